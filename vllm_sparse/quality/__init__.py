"""What sparse attention costs in quality on a real checkpoint: `vllm-sparse quality`."""
