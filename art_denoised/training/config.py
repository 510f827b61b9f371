"""How to train: the config, what PyTorch makes of it, and batches in a repeatable order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel
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
from art_denoised.runs.journal import describe, fingerprint
from art_denoised.types import Images, Labels

Optimizer = Literal["adam", "sgd"]
Schedule = Literal["cosine", "one-cycle", "step", "milestones", "sat-milestones", "constant"]
Augmentation = Literal["crop+flip", "crop", "none"]
ParameterGroups = Callable[[nn.Module], list[dict[str, Any]]]
Tensors = list[Tensor] | tuple[Tensor, ...]
# When the learning rate falls to a tenth, in parts of the steps.
_MILESTONES = {
    "step": (1, 2, 3),
    "milestones": (35, 70, 95, 110),
    "sat-milestones": (30, 60, 90, 100),
}
_LOADING = (  # what is kept of a DataLoader
    *("num_workers", "collate_fn", "pin_memory", "worker_init_fn"),
    *("timeout", "multiprocessing_context", "prefetch_factor"),
)
_SAMPLE = 16  # images that stand for all when data are compared


def decayed_weights(network: nn.Module) -> list[dict[str, Any]]:
    """Group parameters so that weight decay acts on weights alone, as in the papers' releases.

    Weights are trained parameters of two or more dimensions that belong to no normalisation. One
    that is a single row in disguise, as the scales (channels, 1, 1) of ConvNeXt and of affine
    normalisations are, counts if its name is "weight", as in a layer with one output.
    """
    # Norms over several dimensions have weights that look like those of a linear layer.
    norms = {
        id(p) for m in network.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()
    }
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    trained = [p for _, p in named]
    weights = [
        p
        for name, p in named
        if p.ndim > 1
        and id(p) not in norms
        and (name.endswith("weight") or sum(size > 1 for size in p.shape) > 1)
    ]
    decayed = {id(p) for p in weights}
    others = [p for p in trained if id(p) not in decayed]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How to train.

    Attributes:
        epochs: Number of passes over the data.
        batch_size: Number of images in a step. A last smaller batch is left out of the epoch.
        optimizer: "adam", or "sgd" with Nesterov's momentum.
        lr: Peak learning rate.
        momentum: Momentum of SGD.
        weight_decay: Factor of the L2 penalty, whose gradient is added to that of the loss.
        clip: Largest norm of the gradient, which is scaled down to it; 0 disables it.
        schedule: Learning rate over time. "cosine": 5% of the steps up to ``lr``, then a half
            cosine down to 0. "one-cycle": 30% up, then a line down to 0. "step": a tenth after each
            third of the steps (Salman et al. 2020). "milestones": 5% up, then a tenth after 35, 70
            and 95 of 110 parts of the steps (Xie et al., CVPR 2019). "sat-milestones": 5% up, then
            a tenth after 30, 60 and 90 of 100 (release of Xie et al. 2020). "constant".
        average: Decay of the exponential moving average of the weights that is returned; 0
            disables it. At step t the decay is at most (1 + t) / (10 + t).
        augment: Random crops from a reflected border of an eighth of the image, and flips:
            "crop+flip", "crop" (for digits) or "none".
        bf16: Whether to autocast to bfloat16; None: where the device computes in it natively.
        seed: Seed of everything random.
        parameter_groups: Function from the network to the parameter groups of the optimizer, for
            example with learning rates of their own. By default biases, normalisation and learnt
            activations are not decayed.
        checkpoint_every: Seconds between checkpoints within an epoch. It changes no result.

    Raises:
        InputError: A value is out of range.

    Example:
        >>> TrainingConfig(epochs=2, schedule="step").lr
        0.001
    """

    epochs: int = 30
    batch_size: int = 128
    optimizer: Optimizer = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 1.0
    schedule: Schedule = "cosine"
    average: float = 0.999
    augment: Augmentation = "crop+flip"
    bf16: bool | None = None
    seed: int = 0
    parameter_groups: ParameterGroups = decayed_weights
    checkpoint_every: float = 60.0

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        checks.count("epochs", self.epochs)
        checks.count("batch_size", self.batch_size)
        if checks.count("seed", self.seed, 0) >= 2**64:
            raise InputError(f"seed is {self.seed}; give a whole number below 2^64")
        checks.positive("lr", self.lr)
        for name in ("weight_decay", "clip", "checkpoint_every"):
            if not 0 <= checks.real(name, getattr(self, name)) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; give a number >= 0")
        for name in ("average", "momentum"):
            if not 0 <= checks.real(name, getattr(self, name)) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give a number in [0, 1)")
        if self.bf16 is not None:
            checks.flag("bf16", self.bf16)
        for name, known in (
            ("optimizer", Optimizer),
            ("schedule", Schedule),
            ("augment", Augmentation),
        ):
            checks.choice(name, getattr(self, name), get_args(known))

    @property
    def settings(self) -> dict[str, Any]:
        """What determines the result, as JSON values."""
        names = [field.name for field in fields(self) if field.name != "checkpoint_every"]
        return {name: describe(getattr(self, name)) for name in names}


def make_optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a training."""
    groups = config.parameter_groups(network)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        groups,
        config.lr,
        config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, config: TrainingConfig, steps: int
) -> lr_scheduler.LRScheduler:
    """Return the schedule of a learning rate over ``steps`` steps, stepped after each of them."""
    kind = config.schedule
    warm = max(1, round(0.3 * steps) if kind == "one-cycle" else steps // 20)
    left = max(1, steps - warm)
    later: lr_scheduler.LRScheduler
    if kind == "constant":
        return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=1)
    if kind in _MILESTONES:
        *parts, whole = _MILESTONES[kind]
        later = lr_scheduler.MultiStepLR(optimizer, [-(-steps * p // whole) for p in parts])
        if kind == "step":
            return later
    elif kind == "cosine":
        later = lr_scheduler.CosineAnnealingLR(optimizer, T_max=left)
    else:  # one step more would reach 0
        later = _line(optimizer, left / (left + 1), 1 / (left + 1), left)
    warm_up = _line(optimizer, 1 / warm, 1.0, warm)
    if kind in _MILESTONES:
        return lr_scheduler.ChainedScheduler([warm_up, later])
    return lr_scheduler.SequentialLR(optimizer, [warm_up, later], [warm])


def _line(
    optimizer: torch.optim.Optimizer, first: float, last: float, steps: int
) -> lr_scheduler.LinearLR:
    return lr_scheduler.LinearLR(optimizer, first, last, total_iters=max(1, steps - 1))


def moving_average(network: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of a network's weights and buffers.

    Counters and masks, which have no mean, are copied.
    """

    # All tensors of one type at once. The count is read where it is held, on the host: `_updates`
    # has been moved to the device.
    def average(old: Tensors, new: Tensors, _updates: Tensor | int) -> None:
        if not (old[0].is_floating_point() or old[0].is_complex()):
            torch._foreach_copy_(old, new)
            return
        change = torch._foreach_sub(new, old)
        torch._foreach_mul_(change, max(1 - decay, 9 / (10 + int(averaged.n_averaged))))
        torch._foreach_add_(old, change)

    averaged = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
    return averaged


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
