"""The device's clock, read in stream order, also inside CUDA graphs."""
