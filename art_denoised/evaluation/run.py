"""Certify or predict a whole data set: one row an image, written as it is made, resumable."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.evaluation.data import ImageData
from art_denoised.evaluation.logs import LogWriter
from art_denoised.evaluation.records import CertifyRow, Log, PredictRow
from art_denoised.evaluation.tsv import TsvWriter
from art_denoised.smoothing.certify import certify, vote
from art_denoised.smoothing.sampling import model_device, model_dtype
from art_denoised.types import Image


def certify_data(
    base: nn.Module,
    data: ImageData,
    out: Path | str,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    seed: int = 0,
    batch_size: int = 64,
    indices: Sequence[int] | None = None,
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    tsv: bool = False,
    progress: bool = True,
) -> Log:
    """Certify images of a data set into the log ``out/certify.jsonl``.

    A row is written as soon as its image is done. A run that was killed goes on with
    ``resume=True`` and ends with the rows of one that was not.

    Args:
        base: Base classifier in eval mode, on the device to use.
        data: Pairs of an image (channels, height, width) in [0, 1] and its class.
        out: Folder for the log, created if need be.
        sigma: Standard deviation of the noise in image units.
        n0: Samples that select the class.
        n: Samples that bound its probability.
        alpha: Failure probability of each certificate.
        seed: Seed of the noise.
        batch_size: Noisy copies classified at once; changes nothing but speed.
        indices: Which images, all by default. An image's noise depends on its index alone.
        identity: What else must agree before a run is continued, such as the names of model and
            data. The weights are always compared.
        resume: Continue the run in ``out`` if there is one.
        tsv: Also write the field's six-column ``out/certify.tsv``.
        progress: Show a progress bar on standard error.

    Returns:
        The finished log.

    Raises:
        InputError: Something cannot be used; what was computed before stays in the log.
        OSError: The log cannot be written, for example on a full disk.

    Example:
        >>> import tempfile
        >>> from art_denoised.demo import digits_classifier
        >>> from art_denoised.evaluation.data import load_data
        >>> with tempfile.TemporaryDirectory() as out:
        ...     log = certify_data(
        ...         digits_classifier(), load_data("digits"), out,
        ...         sigma=0.1, n=100, indices=range(3), progress=False,
        ...     )
        >>> [row.idx for row in log.rows]
        [0, 1, 2]
    """
    sigma = checks.sigma(sigma)
    alpha = checks.alpha(alpha)
    options: dict[str, Any] = {
        "sigma": sigma,
        "alpha": alpha,
        "n0": checks.count("n0", n0),
        "n": checks.sample_count(n, alpha),
        "seed": checks.count("seed", seed, 0),
    }

    batch_size = checks.count("batch_size", batch_size)

    def row(index: int, x: Image, label: int) -> CertifyRow:
        start = time.perf_counter()
        certificate = certify(base, x, index=index, batch_size=batch_size, **options)
        return CertifyRow(
            idx=index,
            label=label,
            predict=certificate.label,
            radius=certificate.radius,
            seconds=time.perf_counter() - start,
            certificate=certificate,
        )

    settings = {**(identity or {}), **_settings(base), **options}
    return _run("certify", row, base, data, out, settings, indices, resume, tsv, progress)


def predict_data(
    base: nn.Module,
    data: ImageData,
    out: Path | str,
    *,
    sigma: float,
    n: int = 1000,
    alpha: float = 0.001,
    seed: int = 0,
    batch_size: int = 64,
    indices: Sequence[int] | None = None,
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    tsv: bool = False,
    progress: bool = True,
) -> Log:
    """Predict the smoothed classifier's labels into the log ``out/predict.jsonl``.

    Args, Returns, Raises: As `certify_data`; ``n`` samples vote, -1 is an abstention.

    Example:
        >>> import tempfile
        >>> from art_denoised.demo import digits_classifier
        >>> from art_denoised.evaluation.data import load_data
        >>> with tempfile.TemporaryDirectory() as out:
        ...     log = predict_data(
        ...         digits_classifier(), load_data("digits"), out,
        ...         sigma=0.1, n=100, indices=[5], progress=False,
        ...     )
        >>> len(log.rows)
        1
    """
    options: dict[str, Any] = {
        "sigma": checks.sigma(sigma),
        "alpha": checks.alpha(alpha),
        "n": checks.count("n", n),
        "seed": checks.count("seed", seed, 0),
    }

    batch_size = checks.count("batch_size", batch_size)

    def row(index: int, x: Image, label: int) -> PredictRow:
        start = time.perf_counter()
        answer = vote(base, x, index=index, batch_size=batch_size, **options)
        return PredictRow(
            idx=index,
            label=label,
            predict=answer.label,
            seconds=time.perf_counter() - start,
            vote=answer,
        )

    settings = {**(identity or {}), **_settings(base), **options}
    return _run("predict", row, base, data, out, settings, indices, resume, tsv, progress)


def weights_fingerprint(model: nn.Module) -> str:
    """Return a short hash of all weights and buffers: equal for equal models, whatever the file.

    Example:
        >>> import torch
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


def _settings(base: nn.Module) -> dict[str, Any]:
    return {
        "weights": weights_fingerprint(base),
        "dtype": str(model_dtype(base)).removeprefix("torch."),
        "noise": model_device(base).type,
    }


def _run(
    kind: str,
    make_row: Callable[[int, Image, int], Any],
    base: nn.Module,
    data: ImageData,
    out: Path | str,
    settings: Mapping[str, Any],
    indices: Sequence[int] | None,
    resume: bool,
    tsv: bool,
    progress: bool,
) -> Log:
    indices = range(len(data)) if indices is None else indices
    checks.eval_mode(base)
    classes = _classes(base, data, indices[0]) if indices else None
    folder = _make_folder(Path(out))
    with LogWriter(folder / f"{kind}.jsonl", kind, settings, resume=resume) as log:
        for notice in log.notices:
            tqdm.write(f"notice: {notice}", file=sys.stderr)
        done = {row.idx for row in log.rows}
        todo = [index for index in indices if index not in done]
        with TsvWriter(folder / f"{kind}.tsv", kind, log.rows, enabled=tsv) as table:
            for index in tqdm(
                todo,
                desc=kind,
                unit="image",
                initial=len(indices) - len(todo),
                total=len(indices),
                disable=not progress,
            ):
                x, label = _checked(data, index, classes)
                row = make_row(index, x, label)
                log.append(row)
                table.append(row)
        return Log(kind=kind, settings=dict(settings), rows=tuple(log.rows), notices=())


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{folder} is in the way of the output folder; give another") from None
    return folder


def _checked(data: ImageData, index: int, classes: int | None) -> tuple[Image, int]:
    x, label = data[index]
    try:
        x = checks.images(x[None])[0].float()
        label = int(checks.labels([label], classes)[0])
    except InputError as error:
        raise InputError(f"image {index}: {error}") from None
    return x, label


def _classes(base: nn.Module, data: ImageData, index: int) -> int:
    """Return the number of classes, from one image: a misfit is found before the work starts."""
    x, _ = _checked(data, index, None)
    return checks.class_count(base, x[None].to(model_device(base), model_dtype(base)))
