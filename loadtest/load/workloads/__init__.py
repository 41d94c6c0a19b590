"""What is sent: prompts of every kind, their lengths, and tokens counted as the served model counts them."""
