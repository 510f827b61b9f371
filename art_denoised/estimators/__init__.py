"""Faces for the Adversarial Robustness Toolbox: the only folder that imports art."""
