"""Text: eight tasks on real sentences, and the small language models that read them."""
