"""Tasks with known answers, made of real text. "RULER-style": the kinds are named after RULER's, the text is not."""
