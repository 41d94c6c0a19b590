"""Synthetic text: words, documents with needles in them, and the bundled model's tokenizer."""
