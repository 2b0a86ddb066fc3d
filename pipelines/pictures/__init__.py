"""PNG files for people."""
