"""The torch faces of denoised smoothing: modules from images in [0, 1] to logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from art_denoised import checks
from art_denoised.smoothing.noise import Gaussian, Stream, StreamKey, fresh_seed
from art_denoised.smoothing.procedures import Stage

if TYPE_CHECKING:
    from art_denoised.types import Denoiser, Images, Logits


class DenoisedClassifier(nn.Module):
    """Classifier behind a denoiser: the base classifier of denoised smoothing.

    ``forward(x_noisy) = classifier(denoiser(x_noisy, sigma))``. It adds no noise itself.

    Source: Salman et al., "Denoised Smoothing" (NeurIPS 2020, arXiv 2003.01908), equation 3.

    Args:
        classifier: Clean images to logits.
        denoiser: Noisy images and sigma to clean images.
        sigma: Noise level that the denoiser is told, image units.

    Raises:
        InputError: sigma is not a positive number.

    Example:
        >>> import torch
        >>> classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> shrink = lambda x, sigma: x / (1 + sigma**2)
        >>> DenoisedClassifier(classifier, shrink, sigma=0.25)(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, classifier: nn.Module, denoiser: Denoiser, *, sigma: float) -> None:
        super().__init__()
        self.classifier = classifier
        self.denoiser = denoiser
        self.sigma = checks.positive("sigma", sigma)

    def forward(self, x_noisy: Images) -> Logits:
        """Return the classifier's logits on the denoised images."""
        logits: Logits = self.classifier(self.denoiser(x_noisy, self.sigma))
        return logits


class SmoothedClassifier(nn.Module):
    """The soft smoothed classifier: log of the mean softmax over Gaussian noise.

    ``forward(x)_c = log (1/m) sum_i softmax(base(x + sigma * eps_i))_c`` with m ``samples``. It is
    differentiable, so gradient attacks run on it unchanged (Salman et al., "Provably Robust
    Deep Learning via Adversarially Trained Smoothed Classifiers", NeurIPS 2019, equation 6).

    With a ``seed`` the m noise tensors are fixed and shared by all images: a deterministic
    function of each image alone, whatever its batch. With ``seed=None`` every image of every
    call gets fresh noise; AutoAttack then calls the defence randomized (use its version 'rand').
    The global random state is neither read nor changed, and noise is added in eval mode too.

    Args:
        base: Images to logits.
        sigma: Standard deviation of the noise in image units.
        samples: Noise samples m an image.
        seed: Fixes the noise; None draws it afresh from the operating system's entropy.
        max_batch: Noisy images that go through ``base`` at once, when there are fewer images than
            that. Under autograd larger batches are recomputed in pieces in the backward pass,
            so memory grows with ``samples`` by the noise alone.

    Raises:
        InputError: A value out of range.

    Example:
        >>> import torch
        >>> base = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> smoothed = SmoothedClassifier(base, sigma=0.25, samples=16, seed=0)
        >>> log_probabilities = smoothed(torch.rand(2, 1, 8, 8))
        >>> bool(torch.allclose(log_probabilities.exp().sum(1), torch.ones(2)))
        True
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        sigma: float,
        samples: int = 32,
        seed: int | None = None,
        max_batch: int = 256,
    ) -> None:
        super().__init__()
        self.base = base
        self.sigma = checks.positive("sigma", sigma)
        self.samples = checks.count("samples", samples)
        self.seed = seed if seed is None else checks.count("seed", seed, 0)
        self.max_batch = checks.count("max_batch", max_batch)

    def forward(self, x: Images) -> Logits:
        """Return log-probabilities of shape (batch, classes), differentiable in ``x``."""
        x = x.to(checks.model_dtype(self.base))
        at_once = max(1, self.max_batch // len(x))
        recompute = torch.is_grad_enabled() and self.samples > at_once
        total: torch.Tensor | None = None
        for noise in self._noise(x, at_once):
            if recompute:
                part = checkpoint(
                    self._log_sum_softmax, x, noise, use_reentrant=False, preserve_rng_state=False
                )
            else:
                part = self._log_sum_softmax(x, noise)
            total = part if total is None else torch.logaddexp(total, part)
        assert total is not None
        return total - math.log(self.samples)

    def _noise(self, x: Images, at_once: int) -> Iterator[torch.Tensor]:
        """Yield noise of shape (s, 1 or batch, channels, height, width), s at most at_once."""
        fixed = self.seed is not None
        seed = self.seed if self.seed is not None else fresh_seed()
        streams = [
            Stream(
                Gaussian(self.sigma),
                StreamKey(seed, i, Stage.SMOOTHING),
                x.shape[1:],
                x.device,
            )
            for i in range(1 if fixed else len(x))
        ]
        for done in range(0, self.samples, at_once):
            size = min(at_once, self.samples - done)
            yield torch.stack([stream.take(size) for stream in streams], dim=1).to(x.dtype)

    def _log_sum_softmax(self, x: Images, noise: torch.Tensor) -> Logits:
        noisy = torch.add(x, noise, alpha=self.sigma)
        logits = self.base(noisy.flatten(0, 1))
        log_probabilities = torch.log_softmax(logits, dim=1).reshape(*noisy.shape[:2], -1)
        return torch.logsumexp(log_probabilities, dim=0)
