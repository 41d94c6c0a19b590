"""Attempts to break a server: mixed traffic beside each request alone, a soak, and bodies that nobody would send.

    python -m loadtest.robustness.differential   each request of random traffic, mixed and alone, and beside stock vLLM
    python -m loadtest.robustness.soak           memory, files and slots under load for a time
    python -m loadtest.robustness.fuzz           random bodies to all routes that compute or configure

Each starts its own server of the bundled model, draws everything from `--seed`, and ends with 1 where it found
something.
"""
