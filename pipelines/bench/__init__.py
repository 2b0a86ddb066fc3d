"""Benchmarks: `mae bench step`, `data` and `recipes`, and modules to run with `python -m pipelines.bench.NAME`."""
