"""Randomized and denoised smoothing as plain torch: statistics, sampling, certificates, modules."""
