"""What a module's own forward does, through torch.fx, and which activations a model calls.

Each module is traced alone, and what it calls stays a call. So a module is rewritten only where it
must be, and the rest of the model (its classes, hooks, keys, and paths that depend on the mode) is
left as it was.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from art_denoised.checks import InputError
from art_denoised.networks import code
from art_denoised.networks.activations import ParametricSoftplus, SmoothReLU, SplitReLU
from art_denoised.networks.strict import NoValues, UntraceableError, no_draws

RECTIFIERS = ("ReLU", "ReLU6")
_MODULES = (
    *(nn.ReLU6, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Hardswish),
    *(nn.Hardsigmoid, nn.Threshold, nn.SiLU, nn.GELU, nn.ELU, nn.CELU, nn.SELU, nn.Mish),
    *(nn.Softplus, nn.Tanh, nn.Sigmoid, ParametricSoftplus, SmoothReLU, SplitReLU),
)
_CALLED: dict[str, tuple[Any, ...]] = {  # functions, and methods of tensors by name
    "ReLU": (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"),
    "ReLU6": (F.relu6,),
    "LeakyReLU": (F.leaky_relu, F.leaky_relu_),
    "PReLU": (F.prelu, torch.prelu),
    "RReLU": (F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_),
    "Hardtanh": (F.hardtanh, F.hardtanh_),
    "Hardswish": (F.hardswish,),
    "Hardsigmoid": (F.hardsigmoid,),
    "Threshold": (F.threshold, torch.threshold),
    "SiLU": (F.silu,),
    "GELU": (F.gelu,),
    "ELU": (F.elu, F.elu_),
    "CELU": (F.celu, torch.celu),
    "SELU": (F.selu, torch.selu),
    "Mish": (F.mish,),
    "Softplus": (F.softplus,),
    "Tanh": (F.tanh, torch.tanh, "tanh", "tanh_"),
    "Sigmoid": (F.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_"),
}
_KINDS = {called: kind for kind, functions in _CALLED.items() for called in functions}
_QUANTISED = ("torch.ao.nn.", "torch.nn.quantized", "torch.nn.intrinsic", "torch.nn.qat")
UPDATES = {  # in place, and what gives the same beside
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.ipow: operator.pow,
    operator.imod: operator.mod,
}
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


@dataclass(frozen=True, slots=True)
class Call:
    """One place in the code of a module's forward where an activation is called."""

    kind: str
    graph: fx.Graph
    node: fx.Node
    slot: tuple[nn.Module, str] | None  # who holds the module that is called, and its name there


def refuse_unreadable(model: nn.Module) -> None:
    """Check that the model is made of Python modules in float, whose code can be read and changed.

    Raises:
        InputError: It is scripted, compiled, fused or quantised.
    """
    for name, module in model.named_modules():
        home, kind = type(module).__module__, type(module).__name__
        what = None
        if isinstance(module, torch.jit.ScriptModule):
            what = "is scripted; give the model that was scripted"
        elif home.startswith("torch._dynamo"):
            what = "is compiled; change the model first, then compile it"
        elif home.startswith(_QUANTISED) and kind != "FloatFunctional":
            what = "is quantised or fused; change the float model first"
        elif "forward" in vars(module):
            what = "has a forward set on the instance; put it into the class, or take it off"
        if what is not None:
            raise InputError(f"{name or 'the model'} ({kind}) {what}")


def traced(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[fx.Graph] | None, str]]:
    """Yield name, module, its `own_graphs` or None, and why there are none, of a model's modules.

    Modules of torch itself are left out. An argument with a default is what callers make of it: an
    input if they give it, else its default for good.
    """
    given: dict[int, list[set[str]]] = {}  # by module: the arguments of each call
    for name, module in model.named_modules():
        runs = type(module).forward is not nn.Module.forward  # a ModuleList has none
        own = not is_torch_own(module) or type(module) is nn.Sequential
        if not (own and runs) or activation_kind(module) is not None:
            continue
        try:
            graphs = own_graphs(module, given.get(id(module), []))
        except UntraceableError as error:
            yield name, module, None, str(error)
            continue
        for node in (node for graph in graphs for node in graph.nodes if node.op == "call_module"):
            child = module.get_submodule(str(node.target))
            given.setdefault(id(child), []).append(_given(child, node))
        yield name, module, graphs, ""


def _given(module: nn.Module, call: fx.Node) -> set[str]:
    """Return the arguments that have a default and are given something else by this call."""
    signature = inspect.signature(module.forward)
    try:
        arguments = signature.bind(*call.args, **call.kwargs).arguments
    except TypeError:
        return set()
    defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}
    return {n for n in defaults if n in arguments and arguments[n] is not defaults[n]}


def activation_calls(module: nn.Module, graphs: list[fx.Graph]) -> list[Call]:
    """Return the calls of activations in a module's graphs, in the order they are made."""
    found = []
    for graph in graphs:
        for node in graph.nodes:
            if node.op == "call_module":
                holder, _, attribute = str(node.target).rpartition(".")
                slot = module.get_submodule(holder), attribute
                kind = activation_kind(getattr(*slot))
                if kind is not None:
                    found.append(Call(kind, graph, node, slot))
            elif node.op in ("call_function", "call_method") and node.target in _KINDS:
                found.append(Call(_KINDS[node.target], graph, node, None))
    return found


def hidden(graphs: Sequence[fx.Graph], word: str) -> str | None:
    """Return the name of a function that is no known activation and has this word inside."""
    for node in (node for graph in graphs for node in graph.nodes):
        called = node.op in ("call_function", "call_method") and node.target not in _KINDS
        if called and code.function_mentions(node.target, word):
            return str(getattr(node.target, "__name__", node.target))
    return None


