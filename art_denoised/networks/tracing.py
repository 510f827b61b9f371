"""The graph of a module's own forward, by torch.fx; modules that it calls stay calls."""

from __future__ import annotations

import inspect
import operator
import pickle
import random
from collections.abc import Callable, Set
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from art_denoised.networks.trial import kept_states

_ADDITIONS = (operator.add, torch.add, "add", "add_")


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
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UntraceableError(reason) from error
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
