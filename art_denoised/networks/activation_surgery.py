"""ReLU replaced by a smooth activation wherever a network calls it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from torch import fx, nn

from art_denoised.checks import InputError
from art_denoised.networks import code, memory, tracing
from art_denoised.networks.coverage import activation_report
from art_denoised.networks.tracing import Call

_FUNCTIONS = frozenset(("relu", "relu_", "relu6"))
_NAMED = {"silu": nn.SiLU, "gelu": nn.GELU, "elu": nn.ELU, "celu": nn.CELU, "mish": nn.Mish}


def smooth_activations(model: nn.Module, activation: str | nn.Module) -> nn.Module:
    """Return a copy of the model with every ReLU and ReLU6 replaced, wherever it is called.

    Each module is traced alone (torch.fx), and each place in its code that calls a rectifier gets
    an activation of its own: one that was called twice is unshared, and a functional call becomes a
    module. Modules of these two sorts get a new forward (their class becomes a subclass,
    ``SmoothedBottleneck``) and nothing else, so the keys of weights, hooks and methods stay. A
    block that is itself called twice shares its activations as it shares its weights. Nothing is in
    place any more. Other activations are left: compare `activation_report` before and after.

    Args:
        model: Any network whose forwards that call ReLU can be traced; others are refused.
        activation: "silu", "gelu", "elu", "celu", "mish", or a module that is copied for every
            call, such as `ParametricSoftplus`, `SmoothReLU` or `SplitReLU`.

    Raises:
        InputError: An unknown activation, ELU that is not smooth (alpha other than 1), a model
            without ReLU, or one whose calls of ReLU cannot all be found.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet50
        >>> from art_denoised.networks.coverage import activation_report
        >>> with torch.device("meta"):
        ...     print(activation_report(smooth_activations(resnet50(), "silu")))
        activation            modules  calls of them  functional calls
        SiLU                       49             49                 0
    """
    new = _activation(activation)
    tracing.refuse_unreadable(model)
    model = copy.deepcopy(model)
    some = next(model.parameters(), None)
    new = copy.deepcopy(new).to(None if some is None else some.device)
    found = _rectifiers(model)
    if not found:
        kinds = ", ".join(count.kind for count in activation_report(model).counts)
        raise InputError(
            f"{type(model).__name__} calls no ReLU or ReLU6, which is what is replaced; "
            f"it calls {kinds or 'no activation that is known'}"
        )
    holders: dict[tuple[int, str], nn.Module] = {}  # slots, and the one whose call stays there
    for name, owner, calls in found:
        staying = list(_staying(owner, calls, holders))
        if any(memory.is_seen_elsewhere(owner, call) for call in calls):
            raise _cannot(name, owner, "changes in place what it goes on using by another name")
        if not all(staying) or any(memory.later_users(call) for call in calls):
            _rewrite(name, owner, calls, staying, new)
        for call, stays in zip(calls, staying, strict=True):
            if stays and call.slot is not None:
                setattr(*call.slot, copy.deepcopy(new).train(owner.training))
    return model


def _activation(activation: str | nn.Module) -> nn.Module:
    known = f"{', '.join(_NAMED)}, or a module such as ParametricSoftplus(10.)"
    if isinstance(activation, str):
        if activation not in _NAMED:
            raise InputError(f"activation is {activation!r}; give one of {known}")
        return _NAMED[activation]()
    if not isinstance(activation, nn.Module):
        raise InputError(f"activation is {activation!r}, not a module; give one of {known}")
    if isinstance(activation, nn.ELU) and activation.alpha != 1:
        raise InputError(
            f"ELU with alpha {activation.alpha:g} has a kink at 0; "
            f"give nn.CELU({activation.alpha:g}), which is smooth, or nn.ELU()"
        )
    return activation


def _rectifiers(model: nn.Module) -> list[tuple[str, nn.Module, list[Call]]]:
    """Return the modules that call rectifiers, with their names and these calls."""
    for name, module in model.named_modules():
        if tracing.is_torch_own(module) and tracing.setting_kind(module) in tracing.RECTIFIERS:
            raise _cannot(name, module, "is torch's own and has ReLU inside")
    found, opaque = [], []
    for name, module, graphs, reason in tracing.traced(model):
        if graphs is None:
            opaque.append((name, module, reason))
            continue
        if hidden := tracing.hidden(graphs, "relu"):
            raise _cannot(name, module, f"calls {hidden}, which has ReLU inside or is one unknown")
        calls = tracing.activation_calls(module, graphs)
        calls = [call for call in calls if call.kind in tracing.RECTIFIERS]
        if calls:
            found.append((name, module, calls))
    seen = {id(getattr(*call.slot)) for _, _, calls in found for call in calls if call.slot}
    for name, module, reason in opaque:
        inside = (m for m in module.modules() if tracing.activation_kind(m) in tracing.RECTIFIERS)
        if code.mentions(type(module), "relu") or any(id(m) not in seen for m in inside):
            raise _cannot(name, module, f"cannot be traced ({reason})")
    return found


def _staying(
    owner: nn.Module, calls: list[Call], holders: dict[tuple[int, str], nn.Module]
) -> Iterator[bool]:
    """Yield for each call whether it may go on calling what is in its slot: the first one may."""
    called: set[tuple[int, str, fx.Graph]] = set()
    for call in calls:
        if call.slot is None:
            yield False
            continue
        slot = id(call.slot[0]), call.slot[1]
        yield holders.setdefault(slot, owner) is owner and (*slot, call.graph) not in called
        called.add((*slot, call.graph))


def _rewrite(
    name: str, owner: nn.Module, calls: list[Call], staying: list[bool], new: nn.Module
) -> None:
    """Give a module a forward in which each call has an activation of its own."""
    if any(call.graph is not calls[0].graph for call in calls):
        raise _cannot(name, owner, "takes different paths in training and in evaluation")
    asks = code.asks_for_types(type(owner))
    if asks is not None:
        raise _cannot(name, owner, f"asks for types ({asks}), which a trace does not have")
    graph = calls[0].graph
    if not memory.replace_updates(owner, graph):
        raise _cannot(name, owner, "changes in place what it goes on using by another name")
    for call, stays in zip(calls, staying, strict=True):
        (x,) = call.node.all_input_nodes
        node, later = call.node, memory.later_users(call)
        if not stays:
            base = "relu" if call.slot is None else call.slot[1]
            free = (f"{base}_{i}" if i else base for i in range(len(calls) + 1_000))
            attribute = next(a for a in free if not hasattr(owner, a))
            setattr(owner, attribute, copy.deepcopy(new).train(owner.training))
            with graph.inserting_after(node):
                node = graph.create_node("call_module", attribute, (x,))
            call.node.replace_all_uses_with(node)
            graph.erase_node(call.node)
        for user in later:
            user.replace_input_with(x, node)
    if isinstance(owner, fx.GraphModule):
        owner.graph = graph
        return
    kind = type(owner)
    title = kind.__name__ if kind.__name__.startswith("Smoothed") else f"Smoothed{kind.__name__}"
    forward = type(fx.GraphModule(owner, graph)).forward
    own: dict[str, Any] = {method: _left(method) for method in code.calling(kind, _FUNCTIONS)}
    own |= {"forward": forward, "__module__": kind.__module__}
    owner.__class__ = type(title, (kind,), own)


def _left(method: str) -> Callable[..., NoReturn]:
    """Return what stands for a method that still has ReLU in its code."""

    def refuse(self: nn.Module, *_: Any, **__: Any) -> NoReturn:
        raise InputError(
            f"{type(self).__name__}.{method} has ReLU in its own code, and smooth_activations "
            "changed forward only; call the model, or make that method a module that it calls"
        )

    return refuse


def _cannot(name: str, module: nn.Module, why: str) -> InputError:
    return InputError(
        f"the forward of {name or 'the model'} ({type(module).__name__}) {why}, so that not all "
        "its activations can be replaced; build it with the activation you want, or call nn.ReLU "
        "modules, once each, in a forward without such branches"
    )
