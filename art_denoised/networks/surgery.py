"""Networks of any make, changed: denoising blocks put in, and what a change costs."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from art_denoised.checks import InputError
from art_denoised.models.loading import fitting_state, read_state_dict
from art_denoised.networks import trial
from art_denoised.networks.activations import is_from_torch, smooth_activations
from art_denoised.networks.feature_denoising import FeatureDenoising, Operation
from art_denoised.networks.optimizing import Optimization, as_optimized
from art_denoised.networks.trial import Call, Shape, Trial, TrialError, is_residual

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
    in the order of their calls, whose outputs have one shape (docs/how-to/change-a-network.md).

    Args:
        model: Any network. Its mode, device and dtype are kept.
        where: "stages" puts a block after the last residual block of each stage (the paper's four
            blocks), "all" after every residual block (its "denoise all"). Otherwise names of
            modules or globs, whose ``*`` does not cross a dot (``layer[34].*``).
        operation: Operation of the blocks, see `FeatureDenoising`.
        input_shape: Channels, height and width of an image that the model takes. Copies are run on
            noise, to find the shapes and to check that the result computes the same.
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
    before = Trial(model, input_shape)
    calls = _first_calls(before)
    places = _places(model, where, calls)
    blocks = {
        place: FeatureDenoising(at.shape[1], operation, **options).to(at.device, at.dtype)
        for place, at in ((place, calls[place].output) for place in places)
    }
    changed = _with_blocks(model, blocks)
    identity = options.get("conv", True) and options.get("residual", True)

    def problem(changed: nn.Module) -> str:
        return _problem(changed, input_shape, before.result if identity else None)

    if why := problem(changed):
        names = [p for p in places if problem(_with_blocks(model, {p: blocks[p]}))]
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

    It must return what is expected, unless that is None.
    """
    try:
        after = Trial(changed, input_shape)
    except TrialError as error:
        return error.why
    called = {call.name for call in after.calls}
    for name, module in changed.named_modules():
        if isinstance(module, FeatureDenoising) and name not in called:
            return "it is not called"
    if expected is None or trial.same(after.result, expected):
        return ""
    return "the model no longer computes the same"


def _first_calls(tried: Trial) -> dict[str, Call]:
    """Return the first call of each part that was called, in the order of their returns."""
    first: dict[str, Call] = {}
    for call in tried.calls[:-1]:  # the last is that of the model
        first.setdefault(call.name, call)
    return first


def _unfit(call: Call) -> str:
    """Return why a block cannot follow a module, or nothing."""
    output = call.output
    if not isinstance(output, Tensor):
        return f"returns {type(output).__name__}, not a tensor"
    if output.is_quantized or not output.is_floating_point():
        return f"returns {output.dtype} and not float features"
    if output.ndim != 4:
        return f"returns shape {tuple(output.shape)} and not (batch, channels, height, width)"
    return "" if len(call.args) == 1 and not call.kwargs else "is called with more than its input"


def _places(model: nn.Module, where: str | Sequence[str], calls: dict[str, Call]) -> list[str]:
    """Return the names of the modules after which blocks go."""
    if where in ("stages", "all"):
        places = _residual_blocks(model, calls)
        if not places:
            raise InputError(
                f"{type(model).__name__} has no residual blocks that could be found; "
                f"name modules in where, within its parts {_listed(_parts(model))}"
            )
        if where == "stages":
            runs = groupby(places, key=lambda name: calls[name].output.shape)
            places = [list(run)[-1] for _, run in runs]
    else:
        patterns = [where] if isinstance(where, str) else list(where)
        places = list(dict.fromkeys(chain(*(_named(model, p, calls) for p in patterns))))
        if not places:
            raise InputError('where is empty; give "stages", "all", or names of modules')
    for place in places:
        holder, _, attribute = place.rpartition(".")
        after = getattr(model.get_submodule(holder), "denoise", None)
        if attribute == "block" and isinstance(after, FeatureDenoising):
            raise InputError(f"{holder} has a denoising block; start from the model without")
    return places


def _named(model: nn.Module, pattern: str, calls: dict[str, Call]) -> list[str]:
    """Return the modules that a name or glob matches."""
    parts = pattern.split(".")
    found = [
        name
        for name in calls
        if len(names := name.split(".")) == len(parts) and all(map(fnmatchcase, names, parts))
    ]
    usable = [name for name in found if not _unfit(calls[name])]
    if found and not usable:
        raise InputError(f"where: {found[0]} {_unfit(calls[found[0]])}; name other modules")
    if not usable:
        known = _residual_blocks(model, calls)
        known = known or [name for name, call in calls.items() if not _unfit(call)]
        raise InputError(
            f"where: nothing that {type(model).__name__} calls is named {pattern!r}; "
            f"give some of {_listed(known)}"
        )
    return usable


def _residual_blocks(model: nn.Module, calls: dict[str, Call]) -> list[str]:
    """Return the outermost residual blocks, in the order of their calls."""
    found: list[str] = []
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in found)
        if name not in calls or _unfit(calls[name]) or inner:
            continue
        if isinstance(module, FeatureDenoising) or is_from_torch(module):
            continue
        has_convolution = any(isinstance(m, nn.Conv2d) for m in module.modules())
        if has_convolution and is_residual(module):
            found.append(name)
    return [name for name in calls if name in found]


