"""`mixers demo`: a character-level language model that learns real text, here and now."""
