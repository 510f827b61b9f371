"""Robust diffusion classifier: likelihood maximization, then Bayes' rule, by a diffusion model."""
