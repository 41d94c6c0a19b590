"""What is found offline, per model, and loaded by a server."""
