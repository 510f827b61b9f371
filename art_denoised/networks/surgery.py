"""Denoising blocks put into networks of any make, and what they cost."""

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
from torch.utils.flop_counter import FlopCounterMode

from art_denoised.checks import InputError
from art_denoised.networks import tracing
from art_denoised.networks.feature_denoising import FeatureDenoising, Operation
from art_denoised.networks.sameness import same

Shape = tuple[int, int, int]
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
    ``P.denoise``, the `FeatureDenoising`. Load pretrained weights before: keys below P change.

    Residual blocks are found by their code: modules with a convolution in them that add two things
    which both come from their input; of nested ones the outermost. A stage is a run of them, in the
    order they are called, whose outputs have one shape (channels, height, width). This covers the
    ResNets, ResNeXts and WideResNets of torchvision and timm and those made for CIFAR, dilated and
    pre-activated ones too.

    Args:
        model: Any network; its mode, device and dtype are kept.
        where: "stages": after the last residual block of each stage (the paper's four blocks);
            "all": after every residual block (its "denoise all"); or names of modules, or globs,
            whose ``*`` does not cross a dot (``layer[34].*``).
        operation: What `FeatureDenoising` computes.
        input_shape: Channels, height and width of an image that the model takes. One forward pass
            on noise, of a copy in evaluation mode, finds the shapes, and another of the result
            checks that it runs, calls the blocks and computes the same.
        **options: The other options of `FeatureDenoising`.

    Raises:
        InputError: Names that are not there (those that are get listed), a model without residual
            blocks or that cannot take such an image, a place where features are not float
            tensors of four dimensions, or one that other code of the model reads attributes of.

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
    tracing.refuse_unreadable(model)
    outputs, result = _outputs(model, input_shape)
    places = _places(model, where, outputs)
    blocks = {
        place: FeatureDenoising(at.channels, operation, **options).to(at.device, at.dtype)
        for place, at in ((place, outputs[place]) for place in places)
    }
    changed = _with_blocks(model, blocks)
    identity = options.get("conv", True) and options.get("residual", True)
    problem = partial(_problem, input_shape=input_shape, expected=result if identity else None)
    why = problem(changed)
    if why:
        single = ({place: block} for place, block in blocks.items())
        names = [name for one in single if problem(_with_blocks(model, one)) for name in one]
        raise InputError(
            f"where: a block after {_listed(names or places)} does not work ({why}), since other "
            "code of the model uses what is there for more than to call it; name other modules"
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
    """Return what is wrong with a model that got blocks, from one forward pass; or nothing.

    Args:
        changed: The model.
        input_shape: Of an image that the model took before.
        expected: What it returned, if it is to return the same, or None.
    """
    try:
        outputs, result = _outputs(changed, input_shape)
    except InputError as error:
        cause = error.__cause__
        return f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}"
    for name, module in changed.named_modules():
        if isinstance(module, FeatureDenoising) and name not in outputs:
            return "it is not called"
    if expected is None or same(result, expected):
        return ""
    return "the model no longer computes the same"


@dataclass(frozen=True, slots=True)
class AddedCost:
    """What a change adds to a model: parameters, and multiply-accumulates (MACs) for one image.

    MACs are those of convolutions and matrix products. Means, medians, windows and activations are
    not counted: they cost memory traffic rather than arithmetic.
    """

    parameters: int
    macs: int
    parameters_before: int
    macs_before: int

    def __str__(self) -> str:
        """Return one line to print."""
        parameters, macs = self.parameters / 1e6, self.macs / 1e9
        return (
            f"adds {parameters:.2f} M parameters to {self.parameters_before / 1e6:.2f} M "
            f"(+{self.parameters / self.parameters_before:.1%}) and "
            f"{macs:.2f} GMAC to {self.macs_before / 1e9:.2f} (+{self.macs / self.macs_before:.1%})"
        )


def added_cost(before: nn.Module, after: nn.Module, input_shape: Shape = (3, 64, 64)) -> AddedCost:
    """Return what ``after`` costs beyond ``before``, for one image of this shape.

    Both are run on it once, in evaluation mode, where they are; on the meta device that is free.

    Raises:
        InputError: A model cannot take such an image.

    Example:
        >>> from torchvision.models import resnet18
        >>> with torch.device("meta"):
        ...     model = resnet18()
        >>> print(added_cost(model, add_feature_denoising(model), (3, 224, 224)))
        adds 0.70 M parameters to 11.69 M (+6.0%) and 1.18 GMAC to 1.81 (+65.1%)
    """
    costs = []
    for model in (before, after):
        with FlopCounterMode(display=False) as counter:
            _run(copy.deepcopy(model), input_shape)
        parameters = sum(p.numel() for p in model.parameters())
        costs.append((parameters, counter.get_total_flops() // 2))
    (few, cheap), (many, dear) = costs
    return AddedCost(many - few, dear - cheap, few, cheap)


@dataclass(frozen=True, slots=True)
class _Output:
    """What a module returned; ``problem`` says why a block cannot follow, or is empty."""

    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    problem: str

    @property
    def channels(self) -> int:
        return self.shape[1]


def _outputs(model: nn.Module, input_shape: Shape) -> tuple[dict[str, _Output], Any]:
    """Return what each module called returns, by name, in the order they return first.

    And what the model returns.
    """
    model = copy.deepcopy(model)
    outputs: dict[str, _Output] = {}
    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(partial(_record, outputs, name), with_kwargs=True)
    result = _run(model, input_shape)
    return outputs, result


def _record(
    outputs: dict[str, _Output], name: str, module: nn.Module, args: Any, kwargs: Any, output: Any
) -> None:
    if not isinstance(output, Tensor):
        problem = f"returns {type(output).__name__}, not a tensor"
        outputs.setdefault(name, _Output((), torch.device("cpu"), torch.float32, problem))
        return
    problem = ""
    if output.is_quantized or not output.is_floating_point():
        problem = f"returns {output.dtype} and not float features"
    elif output.ndim != 4:
        problem = f"returns shape {tuple(output.shape)} and not (batch, channels, height, width)"
    elif len(args) != 1 or kwargs:
        problem = "is called with more than its input"
    outputs.setdefault(name, _Output(tuple(output.shape), output.device, output.dtype, problem))


@torch.no_grad()
def _run(model: nn.Module, input_shape: Shape) -> Any:
    """Run a model, which is a copy, on an image of noise, and draw what it draws from seed 0."""
    some = next(
        (t for t in chain(model.parameters(), model.buffers()) if t.is_floating_point()), None
    )
    x = torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0))
    x = x if some is None else x.to(some.device, some.dtype)
    devices = [x.device] if x.is_cuda else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(0)
            for device in devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(0)
            return model.eval()(x)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"{type(model).__name__} failed on an image of shape {tuple(input_shape)} "
            f"({type(error).__name__}: {reason}); give the input_shape that it takes"
        ) from error


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
        if attribute == "block" and isinstance(
            getattr(model.get_submodule(holder), "denoise", None), FeatureDenoising
        ):
            raise InputError(f"{holder} has a denoising block; start from the model without")
    return places


def _named(model: nn.Module, pattern: str, outputs: dict[str, _Output]) -> list[str]:
    """Return the modules that a name or glob means."""
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
    """Return the outermost residual blocks, in the order they are called."""
    found: list[str] = []
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in found)
        if name not in outputs or outputs[name].problem or inner:
            continue
        if isinstance(module, FeatureDenoising) or tracing.is_torch_own(module):
            continue
        has_convolution = any(isinstance(m, nn.Conv2d) for m in module.modules())
        if has_convolution and tracing.is_residual(module):
            found.append(name)
    return [name for name in outputs if name in found]


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
