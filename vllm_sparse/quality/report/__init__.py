"""What was measured, as a verdict, a table, files and a page."""
