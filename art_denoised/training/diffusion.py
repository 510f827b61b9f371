"""Training of diffusion models, in the preconditioning of EDM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.diffusion.levels import P_MEAN, P_STD
from art_denoised.diffusion.model import DiffusionModel
from art_denoised.diffusion.preconditioning import EDM
from art_denoised.training.config import TrainingConfig
from art_denoised.training.loop import EpochRow, train
from art_denoised.types import Images, Labels


@dataclass(frozen=True, slots=True, kw_only=True)
class EDMLoss:
    """E lambda(sigma) ||D(x + n; sigma, y) - x||^2 (Karras et al. 2022, equation 8 and table 1).

    ln(sigma) is normal, lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, and the
    error is averaged over pixels, in the units of the network.

    Attributes:
        p_mean: Mean of ln(sigma).
        p_std: Standard deviation of ln(sigma).
        drop: Share of images whose class is replaced by the null class, where there is one.

    Raises:
        InputError: A value is out of range.

    Example:
        >>> EDMLoss(p_mean=0.0).p_std
        1.2
    """

    p_mean: float = P_MEAN
    p_std: float = P_STD
    drop: float = 0.1

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        if not 0 <= checks.real("drop", self.drop) < 1:
            raise InputError(f"drop is {self.drop}; give a share in [0, 1)")
        checks.positive("p_std", self.p_std)
        if not math.isfinite(checks.real("p_mean", self.p_mean)):
            raise InputError(f"p_mean is {self.p_mean}; give a finite number")

    def __call__(self, model: nn.Module, x: Images, y: Labels, step: int) -> Tensor:
        """Return the loss of a batch; draws from torch's global random state."""
        assert isinstance(model, DiffusionModel)
        assert isinstance(model.preconditioning, EDM)
        sigma = (self.p_mean + self.p_std * torch.randn(len(x), device=x.device)).exp()
        sigma = sigma / model.scale  # in image units
        x_noisy = x + sigma.reshape(-1, 1, 1, 1) * torch.randn_like(x)
        x_hat = model(x_noisy, sigma, self._labels(model, y)).float()
        level, sigma_data = sigma * model.scale, model.preconditioning.sigma_data
        weight = (level**2 + sigma_data**2) / (level * sigma_data) ** 2
        error = ((x_hat - x) * model.scale).square().mean((1, 2, 3))
        return (weight * error).mean()

    def _labels(self, model: DiffusionModel, y: Labels) -> Labels | None:
        if model.classes is None:
            return None
        checks.labels(y, model.classes)
        drop = self.drop if model.null_class is not None else 0.0
        dropped = torch.rand(len(y), device=y.device) < drop
        return torch.where(dropped, model.null_class or 0, y)


def train_diffusion(
    model: DiffusionModel,
    data: Any,
    loss: EDMLoss | None = None,
    config: TrainingConfig | None = None,
    *,
    run: Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> list[EpochRow]:
    """Train a diffusion model in place, with the loss of EDM; return a row for each epoch.

    Args:
        model: Diffusion model of the family `EDM`.
        data: Images in [0, 1] and labels, as `train` takes them.
        loss: Noise levels and share of dropped classes; by default `EDMLoss()`.
        config: How to train; by default `TrainingConfig()`.
        run: Folder for log and checkpoint; None keeps neither.
        resume: Continue the training in the folder if there is one.
        progress: Show a progress bar.

    Raises:
        InputError: The model is of another family, a label is out of range, or `train` refuses.

    Example:
        >>> class Zero(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gain = torch.nn.Parameter(torch.ones(1))
        ...     def forward(self, x, c_noise, y):
        ...         return self.gain * x
        >>> data = torch.utils.data.TensorDataset(torch.rand(64, 1, 8, 8), torch.zeros(64).long())
        >>> config = TrainingConfig(epochs=2, batch_size=32)
        >>> rows = train_diffusion(
        ...     DiffusionModel(Zero(), EDM()), data, config=config, progress=False
        ... )
        >>> len(rows)
        2
    """
    if not isinstance(model.preconditioning, EDM):
        kind = type(model.preconditioning).__name__
        raise InputError(f"the preconditioning is {kind}; give a model of EDM")
    loss = EDMLoss() if loss is None else loss
    return train(model, data, loss, config, run=run, resume=resume, progress=progress)
