"""Benchmarks: of one layer's kernels, and of a whole engine."""
