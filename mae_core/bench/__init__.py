"""Benchmark of a training step (forward, backward, optimizer) against the plain computation and transformers.

Needs only the library's dependencies, so that `python -m mae_core.bench` runs on a GPU host without Ray.
"""
