"""Trial runs: a model on images of noise, with its draws fixed, and whether two models agree."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from art_denoised.checks import InputError

Shape: TypeAlias = tuple[int, ...]
_QUANTISED = ("torch.ao.nn.", "torch.nn.quantized", "torch.nn.intrinsic", "torch.nn.qat")


def refuse_unreadable(model: nn.Module) -> None:
    """Check that a model is made of plain Python modules, which surgery can copy and change.

    Raises:
        InputError: It is scripted, compiled, fused or quantised, or has a forward on an instance.
    """
    for name, module in model.named_modules():
        home, kind = type(module).__module__, type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            problem = "is scripted; give the model that was scripted"
        elif home.startswith("torch._dynamo"):
            problem = "is compiled; change the model first, then compile it"
        elif home.startswith(_QUANTISED) and kind != "FloatFunctional":
            problem = "is quantised or fused; change the float model first"
        elif "forward" in vars(module):  # a copy of it would still call the modules of the original
            problem = "has a forward set on the instance; define it in the class"
        else:
            continue
        raise InputError(f"{name or 'the model'} ({kind}) {problem}")


@torch.no_grad()
def run(model: nn.Module, input_shape: Shape, *, images: int = 1, training: bool = False) -> Any:
    """Return what a model makes of noise. It changes the mode and statistics: give a copy.

    Args:
        model: Any network; the noise has the device and dtype of its first floating-point tensor.
        input_shape: Shape of one image, usually (channels, height, width).
        images: Number of images in the batch. Batch norm needs two in training mode.
        training: Mode in which it runs.

    Raises:
        InputError: The model fails.
    """
    tensors = chain(model.parameters(), model.buffers())
    first = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    x = torch.rand(images, *input_shape, generator=torch.Generator().manual_seed(0))
    try:
        with _fixed_draws(first.device):
            return model.train(training)(x.to(first.device, first.dtype))
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} failed on an image of shape {tuple(input_shape)} in "
            f"{'training' if training else 'evaluation'} mode ({reason(error)}); "
            "give the input_shape that it takes"
        ) from error


def reason(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


@contextmanager
def _fixed_draws(device: torch.device) -> Iterator[None]:
    """Seed the global random states of torch, Python and numpy, and put them back afterwards."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(0)
        for cuda in devices:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


def same(one: Any, other: Any) -> bool:
    """Whether two outputs, tensors or containers of tensors, are equal to the last bit.

    GPU kernels need not repeat themselves, so there the values must be close; on the meta device
    only the shapes are compared.
    """
    (ours, structure), (theirs, expected) = tree_flatten(one), tree_flatten(other)
    return structure == expected and all(map(_equal, ours, theirs))


def _equal(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return type(one) is type(other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    close = torch.equal if one.device.type == "cpu" else torch.allclose
    return one.is_meta or close(one.nan_to_num(), other.nan_to_num())


def first_difference(one: nn.Module, other: nn.Module, *how: Any, **options: Any) -> str:
    """Return the name of the first module that makes something else of the same input.

    Args:
        one: A model that runs.
        other: A model that runs, with modules of the same names.
        *how: Further arguments of `run`.
        **options: Further options of `run`.
    """
    ours, theirs = (_recorded(model, *how, **options) for model in (one, other))
    for call, (inputs, output) in ours.items():
        others = theirs.get(call)
        if others and same(inputs, others[0]) and not same(output, others[1]):
            return call[0]
    return ""


def _recorded(model: nn.Module, *how: Any, **options: Any) -> dict[tuple[str, int], Any]:
    """Return inputs and output of each call, by the name of the module and the call's number."""
    model, calls = copy.deepcopy(model), Counter[str]()
    inputs: dict[str, Any] = {}
    record: dict[tuple[str, int], Any] = {}
    cloned = partial(tree_map_only, Tensor, torch.clone)  # code that follows may change them

    def enter(name: str, module: nn.Module, *arguments: Any) -> None:
        inputs[name] = cloned(arguments)

    def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
        record[name, calls[name]] = inputs[name], cloned(output)
        calls[name] += 1

    for name, module in model.named_modules():
        module.register_forward_pre_hook(partial(enter, name), with_kwargs=True)
        module.register_forward_hook(partial(leave, name))
    run(model, *how, **options)
    return record
