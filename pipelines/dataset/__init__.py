"""A prepared dataset on disk: its manifest and its row groups."""
