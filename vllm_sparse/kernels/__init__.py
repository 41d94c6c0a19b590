"""Selection operations: one folder each, `reference.py` is the specification."""
