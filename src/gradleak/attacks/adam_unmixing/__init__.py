"""Several pictures behind an adapter that Adam has trained."""
