"""RULER-style tasks: long prompts with known answers, made without any download."""
