"""Training diffusion models, in the preconditioning of EDM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.diffusion.levels import P_MEAN, P_STD
from art_denoised.diffusion.model import DiffusionModel
from art_denoised.diffusion.preconditioning import EDM
from art_denoised.training.loop import train
from art_denoised.training.plan import Plan
from art_denoised.types import Images, Labels


def train_diffusion(
    model: DiffusionModel,
    data: Any,
    *,
    plan: Plan | None = None,
    p_mean: float = P_MEAN,
    p_std: float = P_STD,
    drop: float = 0.1,
    out: Path | str | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    tensorboard: bool = False,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train a diffusion model in place, with the loss of EDM.

    ``E lambda(sigma) ||D(x + n; sigma, y) - x||^2`` with ln(sigma) normal and lambda(sigma) =
    (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, averaged over pixels (Karras et al. 2022,
    equation 8 and table 1), in the units of the network.

    Args:
        model: Of the family `EDM`.
        data: As for `train`.
        plan: How to train.
        p_mean: Mean of ln(sigma).
        p_std: Standard deviation of ln(sigma).
        drop: Share of images whose class is replaced by the null class, where there is one.
        out: As for `train`.
        resume: As for `train`.
        identity: As for `train`.
        tensorboard: As for `train`.
        progress: As for `train`.

    Returns:
        A row an epoch.

    Raises:
        InputError: A model of another family, a value out of range, or as for `train`.

    Example:
        >>> class Zero(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gain = torch.nn.Parameter(torch.ones(1))
        ...     def forward(self, x, c_noise, y):
        ...         return self.gain * x
        >>> data = torch.utils.data.TensorDataset(torch.rand(64, 1, 8, 8), torch.zeros(64).long())
        >>> model, plan = DiffusionModel(Zero(), EDM()), Plan(epochs=2, batch_size=32)
        >>> rows = train_diffusion(model, data, plan=plan, progress=False)
        >>> len(rows)
        2
    """
    edm = model.preconditioning
    if not isinstance(edm, EDM):
        raise InputError(f"the preconditioning is {type(edm).__name__}; training takes EDM")
    if not 0 <= drop < 1:
        raise InputError(f"drop is {drop}; give a share in [0, 1)")
    checks.positive("p_std", p_std)
    if not math.isfinite(p_mean):
        raise InputError(f"p_mean is {p_mean}; give a finite number")
    drop = drop if model.null_class is not None else 0.0

    def loss(x: Images, y: Labels, step: int) -> Tensor:
        sigma = (p_mean + p_std * torch.randn(len(x), device=x.device)).exp() / model.scale
        x_noisy = x + sigma.reshape(-1, 1, 1, 1) * torch.randn_like(x)
        labels = None
        if model.classes is not None:
            checks.labels(y, model.classes)
            dropped = torch.rand(len(x), device=x.device) < drop
            labels = torch.where(dropped, model.null_class or 0, y)
        x_hat = model(x_noisy, sigma, labels).float()
        level = sigma * model.scale
        weight = (level**2 + edm.sigma_data**2) / (level * edm.sigma_data) ** 2
        error = ((x_hat - x) * model.scale).square().mean((1, 2, 3))
        return (weight * error).mean()

    return train(
        model,
        data,
        loss,
        Plan() if plan is None else plan,
        out=out,
        resume=resume,
        identity={**(identity or {}), "p_mean": p_mean, "p_std": p_std, "drop": drop},
        tensorboard=tensorboard,
        progress=progress,
    )
