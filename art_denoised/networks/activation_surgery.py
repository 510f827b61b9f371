"""ReLU replaced by another activation wherever a network calls it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from art_denoised.checks import InputError
from art_denoised.networks import trial
from art_denoised.networks.activations import ParametricSoftplus, SmoothReLU
from art_denoised.networks.rectifiers import RunError, Watch, is_from_torch, watch
from art_denoised.networks.tracing import UntraceableError, own_graph
from art_denoised.networks.trial import Shape

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "celu": nn.CELU,
    "mish": nn.Mish,
    "softplus": ParametricSoftplus,
    "smoothrelu": SmoothReLU,
}
_FUNCTIONS: dict[Any, type[nn.Module]] = {  # functions, and methods of tensors by name
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), nn.ReLU),
    F.relu6: nn.ReLU6,
}
_REMEDY = "build it with the activation you want, or let it call nn.ReLU modules, once each"


def smooth_activations(
    model: nn.Module, activation: str | nn.Module, *, input_shape: Shape = (3, 64, 64)
) -> nn.Module:
    """Return a copy of the model with every ReLU and ReLU6 replaced, wherever it is called.

    Each call gets an activation of its own. ReLU modules are replaced where they are. A module that
    calls one of them twice, or calls a function such as ``F.relu``, gets a new forward (torch.fx):
    its class becomes a subclass, ``SmoothedBottleneck``, and its weights keep their keys. A block
    that is called twice shares its activations as it shares its weights. Nothing works in place any
    more. Methods other than ``forward`` are not changed.

    Copies of the model are run on noise, in evaluation and in training mode, before and after the
    calls have become modules of their own. The outputs must be the same, and no rectifier may run
    elsewhere (`count_rectifiers`). So a call that was not found is an error, and not left behind.

    Args:
        model: Any network. Its mode, statistics and the global random states are not changed.
        activation: "silu", "gelu", "elu", "celu", "mish", "softplus" (`ParametricSoftplus`),
            "smoothrelu" (`SmoothReLU`), or a module that is copied for every call.
        input_shape: Shape of an image that the model takes.

    Raises:
        InputError: An unknown activation, ELU that is not smooth (alpha other than 1), a model
            without ReLU or that cannot take such an image, or calls of ReLU that cannot be
            replaced, with the name of their module.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet50
        >>> with torch.device("meta"):
        ...     model = smooth_activations(resnet50(), "silu")
        >>> sum(isinstance(module, nn.SiLU) for module in model.modules())  # 17 ReLU, 49 calls
        49
    """
    new = _activation(activation)
    trial.refuse_unreadable(model)
    modes = (False, True)
    before = [watch(model, input_shape, training=mode) for mode in modes]
    given = {
        name: before[0].given.get(name, set()) | before[1].given.get(name, set())
        for name in dict(model.named_modules())
    }
    changed, reasons = _with_modules(model, given)
    for seen, mode in zip(before, modes, strict=True):
        after = _watch_changed(changed, input_shape, mode)
        _check_rectifiers(changed, after, reasons, own=any(True for _ in new.parameters()))
        if not trial.same(seen.result, after.result):
            name = trial.first_difference(model, changed, input_shape, images=2, training=mode)
            raise _cannot(changed, name, "no longer computes the same with calls of nn.ReLU")
    return _replaced(changed, new)


def _activation(activation: str | nn.Module) -> nn.Module:
    known = f"{', '.join(ACTIVATIONS)}, or a module such as ParametricSoftplus(10.)"
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise InputError(f"activation is {activation!r}; give one of {known}")
        return ACTIVATIONS[activation]()
    if not isinstance(activation, nn.Module):
        raise InputError(f"activation is {activation!r}, not a module; give one of {known}")
    if isinstance(activation, nn.ELU) and activation.alpha != 1:
        raise InputError(
            f"ELU with alpha {activation.alpha:g} has a kink at 0; "
            f"give nn.CELU({activation.alpha:g}), which is smooth, or nn.ELU()"
        )
    return activation


def _rectifier(module: nn.Module) -> type[nn.Module] | None:
    """Return nn.ReLU or nn.ReLU6 if a module computes it, or None: a subclass may do otherwise."""
    for kind in (nn.ReLU6, nn.ReLU):
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return kind
    return None


def _slots(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield each place that holds a rectifier: the holder, the attribute and the rectifier."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and _rectifier(module):
            holder, _, attribute = name.rpartition(".")
            yield model.get_submodule(holder), attribute, module


def _replaced(model: nn.Module, new: nn.Module) -> nn.Module:
    """Put a copy of the activation into every slot of a model, in place."""
    found = list(_slots(model))
    if not found:
        raise InputError(
            f"{type(model).__name__} calls no ReLU or ReLU6, which is what is replaced; "
            "give a network that does"
        )
    first = next(model.parameters(), None)
    new = copy.deepcopy(new).to(None if first is None else first.device)
    for holder, attribute, old in found:
        setattr(holder, attribute, copy.deepcopy(new).train(old.training))
    return model


# The same function, with each call of a rectifier a module of its own


def _with_modules(
    model: nn.Module, given: dict[str, set[frozenset[str]]]
) -> tuple[nn.Module, dict[str, str]]:
    """Return a copy in which each rectifier is a module of its own that does not work in place.

    Args:
        model: Any network.
        given: By module, the arguments with a default that its calls gave another value.

    Returns:
        The copy, and for each module that could not be traced the reason.
    """
    model, reasons = copy.deepcopy(model), {}
    in_place = _unshare(model)
    # A slot belongs to its first call. nn.Sequential calls each of its slots once.
    taken = {(id(h), a) for h, a, _ in _slots(model) if type(h).forward is nn.Sequential.forward}
    for name, module in list(model.named_modules()):
        if is_from_torch(module) or type(module).forward is nn.Sequential.forward:
            continue
        try:
            if len(given[name]) > 1:
                raise UntraceableError("its calls give different arguments")
            graph = own_graph(module, next(iter(given[name]), frozenset()))
        except UntraceableError as error:
            reasons[name] = str(error)
            continue
        if _rewrite(module, graph, taken, in_place):
            _set_graph(module, graph)
    return model, reasons


def _unshare(model: nn.Module) -> set[tuple[int, str]]:
    """Put a fresh rectifier into every slot; return the slots whose rectifier worked in place."""
    in_place = set()
    for holder, attribute, old in list(_slots(model)):
        if getattr(old, "inplace", False):
            in_place.add((id(holder), attribute))
        kind = _rectifier(old) or nn.ReLU
        setattr(holder, attribute, kind().train(old.training))
    for module in list(model.modules()):
        for attribute, value in list(vars(module).items()):
            kinds = [kind for function, kind in _FUNCTIONS.items() if value is function]
            if kinds and callable(value):
                delattr(module, attribute)
                setattr(module, attribute, kinds[0]().train(module.training))
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # its fused kernel would not call the activation
    return in_place


def _rewrite(
    module: nn.Module,
    graph: fx.Graph,
    taken: set[tuple[int, str]],
    in_place: Collection[tuple[int, str]],
) -> bool:
    """Give each call of a rectifier in a graph a module of its own; return whether it changed.

    Args:
        module: Module whose forward the graph is.
        graph: Changed.
        taken: Slots that are called already. Those called here are added.
        in_place: Slots whose rectifier worked in place.
    """
    changed = False
    for node in list(graph.nodes):
        slot, kind = _called(module, node)
        if kind is None:
            continue
        (x,) = node.all_input_nodes
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


def _called(
    module: nn.Module, node: fx.Node
) -> tuple[tuple[int, str] | None, type[nn.Module] | None]:
    """Return the slot and the kind of rectifier that a node calls, each None if there is none."""
    if node.op == "call_module":
        holder, _, attribute = str(node.target).rpartition(".")
        parent = module.get_submodule(holder)
        return (id(parent), attribute), _rectifier(getattr(parent, attribute))
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


# What is checked


def _watch_changed(model: nn.Module, input_shape: Shape, training: bool) -> Watch:
    try:
        return watch(model, input_shape, training=training)
    except RunError as error:
        cause = error.__cause__ and error.__cause__.__cause__
        why = trial.reason(cause or error)
        raise _cannot(model, error.module, f"cannot be rewritten ({why})") from error


def _check_rectifiers(model: nn.Module, seen: Watch, reasons: dict[str, str], *, own: bool) -> None:
    """Check that rectifiers ran in modules of their own only.

    Args:
        model: Network with rectifiers as modules.
        seen: What one run of it did.
        reasons: Why modules could not be traced.
        own: Each activation has parameters, and must not be shared between calls.
    """
    for name, count in seen.rectifiers.items():
        # nn.Hardtanh(0, 6) computes ReLU6; who calls it by that name does not ask for ReLU6.
        if not isinstance(model.get_submodule(name), nn.ReLU | nn.Hardtanh):
            why = reasons.get(name, "they are inside a function or another method")
            raise _cannot(model, name, f"runs {count} ReLU that cannot be replaced ({why})")
    for name in seen.repeated if own else ():
        if _rectifier(model.get_submodule(name)):
            holder = name.rpartition(".")[0]
            why = reasons.get(holder, "its caller cannot be rewritten")
            raise _cannot(model, holder, f"calls {name} more than once ({why})")


def _cannot(model: nn.Module, name: str, why: str) -> InputError:
    kind = type(model.get_submodule(name)).__name__.removeprefix("Smoothed")
    return InputError(f"{name or 'the model'} ({kind}) {why}; {_REMEDY}")
