"""Benchmarks: the commands `mae bench ...`, and modules to run with `python -m pipelines.bench.NAME`."""
