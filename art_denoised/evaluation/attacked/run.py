"""Evaluate a model under attacks: a row an image and attack, then the masking checks."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from art_denoised import checks
from art_denoised.attacks.suites import NORMS, Suite, distances
from art_denoised.checks import InputError
from art_denoised.data import ImageData
from art_denoised.evaluation.attacked import masking
from art_denoised.evaluation.attacked.columns import (
    Column,
    attack_settings,
    columns,
    verified,
    versions,
)
from art_denoised.evaluation.attacked.flags import autoattack_flags
from art_denoised.evaluation.attacked.probing import Probes, Subject
from art_denoised.evaluation.attacked.records import (
    CHECKS,
    CLEAN,
    AttackLog,
    AttackLogWriter,
    AttackRow,
    CheckRow,
    ImageRow,
    unmade,
)
from art_denoised.evaluation.attacked.settings import data_fingerprint, module_options
from art_denoised.evaluation.attacked.target import LOOKED, Target
from art_denoised.storage import make_folder, weights_fingerprint
from art_denoised.types import Images, Labels


def evaluate(
    model: Any,
    data: ImageData,
    attacks: Sequence[Any] | Mapping[str, Any],
    *,
    out: Path | str | None = None,
    repeats: int = 10,
    noise: str | None = None,
    gradients: Sequence[str] | None = None,
    bare: nn.Module | None = None,
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
    """Attack a model on the images it gets right, and check that the figures can be believed.

    Every attack runs on every image that is right without it, so that attacks can be compared
    image by image. Rows are written as their batch is done, and a killed run goes on with
    ``resume=True`` to the same rows; where the noise of a defence comes from the operating system
    (a seed of None), to rows of the same distribution.

    A randomised model, one of whose first calls differ (`Target`), is judged twice: as the attack
    itself counted, and in ``repeats`` later evaluations with fresh noise.

    Args:
        model: Images in [0, 1] to logits, in eval mode on the device to use; or an ART estimator.
        data: Pairs of an image and its class; for tensors ``TensorDataset(x, y)``.
        attacks: Callables ``attack(model, x, y) -> x_adv`` with ``eps`` and ``norm``, such as `PGD`
            and the faces of `art_denoised.attacks.suites`; or (name, attack) pairs, or a mapping of
            names to them. An attack may be given with several eps. Attributes that are read where
            they are there: ``gradient_free`` and ``mixed`` as of `Suite`, and ``seed``, which is
            mixed into the run's for a dataclass, and is the attack's own affair otherwise.
        out: Folder for ``attack.jsonl``; None: nothing is kept.
        repeats: Later evaluations of each image, for randomised models.
        noise: "fixed" or "fresh", of our modules; None: as the model comes. With fixed noise the
            attacker knows it, and the model is deterministic. With "fresh" any model is judged as
            randomised.
        gradients: "exact", "bpda" or both, for models with likelihood maximization; both by
            default, as an attacker would.
        bare: The classifier without its defence, for the check of transfer.
        masking_checks: Make the checks; without them no figure is called trusted.
        probes: How large the checks are.
        seed: Of all random choices of attacks and evaluations.
        batch_size: Images attacked at once. Attacks draw a start for the batch, so it is part of
            what determines the rows.
        indices: Which images; None: all.
        pictures: Of how many images pictures are kept for the report.
        identity: What else must agree before a run is continued, such as the names of model and
            data. Weights and options of the model, images, labels and attacks always are compared.
        resume: Continue the run in ``out`` if there is one.
        progress: Show a progress bar, with the time left, on standard error.

    Returns:
        The finished log.

    Raises:
        InputError: Something cannot be used; the model raised, returned NaN or another shape; an
            attack failed or left its ball (`within`); or a model taken for deterministic answered
            an image differently when asked again. Rows before are kept.
        OSError: The log cannot be written.

    Example:
        >>> from art_denoised.attacks.pgd import PGD
        >>> from art_denoised.demo import digits_classifier
        >>> from art_denoised.data import load_data
        >>> log = evaluate(
        ...     digits_classifier(), load_data("digits"), [PGD(0.2, steps=10)],
        ...     indices=range(20), masking_checks=False, progress=False,
        ... )
        >>> sum(row.counted for row in log.columns["pgd", "exact", 0.2]) <= 4
        True
    """
    run = _Run(
        model,
        data,
        attacks,
        repeats=checks.count("repeats", repeats),
        noise=noise,
        gradients=gradients,
        seed=checks.count("seed", seed, 0),
        batch_size=checks.count("batch_size", batch_size),
        indices=checks.indices(range(len(data)) if indices is None else indices, len(data)),
        pictures=checks.count("pictures", pictures, 0),
    )
    probes = probes or Probes()
    settings = {**(identity or {}), **run.settings(progress), "probes": asdict(probes)}
    if bare is not None:
        settings["bare_weights"] = weights_fingerprint(bare)
        settings["bare_options"] = module_options(bare)
    with contextlib.ExitStack() as stack:
        if out is None:
            out = stack.enter_context(tempfile.TemporaryDirectory())
        path = make_folder(Path(out)) / "attack.jsonl"
        log = stack.enter_context(AttackLogWriter(path, settings, resume=resume))
        for notice in log.notices:
            tqdm.write(f"notice: {notice}", file=sys.stderr)
        stack.enter_context(run.target.as_asked())
        run.attack(log, progress)
        if masking_checks:
            run.check(log, bare, probes, progress)
        return log.log


class _Run:
    """The model, the images and the attacks of a run, checked before its log is opened."""

    def __init__(
        self,
        model: Any,
        data: ImageData,
        attacks: Sequence[Any] | Mapping[str, Any],
        *,
        repeats: int,
        noise: str | None,
        gradients: Sequence[str] | None,
        seed: int,
        batch_size: int,
        indices: Sequence[int],
        pictures: int,
    ) -> None:
        if not len(indices):
            raise InputError("there are no images; give at least one")
        self._data, self._indices = data, indices
        self._seed, self._size, self._pictures = seed, batch_size, pictures
        x, _ = stack_images(data, indices[:LOOKED])
        self.target = Target(
            model, x, noise=noise, repeats=repeats, seed=seed, batch_size=batch_size
        )
        self._columns = list(columns(attacks, self.target.gradients(gradients)))
        seeing = [column.name for column in self._columns if column.gradient != "none"]
        if seeing and not self.target.differentiable:
            raise InputError(
                f"attack {seeing[0]!r} takes gradients, and the model's answer has none (it is cut "
                "off from the image); give gradient-free attacks, or put BPDA into the model"
            )

    def settings(self, progress: bool) -> dict[str, Any]:
        """Return what determines the rows; every image is read once for it, and checked."""
        attacks: dict[tuple[str, float], dict[str, Any]] = {}
        for column in self._columns:
            name, gradient, eps = column.key
            named = {"name": name, "gradients": [], "mixed": column.mixed}
            entry = attacks.setdefault((name, eps), {**attack_settings(column.attack), **named})
            entry["gradients"].append(gradient)
        return {
            "weights": weights_fingerprint(self.target.module),
            "options": module_options(self.target.module),
            "images": len(self._indices),
            "first": int(self._indices[0]),
            "last": int(self._indices[-1]),
            "pixels": self._pixels(progress),
            **self.target.settings,
            "seed": self._seed,
            "batch_size": self._size,
            "attacks": list(attacks.values()),
            "versions": versions(),
        }

    def _pixels(self, progress: bool) -> str:
        """Return a hash of which images there are, and of what they and their labels are."""
        bar = tqdm(self._indices, desc="reading", unit="image", leave=False, disable=not progress)
        pairs = ((i, stack_images(self._data, [i], self.target.classes)) for i in bar)
        return data_fingerprint((i, x, int(y)) for i, (x, y) in pairs)

    def attack(self, log: AttackLogWriter, progress: bool) -> None:
        """Write the rows that the log does not hold yet, those without attack first."""
        done = {(row.column, row.index) for row in log.log.rows}
        clean = {row.index: row.clean for row in log.log.rows if row.attack == CLEAN}
        todo: list[Column | None] = [None, *self._columns]
        total = len(self._indices) * len(todo)
        begin = len(done)
        with tqdm(total=total, initial=begin, unit="image", disable=not progress) as bar:
            for column in todo:
                key = (CLEAN, "none", 0.0) if column is None else column.key
                bar.set_description(key[0])
                for first in range(0, len(self._indices), self._size):
                    block = self._indices[first : first + self._size]
                    missing = [index for index in block if (key, index) not in done]
                    if missing:
                        rows = self._block(log, column, block, clean)
                        clean.update((row.index, row.clean) for row in rows)
                        for row in rows:
                            if row.index in missing:
                                log.append(row)
                    bar.update(len(missing))

    def check(
        self,
        log: AttackLogWriter,
        bare: nn.Module | None,
        probes: Probes,
        progress: bool,
    ) -> None:
        """Make the masking checks that the log does not hold yet."""
        todo = unmade(log.log.checks)
        right = [row.index for row in log.log.rows if row.attack == CLEAN and row.clean]
        chosen = (right or list(self._indices))[: probes.images]
        x, y = self._images(chosen)
        mixed = frozenset(column.key for column in self._columns if column.mixed)
        subject = Subject(
            self.target, x, y, tuple(chosen), log.log.rows, self._balls(), bare, probes, mixed
        )
        held = len(CHECKS) - len(todo)
        with tqdm(total=len(CHECKS), initial=held, desc="checks", disable=not progress) as bar:
            for name in todo:
                log.append(masking.CHECKS[name](subject))
                bar.update()

    def _balls(self) -> tuple[tuple[str, float], ...]:
        balls = {(column.attack.norm, column.attack.eps) for column in self._columns}
        return tuple(sorted(balls))

    def _block(
        self,
        log: AttackLogWriter,
        column: Column | None,
        block: Sequence[int],
        clean: Mapping[int, bool],
    ) -> list[AttackRow]:
        """Return the rows of one batch, attacking those of its images that are right without."""
        x, y = self._images(block)
        begin = time.perf_counter()
        if column is None:
            norm = self._columns[0].attack.norm if self._columns else NORMS[0]
            key, x_adv = (CLEAN, "none", 0.0), x
            seed = self._key(key, block)
            if self.target.randomised:
                right = self.target.right(x, y, seed)
            else:
                right = self.target.steady(x, y, seed, block)
            counted = right[0]
            ever = right.any(0).tolist()
        else:
            key, norm = column.key, column.attack.norm
            ever = [clean[index] for index in block]
            x_adv, counted, right = self._attacked(log, column, block, x, y, torch.tensor(ever))
        seconds = (time.perf_counter() - begin) / max(sum(ever), 1)
        far = distances(x, x_adv)
        for i, index in enumerate(block):
            if index in self._indices[: self._pictures]:
                self._picture(log, key, index, x_adv[i : i + 1])
        return [
            AttackRow(
                index=int(index),
                label=int(y[i]),
                attack=key[0],
                gradient=key[1],
                norm=norm,
                eps=key[2],
                clean=ever[i],
                counted=ever[i] and bool(counted[i]),
                fresh=tuple(ever[i] and bool(one) for one in right[:, i]),
                distance_linf=float(far["linf"][i]),
                distance_l2=float(far["l2"][i]),
                seconds=round(seconds, 6) if ever[i] else 0.0,
            )
            for i, index in enumerate(block)
        ]

    def _attacked(
        self,
        log: AttackLogWriter,
        column: Column,
        block: Sequence[int],
        x: Images,
        y: Labels,
        ever: Tensor,
    ) -> tuple[Images, Tensor, Tensor]:
        """Return attacked images, the attack's count, and later evaluations (repeats, batch)."""
        x_adv, counted = x.clone(), torch.zeros(len(x), dtype=torch.bool)
        right = torch.zeros(self.target.repeats, len(x), dtype=torch.bool)
        if not bool(ever.any()):
            return x_adv, counted, right
        mine, key = ever.to(x.device), self._key(column.key, block)
        found = self.target.attempt(column.attack, column.gradient, x[mine], y[mine], key)
        numbers = [index for index, is_mine in zip(block, ever.tolist(), strict=True) if is_mine]
        attacked = verified(column, numbers, x[mine], found.x_adv)
        later = self.target.right(attacked, y[mine], key + 1)
        counts = later[0] if found.counted is None else found.counted.cpu()
        if found.counted is None and self.target.randomised:
            counts = self.target.right(attacked, y[mine], key + 2, repeats=1)[0]  # its own draw
        x_adv[mine], counted[ever], right[:, ever] = attacked, counts, later
        if isinstance(column.attack, Suite):
            self._flag(log, column, found.flags)
        return x_adv, counted, right

    def _flag(self, log: AttackLogWriter, column: Column, flags: tuple[str, ...]) -> None:
        """Keep what AutoAttack says of the model, with that of the batches before."""
        row = autoattack_flags(column.key, flags, self.target.randomised)
        before: CheckRow | None = next((c for c in log.log.checks if c.name == row.name), None)
        if before is not None:
            flags = tuple(dict.fromkeys((*before.numbers["flags"], *flags)))
            row = autoattack_flags(column.key, flags, self.target.randomised)
        if flags and row != before:
            log.append(row)

    def _picture(
        self, log: AttackLogWriter, key: tuple[str, str, float], index: int, x: Images
    ) -> None:
        stages = ("clean", "denoised") if key[0] == CLEAN else ("attacked", "attacked and denoised")
        named: dict[str, Any] = {
            "attack": key[0],
            "gradient": key[1],
            "eps": key[2],
            "index": int(index),
        }
        for stage, image in zip(stages, (x, self.target.denoised(x)), strict=True):
            if image is not None:
                log.append(ImageRow.of(image[0].detach().cpu(), stage=stage, **named))

    def _key(self, key: tuple[str, str, float], block: Sequence[int]) -> int:
        """Return the seed of one batch of one column, whatever ran before it."""
        name = zlib.crc32(repr(key).encode())
        sequence = np.random.SeedSequence([self._seed, name, int(block[0])])
        return int(sequence.generate_state(1)[0]) >> 1

    def _images(self, block: Sequence[int]) -> tuple[Images, Labels]:
        x, y = stack_images(self._data, block, self.target.classes)
        return x.to(self.target.device), y.to(self.target.device)


def stack_images(
    data: ImageData, indices: Sequence[int], classes: int | None = None
) -> tuple[Images, Labels]:
    """Return images and their classes as tensors, checked one by one.

    Raises:
        InputError: One cannot be used; it is named.

    Example:
        >>> from art_denoised.data import load_data
        >>> x, y = stack_images(load_data("digits"), [0, 5])
        >>> x.shape, y
        (torch.Size([2, 1, 8, 8]), tensor([2, 7]))
    """
    images, labels = [], []
    for index in indices:
        x, label = data[index]
        try:
            images.append(checks.images(torch.as_tensor(x)[None]).float())
            labels.append(checks.labels([int(label)], classes))
        except InputError as error:
            raise InputError(f"image {index}: {error}") from None
        except (TypeError, ValueError, RuntimeError):
            raise InputError(
                f"image {index} has the label {label!r}, or an image that is no array of numbers; "
                "give a class index, not one-hot"
            ) from None
    if len({image.shape for image in images}) > 1:
        raise InputError("images differ in shape; crop or pad them first")
    return torch.cat(images), torch.cat(labels)
