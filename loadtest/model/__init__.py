"""The bundled model, which retrieves: its batches, its network, its training, and its widening."""
