"""How often each class occurs in a batch, read off the last layers whose gradient is shared."""
