"""The training loop, for any loss and any module.

Whatever is random in a step (augmentation, noise, dropout) is drawn from a state that is seeded by
(seed, step), and the order of the images by (seed, epoch). A training that continues from a
checkpoint therefore takes the very steps of an uninterrupted one. The global random state is
restored after each step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from art_denoised.checks import InputError
from art_denoised.runs.journal import Kind, Row, Run, describe, identity, versions, write_whole
from art_denoised.runs.progress import Progress
from art_denoised.training.config import (
    Batches,
    TrainingConfig,
    augment,
    make_optimizer,
    make_schedule,
    moving_average,
    seeded,
)
from art_denoised.types import Images, Labels

_TICK = 0.5  # seconds between two readings of the loss
Loss = Callable[[nn.Module, Images, Labels, int], Tensor]


class EpochRow(Row, frozen=True, kw_only=True):
    """One epoch of a training.

    Attributes:
        epoch: Number of the epoch, from 1.
        loss: Mean loss of its steps.
        lr: Learning rate of its last step.
        seconds: Time that it took, evaluation left out.
        figures: What was measured after it, such as "accuracy".
    """

    epoch: int
    loss: float
    lr: float
    seconds: float
    figures: dict[str, float] = msgspec.field(default_factory=dict)

    @property
    def key(self) -> int:
        """Number of the epoch."""
        return self.epoch


def _upgraded(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of version 1, which held the figures beside the rest."""
    own = {"epoch": "epoch", "loss": "loss", "rate": "lr", "seconds": "seconds"}
    figures = {name: value for name, value in record.items() if name not in own}
    return {**{new: record[old] for old, new in own.items()}, "figures": figures}


TRAINING: Kind[EpochRow] = Kind("train", EpochRow, upgrade=_upgraded, title="training log")
"""Kind of the journal `train.jsonl`."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is measured after each epoch, and what follows from it.

    Attributes:
        measure: Function ``measure(network, rows) -> figures``; the network has the weights that
            would be returned, and ``rows`` are those of the epochs before.
        keep_best: Name of a figure: the training returns the weights of the epoch in which it was
            highest, not those of the last.
        stop: Function of the rows that returns True to end the training.

    Example:
        >>> Evaluation(lambda network, rows: {"accuracy": 0.5}, keep_best="accuracy").keep_best
        'accuracy'
    """

    measure: Callable[[nn.Module, Sequence[EpochRow]], Mapping[str, float]]
    keep_best: str | None = None
    stop: Callable[[Sequence[EpochRow]], bool] | None = None


