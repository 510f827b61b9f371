"""A classifier behind a purifier, which may vote over several purified copies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from art_denoised import checks
from art_denoised.autograd import straight_through
from art_denoised.checks import InputError
from art_denoised.diffusion.cost import Part, Priced, flop, on
from art_denoised.models.cost import saved, weights
from art_denoised.models.loading import to_input_size
from art_denoised.types import Seeded

if TYPE_CHECKING:
    from art_denoised.types import Classifier, Images, Logits

Vote = Literal["mean", "majority"]


class PurifiedClassifier(nn.Module):
    """Classify purified images, and vote over several copies of each.

    The output is the log of class probabilities. "mean": log of the mean softmax of the copies.
    "majority": log of the share of copies that vote for a class, where the mean softmax counts as
    one more copy and decides ties. A vote has no gradient, so the gradient is that of the mean.

    With a seed each copy has noise of its own, the first that of the seed itself. Images of another
    size than the ``input_size`` of the classifier are resized, as in `DenoisedClassifier`.

    Args:
        purifier: Module or function from images to images, such as `Purification` or
            `LikelihoodMaximization`.
        classifier: Module or function from images to logits.
        copies: Number of purified copies of each image.
        vote: "mean" or "majority".

    Raises:
        InputError: A value is out of range, or a majority of one copy is asked for.

    Example:
        >>> from art_denoised.demo import digits_classifier, digits_diffusion
        >>> from art_denoised.purification import Purification
        >>> purify = Purification(digits_diffusion(), sigma=0.2, steps=4, seed=0)
        >>> model = PurifiedClassifier(purify, digits_classifier(), copies=2)
        >>> model(torch.rand(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(
        self,
        purifier: Callable[[Images], Images],
        classifier: Classifier,
        *,
        copies: int = 1,
        vote: Vote = "mean",
    ) -> None:
        super().__init__()
        self.purifier, self.classifier = purifier, classifier
        self.copies = checks.count("copies", copies)
        self.vote: Vote = checks.choice("vote", vote, get_args(Vote))  # type: ignore[assignment]
        if copies > 1 and not isinstance(purifier, nn.Module):
            raise InputError(
                f"{copies} copies are wanted of a function, whose noise cannot be told apart; give "
                "a module, such as Purification"
            )
        if vote == "majority" and copies == 1:
            raise InputError("one copy has no majority; give more copies, or vote 'mean'")
        self.training = checks.in_training(purifier, classifier)

    def forward(self, x: Images) -> Logits:
        """Return log-probabilities of shape (batch, classes), differentiable in ``x``."""
        answers = torch.stack([self._answer(x, copy) for copy in range(self.copies)])
        answers = answers.to(torch.promote_types(answers.dtype, torch.float32))
        mean = answers.logsumexp(0) - math.log(self.copies)
        if self.vote == "mean":
            return mean
        votes = F.one_hot(answers.argmax(2), answers.shape[2]).sum(0)
        # In logarithms, where a class without a vote keeps a finite value.
        both = torch.logaddexp(votes.to(mean).log(), mean.detach())
        return straight_through(both - math.log(self.copies + 1), mean)

    @torch.no_grad()
    def purify(self, x: Images) -> Images:
        """Return the first purified copy, without a gradient."""
        return self.purifier(x)

    def nfe(self, images: int = 1) -> int:
        """Return the number of evaluations of the diffusion model for some images."""
        purifier: Any = self.purifier
        return self.copies * int(purifier.nfe(images))

    def part(self, x: Images, images: int, batch: int) -> Part:
        """Return the cost on so many images; ``x`` is one of them (`preview_cost`)."""
        if not isinstance(self.purifier, Priced) or not isinstance(self.classifier, nn.Module):
            raise InputError(
                f"the cost of a {type(self.purifier).__name__} in front of a "
                f"{type(self.classifier).__name__} is not known; give Purification and a module"
            )
        number = images * self.copies
        first = self.purifier.part(on(self, x), number, batch)
        shown = on(self.classifier, to_input_size(self.classifier, x))
        forward, both = flop(self.classifier, shown)
        kept = saved(lambda: self.classifier(shown.detach().requires_grad_()), self.classifier)
        memory = weights(self.classifier) + kept * batch * self.copies
        second = Part(0, forward * number, both * number, memory)
        whole = first.then(second)
        return Part(whole.nfe, whole.flop, whole.gradient_flop, first.memory + memory)

    def _answer(self, x: Images, copy: int) -> Logits:
        with self._noise_of(copy):
            purified = self.purifier(x)
        logits = checks.unwrapped(self.classifier(to_input_size(self.classifier, purified)))
        return torch.log_softmax(logits, 1)

    @contextmanager
    def _noise_of(self, copy: int) -> Iterator[None]:
        """Give a copy noise of its own where the noise of the purifier is fixed."""
        parts = self.purifier.modules() if isinstance(self.purifier, nn.Module) else ()
        before = [(part, part.seed) for part in parts if isinstance(part, Seeded)]
        try:
            for part, seed in before if copy else ():
                if seed is not None:
                    part.seed = _seed_of(seed, copy)
            yield
        finally:
            for part, seed in before:
                part.seed = seed


def _seed_of(seed: int, copy: int) -> int:
    sequence = np.random.SeedSequence(seed, spawn_key=(3, copy))  # no stream of LevelNoise is 3
    return int(sequence.generate_state(1, np.uint64).item()) >> 1