def _parts(model: nn.Module) -> list[str]:
    """Return the names of the parts of a model, those inside a wrapper of one part."""
    prefix, inside = "", dict(model.named_children())
    while len(inside) == 1:
        ((name, model),) = inside.items()
        prefix, inside = f"{prefix}{name}.", dict(model.named_children())
    return [prefix + name for name in inside] or [prefix.rstrip(".")]


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@dataclass(frozen=True, slots=True)
class AddedCost:
    """What a change adds to a model, in parameters and multiply-accumulates (MACs) for one image.

    MACs are those of convolutions and matrix products. Means, medians, windows and activations are
    not counted: they cost memory traffic rather than arithmetic.

    Attributes:
        parameters: Number of parameters added.
        macs: Number of MACs added.
        parameters_before: Number of parameters of the unchanged model.
        macs_before: Number of MACs of the unchanged model.
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

    Copies of both are run on one image of noise in evaluation mode; on the meta device that is
    free.

    Raises:
        InputError: A model cannot take such an image.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from art_denoised import add_feature_denoising
        >>> with torch.device("meta"):
        ...     model = resnet18()
        >>> print(added_cost(model, add_feature_denoising(model), (3, 224, 224)))
        adds 0.70 M parameters to 11.69 M (+6.0%) and 1.18 GMAC to 1.81 (+65.1%)
    """
    parameters, macs = _cost(before, input_shape)
    more_parameters, more_macs = _cost(after, input_shape)
    return AddedCost(more_parameters - parameters, more_macs - macs, parameters, macs)


def _cost(model: nn.Module, input_shape: Shape) -> tuple[int, int]:
    with FlopCounterMode(display=False) as counter:
        Trial(model, input_shape)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def load_trained(network: nn.Module, weights: Path | str) -> nn.Module:
    """Return a copy of a network with the blocks, activations and weights of a file, in eval mode.

    Args:
        network: Network that was trained, as its own code builds it. The file says which blocks
            and activations to put in; which code to call is the caller's to name.
        weights: A model.safetensors of train-robust, a file of `save_optimized`, or other weights
            of the network as it is.

    Raises:
        InputError: Weights that cannot be read or do not fit, or a damaged note in the file.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> from art_denoised.demo import digits_network
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "model.safetensors")
        ...     save_file(digits_network().state_dict(), path)
        ...     load_trained(digits_network(), path).training
        False
    """
    weights = Path(weights)
    state = read_state_dict(weights)
    note = _note(weights)
    with torch.random.fork_rng(devices=[]):  # blocks draw weights, which are replaced
        model = change_network(network, note)
    if note.get("optimized") is not None:
        model = as_optimized(model, note["optimized"])
    model.load_state_dict(fitting_state(model, state, weights))
    return model.eval()


def noted_changes(weights: Path) -> dict[str, Any]:
    """Return how the network of a file was changed before its training; empty: not at all.

    Raises:
        InputError: The file is damaged, or holds a network that was optimized, which trains badly.
    """
    read_state_dict(weights)
    note = _note(weights)
    if note.get("optimized") is not None:
        raise InputError(f"{weights} was optimized; give the weights that it was made of")
    changed = note.get("activation") or note.get("feature_denoising")
    return {name: value for name, value in note.items() if value is not None} if changed else {}


def change_network(network: nn.Module, changes: Mapping[str, Any]) -> nn.Module:
    """Return a copy of a network with its activations replaced and denoising blocks put in.

    Args:
        network: Any network.
        changes: What train-robust notes in its files, each or None: ``activation``, a name;
            ``feature_denoising``, an operation; ``where``, names joined by commas;
            ``input_shape``, the shape of an image.

    Raises:
        InputError: See `smooth_activations` and `add_feature_denoising`.

    Example:
        >>> from art_denoised.demo import digits_network
        >>> changes = {"activation": "silu", "input_shape": (1, 8, 8)}
        >>> model = change_network(digits_network(), changes)
        >>> any(isinstance(module, torch.nn.SiLU) for module in model.modules())
        True
    """
    model = copy.deepcopy(network)
    if activation := changes.get("activation"):
        model = smooth_activations(model, activation, input_shape=tuple(changes["input_shape"]))
    if operation := changes.get("feature_denoising"):
        where = changes.get("where") or "stages"
        model = add_feature_denoising(
            model,
            where.split(",") if "," in where else where,
            operation,
            input_shape=tuple(changes["input_shape"]),
        )
    return model


class _Note(msgspec.Struct):
    """What a file notes of its network: how it was changed before training, or optimized after."""

    activation: str | None = None
    feature_denoising: str | None = None
    where: str | None = None
    input_shape: tuple[int, int, int] | None = None
    optimized: Optimization | None = None

    def __post_init__(self) -> None:
        if self.input_shape is None and (self.activation or self.feature_denoising):
            raise ValueError("a change without a shape")
        if self.input_shape is not None and min(self.input_shape) < 1:
            raise ValueError("an empty shape")


def _note(weights: Path) -> dict[str, Any]:
    """Return what a file says of its network; nothing if it has no note."""
    if weights.suffix != ".safetensors":
        return {}
    with safe_open(weights, "pt") as file:
        text = (file.metadata() or {}).get("art_denoised", "{}")
    try:
        return msgspec.structs.asdict(msgspec.json.decode(text, type=_Note))
    except (msgspec.MsgspecError, ValueError):
        raise InputError(
            f"{weights} has a damaged note {text[:40]!r}; train the network again"
        ) from None
