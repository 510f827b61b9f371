"""The training loop: any loss, any module, and an interruption changes nothing.

Whatever is random in a step (augmentation, noise, dropout) is drawn from a state seeded by (seed,
step), and the order of the images by (seed, epoch). So a run that goes on from a checkpoint takes
the very steps of one that was never interrupted. The global random state is put back after each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)
from tqdm import tqdm

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.storage import (
    make_folder,
    sole_writer,
    structure_fingerprint,
    weights_fingerprint,
)
from art_denoised.training.plan import Plan, augment
from art_denoised.training.seeds import derived, seeded
from art_denoised.training.state import State
from art_denoised.types import Images, Labels

Loss = Callable[[Images, Labels, int], Tensor]
Rows = Sequence[Mapping[str, float]]
_SCALARS_EVERY = 50  # steps
_LOADING = (  # what is kept of a DataLoader
    *("num_workers", "collate_fn", "pin_memory", "worker_init_fn"),
    *("timeout", "multiprocessing_context", "prefetch_factor"),
)


def train(
    network: nn.Module,
    data: Any,
    loss: Loss,
    plan: Plan,
    *,
    out: Path | str | None = None,
    resume: bool = False,
    evaluate: Callable[[nn.Module, Rows], Mapping[str, float]] | None = None,
    stop: Callable[[Rows], bool] | None = None,
    best: str | None = None,
    classes: int | None = None,
    identity: Mapping[str, Any] | None = None,
    save_every: float = 60.0,
    tensorboard: bool = False,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train a network in place; afterwards it holds the averaged weights and is in eval mode.

    Args:
        network: What is trained, on its device. It is in training mode during the steps.
        data: A map-style data set of pairs (image in [0, 1], label), or a DataLoader over one,
            whose workers and collation are used; the size of the batches and their order are the
            plan's, so samplers of your own are refused.
        loss: ``loss(x, y, step) -> scalar`` on augmented images, calling ``network``.
        plan: How to train.
        out: Folder for ``checkpoint.pt`` and ``train.jsonl``; None keeps nothing.
        resume: Go on from the checkpoint in ``out`` if there is one.
        evaluate: Called after each epoch with the weights as they would be returned and the rows of
            the epochs before; its figures go to the log.
        stop: Called with the rows after each epoch; True ends the training there.
        best: Name of a figure: return the weights of the epoch in which it was highest, not those
            of the last.
        classes: Number of classes, if labels are to be checked for it.
        identity: What else determines the result, compared on resuming; plain JSON values.
        save_every: Seconds between checkpoints.
        tensorboard: Also write scalars that TensorBoard reads, into ``out``: the rows, and the loss
            of every fiftieth step.
        progress: Show progress, loss and the time that is left.

    Returns:
        A row an epoch: epoch, loss (mean), rate, seconds, and the figures of ``evaluate``.

    Raises:
        InputError: Data or folder that cannot be used, another process that trains into it, or a
            loss that became NaN.

    Example:
        >>> import tempfile
        >>> data = torch.utils.data.TensorDataset(torch.rand(64, 1, 8, 8), torch.zeros(64).long())
        >>> net = nn.Conv2d(1, 1, 3, padding=1)
        >>> loss = lambda x, y, step: (net(x) - x).square().mean()
        >>> with tempfile.TemporaryDirectory() as out:
        ...     plan = Plan(epochs=3, batch_size=16, rate=0.05)
        ...     rows = train(net, data, loss, plan, out=out, progress=False)
        >>> len(rows), rows[-1]["loss"] < rows[0]["loss"], net.training
        (3, True, False)
    """
    if out is None and (resume or tensorboard):
        raise InputError(f"{'resume' if resume else 'tensorboard'} needs a folder; give out")
    batches = _Batches(data, plan, classes)
    trained = [p for p in network.parameters() if p.requires_grad]
    if not trained:
        raise InputError(f"the {type(network).__name__} has no parameters to train")
    device = trained[0].device
    for parameter in network.parameters():
        if parameter.ndim == 4:  # of 2d convolutions; `Module.to` would fail on those of 3d ones
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    state = State(network, trained, plan)
    settings = {**asdict(plan), **(identity or {}), "images": batches.images, "best": best}
    settings |= {"start": weights_fingerprint(network), "structure": structure_fingerprint(network)}
    steps = plan.epochs * len(batches)
    folder = None if out is None else make_folder(Path(out))
    bf16 = plan.bf16 if plan.bf16 is not None else _computes_in_bf16(device)
    with sole_writer(folder):
        if folder is not None:
            state.open(folder, settings, resume)
        with (
            _scalars(folder if tensorboard else None) as scalar,
            tqdm(
                desc="train", unit="step", initial=state.step, total=steps, disable=not progress
            ) as bar,
        ):
            while state.step < steps and not (stop is not None and state.rows and stop(state.rows)):
                network.train()
                for x, y in batches.of_epoch(*divmod(state.step, len(batches))):
                    rate = plan.rate_at(state.step, steps)
                    for group in state.optimizer.param_groups:
                        group["lr"] = rate
                    with seeded([plan.seed, 1, state.step], device):
                        x = augment(x.to(device), plan.augment)
                        x = x.contiguous(memory_format=torch.channels_last)
                        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                            value = loss(x, y.to(device), state.step)
                        state.take(value)
                    bar.update()
                    bar.set_postfix_str(f"loss {state.last:.4f}", refresh=False)
                    if state.step % _SCALARS_EVERY == 0:
                        scalar("loss of the step", state.last, state.step)
                    # The end of an epoch is saved below, with its row.
                    if folder and state.step % len(batches) and state.is_due(save_every):
                        state.save(folder)
                row = state.finish_epoch(state.step // len(batches), rate)
                if evaluate is not None:
                    with state.averaged() as weights, torch.no_grad():
                        row |= evaluate(weights.eval(), state.rows[:-1])
                if best is not None:
                    state.keep_best(best)
                for name, figure in row.items():
                    scalar(name, figure, state.step)
                if folder is not None:
                    state.save(folder)
    state.give_back()
    return state.rows


def first_image(data: Any) -> Images:
    """Return the first image of training data as a batch, to try networks on before the work.

    Raises:
        InputError: As for `train`, of the data.

    Example:
        >>> first_image([(torch.zeros(1, 8, 8), 3)]).shape
        torch.Size([1, 1, 8, 8])
    """
    return _Batches(data, Plan(), None).first()


class _Batches:
    """The batches of an epoch, in an order of ours."""

    def __init__(self, data: Any, plan: Plan, classes: int | None) -> None:
        self._loader = data if isinstance(data, DataLoader) else None
        self._data: Dataset[Any] = data.dataset if isinstance(data, DataLoader) else data
        if isinstance(self._data, IterableDataset) or not isinstance(self._data, Sized):
            raise InputError(
                "the data are a stream without length; give a map-style data set, whose order can "
                "be repeated"
            )
        self.images = len(self._data)
        self._size = min(plan.batch_size, self.images)
        self._seed, self._classes = plan.seed, classes
        if not self.images:
            raise InputError("there are no images to train on; give at least one")
        if self._loader is not None and not _draws_all(self._loader):
            raise InputError(
                "the DataLoader has a sampler of its own, which would not be heeded: batches and "
                "their order are the plan's; give Subset(data, indices)"
            )

    def __len__(self) -> int:
        return self.images // self._size

    def first(self) -> Images:
        """Return the first image as a batch."""
        collate = default_collate if self._loader is None else self._loader.collate_fn
        try:
            batch = collate([self._data[0]])
        except (TypeError, ValueError, LookupError, NotImplementedError) as error:
            raise InputError(f"the data must be pairs of an image and its class: {error}") from None
        return self._read(batch)[0]

    def of_epoch(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches (x, y) from number ``first`` on."""
        order = np.random.default_rng([self._seed, 0, epoch]).permutation(self.images)
        batches = order[: len(self) * self._size].reshape(len(self), self._size)[first:].tolist()
        # Not the global one; of it are the seeds of worker processes.
        generator = torch.Generator().manual_seed(derived([self._seed, 2, epoch]))
        options: dict[str, Any] = {"generator": generator}
        if self._loader is not None:
            options |= {name: getattr(self._loader, name) for name in _LOADING}
        loaded = _one_size(DataLoader(self._data, batch_sampler=batches, **options))
        for step in range(epoch * len(self) + first, (epoch + 1) * len(self)):
            with seeded([self._seed, 3, step], torch.device("cpu")):  # data may draw, as crops do
                batch = next(loaded)
            yield self._read(batch)

    def _read(self, batch: Any) -> tuple[Images, Labels]:
        try:
            x, y = batch
            return checks.images(x).float(), checks.labels(y, self._classes)
        except (TypeError, ValueError) as error:
            raise InputError(f"the data must be pairs of an image and its class: {error}") from None


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


def _computes_in_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = ""
    with suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags


@contextmanager
def _scalars(folder: Path | None) -> Iterator[Callable[[str, float, int], None]]:
    if folder is None:
        yield lambda name, value, step: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "TensorBoard is not installed; pip install '.[tensorboard]' in its clone"
        ) from None
    with SummaryWriter(folder) as writer:
        yield writer.add_scalar
