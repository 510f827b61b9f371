"""Trial runs: what a copy of a model does with images of noise, and whether two do the same.

The graph of a module's own forward, by torch.fx, stands at the end; modules that it calls stay
calls.
"""

from __future__ import annotations

import copy
import inspect
import operator
import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from art_denoised import checks
from art_denoised.checks import InputError, first_line

Shape: TypeAlias = tuple[int, ...]
_SEED = 0  # of images and draws
_QUANTISED = ("torch.ao.nn.", "torch.nn.quantized", "torch.nn.intrinsic", "torch.nn.qat")
_RELU = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)
_BATCH_NORM = torch.ops.aten.native_batch_norm.default
_HARDTANH = (torch.ops.aten.hardtanh.default, torch.ops.aten.hardtanh_.default)
_ADDITIONS = (operator.add, torch.add, "add", "add_")


def refuse_unreadable(model: nn.Module) -> None:
    """Check that a model is made of plain Python modules, which surgery can copy and change."""
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}; give an nn.Module")
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


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a model, or refuse one that torch cannot copy."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise InputError(
            f"the {type(model).__name__} cannot be copied ({why}); where weight_norm or "
            "spectral_norm made its weights, use those of torch.nn.utils.parametrizations"
        ) from error


class TrialError(InputError):
    """A model failed: ``module`` is the name of the module that was running, ``why`` the reason."""

    def __init__(self, message: str, module: str, why: str) -> None:
        super().__init__(message)
        self.module, self.why = module, why


@dataclass(slots=True)
class Call:
    """A call of a module, named by the module and the number of its call."""

    name: str
    number: int
    caller: Call | None
    args: Any
    kwargs: Any
    output: Any = None


