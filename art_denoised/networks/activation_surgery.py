"""ReLU replaced by another activation wherever a network calls it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from torch import nn

from art_denoised.checks import InputError
from art_denoised.networks import trial
from art_denoised.networks.activations import ParametricSoftplus, SmoothReLU
from art_denoised.networks.rectifier_modules import rectifier_kind, slots, with_rectifier_modules
from art_denoised.networks.rectifiers import RunError, Watch, watch
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
    changed, reasons = with_rectifier_modules(model, given)
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


def _replaced(model: nn.Module, new: nn.Module) -> nn.Module:
    """Put a copy of the activation into every slot of a model, in place."""
    found = list(slots(model))
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


def _watch_changed(model: nn.Module, input_shape: Shape, training: bool) -> Watch:
    try:
        return watch(model, input_shape, training=training)
    except RunError as error:
        cause = error.__cause__ and error.__cause__.__cause__
        why = trial.reason(cause or error)
        raise _cannot(model, error.module, f"cannot be rewritten ({why})") from error


def _check_rectifiers(
    model: nn.Module, seen: Watch, reasons: Mapping[str, str], *, own: bool
) -> None:
    """Check that rectifiers ran in modules of their own only.

    Args:
        model: Network with rectifiers as modules.
        seen: What one run of it did.
        reasons: Why modules could not be traced.
        own: Each activation has parameters, and must not be shared between calls.
    """
    for name, count in seen.rectifiers.items():
        module = model.get_submodule(name)
        # nn.Hardtanh(0, 6) computes ReLU6, but is another activation by name, and is left.
        if not rectifier_kind(module) and type(module) is not nn.Hardtanh:
            why = reasons.get(name, "they are inside a function or another method")
            raise _cannot(model, name, f"runs {count} ReLU that cannot be replaced ({why})")
    for name in seen.repeated if own else ():
        if rectifier_kind(model.get_submodule(name)):
            holder = name.rpartition(".")[0]
            why = reasons.get(holder, "its caller cannot be rewritten")
            raise _cannot(model, holder, f"calls {name} more than once ({why})")


def _cannot(model: nn.Module, name: str, why: str) -> InputError:
    kind = type(model.get_submodule(name)).__name__.removeprefix("Smoothed")
    return InputError(f"{name or 'the model'} ({kind}) {why}; {_REMEDY}")
