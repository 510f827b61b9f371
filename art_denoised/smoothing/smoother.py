"""The smoother: a base classifier, its noise and its seed, whose votes are certified.

The modules of denoised smoothing come first: a classifier behind a denoiser, and the mean of a
classifier over noise, both from images in [0, 1] to logits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from art_denoised import checks
from art_denoised.autograd import is_traced, uncompiled
from art_denoised.checks import InputError
from art_denoised.models.loading import to_input_size
from art_denoised.smoothing.noise import Gaussian, Stream, StreamKey, find_noise, fresh_seed
from art_denoised.smoothing.queries import ApiVoter, Ledger, QueryOnly
from art_denoised.smoothing.statistics import Certificate, Vote
from art_denoised.smoothing.stops import FIRST_TURN, Anytime, Stage, Stop, Voting
from art_denoised.smoothing.voters import NearTies, NetworkVoter, Passes, Task, Voter, drive

if TYPE_CHECKING:
    from art_denoised.runs.workers import Place
    from art_denoised.types import Classifier, Denoiser, Image, Images, Logits

T = TypeVar("T")
_THOUSAND_VOTES = Voting()


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


class Smoother:
    """A base classifier under noise, whose answers can be certified.

    The smoothed classifier returns the class that the base classifier returns most often on
    ``x + noise`` (Cohen et al., ICML 2019, arXiv 1902.02918). With a denoiser in front of the base
    it is denoised smoothing (Salman et al., NeurIPS 2020, arXiv 2003.01908). Equal seeds give equal
    certificates, whatever images are certified together. Every pass of the network has one shape;
    samples whose leading logits are tied but for rounding may depend on the batch size
    (docs/explanation/certificates.md).

    Args:
        base: Module or function from images to logits, in eval mode and on the device to use; or a
            classifier that can only be queried, such as a `BlackBox`.
        sigma: Standard deviation of the noise in image units.
        denoiser: ``denoiser(x_noisy, sigma) -> x_hat``, in front of the base; None: plain
            randomized smoothing. For a query-only base it runs here, before an image is sent.
        noise: "gaussian"; or "quantised" for 8-bit images, whose certificates also hold in
            floating-point arithmetic (docs/explanation/certificates.md).
        seed: Non-negative seed of the noise.
        batch_size: Number of noisy images in every pass of the network. It may change the votes of
            near ties.
        clip_values: Smallest and largest pixel value; ``sigma`` is in the same units.
        workers: Where draws are answered: `Workers`, `Cluster`, or any function that is given this
            smoother and returns a `Voter`; None: this process. It changes only the speed.

    Attributes:
        network: The module that is sampled: the base, behind the denoiser if there is one; None
            for a query-only base.
        near_ties: The rule of `Passes` that must hold here, as in a worker; None: a trial finds it.
        tried: `Passes` by batch size and shape of an image.

    Raises:
        InputError: A value is out of range, or a part of the model is in training mode.

    Example:
        >>> import torch
        >>> from art_denoised.smoothing.stops import AtRadii, FixedN
        >>> base = lambda x: torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], dim=1)
        >>> smoother, x = Smoother(base, sigma=0.25), torch.full((1, 1, 8, 8), 0.5)
        >>> certificate = smoother.certify(x, FixedN(1000))[0]
        >>> certificate.label, certificate.radius, certificate.drawn
        (0, 0.615815, 1000)
        >>> certificate = smoother.certify(x, AtRadii([0.25], n=1000))[0]
        >>> certificate.proves(0.25), certificate.drawn
        (True, 55)
    """

    def __init__(
        self,
        base: Classifier | QueryOnly,
        *,
        sigma: float,
        denoiser: Denoiser | None = None,
        noise: str = "gaussian",
        seed: int = 0,
        batch_size: int = 64,
        clip_values: tuple[Any, Any] = (0.0, 1.0),
        workers: Place | Callable[[Smoother], Voter] | None = None,
    ) -> None:
        self._noise = find_noise(noise, sigma, clip_values)
        self.base, self.denoiser = base, denoiser
        self.sigma, self.noise = self._noise.sigma, noise
        self.seed = checks.count("seed", seed, 0)
        self.batch_size = checks.count("batch_size", batch_size)
        self.clip_values = clip_values
        self.workers = workers
        self.near_ties: NearTies | None = None
        self.tried: dict[tuple[int, ...], Passes] = {}
        if not (callable(base) or isinstance(base, QueryOnly)) or isinstance(base, type):
            raise InputError(f"base is {base!r}; give a module or a function from images to logits")
        if not (workers is None or callable(workers) or hasattr(workers, "start")):
            raise InputError(f"workers is {workers!r}; give Workers({workers!r}) or a Cluster")
        for part in (base, denoiser):
            checks.eval_mode(part)
        self.network: Classifier | None = None
        self._box: QueryOnly | None = None
        if isinstance(base, QueryOnly):
            if workers is not None:
                raise InputError(
                    "workers compute networks, and the base can only be queried; leave workers "
                    "out, and give the base more workers of its own"
                )
            self._box = base
        elif denoiser is None:
            self.network = base
        else:
            self.network = DenoisedClassifier(base, denoiser, sigma=self.sigma)

    def record(self, shape: Sequence[int]) -> dict[str, Any]:
        """Return what an answer on images of a shape says of its samples, except their votes."""
        return {
            "sigma": self.sigma,
            "seed": self.seed,
            "dtype": str(checks.model_dtype(self.network)).removeprefix("torch."),
            "noise": self.noise,
            "tv": self._noise.tv(int(np.prod(shape))),
        }

    def prepare(self, x: Any) -> Images:
        """Return images as they are sampled: checked, float32, on the device of the base.

        Args:
            x: Array or tensor (batch, channels, height, width) within ``clip_values``.

        Raises:
            InputError: Something else, or, with quantised noise, images of other than 8 bits.
        """
        x = checks.images(x, clip_values=self.clip_values).float()
        self._noise.check(x)
        return x.to(checks.model_device(self.network))

    def check(self, x: Images) -> int:
        """Try the first image before the work starts, and return the number of classes.

        A network is given a batch, a pair and the image alone; a query-only base is not asked.

        Args:
            x: Images (batch, channels, height, width) as `prepare` returns them.

        Raises:
            InputError: The network or the denoiser cannot be used (`art_denoised.checks`).
        """
        x = x[:1]
        if self.network is not None:
            batch = x.to(checks.model_dtype(self.network)).expand(self.batch_size, *x.shape[1:])
            return checks.classifier(self.network, batch)
        assert self._box is not None
        if self.denoiser is not None:
            checks.eval_mode(self.denoiser)
            checks.denoises(self.denoiser, checks.placed(x, self.denoiser), self.sigma)
        return len(self._box.classes)

    def passes(self, x: Image) -> Passes:
        """Return how noisy copies of an image are passed to the network; a shape is tried once."""
        assert self.network is not None  # a query-only base has no passes
        key = (self.batch_size, *x.shape)
        if key not in self.tried:
            self.tried[key] = Passes.tried(self.network, x, self.batch_size, self.near_ties)
        return self.tried[key]

    def voter(self, ledger: Ledger | None = None) -> Voter:
        """Return a voter that samples the base; the caller closes it.

        The ledger keeps the answers of a query-only base; None: they are kept in memory.
        """
        if callable(self.workers):
            return self.workers(self)
        if self.workers is not None:
            from art_denoised.smoothing.dispatch import dispatched

            return dispatched(self, self.workers)
        streams = self._noise, self.seed
        if self.network is not None:
            size = self.batch_size
            return NetworkVoter(self.network, *streams, passes=self.passes, batch_size=size)
        assert self._box is not None
        return ApiVoter(self._box, *streams, denoiser=self.denoiser, ledger=ledger)

    def certify(
        self,
        x: Any,
        stop: Stop[Certificate],
        *,
        labels: Any = None,
        first_index: int = 0,
        earlier: Sequence[Certificate] | None = None,
    ) -> list[Certificate]:
        """Certify images in memory.

        Args:
            x: Images (batch, channels, height, width) within ``clip_values``.
            stop: `FixedN`, `AtRadii` or `Anytime`.
            labels: True classes (batch,), by which some rules skip images that are wrong anyway;
                they never enter a bound. None: no image is skipped.
            first_index: Index of the first image in its data set. Images of one run need different
                noise, which their index selects.
            earlier: Certificates (batch,) of the same images, indices and settings to go on from;
                only with `Anytime`. That images, indices and the batch size are the same cannot be
                checked.

        Returns:
            A certificate for each image.

        Raises:
            InputError: Images, labels or model cannot be used, ``earlier`` was made with other
                settings, or the time did not suffice to select a class and sample once more.

        Example:
            >>> from art_denoised.smoothing.stops import Anytime
            >>> import torch
            >>> base = lambda x: torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], dim=1)
            >>> smoother, x = Smoother(base, sigma=0.25), torch.full((1, 1, 8, 8), 0.5)
            >>> first = smoother.certify(x, Anytime(200))
            >>> second = smoother.certify(x, Anytime(2000), earlier=first)
            >>> first[0].radius < second[0].radius, second[0].n
            (True, 2000)
        """
        if isinstance(stop, Voting) or not hasattr(stop, "procedure"):
            raise InputError(f"stop is {stop!r}; give FixedN, AtRadii or Anytime")
        if earlier is not None and not (
            isinstance(earlier, Sequence) and all(isinstance(one, Certificate) for one in earlier)
        ):
            raise InputError(f"earlier is {earlier!r}; give the certificates of an earlier call")
        images, first_index = self.prepare(x), checks.count("first_index", first_index, 0)
        classes = self.check(images)
        true = [None] * len(images) if labels is None else checks.labels(labels, classes).tolist()
        held = {} if earlier is None else dict(enumerate(earlier))
        checks.one_each(images, true)
        if earlier is not None:
            checks.one_each(images, held, "earlier certificates")
        for index, answer in self._answers(images, stop, true, first_index, held):
            held[index - first_index] = answer
        missing = [i for i in range(len(images)) if i not in held]
        if missing:
            raise InputError(
                f"there was no time to select a class of image {first_index + missing[0]} and "
                "sample once more; give more seconds or a smaller n0"
            )
        return [held[i] for i in range(len(images))]

    def vote(
        self, x: Any, stop: Stop[Vote] = _THOUSAND_VOTES, *, first_index: int = 0
    ) -> list[Vote]:
        """Predict images in memory by majority vote, abstaining where it is too close.

        Args:
            x: Images (batch, channels, height, width) within ``clip_values``.
            stop: `Voting`.
            first_index: Index of the first image in its data set.

        Raises:
            InputError: Images or model cannot be used.

        Example:
            >>> import torch
            >>> base = lambda x: torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], dim=1)
            >>> Smoother(base, sigma=0.25).vote(torch.full((1, 1, 8, 8), 0.5))[0].label
            0
        """
        if not isinstance(stop, Voting):
            raise InputError(f"stop is {stop!r}; give Voting")
        images, first_index = self.prepare(x), checks.count("first_index", first_index, 0)
        self.check(images)
        answers = dict(self._answers(images, stop, [None] * len(images), first_index, {}))
        return [answers[first_index + i] for i in range(len(images))]

    def _answers(
        self,
        images: Images,
        stop: Stop[T],
        labels: Sequence[int | None],
        first_index: int,
        held: Mapping[int, Certificate],
    ) -> Iterator[tuple[int, T]]:
        """Yield (index, answer); with a time limit once for each turn of an image."""
        if self.network is not None:
            self.passes(images[0])  # before workers begin, which must agree
        record = self.record(images.shape[1:])
        seconds = stop.seconds if isinstance(stop, Anytime) else None
        end = None if seconds is None else time.monotonic() + seconds
        with closing(self.voter()) as voter:
            for turn in _turns(stop):
                procedures = [
                    turn.procedure(label, record, held.get(i)) for i, label in enumerate(labels)
                ]
                tasks = (
                    Task(first_index + i, x, procedure, turn.looks)
                    for i, (x, procedure) in enumerate(zip(images, procedures, strict=True))
                )
                yield from drive(tasks, voter, until=end)
                if end is not None and time.monotonic() >= end:
                    return


def _turns(stop: Stop[T]) -> Iterator[Stop[T]]:
    """Yield the rule; of one with a time limit doubled sample counts, so that no image waits."""
    if isinstance(stop, Anytime) and stop.seconds is not None:
        n = FIRST_TURN
        while n < stop.n:
            yield stop.upto(n)
            n *= 2
    yield stop
