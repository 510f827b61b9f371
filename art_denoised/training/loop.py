"""The training loop, for any loss and any module.

Whatever is random in a step (augmentation, noise, dropout) is drawn from a state that is seeded by
(seed, step), and the order of the images by (seed, epoch). A training that continues from a
checkpoint therefore takes the very steps of an uninterrupted one. The global random state is
restored after each step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from art_denoised.checks import InputError
from art_denoised.runs.identity import describe, identity, versions
from art_denoised.runs.journal import Run
from art_denoised.training.batches import Batches, augment
from art_denoised.training.config import TrainingConfig
from art_denoised.training.rows import TRAINING, EpochRow
from art_denoised.training.seeds import seeded
from art_denoised.training.state import State
from art_denoised.types import Images, Labels

Loss = Callable[[nn.Module, Images, Labels, int], Tensor]


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
    settings = {} if run is None else _settings(network, batches, loss, config, evaluation, bf16)
    for parameter in network.parameters():
        if parameter.ndim == 4:  # of 2d convolutions; `Module.to` would fail on those of 3d ones
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    steps = config.epochs * len(batches)
    state = State(network, config, steps)
    saving = _saving(state, run, settings, resume)
    with saving as save, _bar(state, steps, progress) as bar:
        while state.step < steps and not _ends(evaluation, state.rows):
            network.train()
            for x, y in batches.of_epoch(*divmod(state.step, len(batches))):
                with seeded([config.seed, 1, state.step], device):
                    x = augment(x.to(device), config.augment)
                    x = x.contiguous(memory_format=torch.channels_last)
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        value = loss(network, x, y.to(device), state.step)
                    state.take(value)
                bar.update()
                bar.set_postfix_str(f"loss {state.loss:.4f}", refresh=False)
                if state.step % len(batches):  # the end of an epoch is saved with its row
                    save(config.checkpoint_every)
            figures: dict[str, float] = {}
            if evaluation is not None:
                with torch.no_grad():
                    figures = dict(evaluation.measure(state.result.eval(), state.rows))
            state.finish_epoch(figures, evaluation.keep_best if evaluation else None)
            save(0)
    state.give_back()
    return state.rows


def _settings(
    network: nn.Module,
    batches: Batches,
    loss: Loss,
    config: TrainingConfig,
    evaluation: Evaluation | None,
    bf16: bool,
) -> dict[str, Any]:
    """Return what determines the result of a training."""
    return {
        "network": identity(network),
        "data": batches.identity(),
        "loss": describe(loss),
        **config.settings,
        "bf16": bf16,
        "evaluation": describe(evaluation),
        "versions": versions(),
    }


@contextmanager
def _saving(
    state: State, run: Path | str | None, settings: Mapping[str, Any], resume: bool
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


def _bar(state: State, steps: int, progress: bool) -> Any:
    return tqdm(desc="train", unit="step", initial=state.step, total=steps, disable=not progress)


def _ends(evaluation: Evaluation | None, rows: Sequence[EpochRow]) -> bool:
    stop = None if evaluation is None else evaluation.stop
    return stop is not None and bool(rows) and stop(rows)


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
