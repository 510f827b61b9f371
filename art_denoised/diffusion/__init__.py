"""Diffusion models of every family in one form: D(x_noisy, sigma, y) -> E[x | x_noisy, y]."""
