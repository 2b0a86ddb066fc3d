"""One image: encoded bytes to pixels and back."""
