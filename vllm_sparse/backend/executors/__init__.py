"""Executors: one stock kernel of the platform each."""
