"""What is measured, one file a measure."""
