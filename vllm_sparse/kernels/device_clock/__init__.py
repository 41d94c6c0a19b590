"""The device's clock, read in stream order, also inside of CUDA graphs."""
