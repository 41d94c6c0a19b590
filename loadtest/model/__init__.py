"""The small retrieval model: its tokenizer and its training."""
