"""What a change adds to a network: parameters and multiply-accumulates."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from art_denoised.networks import trial
from art_denoised.networks.trial import Shape


@dataclass(frozen=True, slots=True)
class AddedCost:
    """What a change adds to a model, in parameters and multiply-accumulates (MACs) for one image.

    MACs are those of convolutions and matrix products. Means, medians, windows and activations are
    not counted: they cost memory traffic rather than arithmetic.

    Attributes:
        parameters: Number of parameters added.
        macs: Number of MACs added.
        parameters_before: Number of parameters of the unchanged model.
        macs_before: Number of MACs of the unchanged model.
    """

    parameters: int
    macs: int
    parameters_before: int
    macs_before: int

    def __str__(self) -> str:
        """Return one line to print."""
        parameters, macs = self.parameters / 1e6, self.macs / 1e9
        return (
            f"adds {parameters:.2f} M parameters to {self.parameters_before / 1e6:.2f} M "
            f"(+{self.parameters / self.parameters_before:.1%}) and "
            f"{macs:.2f} GMAC to {self.macs_before / 1e9:.2f} (+{self.macs / self.macs_before:.1%})"
        )


def added_cost(before: nn.Module, after: nn.Module, input_shape: Shape = (3, 64, 64)) -> AddedCost:
    """Return what ``after`` costs beyond ``before``, for one image of this shape.

    Copies of both are run on one image of noise in evaluation mode; on the meta device that is
    free.

    Raises:
        InputError: A model cannot take such an image.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from art_denoised import add_feature_denoising
        >>> with torch.device("meta"):
        ...     model = resnet18()
        >>> print(added_cost(model, add_feature_denoising(model), (3, 224, 224)))
        adds 0.70 M parameters to 11.69 M (+6.0%) and 1.18 GMAC to 1.81 (+65.1%)
    """
    parameters, macs = _cost(before, input_shape)
    more_parameters, more_macs = _cost(after, input_shape)
    return AddedCost(more_parameters - parameters, more_macs - macs, parameters, macs)


def _cost(model: nn.Module, input_shape: Shape) -> tuple[int, int]:
    with FlopCounterMode(display=False) as counter:
        trial.run(copy.deepcopy(model), input_shape)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2
