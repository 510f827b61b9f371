"""A chain of steps, and the exact gradient through it in the memory of one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from art_denoised import checks

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Chain:
    """Steps from one state to the next: ``step`` maps (number, start, state) to a state.

    Each step sees the ``start`` of the chain. It must give the same state when it is called again.
    """

    name: str
    steps: int
    step: Callable[[int, Tensor, State], State]

    @torch.no_grad()
    def run(self, start: Tensor, *state: Tensor) -> State:
        """Return the last state, without a gradient."""
        for number in range(self.steps):
            state = self.step(number, start, state)
        return state

    def differentiable(self, start: Tensor, *state: Tensor) -> State:
        """Return the last state, with the exact gradient in the start and in the first state.

        The backward pass recomputes one step after another from stored states, so that it holds the
        graph of one step, and a state of each.
        """
        last: State = _Recomputed.apply(self, start, *state)
        return last


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, start: Tensor, *state: Tensor) -> State:
        ctx.set_materialize_grads(False)  # as a rule one tensor of the last state is used
        states = []
        for number in range(chain.steps):
            states.append(state)
            state = chain.step(number, start, state)
        ctx.chain, ctx.width = chain, len(state)
        ctx.save_for_backward(start, *(tensor for held in states for tensor in held))
        return tuple(tensor.detach() for tensor in state)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        checks.first_derivative(ctx.chain.name)
        start, *saved = ctx.saved_tensors
        total = torch.zeros_like(start)
        flow: Sequence[Tensor | None] = gradients
        for number in reversed(range(ctx.chain.steps)):
            held = saved[ctx.width * number : ctx.width * (number + 1)]
            with torch.enable_grad():
                inputs = [tensor.detach().requires_grad_() for tensor in (start, *held)]
                after = ctx.chain.step(number, inputs[0], tuple(inputs[1:]))
                pairs = zip(after, flow, strict=True)
                live = [(t, g) for t, g in pairs if g is not None and t.requires_grad]
                if not live:
                    return None, total, *(None,) * ctx.width
                ends, seeds = zip(*live, strict=True)
                of_start, *flow = torch.autograd.grad(ends, inputs, seeds, allow_unused=True)
            total += 0 if of_start is None else of_start
        return None, total, *flow
