"""Denoisers: networks that implement ``denoiser(x_noisy, sigma) -> x_hat``, and checkpoints."""
