"""DAGER: exact text from the gradients of a transformer."""
