"""One picture out of a vision transformer."""
