"""Selection and attention of single layers, dense beside sparse in the same process."""