class Trial(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """One forward pass of a copy of a model on images of noise, seen from hooks on every module.

    With ``values`` inputs and outputs of calls are kept as they were at the time; otherwise code
    that follows may have changed them.

    Attributes:
        result: What the model returned.
        calls: Calls in the order in which they returned; the last is that of the model.
        rectifiers: Number of rectifiers that were dispatched, by the innermost module running.

    Raises:
        TrialError: The model fails.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: Shape,
        *,
        images: int = 1,
        training: bool = False,
        values: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.rectifiers: Counter[str] = Counter()
        self._running: list[Call] = []
        self._number: Counter[str] = Counter()
        self._kept: Callable[[Any], Any] = (
            partial(tree_map_only, Tensor, torch.clone) if values else lambda inputs: inputs
        )
        input_shape = checks.shape("input_shape", input_shape)
        model = copied(model).train(training)
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
            module.register_forward_hook(self._leave)
        try:
            with torch.no_grad(), self:
                self.result = _run(model, input_shape, images)
        except Exception as error:
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise TrialError(
                f"{type(model).__name__} failed on an image of shape {tuple(input_shape)} in "
                f"{'training' if training else 'evaluation'} mode ({why}); "
                "give the input_shape that it takes",
                self._running[-1].name if self._running else "",
                why,
            ) from error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; count it if it is a rectifier."""
        # ReLU6 arrives as hardtanh(x, 0, 6).
        if func in _RELU or (func in _HARDTANH and tuple(args[1:]) == (0, 6)):
            self.rectifiers[self._running[-1].name] += 1
        if func is _BATCH_NORM and args[0].is_meta:  # torch would go through 20 ms of Python
            y = torch.empty_like(args[0])
            return y, y, y  # nothing reads the statistics
        return func(*args, **(kwargs or {}))

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        caller = self._running[-1] if self._running else None
        self._running.append(Call(name, self._number[name], caller, *self._kept((args, kwargs))))
        self._number[name] += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self._running.pop()
        call.output = self._kept(output)
        self.calls.append(call)


def _run(model: nn.Module, input_shape: Shape, images: int) -> Any:
    """Return what a model makes of noise, with the draws of torch, Python and numpy fixed."""
    tensors = chain(model.parameters(), model.buffers())
    first = next((t for t in tensors if t.is_floating_point()), torch.empty(()))
    x = torch.rand(images, *input_shape, generator=torch.Generator().manual_seed(_SEED))
    devices = [first.device] if first.is_cuda else []
    with kept_states(), torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(_SEED)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(_SEED)
        random.seed(_SEED)
        np.random.seed(_SEED)  # noqa: NPY002
        return model(x.to(first.device, first.dtype))


@contextmanager
def kept_states() -> Iterator[tuple[Any, Any]]:
    """Yield the global random states of Python and numpy, and put them back afterwards."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield states
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def same(one: Any, other: Any) -> bool:
    """Whether two outputs, tensors or containers of tensors, are equal to the last bit."""
    return _alike(_equal, one, other)


def near(one: Any, other: Any) -> bool:
    """Whether two outputs are equal up to the rounding of a network's arithmetic."""
    return _alike(_near, one, other)


def _alike(compare: Callable[[Any, Any], bool], one: Any, other: Any) -> bool:
    (ours, structure), (theirs, expected) = tree_flatten(one), tree_flatten(other)
    return structure == expected and all(map(compare, ours, theirs))


def _near(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor) and one.is_floating_point()):
        return _equal(one, other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bound = torch.finfo(one.dtype).eps ** 0.5 * one.abs().max()
    return one.is_meta or bool(((one - other).abs() <= bound).all())


def _equal(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return type(one) is type(other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    # Kernels of a GPU need not repeat themselves; the meta device has shapes alone.
    close = torch.equal if one.device.type == "cpu" else torch.allclose
    return one.is_meta or close(one.nan_to_num(), other.nan_to_num())


def first_difference(one: Trial, other: Trial) -> str:
    """Return the name of the first module that made something else of the same input."""
    theirs = {(call.name, call.number): call for call in other.calls}
    for ours in one.calls:
        call = theirs.get((ours.name, ours.number))
        if (
            call
            and same((ours.args, ours.kwargs), (call.args, call.kwargs))
            and not same(ours.output, call.output)
        ):
            return ours.name
    return ""


class UntraceableError(Exception):
    """The forward of a module cannot be traced; says why."""


def own_graph(
    module: nn.Module, given: Set[str] = frozenset(), training: bool | None = None
) -> fx.Graph:
    """Trace the forward of one module.

    Arguments with a default become inputs if they are ``given``; others keep it for good.
    ``training`` is the mode to trace in; None keeps it a variable, for a graph that holds in both.

    Raises:
        UntraceableError: The code branches on values, computes something that does not depend on
            the input, or draws: a trace would keep that as a constant.
    """
    parameters = inspect.signature(module.forward).parameters
    constant = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not parameter.empty and name not in given
    }
    mode = module.training
    try:
        with kept_states() as states, _InputsOnly():
            graph = _OwnForward(training).trace(module, constant or None)
            now = random.getstate(), np.random.get_state()  # noqa: NPY002
        if pickle.dumps(now) != pickle.dumps(states):
            raise UntraceableError("it draws at random, and a trace keeps the one draw")
    except Exception as error:  # code that is run with proxies may raise anything
        raise UntraceableError(first_line(error)) from error
    finally:
        module.training = mode
    if any(str(node.target).startswith("_tensor_constant") for node in graph.nodes):
        raise UntraceableError("it uses a tensor that is not its own")
    return graph


def is_residual(module: nn.Module) -> bool:
    """Whether the forward of a module, in evaluation, adds two things that depend on its input."""
    try:
        graph = own_graph(module, training=False)
    except UntraceableError:
        return False
    from_input: set[fx.Node] = set()
    for node in graph.nodes:
        parts = [n for n in node.all_input_nodes if n in from_input]
        if node.target in _ADDITIONS and len(parts) > 1:
            return True
        if node.op == "placeholder" or parts:
            from_input.add(node)
    return False


class _OwnForward(fx.Tracer):
    trace_asserts = True
    proxy_buffer_attributes = True  # a trace would keep what a buffer holds now

    def __init__(self, training: bool | None) -> None:
        super().__init__()
        self._training = training

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> Any:
        made = super().create_args_for_root(root_fn, is_module, concrete_args)
        mode: Any = self._training
        if mode is None:
            mode = self.create_proxy("get_attr", "training", (), {})
        self.root.training = mode
        return made


class _InputsOnly(TorchFunctionMode):
    """Refuses what is computed without the input: reads of values, new tensors and draws."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, if a proxy is among its arguments or it reads a shape or a dtype."""
        name = getattr(func, "__name__", str(func))
        leaves = tree_leaves((args, kwargs))
        if name != "__get__" and not any(isinstance(leaf, fx.Proxy) for leaf in leaves):
            raise UntraceableError(f"it calls {name} on no input, and a trace keeps the result")
        return func(*args, **(kwargs or {}))
