"""The batches of a training, in an order that can be repeated, and random states that can too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.runs.identity import fingerprint
from art_denoised.training.config import Augmentation, TrainingConfig
from art_denoised.types import Images, Labels

_LOADING = (  # what is kept of a DataLoader
    *("num_workers", "collate_fn", "pin_memory", "worker_init_fn"),
    *("timeout", "multiprocessing_context", "prefetch_factor"),
)
_SAMPLE = 16  # images that stand for all when data are compared


@contextmanager
def seeded(key: Sequence[int] | int, device: torch.device) -> Iterator[None]:
    """Seed torch's random states of the CPU and of one device alone, and restore them afterwards.

    The state of accelerators other than CUDA is not restored. A key of several numbers is hashed.
    """
    seed = key if isinstance(key, int) else _derived(key)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)
        yield


def _derived(key: Sequence[int]) -> int:
    """Return a seed of 64 bits; zeros at the end of a key are ignored."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


class Batches:
    """Batches of a data set or of a DataLoader's, the same in every run of a seed."""

    def __init__(self, data: Any, config: TrainingConfig) -> None:
        self._loader = data if isinstance(data, DataLoader) else None
        self._data: Dataset[Any] = data.dataset if isinstance(data, DataLoader) else data
        if isinstance(self._data, IterableDataset) or not isinstance(self._data, Sized):
            raise InputError(
                "the data are a stream without length; give a map-style data set, whose order can "
                "be repeated"
            )
        self.images = len(self._data)
        self._size = min(config.batch_size, self.images)
        self._seed = config.seed
        if not self.images:
            raise InputError("there are no images to train on; give at least one")
        if self._loader is not None and not _draws_all(self._loader):
            raise InputError(
                "the DataLoader has a sampler of its own, which would be ignored: the config "
                "decides on batches and their order; give Subset(data, indices)"
            )

    def __len__(self) -> int:
        return self.images // self._size

    def one(self, index: int = 0) -> tuple[Images, Labels]:
        """Return one image and its label as a batch."""
        collate = default_collate if self._loader is None else self._loader.collate_fn
        with seeded([self._seed, 4, index], torch.device("cpu")):
            try:
                batch = collate([self._data[index]])
            except (TypeError, ValueError, LookupError, NotImplementedError) as error:
                raise InputError(_no_pairs(error)) from None
        return _read(batch)

    def identity(self) -> dict[str, Any]:
        """Return what tells these data from others: their number, and a sample of them."""
        indices = np.linspace(0, self.images - 1, min(_SAMPLE, self.images)).round().astype(int)
        once, again = (
            fingerprint(*(tensor for index in indices.tolist() for tensor in self.one(index)))
            for _ in range(2)
        )
        # Data may draw from random states other than torch's.
        return {"images": self.images, "sample": once if once == again else "random"}

    def of_epoch(self, epoch: int, first: int) -> Iterator[tuple[Images, Labels]]:
        """Yield the batches of an epoch from number ``first`` on."""
        order = np.random.default_rng([self._seed, 0, epoch]).permutation(self.images)
        batches = order[: len(self) * self._size].reshape(len(self), self._size)[first:].tolist()
        # Not the global generator; the seeds of worker processes follow from it.
        generator = torch.Generator().manual_seed(_derived([self._seed, 2, epoch]))
        options: dict[str, Any] = {"generator": generator}
        if self._loader is not None:
            options |= {name: getattr(self._loader, name) for name in _LOADING}
        loaded = _one_size(DataLoader(self._data, batch_sampler=batches, **options))
        for step in range(epoch * len(self) + first, (epoch + 1) * len(self)):
            with seeded([self._seed, 3, step], torch.device("cpu")):  # data may draw, as crops do
                batch = next(loaded)
            yield _read(batch)


def stack_pairs(data: Any, classes: int | None = None) -> tuple[Images, Labels]:
    """Read a validation set, pairs of image and label, into two tensors."""
    try:
        images, labels = zip(*(data[i] for i in range(len(data))), strict=True)
        x = torch.stack([torch.as_tensor(image) for image in images])
        y = torch.tensor([int(label) for label in labels])
    except (TypeError, ValueError, RuntimeError, LookupError, NotImplementedError):
        raise InputError(
            f"the validation set is a {type(data).__name__} that cannot be read; give pairs of an "
            "image and its class, at least one, all images of one size (of a DataLoader, its "
            "dataset)"
        ) from None
    return checks.images(x).float(), checks.labels(y, classes)


def augment(x: Images, how: Augmentation = "crop+flip") -> Images:
    """Crop each image from a reflected border of an eighth of its size, and flip it, at random."""
    if how == "none":
        return x
    n, _, height, width = x.shape
    border = max(1, min(height, width) // 8)
    padded = F.pad(x, (border,) * 4, mode="reflect")
    top, left = torch.randint(0, 2 * border + 1, (2, n), device=x.device)
    rows = top[:, None] + torch.arange(height, device=x.device)
    columns = left[:, None] + torch.arange(width, device=x.device)
    if how == "crop+flip":
        flipped = torch.rand(n, device=x.device) < 0.5
        columns = torch.where(flipped[:, None], columns.flip(1), columns)
    item = torch.arange(n, device=x.device)[:, None, None]
    # Advanced indices around the channel slice come first: (n, height, width, channels).
    return padded[item, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _read(batch: Any) -> tuple[Images, Labels]:
    try:
        x, y = batch
        return checks.images(x).float(), checks.labels(y)
    except (TypeError, ValueError) as error:
        raise InputError(_no_pairs(error)) from None


def _no_pairs(error: Exception) -> str:
    return f"the data must be pairs of an image and its class: {error}"


def _draws_all(loader: DataLoader[Any]) -> bool:
    """Whether an epoch of a DataLoader is its data, each once, in batches."""
    return (
        type(loader.batch_sampler) is BatchSampler
        and type(loader.sampler) in (SequentialSampler, RandomSampler)
        and len(loader.sampler) == len(loader.dataset)  # type: ignore[arg-type]
    )


def _one_size(batches: DataLoader[Any]) -> Iterator[Any]:
    try:
        yield from batches
    except RuntimeError as error:
        if "stack expects each tensor to be equal size" not in str(error):
            raise
        raise InputError(
            "the images of the data differ in size; bring them to one size first"
        ) from None
