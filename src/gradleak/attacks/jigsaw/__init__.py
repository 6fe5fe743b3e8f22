"""R-GAP: closed-form recursion through a network."""
