"""What private data are."""
