"""Learned denoisers: any of diffusers, FFDNet, and one that is trained here."""
