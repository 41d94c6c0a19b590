"""Latency of a whole engine, dense beside sparse."""
