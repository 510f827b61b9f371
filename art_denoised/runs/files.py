"""Files that survive a killed process, and folders with one writer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from art_denoised.checks import InputError


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file so that it always holds the old content or the new, never a part.

    Args:
        path: File to write.
        content: All of its bytes.

    Raises:
        InputError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder, "a"), b"content")
        ...     Path(folder, "a").read_bytes()
        b'content'
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename: a power cut could leave an empty file
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); choose another place"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path | str) -> Path:
    """Create a folder and its parents where they are missing, and return its path.

    Raises:
        InputError: A file of that name exists, or the folder cannot be created.

    Example:
        >>> make_folder("/").is_dir()
        True
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{folder} exists and is not a directory; choose another folder") from None
    except OSError as error:
        raise InputError(
            f"{folder} cannot be created ({error.strerror}); choose another folder"
        ) from None
    return folder


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Hold a file or folder for this process alone, by a hidden lock file beside or inside it.

    Args:
        path: What is about to be written.

    Raises:
        InputError: Another process is writing it, or nothing can be written there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name, sole_writer(Path(name)):
        ...     Path(name, "a").touch()
    """
    hidden = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    try:
        lock = filelock.FileLock(hidden, timeout=0)
        lock.acquire()
    except filelock.Timeout:
        if not hidden.exists():  # as on a file system that takes no files
            raise InputError(f"{path} cannot be written; choose another folder") from None
        raise InputError(
            f"{path} is being written by another process; wait for it or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()
