"""Files that survive: written whole or not at all, and weights that can be told apart."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import nn

from art_denoised.checks import InputError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it holds the old content or the new, whenever the process dies.

    Raises:
        InputError: It cannot be written there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder, "a"), b"content")
        ...     Path(folder, "a").read_bytes()
        b'content'
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; give another place") from None
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> Path:
    """Return a folder that exists, making it where it does not.

    Raises:
        InputError: Something else is in its way.

    Example:
        >>> make_folder(Path("/")).is_dir()
        True
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{folder} is in the way of the output folder; give another") from None
    return folder


def weights_fingerprint(model: nn.Module) -> str:
    """Return a short hash of all weights and buffers: equal for equal models, whatever the file.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> before = weights_fingerprint(layer)
        >>> _ = layer.bias.data.add_(1)
        >>> weights_fingerprint(layer) == before
        False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()[:16]
