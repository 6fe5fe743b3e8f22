"""One picture out of the adapter of a ReLU network."""
