"""Training data out of trained weights."""
