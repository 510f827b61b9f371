"""The training loop: any loss, any module, and an interruption changes nothing.

Whatever is random in a step (augmentation, noise, dropout) is drawn from a state seeded by (seed,
step), and the order of the images by (seed, epoch). So a run that goes on from a checkpoint takes
the very steps of one that was never interrupted. The global random state is put back after each.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.storage import make_folder, weights_fingerprint, write_whole
from art_denoised.training.plan import Plan, augment
from art_denoised.types import Images, Labels

Loss = Callable[[Images, Labels, int], Tensor]
Rows = Sequence[Mapping[str, float]]


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
            whose workers and collation are used; the batches and their order are the plan's.
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
        tensorboard: Also write scalars that TensorBoard reads, into ``out``.
        progress: Show progress, loss and the time that is left.

    Returns:
        A row an epoch: epoch, loss (mean), rate, seconds, and the figures of ``evaluate``.

    Raises:
        InputError: Data or folder that cannot be used, or a loss that became NaN.

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
    batches = _Batches(data, plan, classes)
    trained = [p for p in network.parameters() if p.requires_grad]
    if not trained:
        raise InputError(f"the {type(network).__name__} has no parameters to train")
    device = trained[0].device
    network.to(memory_format=torch.channels_last)
    state = _State(network, _optimizer(trained, plan), plan.clip)
    if plan.average:
        state.average = AveragedModel(network, avg_fn=_warm_average(plan.average), use_buffers=True)
    settings = {**asdict(plan), **(identity or {}), "images": batches.images, "best": best}
    settings["start"] = weights_fingerprint(network)
    steps = plan.epochs * len(batches)
    folder = None if out is None else make_folder(Path(out))
    if folder is not None:
        state.open(folder, settings, resume)
    bf16 = plan.bf16 if plan.bf16 is not None else _computes_in_bf16(device)
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
                with _seeded(plan.seed, state.step, device):
                    x = augment(x.to(device), plan.augment)
                    x = x.contiguous(memory_format=torch.channels_last)
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        value = loss(x, y.to(device), state.step)
                    state.take(value, trained)
                bar.update()
                bar.set_postfix_str(f"loss {state.last:.4f}", refresh=False)
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


class _State:
    """All that a checkpoint holds."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> None:
        self.network, self.optimizer, self._clip = network, optimizer, clip
        self.average: AveragedModel | None = None
        self.best: dict[str, Tensor] = {}
        self.step, self.last = 0, math.nan
        self.rows: list[dict[str, float]] = []
        self._losses: list[float] = []
        self._seconds, self._since = 0.0, time.monotonic()
        self._saved = time.monotonic()
        self._settings: dict[str, Any] = {}

    def take(self, loss: Tensor, trained: list[nn.Parameter]) -> None:
        """Take one step of the optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.last = float(loss.detach())
        if not math.isfinite(self.last):
            raise InputError(
                f"the loss became {self.last} at step {self.step}; train with a smaller rate"
            )
        if self._clip:
            nn.utils.clip_grad_norm_(trained, self._clip)
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

    def __len__(self) -> int:
        return self.images // self._size

    def of_epoch(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches (x, y) from number ``first`` on."""
        order = np.random.default_rng([self._seed, 0, epoch]).permutation(self.images)
        batches = order[: len(self) * self._size].reshape(len(self), self._size)[first:].tolist()
        options: dict[str, Any] = {"generator": torch.Generator()}  # not the global one
        if self._loader is not None:
            names = ("num_workers", "collate_fn", "pin_memory", "worker_init_fn")
            options |= {name: getattr(self._loader, name) for name in names}
        for batch in DataLoader(self._data, batch_sampler=batches, **options):
            try:
                x, y = batch
                x, y = checks.images(x).float(), checks.labels(y, self._classes)
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"the data must be pairs of an image and its class: {error}"
                ) from None
            yield x, y


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


@contextmanager
def _seeded(seed: int, step: int, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    state = np.random.SeedSequence([seed, 1, step]).generate_state(1, np.uint64)
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(state[0]))
        yield


def _warm_average(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    def average(old: Tensor, new: Tensor, n: Tensor | int) -> Tensor:
        weight = max(1 - decay, 9 / (10 + int(n)))
        return old + ((new - old) * weight).to(old.dtype)

    return average


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
            "TensorBoard is not installed; pip install 'art-denoised[tensorboard]'"
        ) from None
    with SummaryWriter(folder) as writer:
        yield writer.add_scalar
