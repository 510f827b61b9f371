"""What gradients by recomputation have in common."""

from __future__ import annotations

import torch

from art_denoised.checks import InputError


def refuse_second_derivatives() -> None:
    """Call it in a backward pass: autograd records it only where it is to be differentiated again.

    Raises:
        InputError: It is; the derivative would be wrong, and nothing would say so.
    """
    if torch.is_grad_enabled():
        raise InputError(
            "gradients of a diffusion classifier or of likelihood maximization cannot be "
            "differentiated again; take them without create_graph=True"
        )