def train(
    network: nn.Module,
    data: Any,
    loss: Loss,
    config: TrainingConfig | None = None,
    *,
    evaluation: Evaluation | None = None,
    run: Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> list[EpochRow]:
    """Train a network in place; afterwards it holds the averaged weights and is in eval mode.

    Args:
        network: Network on its device. It is in training mode during the steps.
        data: A map-style data set of pairs (image in [0, 1], label), or a DataLoader over one,
            whose workers and collation are used. The config decides on batches and their order, so
            a sampler of your own is refused.
        loss: Function ``loss(network, x, y, step)`` of augmented images that returns a scalar. The
            log describes it; give a dataclass with ``__call__`` if it has settings.
        config: How to train; by default `TrainingConfig()`.
        evaluation: What is measured after each epoch; None: nothing.
        run: Folder for the log ``train.jsonl`` and ``checkpoint.pt``; None keeps neither.
        resume: Continue the training in the folder if there is one. Network, data, loss, config,
            evaluation and versions are compared.
        progress: Show a progress bar with the loss on standard error.

    Returns:
        One row for each epoch.

    Raises:
        InputError: Data or folder cannot be used, another process trains into the folder, or the
            loss is not a finite scalar.
        OSError: The log cannot be written, for example on a full disk.

    Example:
        >>> import tempfile
        >>> data = torch.utils.data.TensorDataset(torch.rand(64, 1, 8, 8), torch.zeros(64).long())
        >>> net = nn.Conv2d(1, 1, 3, padding=1)
        >>> def loss(network, x, y, step):
        ...     return (network(x) - x).square().mean()
        >>> config = TrainingConfig(epochs=3, batch_size=16, lr=0.05)
        >>> with tempfile.TemporaryDirectory() as run:
        ...     rows = train(net, data, loss, config, run=run, progress=False)
        >>> len(rows), rows[-1].loss < rows[0].loss, net.training
        (3, True, False)
    """
    config = TrainingConfig() if config is None else config
    if run is None and resume:
        raise InputError("resume is True without a folder to resume from; give run")
    batches = Batches(data, config)
    device = _device(network)
    bf16 = _computes_in_bf16(device) if config.bf16 is None else config.bf16
    settings: dict[str, Any] = {}
    if run is not None:
        settings = {
            "network": identity(network),
            "data": batches.identity(),
            "loss": describe(loss),
            **config.settings,
            "bf16": bf16,
            "evaluation": describe(evaluation),
            "versions": versions(),
        }
    for parameter in network.parameters():
        if parameter.ndim == 4:  # of 2d convolutions; `Module.to` would fail on those of 3d ones
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    steps = config.epochs * len(batches)
    state, stop = _State(network, config, steps), evaluation.stop if evaluation else None
    of_step = batches.images / len(batches)
    total = steps * of_step
    with (
        _saving(state, run, settings, resume) as save,
        Progress("train", total, done=state.step * of_step, visible=progress) as shown,
    ):
        while state.step < steps and not (stop and state.rows and stop(state.rows)):
            network.train()
            for x, y in batches.of_epoch(*divmod(state.step, len(batches))):
                with seeded([config.seed, 1, state.step], device):
                    x = augment(x.to(device, non_blocking=True), config.augment)
                    x = x.contiguous(memory_format=torch.channels_last)
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        y = y.to(device, non_blocking=True)
                        value = loss(network, x, y, state.step)
                    state.take(value)
                if state.is_late:
                    state.read()
                shown.update(of_step, lambda: state.note)
                if state.step % len(batches):  # the end of an epoch is saved with its row
                    save(config.checkpoint_every)
            state.read()
            figures: dict[str, float] = {}
            if evaluation is not None:
                with torch.no_grad():
                    figures = dict(evaluation.measure(state.result.eval(), state.rows))
            state.finish_epoch(figures, evaluation.keep_best if evaluation else None)
            save(0)
    state.give_back()
    return state.rows


@contextmanager
def _saving(
    state: _State, run: Path | str | None, settings: Mapping[str, Any], resume: bool
) -> Iterator[Callable[[float], None]]:
    """Restore what the folder holds, and lend a function that saves if that is due.

    The checkpoint is written before the row, and holds all rows: a row that a killed process did
    not write is written when the training is resumed.
    """
    if run is None:
        yield lambda every: None
        return
    checkpoint = Path(run, "checkpoint.pt")
    if checkpoint.exists() and not Path(run, "train.jsonl").exists():
        raise InputError(
            f"{run} holds a checkpoint without the log of its training; choose another folder"
        )
    with Run(run, TRAINING, settings, resume=resume) as log:
        if checkpoint.exists():
            state.load(checkpoint)
        elif log.rows:
            raise InputError(
                f"{run} holds the log of a training without its checkpoint; choose another folder"
            )
        log.append(state.rows[len(log.rows) :])
        saved = time.monotonic()

        def save(every: float) -> None:
            nonlocal saved
            if time.monotonic() - saved >= every:
                state.save(checkpoint)
                log.append(state.rows[len(log.rows) :])
                saved = time.monotonic()

        yield save


def _device(network: nn.Module) -> torch.device:
    """Return the device of what is trained, once it is known that it can be trained."""
    trained = [p for p in network.parameters() if p.requires_grad]
    if not trained:
        raise InputError(f"the {type(network).__name__} has no parameters to train; give another")
    if any(p.dtype == torch.float16 for p in trained):  # its steps are below what it resolves
        raise InputError(
            f"the {type(network).__name__} has float16 parameters; train network.float(), and "
            "convert it afterwards"
        )
    return trained[0].device


def _computes_in_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Where torch cannot tell, float32 is never wrong.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


class _State:
    """Everything that a training holds between two steps, and its checkpoint."""

    def __init__(self, network: nn.Module, config: TrainingConfig, steps: int) -> None:
        self._network, self._clip = network, config.clip
        self._trained = [p for p in network.parameters() if p.requires_grad]
        self._optimizer = make_optimizer(network, config)
        self._schedule = make_schedule(self._optimizer, config, steps)
        self._average = moving_average(network, config.average) if config.average else None
        parts = {"network": network, "optimizer": self._optimizer, "schedule": self._schedule}
        self._parts: dict[str, Any] = parts | ({"average": self._average} if self._average else {})
        self._best: dict[str, Tensor] = {}
        self.step, self.rows = 0, list[EpochRow]()
        self._losses, self._unread = list[float](), list[Tensor]()
        self._loss = math.nan
        self._lr, self._seconds = 0.0, 0.0
        self._began = self._read = time.monotonic()

    def take(self, loss: Tensor) -> None:
        """Take one step of the optimizer."""
        if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
            shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
            raise InputError(
                f"the loss is a {type(loss).__name__}{shape}; return a scalar tensor that depends "
                "on the network, such as the mean over the images"
            )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._clip:
            nn.utils.clip_grad_norm_(self._trained, self._clip)
        self._lr = float(self._schedule.get_last_lr()[0])
        self._optimizer.step()
        self._schedule.step()
        if self._average is not None:
            self._average.update_parameters(self._network)
        self._unread.append(loss.detach())
        self._seconds = time.monotonic() - self._began
        self.step += 1

    @property
    def note(self) -> str:
        """The last loss that was read, in words; nothing before the first."""
        return "" if math.isnan(self._loss) else f"loss {self._loss:.4f}"

    @property
    def is_late(self) -> bool:
        """Whether losses are to be read: a GPU is waited for at times, not in each step."""
        return time.monotonic() - self._read > _TICK

    def read(self) -> None:
        """Read the losses since the last time, which must be finite."""
        unread, self._unread, self._read = self._unread, [], time.monotonic()
        losses = torch.stack([loss.reshape(()) for loss in unread]).tolist() if unread else []
        for step, value in enumerate(losses, start=self.step - len(losses)):
            if not math.isfinite(value):
                raise InputError(f"the loss became {value} at step {step}; train with a smaller lr")
        self._losses += losses
        self._loss = losses[-1] if losses else self._loss

    @property
    def result(self) -> nn.Module:
        """Network with the weights that the training would return now."""
        return self._network if self._average is None else self._average.module

    def finish_epoch(self, figures: dict[str, float], keep_best: str | None) -> None:
        """Add a row; keep the weights if a figure is the highest so far."""
        row = EpochRow(
            epoch=len(self.rows) + 1,
            loss=round(float(np.mean(self._losses)), 6),
            lr=float(f"{self._lr:.9g}"),
            seconds=round(self._seconds, 1),
            figures=figures,
        )
        if keep_best and all(figures[keep_best] > old.figures[keep_best] for old in self.rows):
            self._best = {name: v.clone() for name, v in self.result.state_dict().items()}
        self.rows.append(row)
        self._losses, self._began = [], time.monotonic()

    def give_back(self) -> None:
        """Put the averaged or the best weights into the network."""
        if self._best:
            self._network.load_state_dict(self._best)
        elif self._average is not None:
            self._network.load_state_dict(self._average.module.state_dict())
        self._network.eval()

    def save(self, path: Path) -> None:
        """Write the checkpoint, whole."""
        if self._unread:
            self.read()
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        progress = {
            "best": self._best,
            "step": self.step,
            "rows": msgspec.to_builtins(self.rows),
            "losses": self._losses,
            "lr": self._lr,
            "seconds": self._seconds,
        }
        buffer = BytesIO()
        torch.save({**parts, **progress}, buffer)
        write_whole(path, buffer.getvalue())

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in self._parts.items():
                part.load_state_dict(saved[name])
            self.rows = msgspec.convert(saved["rows"], list[EpochRow])
            self._best, self.step = saved["best"], int(saved["step"])
            self._losses, self._lr = saved["losses"], saved["lr"]
            self._began = time.monotonic() - saved["seconds"]
        except Exception as error:  # torch has many ways to refuse a file
            raise InputError(
                f"{path} is not a checkpoint of this training ({type(error).__name__}); choose "
                "another folder"
            ) from None
