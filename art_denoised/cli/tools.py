"""Commands that convert published models, list names, and show what is installed."""

from __future__ import annotations

import platform
from importlib import metadata
from json import loads as parsed
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from art_denoised.cli.options import print_json, print_result
from art_denoised.reports.terminal import Block, Column, Lines, Table, escaped, show
from art_denoised.runs.progress import waiting

_ABSENT = "not installed"
NEEDED = ("art-denoised", "torch", "numpy", "adversarial-robustness-toolbox", "diffusers")
# Package, the extra that installs it, and what it adds.
OPTIONAL = (
    ("torchvision", "vision", "networks torchvision:NAME, data torchvision:NAME:DIR"),
    ("timm", "names", "networks timm:NAME"),
    ("transformers", "names", "networks hf:OWNER/NAME"),
    ("pyautoattack", "attacks", "attacks autoattack, autoattack-rand, apgd-*, fab and square"),
    ("torchattacks", "attacks", "attacks torchattacks:NAME"),
    ("httpx", "api", "classifiers behind HTTP"),
    ("ray", "cluster", "workers on many machines"),
    ("tenacity", "api", "paid classifiers that are queried again after an error"),
)


def convert(
    source: Annotated[Path, Parameter(name="IN")],
    out: Annotated[Path, Parameter(name="OUT")],
    /,
    *,
    openai: str | None = None,
    classes: int | None = None,
    json: bool = False,
) -> None:
    """Write a diffusion model of EDM or OpenAI as safetensors and a config.

    Nothing that the file contains is executed. The folder is loaded without
    a pickle, wherever a diffusion model is named.

    For example:
      art-denoised convert edm-cifar10-32x32-cond-vp.pkl models/edm-cifar10

    Args:
        source: Pickle of EDM (.pkl), or U-Net of OpenAI (.pt).
        out: Folder to write; it must be new or empty.
        openai: Name of the published model, such as imagenet256-uncond, or a JSON object of flags.
            By default the name of the file decides.
        classes: Number of classes, if the network embeds one more as null class.
        json: Print the result as JSON.
    """
    from art_denoised.checks import InputError
    from art_denoised.diffusion.folders import load_diffusion, save_diffusion

    if not source.is_file():
        raise InputError(f"{source} is no file; give a .pkl of EDM or a .pt of OpenAI")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder; give another")
    with waiting(f"converting {escaped(str(source))}"):
        model = load_diffusion(source, openai=_flags(openai), classes=classes)
        save_diffusion(model, out)
    count = sum(p.numel() for p in model.parameters())
    known = "no classes" if model.classes is None else f"{model.classes} classes"
    print_result(
        {"folder": str(out), "parameters": count, "classes": model.classes},
        f"{out}: {count / 1e6:.1f} million parameters, {known}",
        json=json,
    )


def _flags(text: str | None) -> str | dict[str, Any] | None:
    from art_denoised.checks import InputError

    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return dict(parsed(text))
    except ValueError as error:
        raise InputError(f"--openai is no JSON object: {error}; give a name or flags") from None


def doctor(*, json: bool = False) -> None:
    """Show versions, devices and optional packages, and what each would add.

    Include this page when you report a problem.

    Args:
        json: Print everything as JSON.
    """
    optional = [(name, _version(name), f"[{extra}]", adds) for name, extra, adds in OPTIONAL]
    with waiting("looking for devices"):
        devices = _devices()
    if json:
        needed = {"python": platform.python_version(), **{name: _version(name) for name in NEEDED}}
        keys = ("version", "extra", "adds")
        added = {name: dict(zip(keys, rest, strict=True)) for name, *rest in optional}
        print_json({"packages": needed, "devices": dict(devices), "optional": added})
        return
    blocks: list[Block] = [
        Table(
            (Column("package", left=True), Column("version", left=True)),
            (("python", platform.python_version()), *((name, _version(name)) for name in NEEDED)),
        ),
        Table((Column("device", left=True), Column("hardware", left=True)), tuple(devices)),
        Table(
            tuple(Column(head, left=True) for head in ("optional", "version", "extra", "adds")),
            tuple(optional),
        ),
    ]
    if missing := sorted({extra for _, version, extra, _ in optional if version == _ABSENT}):
        extras = ",".join(extra.strip("[]") for extra in missing)
        blocks.append(Lines((f"To add what is missing, in a clone: pip install '.[{extras}]'",)))
    show(blocks)


def models(pattern: str = "*", /, *, json: bool = False) -> None:
    """List the names of networks that --model takes.

    Names of timm and torchvision are listed, where they are installed. hf:OWNER/NAME (Hugging
    Face), robustbench:NAME:DATASET:THREAT and your own package.module:function are taken as well.

    For example:
      art-denoised models 'resnet50*'

    Args:
        pattern: Pattern of names with * and ?, or a part of them.
        json: Print the names as a JSON list.
    """
    from art_denoised.checks import InputError
    from art_denoised.models.loading import list_classifiers

    with waiting("asking timm and torchvision for their names"):
        names = list_classifiers(pattern)
    if not names:
        raise InputError(f"no network is named {pattern!r}; give another pattern")
    print_result(names, *names, json=json)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return _ABSENT


def _devices() -> list[tuple[str, str]]:
    import torch

    found = [("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")]
    for i in range(torch.cuda.device_count()):
        hardware = torch.cuda.get_device_properties(i)
        found.append((f"cuda:{i}", f"{hardware.name}, {hardware.total_memory / 2**30:.0f} GiB"))
    if torch.backends.mps.is_available():
        found.append(("mps", "Apple GPU"))
    return found
