"""A prepared dataset becomes micro-batches on every rank."""
