"""One step as plain data: which rows it has, what they asked for and what each runs."""
