"""Benchmarks of a whole engine: its latency, dense beside sparse."""
