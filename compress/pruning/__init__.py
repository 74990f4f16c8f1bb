"""Structural pruning: what can be cut out of a denoiser, what that costs its pictures, and what is cut."""
