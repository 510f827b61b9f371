"""What runs over a data set have in common: images checked, batches packed, rows written."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.data import ImageData
from art_denoised.evaluation.logs import LogWriter
from art_denoised.evaluation.records import CertifyRow, Log, PredictRow
from art_denoised.evaluation.tsv import TsvWriter
from art_denoised.evaluation.tuning import tune
from art_denoised.smoothing.certify import find_noise, sampling_record
from art_denoised.smoothing.packing import Task, run_packed, takes_channels_last
from art_denoised.smoothing.procedures import Procedure
from art_denoised.smoothing.sampling import model_device, model_dtype
from art_denoised.storage import make_folder, structure_fingerprint, weights_fingerprint
from art_denoised.types import Image


class Runner:
    """A model, the images of a data set, and how they are sampled, checked before a log is opened.

    Args:
        base: Base classifier in eval mode, on the device to use.
        data: Pairs of an image and its class.
        sigma: Noise level in image units.
        noise: Name of the kind of noise.
        seed: Seed of the noise.
        batch_size: Noisy copies classified at once; None: measured.
        indices: Which images; None: all.

    Raises:
        InputError: Something cannot be used.

    Example:
        >>> from art_denoised.demo import digits_classifier
        >>> from art_denoised.data import load_data
        >>> runner = Runner(digits_classifier(), load_data("digits"), 0.25, "gaussian", 0, 64, [7])
        >>> runner.settings({"n": 100}, identity=None)["sigma"]
        0.25
    """

    def __init__(
        self,
        base: nn.Module,
        data: ImageData,
        sigma: float,
        noise: str,
        seed: int,
        batch_size: int | None = None,
        indices: Sequence[int] | None = None,
    ) -> None:
        checks.eval_mode(base)
        self._base, self._data = base, data
        self._noise = find_noise(noise, sigma)
        self._seed = checks.count("seed", seed, 0)
        if batch_size is not None:
            batch_size = checks.count("batch_size", batch_size)
        self.indices = checks.indices(range(len(data)) if indices is None else indices, len(data))
        self._classes: int | None = None
        if len(self.indices):
            # From one image: a misfit is found before the work starts.
            x, _ = self._image(self.indices[0])
            self._classes = checks.class_count(base, x[None].to(model_dtype(base)))
            self._noise.centre(x)
            self._batch = self._how_to_batch(x, batch_size)

    def settings(
        self, options: Mapping[str, Any], identity: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Return all that the rows depend on, except the images."""
        settings: dict[str, Any] = {
            **(identity or {}),
            "weights": weights_fingerprint(self._base),
            "structure": structure_fingerprint(self._base),
            "dtype": str(model_dtype(self._base)).removeprefix("torch."),
            "noise": model_device(self._base).type,
            "sigma": self._noise.sigma,
            **options,
            "seed": self._seed,
        }
        if self._noise.name != "gaussian":
            settings["noise"] = self._noise.name
        return settings

    def answers(
        self,
        todo: Sequence[int],
        procedure: Callable[[int, int, dict[str, Any]], Procedure[Any]],
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[int, int, Any, float]]:
        """Yield (index, label, answer, seconds since the last one) as images are finished."""
        labels: dict[int, int] = {}
        failure: list[Exception] = []

        def tasks() -> Iterator[Task[Any]]:
            for index in todo:
                try:
                    x, labels[index] = self._image(index)
                    centred = self._noise.centre(x)
                except (InputError, OSError) as error:
                    failure.append(error)  # raised once the images before it are finished
                    return
                record = sampling_record(self._base, self._noise, centred.shape, self._seed)
                yield Task(index, x, procedure(index, labels[index], record))

        if not todo:
            return
        last = time.perf_counter()
        for index, answer in run_packed(
            self._base, tasks(), noise=self._noise, seed=self._seed, stop=stop, **self._batch
        ):
            now = time.perf_counter()
            yield index, labels.pop(index), answer, now - last
            last = now
        if failure:
            raise failure[0]

    def _image(self, index: int) -> tuple[Image, int]:
        x, label = self._data[index]
        try:
            x = checks.images(x[None])[0].float()
            label = int(checks.labels([label], self._classes)[0])
        except InputError as error:
            raise InputError(f"image {index}: {error}") from None
        return x.to(model_device(self._base)), label

    def _how_to_batch(self, x: Image, batch_size: int | None) -> dict[str, Any]:
        if batch_size is None:
            tuning = tune(self._base, x)
            return {"batch_size": tuning.batch_size, "channels_last": tuning.channels_last}
        return {"batch_size": batch_size, "channels_last": takes_channels_last(self._base, x)}


def write_rows(
    kind: str,
    run: Runner,
    procedure: Callable[[int, int, dict[str, Any]], Procedure[Any]],
    make_row: Callable[[int, int, Any, float], CertifyRow | PredictRow],
    out: Path | str,
    settings: Mapping[str, Any],
    resume: bool,
    tsv: bool,
    progress: bool,
) -> Log:
    """Answer for all images that the log does not hold yet, a row each, and return the log."""
    with open_log(kind, out, settings, resume) as log:
        todo = [index for index in run.indices if index not in log.rows]
        total, done = len(run.indices), len(run.indices) - len(todo)
        with (
            TsvWriter(log.path.with_suffix(".tsv"), kind, log.rows.values(), enabled=tsv) as table,
            tqdm(desc=kind, unit="image", initial=done, total=total, disable=not progress) as bar,
        ):
            for answer in run.answers(todo, procedure):
                row = make_row(*answer)
                log.append(row)
                table.append(row)
                bar.update()
        return Log(kind, dict(settings), tuple(log.rows[index] for index in sorted(log.rows)))


def open_log(kind: str, out: Path | str, settings: Mapping[str, Any], resume: bool) -> LogWriter:
    """Open ``out/kind.jsonl``, telling the user what had to be repaired."""
    log = LogWriter(make_folder(Path(out)) / f"{kind}.jsonl", kind, settings, resume=resume)
    for notice in log.notices:
        tqdm.write(f"notice: {notice}", file=sys.stderr)
    return log
