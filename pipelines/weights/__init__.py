"""Weights in and out: read those of other projects into the registry, and write versions for other projects."""
