"""Evaluate a model under attacks: one row for each image and attack, then the masking checks."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from art_denoised import checks
from art_denoised.attacks.suites import NORMS, Suite, distances
from art_denoised.checks import InputError
from art_denoised.data import ImageData
from art_denoised.evaluation import masking
from art_denoised.evaluation.attack_rows import (
    ATTACK,
    CHECKS,
    CLEAN,
    AnyRow,
    AttackLog,
    AttackRow,
    CheckRow,
    ImageRow,
    unmade,
)
from art_denoised.evaluation.columns import (
    Column,
    attack_settings,
    autoattack_flags,
    columns,
    verified,
)
from art_denoised.evaluation.images import stack_images
from art_denoised.evaluation.probing import Probes, Subject
from art_denoised.evaluation.progress import Progress
from art_denoised.evaluation.target import LOOKED, Target
from art_denoised.runs.identity import data_fingerprint, versions
from art_denoised.runs.identity import identity as model_identity
from art_denoised.runs.journal import Run
from art_denoised.types import Images, Labels

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
    repeats, seed = checks.count("repeats", repeats), checks.count("seed", seed, 0)
    batch_size, pictures = (
        checks.count("batch_size", batch_size),
        checks.count("pictures", pictures, 0),
    )
    indices = checks.indices(range(len(data)) if indices is None else indices, len(data))
    if not indices:
        raise InputError("there are no images; give at least one")
    x, _ = stack_images(data, indices[:LOOKED])
    target = Target(model, x, noise=noise, repeats=repeats, seed=seed, batch_size=batch_size)
    used = _usable(columns(attacks, target.gradients(gradients)), target)
    pixels, labels = _read(data, indices, target.classes, progress)
    probes = probes or Probes()
    settings = {
        **(identity or {}),
        **model_identity(target.module),
        **({} if undefended is None else {"undefended_identity": model_identity(undefended)}),
        **target.settings,
        "images": len(indices),
        "first": indices[0],
        "last": indices[-1],
        "pixels": pixels,
        "seed": seed,
        "batch_size": batch_size,
        "attacks": attack_settings(used),
        "probes": asdict(probes),
        "versions": versions(*_LIBRARIES),
    }
    work = _Work(target, used, data, indices, seed, batch_size, frozenset(indices[:pictures]))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if run is None else run
        journal = stack.enter_context(Run(folder, ATTACK, settings, resume=resume))
        notices = [*journal.notices, *_one_class(labels)]
        for notice in notices:
            tqdm.write(f"notice: {notice}", file=sys.stderr)
        stack.enter_context(target.as_asked())
        work.attack(journal, progress)
        if masking_checks:
            work.check(journal, undefended, probes, progress)
        return AttackLog.of(journal.settings, journal.rows.values(), notices)


def _usable(made: Iterator[Column], target: Target) -> list[Column]:
    used = list(made)
    seeing = [column.name for column in used if column.gradient != "none"]
    if seeing and not target.differentiable:
        raise InputError(
            f"attack {seeing[0]!r} needs gradients, but autograd does not reach the images through "
            "the model; give gradient-free attacks, or put BPDA into the model"
        )
    return used


def _read(
    data: ImageData, indices: Sequence[int], classes: int, progress: bool
) -> tuple[str, list[int]]:
    """Return a hash of indices, images and labels, and the labels; every image is checked."""
    labels: list[int] = []

    def triples() -> Iterator[tuple[int, Tensor, int]]:
        for i in tqdm(indices, desc="reading", unit="image", leave=False, disable=not progress):
            x, y = stack_images(data, [i], classes)
            labels.append(int(y))
            yield i, x, labels[-1]

    return data_fingerprint(triples()), labels


def _one_class(labels: Sequence[int]) -> list[str]:
    if len(labels) < 2 or len(set(labels)) > 1:
        return []
    return [
        f"all {len(labels)} images are of class {labels[0]}; choose indices of several classes to "
        "measure the accuracy on the data set"
    ]


class _Found(NamedTuple):
    """What became of a batch: attacked images, the attack's count, later evaluations, flags."""

    x_adv: Images
    counted: Tensor  # (batch,)
    right: Tensor  # (repeats, batch)
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Work:
    """The model, the attacks and the images of a run, and the rows that come of them."""

    target: Target
    columns: Sequence[Column]
    data: ImageData
    indices: Sequence[int]
    seed: int
    batch_size: int
    pictured: frozenset[int]

    def attack(self, run: Run[Any], visible: bool) -> None:
        """Write the rows that the run does not hold yet, those without attack first."""
        total = len(self.indices) * (1 + len(self.columns))
        done = sum(isinstance(row, AttackRow) for row in run.rows.values())
        with Progress(total, done, visible=visible) as progress:
            self.target.tick = progress.tick
            for column in (None, *self.columns):
                key = (CLEAN, "none", 0.0) if column is None else column.key
                expected = getattr(column and column.attack, "nfe", None)
                for first in range(0, len(self.indices), self.batch_size):
                    block = self.indices[first : first + self.batch_size]
                    missing = [i for i in block if ("attack", key, i) not in run.rows]
                    if not missing:
                        continue
                    progress.begin(key[0], len(missing), expected)
                    run.append(self._rows(run, column, block))
                    expected = progress.nfe / len(block)
                    progress.end()

    def check(
        self, run: Run[Any], undefended: nn.Module | None, probes: Probes, visible: bool
    ) -> None:
        """Make the masking checks that the run does not hold yet."""
        log = AttackLog.of(run.settings, run.rows.values())
        right = [row.index for row in log.rows if row.attack == CLEAN and row.clean]
        chosen = tuple(right or self.indices)[: probes.images]
        x, y = self._images(chosen)
        subject = Subject(
            self.target, x, y, chosen, log.rows, tuple(self.columns), undefended, probes
        )
        todo = unmade(log.checks)
        with Progress(len(CHECKS), len(CHECKS) - len(todo), visible=visible) as progress:
            self.target.tick = progress.tick
            for name in todo:
                progress.begin(name, 1, None)
                run.append([masking.make(name, subject)])
                progress.end()
            run.append(row for row in masking.unmoved(subject) if row != run.rows.get(row.key))

    def _rows(self, run: Run[Any], column: Column | None, block: Sequence[int]) -> list[AnyRow]:
        """Return the rows of one batch that the run does not hold yet."""
        x, y = self._images(block)
        begin = time.perf_counter()
        if column is None:
            key, norm = (
                (CLEAN, "none", 0.0),
                self.columns[0].attack.norm if self.columns else NORMS[0],
            )
            found = self._clean(x, y, block)
            right = found.right.any(0)
        else:
            key, norm = column.key, column.attack.norm
            clean = [run.rows["attack", (CLEAN, "none", 0.0), index].clean for index in block]
            right = torch.tensor(clean)
            found = self._attacked(column, block, x, y, right)
        seconds = (time.perf_counter() - begin) / max(int(right.sum()), 1)
        far = distances(x, found.x_adv)
        rows: list[AnyRow] = []
        for i, index in enumerate(block):
            ever = bool(right[i])
            rows.append(
                AttackRow(
                    index=index,
                    label=int(y[i]),
                    attack=key[0],
                    gradient=key[1],
                    norm=norm,
                    eps=key[2],
                    clean=ever,
                    counted=ever and bool(found.counted[i]),
                    fresh=tuple(ever and bool(one) for one in found.right[:, i]),
                    distance_linf=float(far["linf"][i]),
                    distance_l2=float(far["l2"][i]),
                    seconds=round(seconds, 6) if ever else 0.0,
                )
            )
            if index in self.pictured:
                rows += self._pictures(key, index, found.x_adv[i : i + 1])
        new = [row for row in rows if row.key not in run.rows]
        return new if column is None else [*new, *self._flags(run, column, found.flags)]

    def _clean(self, x: Images, y: Labels, block: Sequence[int]) -> _Found:
        seed = self._seed((CLEAN, "none", 0.0), block)
        if self.target.randomised:
            right = self.target.right(x, y, seed)
        else:
            right = self.target.steady(x, y, seed, block)
        return _Found(x, right[0], right)

    def _attacked(
        self, column: Column, block: Sequence[int], x: Images, y: Labels, clean: Tensor
    ) -> _Found:
        """Attack those images of a batch that are right without attack."""
        x_adv, counted = x.clone(), torch.zeros(len(x), dtype=torch.bool)
        right = torch.zeros(self.target.repeats, len(x), dtype=torch.bool)
        if not bool(clean.any()):
            return _Found(x_adv, counted, right)
        mine, seed = clean.to(x.device), self._seed(column.key, block)
        attacked, counts, flags = self.target.attempt(
            column.attack, column.gradient, x[mine], y[mine], seed
        )
        numbers = [index for index, ever in zip(block, clean.tolist(), strict=True) if ever]
        attacked = verified(column, numbers, x[mine], attacked)
        later = self.target.right(attacked, y[mine], seed + 1)
        if counts is None and self.target.randomised:  # a draw of its own
            counts = self.target.right(attacked, y[mine], seed + 2, repeats=1)[0]
        x_adv[mine], right[:, clean] = attacked, later
        counted[clean] = later[0] if counts is None else counts.cpu()
        return _Found(x_adv, counted, right, flags if isinstance(column.attack, Suite) else ())

    def _flags(self, run: Run[Any], column: Column, flags: Sequence[str]) -> list[CheckRow]:
        """Return what AutoAttack says of the model, with what it said on earlier batches."""
        name = autoattack_flags(column, (), self.target.randomised).name
        before = run.rows.get(("check", name))
        known = before.numbers["flags"] if before else []
        if set(flags) <= set(known):
            return []
        every = tuple(dict.fromkeys((*known, *flags)))
        return [autoattack_flags(column, every, self.target.randomised)]

    def _pictures(self, key: tuple[str, str, float], index: int, x: Images) -> Iterator[ImageRow]:
        stages = ("clean", "denoised") if key[0] == CLEAN else ("attacked", "attacked and denoised")
        for stage, image in zip(stages, (x, self.target.denoised(x)), strict=True):
            if image is not None:
                pixels = image[0].detach().cpu()
                yield ImageRow.of(
                    pixels, index=index, attack=key[0], gradient=key[1], eps=key[2], stage=stage
                )

    def _seed(self, key: tuple[str, str, float], block: Sequence[int]) -> int:
        """Return the seed of one batch of one column, whatever ran before it."""
        name = zlib.crc32(repr(key).encode())
        sequence = np.random.SeedSequence([self.seed, name, block[0]])
        return int(sequence.generate_state(1)[0]) >> 1

    def _images(self, block: Sequence[int]) -> tuple[Images, Labels]:
        x, y = stack_images(self.data, block, self.target.classes)
        return x.to(self.target.device), y.to(self.target.device)
