"""What runs in a worker: a server, built from a plan, that answers work."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from art_denoised.checks import InputError, one_line
from art_denoised.runs.crew import Answered, Failed, Plan, Ready, Report, Server


def dumps(plan: Plan, dump: Callable[[Any], bytes] = pickle.dumps) -> bytes:
    """Return a plan as bytes; refuse a network or an attack that cannot be pickled."""
    try:
        return dump(plan)
    except Exception as error:  # whatever its attributes raise
        raise InputError(
            f"the network cannot be sent to workers ({one_line(error)}); give `build`, a "
            "function of a module that returns it"
        ) from None


@dataclass(frozen=True)
class Held:
    """Returns a network that was sent itself, pickled."""

    network: Any

    def __post_init__(self) -> None:
        modules = self.network.modules() if isinstance(self.network, nn.Module) else ()
        # A pickle leaves out what was compiled: workers would compute another function.
        if any(module._compiled_call_impl is not None for module in modules):
            raise InputError(
                "the network is compiled, which cannot be sent to workers; give `build`, a "
                "function of a module that returns it compiled"
            )

    def __call__(self) -> Any:
        """Return it."""
        return self.network


class Replica:
    """A worker.

    Args:
        plan: A `Plan` as bytes.
        device: Device of its network; None: as it is built.
        threads: Number of threads that it may use.
    """

    def __init__(self, plan: bytes, device: str | None, threads: int) -> None:
        torch.set_num_threads(threads)
        self._first: Report
        try:
            made: Plan = pickle.loads(plan)
            self._server: Server = made(device)
            self._first = Ready(dict[str, Any](self._server.identity))
        except Exception as error:  # whatever the user's function raises
            self._first = _failed(error)

    def hello(self) -> Report:
        """Return the first report."""
        return self._first

    def answer(self, work: Any) -> Report:
        """Return the answer to work."""
        begin = time.perf_counter()
        try:
            answer = self._server.answer(work)
        except Exception as error:  # whatever the network raises
            return _failed(error)
        return Answered(answer, time.perf_counter() - begin)


def _failed(error: Exception) -> Failed:
    kind = "" if isinstance(error, InputError) else f"a worker failed: {type(error).__name__}: "
    return Failed(f"{kind}{one_line(error)}")
