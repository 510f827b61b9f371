"""The rectifiers of a network, each call of one made a module of its own."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch.nn import functional as F

from art_denoised.networks.rectifiers import is_from_torch
from art_denoised.networks.tracing import UntraceableError, own_graph

Slot: TypeAlias = tuple[int, str]  # id of the module that holds a rectifier, and the attribute
_FUNCTIONS: dict[Any, type[nn.Module]] = {  # functions, and methods of tensors by name
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), nn.ReLU),
    F.relu6: nn.ReLU6,
}


def with_rectifier_modules(
    model: nn.Module, given: Mapping[str, set[frozenset[str]]]
) -> tuple[nn.Module, dict[str, str]]:
    """Return a copy in which each call of a rectifier calls an nn.ReLU or nn.ReLU6 of its own.

    These do not work in place. Where code cannot be traced, calls stay as they were.

    Args:
        model: Any network.
        given: By module, the arguments with a default that its calls gave another value.

    Returns:
        The copy, and for each module that could not be traced the reason.
    """
    model, reasons = copy.deepcopy(model), {}
    in_place = _unshare(model)
    # A slot belongs to its first call. nn.Sequential calls each of its slots once.
    taken = {(id(h), a) for h, a, _ in slots(model) if type(h).forward is nn.Sequential.forward}
    for name, module in list(model.named_modules()):
        if is_from_torch(module) or type(module).forward is nn.Sequential.forward:
            continue
        try:
            if len(given[name]) > 1:
                raise UntraceableError("its calls give different arguments")
            graph = own_graph(module, frozenset().union(*given[name]))
        except UntraceableError as error:
            reasons[name] = str(error)
            continue
        if _rewrite(module, graph, taken, in_place):
            _set_graph(module, graph)
    return model, reasons


def _unshare(model: nn.Module) -> set[Slot]:
    """Put a fresh rectifier into every slot; return the slots whose rectifier worked in place."""
    in_place = set()
    for holder, attribute, old in list(slots(model)):
        if getattr(old, "inplace", False):
            in_place.add((id(holder), attribute))
        kind = rectifier_kind(old) or nn.ReLU
        setattr(holder, attribute, kind().train(old.training))
    for module in list(model.modules()):
        for attribute, value in list(vars(module).items()):
            kinds = [k for f, k in _FUNCTIONS.items() if f is value and callable(f)]
            if kinds:  # such as self.act = F.relu
                delattr(module, attribute)
                setattr(module, attribute, kinds[0]().train(module.training))
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # its fused kernel would not call the activation
    return in_place


def _rewrite(
    module: nn.Module, graph: fx.Graph, taken: set[Slot], in_place: Collection[Slot]
) -> bool:
    """Give each call of a rectifier in a graph a module of its own; return whether it changed.

    Args:
        module: Module whose forward the graph is.
        graph: Graph that is changed.
        taken: Slots that are called already; those called here are added.
        in_place: Slots whose rectifier worked in place.
    """
    changed = False
    for node in list(graph.nodes):
        slot, kind = _called(module, node)
        if kind is None:
            continue
        x = node.all_input_nodes[0]
        users = _later_users(node, x) if slot in in_place or _works_in_place(node) else []
        call = node
        if slot is None or slot in taken:
            attribute = _free_name(module, "relu" if slot is None else slot[1])
            setattr(module, attribute, kind().train(module.training))
            with graph.inserting_after(node):
                call = graph.create_node("call_module", attribute, (x,))
            node.replace_all_uses_with(call)
            graph.erase_node(node)
        else:
            taken.add(slot)
        for user in users:  # they saw what the activation made of its input
            user.replace_input_with(x, call)
        changed = changed or call is not node or bool(users)
    return changed


def _called(module: nn.Module, node: fx.Node) -> tuple[Slot | None, type[nn.Module] | None]:
    """Return the slot and the kind of rectifier that a node calls, each None if there is none."""
    if node.op == "call_module":
        holder, _, attribute = str(node.target).rpartition(".")
        parent = module.get_submodule(holder)
        return (id(parent), attribute), rectifier_kind(getattr(parent, attribute))
    if node.op in ("call_function", "call_method"):
        return None, _FUNCTIONS.get(node.target)
    return None, None


def _works_in_place(node: fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    return name.endswith("_") or bool(node.kwargs.get("inplace"))


def _later_users(node: fx.Node, x: fx.Node) -> list[fx.Node]:
    nodes = list(node.graph.nodes)
    return [user for user in x.users if nodes.index(user) > nodes.index(node)]


def _free_name(module: nn.Module, base: str) -> str:
    number, name = 0, base
    while hasattr(module, name):
        number += 1
        name = f"{base}_{number}"
    return name


def _set_graph(module: nn.Module, graph: fx.Graph) -> None:
    """Make a graph the forward of a module: its class becomes a subclass with that forward."""
    if isinstance(module, fx.GraphModule):
        module.graph = graph
        return
    kind = type(module)
    name = kind.__name__ if kind.__name__.startswith("Smoothed") else f"Smoothed{kind.__name__}"
    forward = type(fx.GraphModule(module, graph)).forward
    module.__class__ = type(name, (kind,), {"forward": forward, "__module__": kind.__module__})


def rectifier_kind(module: nn.Module) -> type[nn.Module] | None:
    """Return nn.ReLU or nn.ReLU6 if a module computes it, or None: a subclass may do otherwise."""
    for kind in (nn.ReLU6, nn.ReLU):
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return kind
    return None


def slots(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield each place that holds a rectifier: the holder, the attribute and the rectifier."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and rectifier_kind(module):
            holder, _, attribute = name.rpartition(".")
            yield model.get_submodule(holder), attribute, module
