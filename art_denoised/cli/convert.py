"""The command that writes published diffusion models as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from art_denoised.cli.options import print_result
from art_denoised.reports.terminal import escaped
from art_denoised.runs.progress import waiting


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
    from json import loads

    from art_denoised.checks import InputError

    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return dict(loads(text))
    except ValueError as error:
        raise InputError(f"--openai is no JSON object: {error}; give a name or flags") from None
