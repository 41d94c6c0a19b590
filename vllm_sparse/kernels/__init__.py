"""Selection operations, one folder each, in which `reference.py` is the specification of the other files."""
