"""Whether two models gave the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten


def same(one: Any, other: Any) -> bool:
    """Whether two outputs, tensors or what holds them, are the same to the last bit.

    GPUs need not repeat themselves, so there they are to be close; on meta, of one shape.
    """
    (ours, shape), (theirs, expected) = tree_flatten(one), tree_flatten(other)
    return shape == expected and all(map(_equal, ours, theirs))


def _equal(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return type(one) is type(other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    close = torch.equal if one.device.type == "cpu" else torch.allclose
    return one.is_meta or close(one.nan_to_num(), other.nan_to_num())
