"""Networks by factory, devices by name, and weights, which are read without executing anything."""

from __future__ import annotations

import hashlib
import importlib
import json
import pickle
import struct
import sys
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from art_denoised import checks
from art_denoised.checks import InputError, one_line

# First bytes of what is a pickle: the zip that torch.save writes, or a bare one.
_PICKLES = (b"PK", b"\x80")
# DataParallel adds "module.", torch.compile "_orig_mod.", Lightning and many wrappers "model.", and
# a Sequential(normalise, network) numbers its network 1.
_PREFIXES = ("module.", "_orig_mod.", "model.", "1.")
_PUBLISHED = "art-denoised"  # before the name of weights that this project publishes
_WRAPPED = "network."  # prefix of all names in a `PretrainedClassifier`
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # names of the state dict in a file
_DAMAGED = (  # how torch.load fails on a file that is cut off or of another format
    *(RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError),
    struct.error,
)


def load_module(name: str) -> nn.Module:
    """Call the function ``package.module:function`` and return the module that it makes.

    Args:
        name: Name of the function, which is found from the current folder too and is called
            without arguments.

    Raises:
        InputError: It cannot be imported, fails, or returns something else than a module.

    Example:
        >>> type(load_module("art_denoised.demo:digits_denoiser")).__name__
        'DnCNN'
    """
    module_name, colon, factory_name = name.partition(":")
    if not (colon and module_name and factory_name):
        raise InputError(f"network is {name!r}; give package.module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except Exception as error:  # whatever the module runs while it is imported
        known = isinstance(error, (ImportError, AttributeError))
        kind = "" if known else f"{type(error).__name__}: "
        raise InputError(f"{name} cannot be imported: {kind}{one_line(error)}") from error
    try:
        module = factory()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name}() failed: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{name}() returned {type(module).__name__}; return an nn.Module")
    return module


def find_device(name: str) -> torch.device:
    """Return a device that works here.

    Args:
        name: Name of the device, as torch knows it; "auto" is a GPU if there is one, else the CPU.

    Raises:
        InputError: There is no such device.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # the meta device has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name} cannot be used here: {one_line(error)}") from None
    return device


def read_state_dict(path: Path | str) -> dict[str, Tensor]:
    """Read named tensors from a .safetensors file or a torch checkpoint, executing nothing.

    Args:
        path: A .safetensors file, or a file of torch.save (.pt, .pth, .tar) that holds a state
            dict, or a dictionary with one under ``state_dict``, ``model_state_dict``, ``model`` or
            ``net``.

    Returns:
        Name -> tensor, on the CPU.

    Raises:
        InputError: The file is missing, damaged, holds no tensors, or needs unsafe unpickling.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"epoch": 3, "state_dict": {"w": torch.ones(2)}}, folder + "/a.pth.tar")
        ...     read_state_dict(folder + "/a.pth.tar")
        {'w': tensor([1., 1.])}
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist; give a file")
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if isinstance(found, Mapping):
        inside = [name for name in _WRAPPERS if isinstance(found.get(name), Mapping)]
        if len(inside) > 1:
            raise InputError(
                f"checkpoint {path} holds weights under {' and '.join(inside)}; save one of them"
            )
        found = found[inside[0]] if inside else found
    if not (
        isinstance(found, Mapping)
        and found
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())
    ):
        raise InputError(f"checkpoint {path} holds no state dict; save model.state_dict()")
    return {name: checks.dense(f"{name} of checkpoint {path}", v) for name, v in found.items()}


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            tied = file.metadata() or {}
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"checkpoint {path} is not a safetensors file: {error}") from None
    # Of tensors that share memory safetensors.save_model writes one, and notes the others' names.
    return state | {name: state[kept] for name, kept in tied.items() if kept in state}


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():  # about what is refused below anyway
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            is_pickle = file.read(2).startswith(_PICKLES)
        if is_pickle and "weights only" in str(error).lower():
            raise InputError(
                f"checkpoint {path} needs unsafe unpickling, which could run any code; "
                "where you trust it, convert its state dict to safetensors"
            ) from None
    except PermissionError:
        raise InputError(f"checkpoint {path} cannot be read; check its permissions") from None
    except _DAMAGED:
        pass
    raise InputError(f"checkpoint {path} is damaged or of another format; give an intact copy")


def find_published(source: Path | str) -> Path | str:
    """Return the path of weights that this project names ``art-denoised:NAME``; others unchanged.

    They are in the folder ``results`` of a clone, in the current folder or beside the package.
    """
    prefix, colon, name = str(source).partition(":")
    if not colon or prefix != _PUBLISHED:
        return source
    roots = (Path("results"), Path(__file__).parents[2] / "results")
    root = next((one for one in roots if (one / "weights.json").is_file()), None)
    if root is None:
        raise InputError(f"art-denoised:{name} is part of a clone; give the path of its weights")
    known = json.loads((root / "weights.json").read_text(encoding="utf-8"))
    entry = known[checks.choice("published weights", name, known)]
    weights = root / entry["weights"]
    found = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else ""
    if found != entry["sha256"]:
        raise InputError(f"{weights} is not the published file; restore it with git checkout")
    return root / entry["path"]


def load_weights(module: nn.Module, path: Path | str) -> None:
    """Load a checkpoint into a module of your own.

    Prefixes that wrappers give to all names are stripped: ``module.``, ``_orig_mod.``, ``model.``
    and ``1.``.

    Args:
        module: Module that receives the weights in its own dtype; it is not changed where they do
            not fit.
        path: File that `read_state_dict` reads.

    Raises:
        InputError: The file cannot be read, or its names or shapes do not fit.

    Example:
        >>> import tempfile
        >>> layer = nn.Linear(2, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"1.module." + k: v for k, v in layer.state_dict().items()},
        ...                folder + "/a.pth")
        ...     load_weights(layer, folder + "/a.pth")
    """
    module.load_state_dict(fitting_state(module, read_state_dict(path), path))


def fitting_state(
    module: nn.Module, state: dict[str, Tensor], path: Path | str
) -> dict[str, Tensor]:
    """Return ``state`` under the names of ``module``, which it must fit."""
    own: Any = module.state_dict()
    state = strip_prefixes(state, own.keys())
    if all(name.startswith(_WRAPPED) for name in own) and state.keys() != own.keys():
        state = {_WRAPPED + name: value for name, value in state.items()}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise InputError(
            f"checkpoint {path} does not match {type(module).__name__}: keys "
            f"{' and '.join(parts)}; give the architecture that was trained"
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise InputError(
                f"checkpoint {path} does not match {type(module).__name__}: {name} has shape "
                f"{tuple(state[name].shape)}, not {tuple(tensor.shape)}; give the trained "
                "architecture"
            )
        if tensor.is_floating_point() and not state[name].is_floating_point():
            raise InputError(
                f"checkpoint {path} holds {name} as {state[name].dtype}; "
                "give floating-point weights"
            )
    versioned: Any = OrderedDict(state)
    versioned._metadata = own._metadata  # modules such as torchvision's MNASNet ask for a version
    found: dict[str, Tensor] = versioned
    return found


def strip_prefixes(state: dict[str, Tensor], wanted: object) -> dict[str, Tensor]:
    """Strip known prefixes that all names share, until the names are those wanted."""
    while state.keys() != wanted:
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): value for name, value in state.items()}
                break
        else:
            break
    return state
