"""Benchmarks of one layer: selection and attention, dense beside sparse in the same process."""
