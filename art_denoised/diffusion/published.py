"""Published diffusion models that are no diffusers folders: files of OpenAI and of EDM.

Both become a config and named tensors, and are written as a folder of config.json and safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from art_denoised.checks import InputError
from art_denoised.diffusion.edm import DhariwalUNet, SongUNet, edm_diffusion
from art_denoised.diffusion.edm_pickle import read_edm_pickle
from art_denoised.diffusion.model import DiffusionModel
from art_denoised.diffusion.openai import (
    OpenAIUNet,
    check_flags,
    openai_diffusion,
    openai_flags,
    published_name,
)
from art_denoised.models.loading import fitting_state, read_state_dict

WEIGHTS = "diffusion_pytorch_model.safetensors"
PUBLISHED_NETWORKS = (OpenAIUNet, SongUNet, DhariwalUNet)
_BUILDERS: dict[str, Callable[..., DiffusionModel]] = {
    "OpenAIUNet": openai_diffusion,
    "EDM": edm_diffusion,
}


def is_published(path: Path, openai: object) -> bool:
    """Whether a file or folder is read here: it names its network, or ``openai`` does."""
    if path.is_dir():
        return read_config(path / "config.json").get("_class_name") in _BUILDERS
    return path.suffix == ".pkl" or openai is not None or published_name(path.stem) is not None


def load_published(
    path: Path, classes: int | None, openai: str | Mapping[str, Any] | None
) -> DiffusionModel:
    """Load a file of OpenAI or EDM, or a folder of `save_published`, in float32 and eval mode.

    If a file of OpenAI embeds one class more than ``classes``, that is the null class. ``openai``
    is a name of a published model or flags; None: by the name of the file.
    """
    if path.is_dir():
        config, state = read_config(path / "config.json"), read_state_dict(path / WEIGHTS)
        build = _BUILDERS[config.pop("_class_name")]
    elif path.suffix == ".pkl":
        if openai is not None:
            raise InputError(f"{path} is a pickle, as EDM writes them; leave out openai")
        (config, state), build = read_edm_pickle(path), edm_diffusion
    else:
        state, build = read_state_dict(path), openai_diffusion
        named = published_name(path.stem) or ""
        config = _openai_config(path, state, classes, named if openai is None else openai)
    try:
        with torch.device("meta"):  # no weights are drawn, and no memory is taken
            model = build(**config)
    except TypeError as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if classes not in (None, model.classes):
        known = "no classes" if model.classes is None else f"{model.classes} classes"
        raise InputError(f"classes is {classes}, but the model in {path} has {known}")
    model.network.load_state_dict(fitting_state(model.network, state, path), assign=True)
    return model.float().eval()


def _openai_config(
    path: Path, state: dict[str, Tensor], classes: int | None, openai: str | Mapping[str, Any]
) -> dict[str, Any]:
    check_flags(openai_flags(openai), state, path)
    if "label_emb.weight" not in state:
        return {"openai": openai}
    embedded = len(state["label_emb.weight"])
    if classes not in (None, embedded, embedded - 1):
        raise InputError(
            f"classes is {classes}, but {path} embeds {embedded}; give that number, or one less if "
            "the last is a null class"
        )
    null_class = classes if classes == embedded - 1 else None
    return {"openai": openai, "classes": classes or embedded, "null_class": null_class}


def save_published(model: DiffusionModel, folder: Path) -> None:
    """Write a model of OpenAI or EDM as config.json and safetensors."""
    network = model.network
    if isinstance(network, OpenAIUNet):
        config = {"_class_name": "OpenAIUNet", "openai": msgspec.to_builtins(network.flags)}
        config |= {"classes": model.classes, "null_class": model.null_class}
    else:
        assert isinstance(network, SongUNet | DhariwalUNet)
        config = {"_class_name": "EDM", **msgspec.to_builtins(network.config)}
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def read_config(path: Path) -> dict[str, Any]:
    """Return a configuration; empty if it is missing or damaged, which is reported elsewhere."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
