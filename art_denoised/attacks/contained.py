"""Undoing what attacks leave behind in the process and in the model's layers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


@contextlib.contextmanager
def contained(module: nn.Module, seed: int) -> Iterator[None]:
    """Seed the global generators; restore their states and the layers' modes at the end.

    Meanwhile the module's forward passes draw from a stream of their own.

    Example:
        >>> before = torch.get_rng_state()
        >>> with contained(nn.Identity(), seed=3):
        ...     _ = torch.rand(3), torch.manual_seed(0)
        >>> torch.equal(before, torch.get_rng_state())
        True
    """
    outer, modes = Generators.now(), [(part, part.training) for part in module.modules()]
    inner = [Generators.seeded(seed, 1)]
    attackers: list[Generators] = []

    def enter(*_: Any) -> None:
        attackers.append(Generators.now())
        inner[0].put_back()

    def leave(*_: Any) -> None:
        inner[0] = Generators.now()
        attackers.pop().put_back()

    hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        Generators.seeded(seed, 0).put_back()
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for part, training in modes:
            part.training = training
        outer.put_back()


class Generators(NamedTuple):
    """The states of all global generators.

    Example:
        >>> before = Generators.now()
        >>> _ = torch.rand(1), random.random()
        >>> Generators.now().differing(before)
        ['torch', 'random']
        >>> before.put_back()
        >>> Generators.now().differing(before)
        []
    """

    cpu: Tensor
    cuda: list[Tensor]
    numpy: Any
    python: Any

    @classmethod
    def now(cls) -> Generators:
        """Return the current states."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        state = np.random.get_state()  # noqa: NPY002
        return cls(torch.get_rng_state(), cuda, state, random.getstate())

    @classmethod
    def seeded(cls, seed: int, stream: int) -> Generators:
        """Return states that depend on seed and stream alone; the current ones do not change."""
        before = cls.now()
        number = int(np.random.SeedSequence([seed, stream]).generate_state(1)[0])
        torch.manual_seed(number)
        np.random.seed(number)  # noqa: NPY002
        random.seed(number)
        states = cls.now()
        before.put_back()
        return states

    def differing(self, other: Generators) -> list[str]:
        """Return the libraries whose states differ."""
        cuda = len(self.cuda) == len(other.cuda) and all(map(torch.equal, self.cuda, other.cuda))
        differing = [] if cuda and torch.equal(self.cpu, other.cpu) else ["torch"]
        mine, theirs = (repr((g.numpy[1].tobytes(), *g.numpy[2:])) for g in (self, other))
        differing += ["numpy"] if mine != theirs else []
        return differing + (["random"] if self.python != other.python else [])

    def put_back(self) -> None:
        """Make these the current states."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)
