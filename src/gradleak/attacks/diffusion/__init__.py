"""Searches under a denoiser: what pictures look like, beside what was released."""
