"""Evaluate a model under attacks: one row for each image and attack, then the masking checks."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.data.images import Chosen, ImageData
from art_denoised.evaluation import masking
from art_denoised.evaluation.attack_rows import (
    ATTACK,
    CHECKS,
    CLEAN,
    AnyRow,
    AttackLog,
    AttackRow,
    unmade,
)
from art_denoised.evaluation.columns import (
    Batch,
    Column,
    Found,
    attack_settings,
    attacked,
    autoattack_flags,
    clean_column,
    columns,
    pictures_of,
    rows_of,
    unattacked,
)
from art_denoised.evaluation.probing import Probes, Subject
from art_denoised.evaluation.progress import Progress
from art_denoised.evaluation.target import LOOKED, Target
from art_denoised.runs.identity import identity as model_identity
from art_denoised.runs.identity import versions
from art_denoised.runs.journal import Run
from art_denoised.types import Images, Labels, Smoothed

_LIBRARIES = ("adversarial-robustness-toolbox", "torchattacks", "pyautoattack", "autoattack")


def evaluate(
    model: Any,
    data: ImageData,
    attacks: Sequence[Any] | Mapping[str, Any],
    *,
    run: Path | str | None = None,
    repeats: int = 10,
    noise: str | None = None,
    gradients: Sequence[str] | None = None,
    undefended: nn.Module | None = None,
    masking_checks: bool = True,
    probes: Probes | None = None,
    seed: int = 0,
    batch_size: int = 64,
    indices: Sequence[int] | None = None,
    pictures: int = 4,
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> AttackLog:
    """Attack a model on the images it gets right, and check that the result is reliable.

    Every attack runs on every image that is right without it, so that attacks can be compared
    image by image. The rows of a batch are written when it is done. An interrupted run continues
    with ``resume=True`` and ends in the same rows. If a defence takes its noise from the operating
    system (a seed of None), they have the same distribution only.

    A randomised model (see `Target`) is judged twice: by the attack's own count, and in
    ``repeats`` later evaluations with fresh noise.

    Args:
        model: Module from images in [0, 1] to logits, in eval mode on the device to use; or an ART
            estimator over one. If its parts are `Seeded`, ``GradientModes`` or ``Purifies``
            (`art_denoised.types`), their noise, gradients and pictures are used.
        data: Pairs of an image and its class, such as ``TensorDataset(x, y)``.
        attacks: Callables ``attack(model, x, y) -> x_adv`` with ``eps`` and ``norm``, such as
            `PGD`, `AutoAttack`, `TorchAttack` and `ArtAttack`; or pairs of a name and an attack, or
            a mapping of names to attacks. An attack may be given with several eps. Optional
            attributes are described in docs/attack.md.
        run: Folder for ``attack.jsonl``; None keeps no file.
        repeats: Number of later evaluations of each image, for randomised models.
        noise: "fixed" or "fresh" noise in all seeded parts; None leaves it as the model comes. An
            attacker knows fixed noise, and the model is deterministic. With "fresh" any model is
            judged as randomised.
        gradients: Ways of taking gradients, of those that the model has ("exact", "bpda"); None
            takes all of them, as an attacker would.
        undefended: The classifier without its defence, for the transfer check.
        masking_checks: Whether to make the masking checks. Without them no result is trusted.
        probes: Size of the masking checks.
        seed: Seed of all random choices of attacks and evaluations.
        batch_size: Number of images attacked at once. Attacks draw their starts for a batch, so
            the rows depend on it.
        indices: Indices of the images to attack; None takes all.
        pictures: Number of images of which pictures are kept for the report.
        identity: Further JSON values that must agree before a run is resumed, such as the names of
            model and data. The weights, structure and attributes of the model, images, labels,
            attacks and versions are always compared.
        resume: Whether to continue the run in the folder, if there is one.
        progress: Whether to show a progress bar with the time left, on standard error.

    Returns:
        The finished log.

    Raises:
        InputError: An argument cannot be used; the model failed, or returned NaN or another shape;
            an attack failed or returned an example outside the eps-ball; or a model that seemed
            deterministic is randomised. Completed rows are kept.
        OSError: The log cannot be written.

    Example:
        >>> from art_denoised import PGD
        >>> from art_denoised.demo import digits_classifier
        >>> from art_denoised.data import load_data
        >>> log = evaluate(
        ...     digits_classifier(), load_data("digits"), [PGD(0.2, steps=10)],
        ...     indices=range(20), masking_checks=False, progress=False,
        ... )
        >>> sum(row.counted for row in log.columns["pgd", "exact", 0.2]) <= 4
        True
    """
    repeats, batch_size = checks.count("repeats", repeats), checks.count("batch_size", batch_size)
    seed, kept = checks.count("seed", seed, 0), checks.count("pictures", pictures, 0)
    images = Chosen(data, indices)
    if not len(images):
        raise InputError("there are no images; give at least one")
    x, _ = images.stack(images.indices[:LOOKED])
    target = Target(model, x, noise=noise, repeats=repeats, seed=seed, batch_size=batch_size)
    used = _usable(list(columns(attacks, target.gradients(gradients))), target)
    images.classes = target.classes
    bar = partial(tqdm, desc="reading", unit="image", leave=False, delay=2, disable=not progress)
    size = probes or Probes()
    settings = {
        **(identity or {}),
        **model_identity(target.module),
        **_smoothed(target.module),
        **({} if undefended is None else {"undefended_identity": model_identity(undefended)}),
        **target.settings,
        **images.settings(bar),
        "seed": seed,
        "batch_size": batch_size,
        "attacks": attack_settings(used),
        "probes": asdict(size),
        "versions": versions(*_LIBRARIES),
    }
    work = _Work(target, used, images, seed, batch_size, frozenset(images.indices[:kept]))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if run is None else run
        journal = stack.enter_context(Run(folder, ATTACK, settings, resume=resume))
        notices = [*journal.notices, *images.notices]
        for notice in notices:
            tqdm.write(f"notice: {notice}", file=sys.stderr)
        stack.enter_context(target.as_asked())
        work.attack(journal, progress)
        if masking_checks:
            work.check(journal, undefended, size, progress)
        return AttackLog.of(journal.settings, journal.rows.values(), notices)


def _smoothed(module: nn.Module) -> dict[str, Any]:
    """Return what tells the classifier under noise: a certificate of it has the same."""
    if not isinstance(module, Smoothed):
        return {}
    return {"smoothed": {**model_identity(module.base), "sigma": module.sigma}}


def _usable(used: list[Column], target: Target) -> list[Column]:
    seeing = [column.name for column in used if column.gradient != "none"]
    if seeing and not target.differentiable:
        raise InputError(
            f"attack {seeing[0]!r} needs gradients, but autograd does not reach the images through "
            "the model; give gradient-free attacks, or put BPDA into the model"
        )
    return used


@dataclass(frozen=True)
class _Work:
    """The model, the attacks and the images of a run."""

    target: Target
    columns: Sequence[Column]
    images: Chosen
    seed: int
    batch_size: int
    pictured: frozenset[int]

    def attack(self, run: Run[Any], visible: bool) -> None:
        """Write the rows that the run does not hold yet, those without attack first."""
        clean = clean_column(*(column.attack.norm for column in self.columns[:1]))
        total = len(self.images.indices) * (1 + len(self.columns))
        done = sum(isinstance(row, AttackRow) for row in run.rows.values())
        with Progress(total, done, visible=visible) as progress:
            self.target.tick = progress.tick
            for column in (clean, *self.columns):
                expected = getattr(column.attack, "nfe", None)
                for first in range(0, len(self.images.indices), self.batch_size):
                    block = self.images.indices[first : first + self.batch_size]
                    todo = [i for i in block if ("attack", column.key, i) not in run.rows]
                    if todo:
                        progress.begin(column.name, len(todo), expected)
                        run.append(self._rows(run, clean, column, block))
                        expected = progress.nfe / len(block)
                        progress.end()

    def check(
        self, run: Run[Any], undefended: nn.Module | None, probes: Probes, visible: bool
    ) -> None:
        """Make the masking checks that the run does not hold yet."""
        log = AttackLog.of(run.settings, run.rows.values())
        right = [row.index for row in log.rows if row.attack == CLEAN and row.clean]
        chosen = tuple(right or self.images.indices)[: probes.images]
        x, y = self._images(chosen)
        used = tuple(self.columns)
        subject = Subject(self.target, x, y, chosen, log.rows, used, undefended, probes)
        todo = unmade(log.checks)
        done = len(CHECKS) - len(todo)
        with Progress(len(CHECKS), done, visible=visible, unit="check") as progress:
            self.target.tick = progress.tick
            for name in todo:
                progress.begin(name, 1, None)
                run.append([masking.make(name, subject)])
                progress.end()
            run.append(row for row in masking.unmoved(subject) if row != run.rows.get(row.key))

    def _rows(
        self, run: Run[Any], clean: Column, column: Column, block: Sequence[int]
    ) -> list[AnyRow]:
        """Return the rows of one batch that the run does not hold yet."""
        batch = Batch(block, *self._images(block), self._seed(column, block))
        begin = time.perf_counter()
        if column is clean:
            found = unattacked(self.target, batch)
        else:
            known = [run.rows["attack", clean.key, index].clean for index in block]
            found = attacked(self.target, column, batch, torch.tensor(known))
        seconds = time.perf_counter() - begin
        pictured = pictures_of(self.target, column, batch, found, self.pictured)
        made: list[AnyRow] = [*rows_of(column, batch, found, seconds), *pictured]
        return [row for row in made if row.key not in run.rows] + self._flags(run, column, found)

    def _flags(self, run: Run[Any], column: Column, found: Found) -> list[AnyRow]:
        """Return what AutoAttack says of the model, if it says more than on earlier batches."""
        name = autoattack_flags(column, (), self.target.randomised).name
        known = run.rows[key].numbers["flags"] if (key := ("check", name)) in run.rows else []
        if set(found.flags) <= set(known):
            return []
        every = tuple(dict.fromkeys((*known, *found.flags)))
        return [autoattack_flags(column, every, self.target.randomised)]

    def _seed(self, column: Column, block: Sequence[int]) -> int:
        """Return the seed of one batch of one column, whatever ran before it."""
        name = zlib.crc32(repr(column.key).encode())
        sequence = np.random.SeedSequence([self.seed, name, block[0]])
        return int(sequence.generate_state(1)[0]) >> 1

    def _images(self, block: Sequence[int]) -> tuple[Images, Labels]:
        x, y = self.images.stack(block)
        return x.to(self.target.device), y.to(self.target.device)
