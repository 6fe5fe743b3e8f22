"""Generators that are trained on public pairs (GIT, LTI)."""
