"""All that a training holds between two steps, and its checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from art_denoised.checks import InputError
from art_denoised.storage import write_whole
from art_denoised.training.plan import Plan


class State:
    """All that a checkpoint holds."""

    def __init__(self, network: nn.Module, trained: list[nn.Parameter], plan: Plan) -> None:
        self.network, self._trained, self._clip = network, trained, plan.clip
        self.optimizer = _optimizer(trained, plan)
        self.average: AveragedModel | None = None
        if plan.average:
            rule = _warm_average(plan.average)
            self.average = AveragedModel(network, avg_fn=rule, use_buffers=True)
        self.best: dict[str, Tensor] = {}
        self.step, self.last = 0, math.nan
        self.rows: list[dict[str, float]] = []
        self._losses: list[float] = []
        self._seconds, self._since = 0.0, time.monotonic()
        self._saved = time.monotonic()
        self._settings: dict[str, Any] = {}

    def take(self, loss: Tensor) -> None:
        """Take one step of the optimizer."""
        if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
            shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
            raise InputError(
                f"the loss is a {type(loss).__name__}{shape}; return a scalar tensor that depends "
                "on the network, such as the mean over the images"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.last = float(loss.detach())
        if not math.isfinite(self.last):
            raise InputError(
                f"the loss became {self.last} at step {self.step}; train with a smaller rate"
            )
        if self._clip:
            nn.utils.clip_grad_norm_(self._trained, self._clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        self._losses.append(self.last)
        self.step += 1

    def finish_epoch(self, epoch: int, rate: float) -> dict[str, float]:
        """Add a row to the log and return it."""
        self._lap()
        row = {
            "epoch": epoch,
            "loss": round(float(np.mean(self._losses)), 6),
            "rate": rate,
            "seconds": round(self._seconds, 1),
        }
        self.rows.append(row)
        self._losses, self._seconds = [], 0.0
        return row

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Lend the network as it would be returned."""
        yield self.network if self.average is None else self.average.module

    def keep_best(self, figure: str) -> None:
        """Keep the weights as they would be returned if ``figure`` was never as high."""
        if all(self.rows[-1][figure] > row[figure] for row in self.rows[:-1]):
            with self.averaged() as weights:
                self.best = {name: value.clone() for name, value in weights.state_dict().items()}

    def give_back(self) -> None:
        """Put the averaged or the best weights into the network."""
        if self.best:
            self.network.load_state_dict(self.best)
        elif self.average is not None:
            self.network.load_state_dict(self.average.module.state_dict())
        self.network.eval()

    def is_due(self, every: float) -> bool:
        """Whether the last checkpoint is ``every`` seconds old."""
        return time.monotonic() - self._saved >= every

    def open(self, folder: Path, settings: Mapping[str, Any], resume: bool) -> None:
        """Go on from the checkpoint in ``folder``, if there is one."""
        self._settings = json.loads(json.dumps(settings))
        path = folder / "checkpoint.pt"
        if not path.exists():
            if (folder / "train.jsonl").exists():
                raise InputError(
                    f"{folder} holds the log of a training and no checkpoint to go on from; choose "
                    "another folder"
                )
            return
        if not resume:
            raise InputError(
                f"{folder} already holds a training; pass --resume to continue it or choose "
                "another folder"
            )
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            notes = json.loads(saved["notes"])
        except Exception as error:  # torch has many ways to say that a file is none of its own
            raise InputError(
                f"{path} is no checkpoint of ours ({type(error).__name__}); choose another folder"
            ) from None
        old = notes["settings"]
        names = [n for n in {**old, **self._settings} if old.get(n) != self._settings.get(n)]
        if names:
            changes = ", ".join(f"{n} {old.get(n)!r} -> {self._settings.get(n)!r}" for n in names)
            raise InputError(f"{path} is one of other settings ({changes}); choose another folder")
        self.network.load_state_dict(saved["network"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        self.best = saved["best"]
        self.step, self.rows = notes["step"], notes["rows"]
        self._losses, self._seconds = notes["losses"], notes["seconds"]
        self._write_log(folder)

    def save(self, folder: Path) -> None:
        """Write the checkpoint and the log, whole."""
        self._lap()
        notes = {
            "settings": self._settings,
            "step": self.step,
            "rows": self.rows,
            "losses": self._losses,
            "seconds": self._seconds,
        }
        state = {
            "notes": json.dumps(notes),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": {} if self.average is None else self.average.state_dict(),
            "best": self.best,
        }
        buffer = BytesIO()
        torch.save(state, buffer)
        write_whole(folder / "checkpoint.pt", buffer.getvalue())
        self._write_log(folder)
        self._saved = time.monotonic()

    def _lap(self) -> None:
        now = time.monotonic()
        self._seconds, self._since = self._seconds + now - self._since, now

    def _write_log(self, folder: Path) -> None:
        header = {"art_denoised": "training log", "version": 1, "settings": self._settings}
        lines = [json.dumps(line) + "\n" for line in (header, *self.rows)]
        write_whole(folder / "train.jsonl", "".join(lines).encode())


def _optimizer(trained: list[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
    if plan.optimizer == "adam":
        return torch.optim.Adam(trained, plan.rate, weight_decay=plan.weight_decay)
    return torch.optim.SGD(
        trained,
        plan.rate,
        momentum=plan.momentum,
        weight_decay=plan.weight_decay,
        nesterov=plan.momentum > 0,
    )


def _warm_average(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    def average(old: Tensor, new: Tensor, n: Tensor | int) -> Tensor:
        if not (old.is_floating_point() or old.is_complex()):
            return new  # a counter, a mask: there is no mean of them
        weight = max(1 - decay, 9 / (10 + int(n)))
        return old + ((new - old) * weight).to(old.dtype)

    return average
