"""Robustness built into a network: denoising of features and smooth activations."""
