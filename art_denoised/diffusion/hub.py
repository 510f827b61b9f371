"""Fetching a diffusion model from the Hugging Face hub: configurations and safetensors alone."""

from __future__ import annotations

import re
from pathlib import Path

from art_denoised.checks import InputError

# Nothing that would have to be unpickled is fetched, however large the repository.
FILES = ("*.json", "*diffusion_pytorch_model.safetensors")
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def fetch(name: str, revision: str | None = None) -> Path:
    """Return the local folder of a repository on the hub, downloaded where it is not cached.

    With ``HF_HUB_OFFLINE=1`` in the environment only the cache is looked at.

    Args:
        name: "owner/name".
        revision: Branch, tag or commit; None: its main branch. A commit makes a run repeatable.

    Raises:
        InputError: No such repository, or it cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if not _ID.fullmatch(name):
        raise InputError(f"{name} does not exist; give a folder, a file of weights or a hub id")
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(FILES)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"{name} is no folder here, and the hub does not give a repository of that name "
            f"({type(error).__name__}: {reason})"
        ) from None
    return Path(folder)