def activation_kind(module: nn.Module) -> str | None:
    """Return the name of an activation's class, or None: also for one with a forward of its own."""
    for known in _MODULES:
        if isinstance(module, known) and type(module).forward is known.forward:
            return known.__name__
    return None


def setting_kind(module: nn.Module) -> str | None:
    """Return the activation that a module of torch was told to use in its own code, or None."""
    setting = getattr(module, "activation", None)
    if isinstance(setting, nn.Module):
        return activation_kind(setting)
    if getattr(module, "nonlinearity", None) == "relu":  # an RNN
        return "ReLU"
    return _KINDS.get(setting)


def is_torch_own(module: nn.Module) -> bool:
    """Whether the class of a module comes with torch."""
    return type(module).__module__.startswith(("torch.nn.", "torch.ao."))


def is_residual(module: nn.Module) -> bool:
    """Whether a module's own forward adds two things that both come from its input."""
    try:
        graph = _trace(module, False, set())
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


def own_graphs(module: nn.Module, given: Sequence[set[str]] = ()) -> list[fx.Graph]:
    """Trace a module's own forward: one graph, or one each for evaluation and training.

    Calls that differ only in a flag that is True in training (functional dropout and batch norm)
    are one graph, which reads ``self.training`` when it runs.

    Args:
        module: Whose forward is traced; what it calls is not.
        given: For each call of it, which arguments with defaults that gives.

    Raises:
        UntraceableError: It depends on values of tensors, or on what else a trace cannot follow.
    """
    if type(module).forward is nn.Sequential.forward:  # known, and the most of most models
        return [_chain(list(module._modules))]
    inputs = set().union(*given)
    for name in inputs:
        if not all(name in call for call in given):
            raise UntraceableError(f"it is called with {name} and without")
    calm, busy = (_trace(module, training, inputs) for training in (False, True))
    return [calm] if _merge(calm, busy) else [calm, busy]


class _Proxy(fx.Proxy):
    """A proxy that tells ``x += y`` from ``x = x + y``, which fx does not."""


def _recorded(update: Any) -> Any:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", update, (self, other), {})

    return record


for _update in UPDATES:
    setattr(_Proxy, f"__{_update.__name__}__", _recorded(_update))


class _OwnForward(fx.Tracer):
    trace_asserts = True
    proxy_buffer_attributes = True  # else what a buffer holds now would be kept for ever

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _chain(names: list[str]) -> fx.Graph:
    graph = fx.Graph()
    node = graph.placeholder("input")
    for name in names:
        node = graph.create_node("call_module", name, (node,))
    graph.output(node)
    return graph


def _trace(module: nn.Module, training: bool, inputs: set[str]) -> fx.Graph:
    parameters = inspect.signature(module.forward).parameters
    given = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    given = {name: default for name, default in given.items() if name not in inputs}
    if any(isinstance(default, tuple | list | dict) for default in given.values()):
        raise UntraceableError("an argument has a container for a default")
    was = module.training
    try:
        module.training = training
        with no_draws(), NoValues():
            graph = _OwnForward().trace(module, given or None)
    except Exception as error:  # whatever the forward raises when it is given proxies
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UntraceableError(reason) from error
    finally:
        module.training = was
    if any(str(node.target).startswith("_tensor_constant") for node in graph.nodes):
        raise UntraceableError("it makes a tensor, which a trace would keep for ever")
    return graph


class _PathsDifferError(Exception):
    """Training calls something that evaluation does not."""


def _merge(calm: fx.Graph, busy: fx.Graph) -> bool:
    """Make the graph of evaluation that of both modes, if that of training differs in flags only.

    Returns False, and leaves it as it was, if they differ in more.
    """
    if len(calm.nodes) != len(busy.nodes):
        return False
    twins = dict(zip(busy.nodes, calm.nodes, strict=True))
    start = next(node for node in calm.nodes if node.op != "placeholder")
    with calm.inserting_before(start):
        flag = calm.create_node("get_attr", "training")
    try:
        if any((b.op, b.target) != (c.op, c.target) for b, c in twins.items()):
            raise _PathsDifferError
        merged = [
            (c, _unify(c.args, b.args, twins, flag), _unify(c.kwargs, b.kwargs, twins, flag))
            for b, c in twins.items()
        ]
    except _PathsDifferError:
        calm.erase_node(flag)
        return False
    for node, args, kwargs in merged:
        node.args, node.kwargs = args, kwargs
    if not flag.users:
        calm.erase_node(flag)
    return True


def _unify(calm: Any, busy: Any, twins: dict[fx.Node, fx.Node], flag: fx.Node) -> Any:
    """Return an argument for both modes: the flag, where it is False in one, True in the other."""
    if isinstance(busy, fx.Node) and twins[busy] is calm:
        return calm
    if type(busy) is type(calm):
        if isinstance(busy, tuple | list) and len(busy) == len(calm):
            return tuple(_unify(c, b, twins, flag) for c, b in zip(calm, busy, strict=True))
        if isinstance(busy, dict) and busy.keys() == calm.keys():
            return {name: _unify(calm[name], busy[name], twins, flag) for name in busy}
        if isinstance(busy, slice):
            parts = ("start", "stop", "step")
            return slice(*(_unify(getattr(calm, p), getattr(busy, p), twins, flag) for p in parts))
        if calm is False and busy is True:
            return flag
        if calm == busy:
            return calm
    raise _PathsDifferError
