"""Attacks on any torch module: PGD with EOT, BPDA, and faces onto the libraries of the field."""
