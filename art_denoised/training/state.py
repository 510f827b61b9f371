"""Everything that a training holds between two steps, and its checkpoint."""

from __future__ import annotations

import math
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from art_denoised.checks import InputError
from art_denoised.runs.journal import write_whole
from art_denoised.training.config import TrainingConfig
from art_denoised.training.optim import make_optimizer, make_schedule, moving_average
from art_denoised.training.rows import EpochRow


class State:
    """Network, optimizer, schedule, average and progress of a training.

    Args:
        network: Network that is trained.
        config: How to train it.
        steps: Number of steps of the whole training.

    Attributes:
        step: Number of steps taken.
        loss: Loss of the last step.
        rows: Rows of the finished epochs.
    """

    def __init__(self, network: nn.Module, config: TrainingConfig, steps: int) -> None:
        self._network, self._clip = network, config.clip
        self._trained = [p for p in network.parameters() if p.requires_grad]
        self._optimizer = make_optimizer(network, config)
        self._schedule = make_schedule(self._optimizer, config, steps)
        self._average = moving_average(network, config.average) if config.average else None
        self._best: dict[str, Tensor] = {}
        self.step, self.loss, self.rows = 0, math.nan, list[EpochRow]()
        self._losses, self._lr, self._clock = list[float](), 0.0, _Clock()

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
        self.loss = float(loss.detach())
        if not math.isfinite(self.loss):
            raise InputError(
                f"the loss became {self.loss} at step {self.step}; train with a smaller lr"
            )
        if self._clip:
            nn.utils.clip_grad_norm_(self._trained, self._clip)
        self._lr = float(self._schedule.get_last_lr()[0])
        self._optimizer.step()
        self._schedule.step()
        if self._average is not None:
            self._average.update_parameters(self._network)
        self._losses.append(self.loss)
        self.step += 1

    @property
    def result(self) -> nn.Module:
        """Network with the weights that the training would return now."""
        return self._network if self._average is None else self._average.module

    def finish_epoch(self, figures: dict[str, float], keep_best: str | None) -> None:
        """Add a row.

        Args:
            figures: What was measured after the epoch.
            keep_best: Figure whose highest value decides which weights are returned.
        """
        row = EpochRow(
            epoch=len(self.rows) + 1,
            loss=round(float(np.mean(self._losses)), 6),
            lr=float(f"{self._lr:.9g}"),
            seconds=round(self._clock.seconds, 1),
            figures=figures,
        )
        if keep_best and all(figures[keep_best] > old.figures[keep_best] for old in self.rows):
            self._best = {name: v.clone() for name, v in self.result.state_dict().items()}
        self.rows.append(row)
        self._losses, self._clock = [], _Clock()

    def give_back(self) -> None:
        """Put the averaged or the best weights into the network."""
        if self._best:
            self._network.load_state_dict(self._best)
        elif self._average is not None:
            self._network.load_state_dict(self._average.module.state_dict())
        self._network.eval()

    def save(self, path: Path) -> None:
        """Write the checkpoint, whole."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        progress = {
            "best": self._best,
            "step": self.step,
            "rows": msgspec.to_builtins(self.rows),
            "losses": self._losses,
            "lr": self._lr,
            "seconds": self._clock.seconds,
        }
        buffer = BytesIO()
        torch.save({**parts, **progress}, buffer)
        write_whole(path, buffer.getvalue())

    def load(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            InputError: The file is not a checkpoint of this training.
        """
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in self._parts().items():
                part.load_state_dict(saved[name])
            self.rows = msgspec.convert(saved["rows"], list[EpochRow])
            self._best, self.step = saved["best"], int(saved["step"])
            self._losses, self._lr = saved["losses"], saved["lr"]
            self._clock = _Clock(saved["seconds"])
        except Exception as error:  # torch has many ways to refuse a file
            raise InputError(
                f"{path} is not a checkpoint of this training ({type(error).__name__}); choose "
                "another folder"
            ) from None

    def _parts(self) -> dict[str, Any]:
        parts = {
            "network": self._network,
            "optimizer": self._optimizer,
            "schedule": self._schedule,
            "average": self._average,
        }
        return {name: part for name, part in parts.items() if part is not None}


class _Clock:
    """Time since it was made, and before that."""

    def __init__(self, before: float = 0.0) -> None:
        self._since = time.monotonic() - before

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._since
