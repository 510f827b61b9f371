"""Denoising blocks put into networks of any make."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor, nn

from art_denoised.checks import InputError
from art_denoised.networks import trial
from art_denoised.networks.feature_denoising import FeatureDenoising, Operation
from art_denoised.networks.rectifiers import is_from_torch
from art_denoised.networks.tracing import is_residual
from art_denoised.networks.trial import Shape

_SHOWN = 12  # names in an error message


def add_feature_denoising(
    model: nn.Module,
    where: str | Sequence[str] = "stages",
    operation: Operation = "gaussian",
    *,
    input_shape: Shape = (3, 64, 64),
    **options: Any,
) -> nn.Module:
    """Return a copy of the model with denoising blocks, which at first computes exactly the same.

    The module at a place P becomes ``nn.Sequential`` of ``P.block``, the module that was there, and
    ``P.denoise``, the `FeatureDenoising`. Load pretrained weights first: the keys below P change.

    A residual block is a module with a convolution in it whose forward adds two things that both
    come from its input; of nested ones the outermost counts. A stage is a run of residual blocks,
    in the order of their calls, whose outputs have one shape. This covers the ResNets, ResNeXts
    and WideResNets of torchvision and timm and those made for CIFAR, dilated and pre-activated
    ones too.

    Args:
        model: Any network. Its mode, device and dtype are kept.
        where: "stages" puts a block after the last residual block of each stage (the paper's four
            blocks), "all" after every residual block (its "denoise all"). Otherwise names of
            modules or globs, whose ``*`` does not cross a dot (``layer[34].*``).
        operation: Operation of the blocks, see `FeatureDenoising`.
        input_shape: Channels, height and width of an image that the model takes. A copy is run on
            noise in evaluation mode to find the shapes. The result is run to check that it calls
            the blocks and computes the same.
        **options: Further options of `FeatureDenoising`.

    Raises:
        InputError: Names that do not exist, a model without residual blocks or that cannot take
            such an image, a place where features are not float tensors of four dimensions, or a
            place whose attributes other code accesses.

    Example:
        >>> from torchvision.models import resnet18
        >>> model = resnet18().eval()
        >>> robust = add_feature_denoising(model)
        >>> x = torch.rand(1, 3, 64, 64)
        >>> torch.equal(robust(x), model(x))
        True
        >>> [name for name, _ in robust.named_modules() if name.endswith("denoise")]
        ['layer1.1.denoise', 'layer2.1.denoise', 'layer3.1.denoise', 'layer4.1.denoise']
    """
    trial.refuse_unreadable(model)
    outputs, result = _outputs(model, input_shape)
    places = _places(model, where, outputs)
    blocks = {
        place: FeatureDenoising(at.shape[1], operation, **options).to(at.device, at.dtype)
        for place, at in ((place, outputs[place]) for place in places)
    }
    changed = _with_blocks(model, blocks)
    identity = options.get("conv", True) and options.get("residual", True)
    problem = partial(_problem, input_shape=input_shape, expected=result if identity else None)
    if why := problem(changed):
        single = ({place: block} for place, block in blocks.items())
        names = [name for one in single if problem(_with_blocks(model, one)) for name in one]
        raise InputError(
            f"where: a block after {_listed(names or places)} does not work ({why}), because other "
            "code of the model accesses attributes of that module; name other modules"
        )
    return changed


def _with_blocks(model: nn.Module, blocks: dict[str, FeatureDenoising]) -> nn.Module:
    """Return a copy of the model with these blocks after the modules of these names."""
    model, blocks = copy.deepcopy((model, blocks))
    for place in sorted(blocks, key=lambda name: -name.count(".")):  # inner ones first
        old, denoise = model.get_submodule(place), blocks[place]
        names = [n for n, m in model.named_modules(remove_duplicate=False) if m is old]
        pair = nn.Sequential(OrderedDict(block=old, denoise=denoise.train(old.training)))
        pair.training = old.training
        for holder, _, attribute in (name.rpartition(".") for name in names):
            setattr(model.get_submodule(holder), attribute, pair)
    return model


def _problem(changed: nn.Module, input_shape: Shape, expected: Any) -> str:
    """Return what is wrong with a model that got blocks, found by one run, or nothing.

    Args:
        changed: Model with blocks.
        input_shape: Shape of an image that the model took before.
        expected: What the model returned before, if it must return the same, or None.
    """
    try:
        outputs, result = _outputs(changed, input_shape)
    except InputError as error:
        return trial.reason(error.__cause__ or error)
    for name, module in changed.named_modules():
        if isinstance(module, FeatureDenoising) and name not in outputs:
            return "it is not called"
    if expected is None or trial.same(result, expected):
        return ""
    return "the model no longer computes the same"


@dataclass(frozen=True, slots=True)
class _Output:
    """What a module returned first; ``problem`` says why a block cannot follow, or is empty."""

    problem: str
    shape: tuple[int, ...] = ()
    device: torch.device | None = None
    dtype: torch.dtype | None = None


def _outputs(model: nn.Module, input_shape: Shape) -> tuple[dict[str, _Output], Any]:
    """Return the outputs of the modules by name, in the order they return, and the result."""
    model, outputs = copy.deepcopy(model), dict[str, _Output]()

    def record(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        outputs.setdefault(name, _output(output, alone=len(args) == 1 and not kwargs))

    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(partial(record, name), with_kwargs=True)
    return outputs, trial.run(model, input_shape)


def _output(output: Any, *, alone: bool) -> _Output:
    if not isinstance(output, Tensor):
        return _Output(f"returns {type(output).__name__}, not a tensor")
    problem = ""
    if output.is_quantized or not output.is_floating_point():
        problem = f"returns {output.dtype} and not float features"
    elif output.ndim != 4:
        problem = f"returns shape {tuple(output.shape)} and not (batch, channels, height, width)"
    elif not alone:
        problem = "is called with more than its input"
    return _Output(problem, tuple(output.shape), output.device, output.dtype)


def _places(model: nn.Module, where: str | Sequence[str], outputs: dict[str, _Output]) -> list[str]:
    """Return the names of the modules after which blocks go."""
    if where in ("stages", "all"):
        places = _residual_blocks(model, outputs)
        if not places:
            parts = _listed(name for name, _ in model.named_children())
            raise InputError(
                f"{type(model).__name__} has no residual blocks that could be found; "
                f"name modules in where, within its parts {parts}"
            )
        if where == "stages":
            runs = groupby(places, key=lambda name: outputs[name].shape)
            places = [list(run)[-1] for _, run in runs]
    else:
        patterns = [where] if isinstance(where, str) else list(where)
        places = list(dict.fromkeys(chain(*(_named(model, p, outputs) for p in patterns))))
        if not places:
            raise InputError('where is empty; give "stages", "all", or names of modules')
    for place in places:
        holder, _, attribute = place.rpartition(".")
        after = getattr(model.get_submodule(holder), "denoise", None)
        if attribute == "block" and isinstance(after, FeatureDenoising):
            raise InputError(f"{holder} has a denoising block; start from the model without")
    return places


def _named(model: nn.Module, pattern: str, outputs: dict[str, _Output]) -> list[str]:
    """Return the modules that a name or glob matches."""
    parts = pattern.split(".")
    found = [
        name
        for name in outputs
        if len(names := name.split(".")) == len(parts) and all(map(fnmatchcase, names, parts))
    ]
    usable = [name for name in found if not outputs[name].problem]
    if found and not usable:
        raise InputError(f"where: {found[0]} {outputs[found[0]].problem}; name other modules")
    if not usable:
        known = _residual_blocks(model, outputs)
        known = known or [name for name, output in outputs.items() if not output.problem]
        raise InputError(
            f"where: nothing that {type(model).__name__} calls is named {pattern!r}; "
            f"give some of {_listed(known)}"
        )
    return usable


def _residual_blocks(model: nn.Module, outputs: dict[str, _Output]) -> list[str]:
    """Return the outermost residual blocks, in the order of their calls."""
    found: list[str] = []
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in found)
        if name not in outputs or outputs[name].problem or inner:
            continue
        if isinstance(module, FeatureDenoising) or is_from_torch(module):
            continue
        has_convolution = any(isinstance(m, nn.Conv2d) for m in module.modules())
        if has_convolution and is_residual(module):
            found.append(name)
    return [name for name in outputs if name in found]


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
