"""What a pass of a network costs: floating-point operations and memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from art_denoised import checks

if TYPE_CHECKING:
    from art_denoised.types import Classifier, Images

_TEMPORARIES = 1.5  # memory of a gradient over what autograd keeps for it: 1.35 to 1.5 measured


@dataclass(frozen=True, slots=True)
class PassCost:
    """The cost of a pass.

    Attributes:
        flop: Floating-point operations for an image, two for a multiplication and addition;
            convolutions and matrix products are counted.
        weights: Bytes of weights and buffers.
        held: Estimate of the bytes that an image of a batch adds at the peak.
    """

    flop: float
    weights: int
    held: int

    def memory(self, batch: int) -> int:
        """Return an estimate of the bytes that a pass of a batch holds at once."""
        return self.weights + batch * self.held


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations by torch's own table; its FlopCounterMode fails on second derivatives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flop = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flop += count(*args, **kwargs, out_val=result)
        return result


class _Meter(FlopCounter):  # type: ignore[no-untyped-call]
    """Counts operations, and the bytes of results that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._users: dict[int, int] = {}  # tensors on each storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, count it, and note its results until they are freed."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._hold(storage.data_ptr(), storage.nbytes())
                weakref.finalize(tensor, self._free, storage.data_ptr(), storage.nbytes())
        return result

    def _hold(self, place: int, size: int) -> None:
        self._users[place] = self._users.get(place, 0) + 1
        if self._users[place] == 1:
            self._live += size
            self.peak = max(self.peak, self._live)

    def _free(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            self._live -= size


@torch.no_grad()
def forward_cost(network: Classifier, x: Images) -> PassCost:
    """Return the cost of a forward pass without gradients, found by one of the first image.

    Example:
        >>> cost = forward_cost(nn.Conv2d(1, 8, 3, padding=1), torch.zeros(1, 1, 8, 8))
        >>> cost.flop == 2 * 8 * 9 * 64, cost.weights == 4 * (72 + 8), cost.held
        (True, True, 2304)
    """
    x = x[:1].to(checks.model_device(network), checks.model_dtype(network)).clone()
    with _Meter() as meter:
        network(x)
    own = weights(network) if isinstance(network, nn.Module) else 0
    return PassCost(meter.flop, own, meter.peak + x.untyped_storage().nbytes())


def gradient_cost(network: nn.Module, x: Images) -> PassCost:
    """Return the cost of a forward pass and its gradient in the image, found by one of the first.

    Example:
        >>> x = torch.zeros(1, 1, 8, 8)
        >>> network = nn.Conv2d(1, 8, 3, padding=1)
        >>> gradient_cost(network, x).flop == 2 * forward_cost(network, x).flop
        True
    """
    x = x[:1].to(checks.model_device(network), checks.model_dtype(network))
    with torch.enable_grad(), FlopCounter() as counter:
        leaf = x.detach().clone().requires_grad_()
        torch.autograd.grad(network(leaf).float().sum(), leaf)
    held = saved(lambda: network(x.detach().clone().requires_grad_()), network)
    return PassCost(counter.flop, weights(network), held)


def saved(function: Callable[[], object], module: nn.Module) -> int:
    """Return the bytes that a call and its gradient hold, weights aside."""
    known = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, because a freed address is used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    del result
    return int(_TEMPORARIES * sum(storage.nbytes() for storage in kept.values()))


def weights(module: nn.Module) -> int:
    """Return the bytes of weights and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
