"""The torch faces of denoised smoothing: modules from images in [0, 1] to logits."""

from __future__ import annotations

import math
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.models.classifiers import to_input_size
from art_denoised.smoothing.noise import Gaussian, Stream, StreamKey, fresh_seed
from art_denoised.smoothing.stops import Stage
from art_denoised.uncompiled import is_traced, uncompiled

if TYPE_CHECKING:
    from art_denoised.types import Classifier, Denoiser, Images, Logits


class DenoisedClassifier(nn.Module):
    """Classifier behind a denoiser: the base classifier of denoised smoothing.

    ``forward(x_noisy) = classifier(denoiser(x_noisy, sigma))``. It adds no noise itself. It is in
    training mode if a part of it is. Denoised images of another size than the ``input_size`` of the
    classifier, as `load_classifier` gives it, are resized to it (bicubic, antialiased), as Carlini
    et al. do (ICLR 2023, arXiv 2206.10550) for a diffusion model of its own resolution.

    Source: Salman et al., "Denoised Smoothing" (NeurIPS 2020, arXiv 2003.01908), equation 3.

    Args:
        classifier: Module or function from clean images to logits.
        denoiser: Function from noisy images and sigma to clean images.
        sigma: Noise level that the denoiser is told, in image units.

    Raises:
        InputError: sigma is not a positive number.

    Example:
        >>> import torch
        >>> classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> shrink = lambda x, sigma: x / (1 + sigma**2)
        >>> DenoisedClassifier(classifier, shrink, sigma=0.25)(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, classifier: Classifier, denoiser: Denoiser, *, sigma: float) -> None:
        super().__init__()
        self.classifier = classifier
        self.denoiser = denoiser
        self.sigma = checks.positive("sigma", sigma)
        self.training = checks.in_training(classifier, denoiser)

    def forward(self, x_noisy: Images) -> Logits:
        """Return the classifier's logits on the denoised images."""
        x = to_input_size(self.classifier, self.purify(x_noisy))
        logits: Logits = checks.unwrapped(self.classifier(x))
        return logits

    def purify(self, x_noisy: Images) -> Images:
        """Return the denoised images, which the classifier sees."""
        return self.denoiser(checks.batch(x_noisy), self.sigma)


class SmoothedClassifier(nn.Module):
    """The soft smoothed classifier: log of the mean softmax over Gaussian noise.

    ``forward(x)_c = log (1/m) sum_i softmax(base(x + sigma * eps_i))_c`` with m ``samples``. It is
    differentiable, so gradient attacks run on it unchanged (Salman et al., "Provably Robust
    Deep Learning via Adversarially Trained Smoothed Classifiers", NeurIPS 2019, equation 6).

    With a ``seed`` the m noise tensors are fixed and shared by all images: a deterministic
    function of each image alone, whatever its batch. With ``seed=None`` every image of every
    call gets fresh noise; AutoAttack then calls the defence randomized (use its version 'rand').
    The global random state is neither read nor changed, and noise is added in eval mode, too.

    Args:
        base: Module from images to logits.
        sigma: Standard deviation of the noise in image units.
        samples: Number m of noise samples for an image.
        seed: Seed of the noise; None draws it afresh from the operating system's entropy.
        max_batch: Number of noisy images that go through ``base`` at once, when there are fewer
            images than that. Under autograd larger batches are recomputed in pieces in the
            backward pass, so memory grows with ``samples`` by the noise alone.

    Raises:
        InputError: A value is out of range. From `forward`: the module is traced or exported
            without a seed, which would freeze noise that should be fresh.

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
        self.seed = checks.seed(seed)
        self.max_batch = checks.count("max_batch", max_batch)
        self.training = checks.in_training(base)

    def forward(self, x: Images) -> Logits:
        """Return log-probabilities of shape (batch, classes), differentiable in ``x``."""
        if self.seed is None and is_traced():
            raise InputError("seed is None, and tracing would freeze the noise; set a seed")
        # As in a certificate, noise is added in single precision, and the sum is rounded.
        precision = torch.promote_types(checks.model_dtype(self.base), torch.float32)
        x = checks.batch(x).to(precision)
        at_once = max(1, self.max_batch // max(1, len(x)))
        recompute = torch.is_grad_enabled() and self.samples > at_once
        streams = self._streams(x)
        parts = []
        for done in range(0, self.samples, at_once):
            noise = _take(streams, min(at_once, self.samples - done), x.dtype)
            if recompute:
                part = checkpoint(self._log_sum_softmax, x, noise, use_reentrant=False)
            else:
                part = self._log_sum_softmax(x, noise)
            parts.append(part)
        return reduce(torch.logaddexp, parts) - math.log(self.samples)

    @uncompiled
    def _streams(self, x: Images) -> list[Stream]:
        """Return one stream of noise for all images, or one for each where it is fresh."""
        seed = fresh_seed() if self.seed is None else self.seed
        return [
            Stream(Gaussian(self.sigma), StreamKey(seed, i, Stage.SMOOTHING), x.shape[1:], x.device)
            for i in range(len(x) or 1 if self.seed is None else 1)
        ]

    def _log_sum_softmax(self, x: Images, noise: torch.Tensor) -> Logits:
        noisy = torch.add(x, noise, alpha=self.sigma)
        noisy_batch = noisy.flatten(0, 1).to(checks.model_dtype(self.base))
        logits = checks.unwrapped(self.base(noisy_batch)).to(x.dtype)
        log_probabilities = torch.log_softmax(logits, dim=1)
        shape = (*noisy.shape[:2], logits.shape[1])
        return torch.logsumexp(log_probabilities.reshape(shape), dim=0)


@uncompiled
def _take(streams: list[Stream], n: int, dtype: torch.dtype) -> torch.Tensor:
    """Return noise of shape (n, 1 or batch, channels, height, width): it comes from numpy."""
    return torch.stack([stream.take(n) for stream in streams], dim=1).to(dtype)
