"""Codecs for one image: encoded bytes to pixels and back."""
