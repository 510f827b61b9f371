"""Evaluate a model under attacks: one row for each image and attack, then the masking checks.

Workers may take the batches; what they are built from and what they answer stands at the end.
"""

from __future__ import annotations

import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from art_denoised import checks
from art_denoised.attacks.pgd import NORMS, distances, within
from art_denoised.checks import InputError
from art_denoised.data.images import Chosen, ImageData, Shard
from art_denoised.evaluation import masking
from art_denoised.evaluation.attack_rows import (
    ATTACK,
    CHECKS,
    CLEAN,
    AttackLog,
    AttackRow,
    ImageRow,
    unmade,
)
from art_denoised.evaluation.target import LOOKED, Column, Target, columns
from art_denoised.runs.journal import Run, describe, versions
from art_denoised.runs.journal import identity as model_identity
from art_denoised.runs.progress import Progress, watched
from art_denoised.runs.workers import Place, SentNetwork, Team, agreed, built, in_order
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
    probes: masking.Probes | None = None,
    seed: int = 0,
    batch_size: int = 64,
    indices: Sequence[int] | None = None,
    pictures: int = 4,
    identity: Mapping[str, Any] | None = None,
    workers: Place | None = None,
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
            attributes are described in docs/tutorials/attack.md.
        run: Folder for ``attack.jsonl``; None keeps no file.
        repeats: Number of later evaluations of each image, for randomised models.
        noise: "fixed" or "fresh" noise in all seeded parts; None leaves it as the model comes. An
            attacker knows fixed noise, and the model is deterministic. With "fresh" any model is
            judged as randomised.
        gradients: Ways of taking gradients, of those that the model has ("exact", "bpda"); None
            takes all of them, as an attacker would.
        undefended: The classifier without its defence, for the transfer check.
        masking_checks: Whether to make the masking checks. Without them no result is trusted. They
            need the rows of all images, so a `Shard` leaves them out: `merge` the shards, then
            resume the merged run without a shard, which makes them.
        probes: Size of the masking checks.
        seed: Seed of all random choices of attacks and evaluations.
        batch_size: Number of images attacked at once. Attacks draw their starts for a batch, so
            the rows depend on it.
        indices: Indices of the images to attack, or a `Shard` of them; None takes all.
        pictures: Number of images, evenly spaced, of which pictures are kept for the report.
        identity: Further JSON values that must agree before a run is resumed, such as the names of
            model and data. The weights, structure and attributes of the model, images, labels,
            attacks and versions are always compared.
        workers: Where batches are attacked: `Workers` or `Cluster`; None: this process. The rows
            are those of one process, in the same order. The masking checks are made in this one.
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
    if workers is not None and not hasattr(workers, "start"):
        raise InputError(f"workers is {workers!r}; give Workers({workers!r}) or a Cluster")
    if isinstance(indices, Shard):
        indices = indices.in_blocks(batch_size)
    images = Chosen(data, indices)
    if not images.whole:
        raise InputError("there are no images; give at least one")
    x, _ = images.stack(images.whole[:LOOKED])
    target = Target(model, x, noise=noise, repeats=repeats, seed=seed, batch_size=batch_size)
    if undefended is not None:  # it is attacked last, and would be refused then
        Target(undefended, x, noise=None, repeats=1, seed=seed)
    used = list(columns(attacks, target.gradients(gradients)))
    seeing = [column.name for column in used if column.gradient != "none"]
    if seeing and not target.differentiable:
        raise InputError(
            f"attack {seeing[0]!r} needs gradients, but autograd does not reach the images through "
            "the model; give gradient-free attacks, or put BPDA into the model"
        )
    images.classes = target.classes
    reading = partial(watched, what="reading", visible=progress)
    size = probes or masking.Probes()
    settings = {
        **checks.json_values("identity", identity),
        **model_identity(target.module),
        **_smoothed(target.module),
        **({} if undefended is None else {"undefended_identity": model_identity(undefended)}),
        **target.settings,
        **images.settings(reading),
        "seed": seed,
        "batch_size": batch_size,
        "attacks": attack_settings(used),
        "probes": asdict(size),
        "versions": versions(*_LIBRARIES),
        **({"allow_mixed": True} if workers is not None and workers.allow_mixed else {}),
    }
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if run is None else run
        journal = stack.enter_context(Run(folder, ATTACK, settings, resume=resume))
        notices = [*journal.notices, *images.notices]
        for notice in notices:
            print(f"notice: {notice}", file=sys.stderr)
        stack.enter_context(target.as_asked())
        apart = max(1, len(images.whole) // max(1, kept))  # all classes, where they are sorted
        pictured = frozenset(images.whole[::apart][:kept])
        work = Work(journal, target, used, images, seed, batch_size, pictured, progress)
        if workers is None:
            work.attack()
        else:
            attack_elsewhere(work, workers, x)
        if masking_checks and images.shard is None:
            work.check(undefended, size)
        return AttackLog.of(journal, notices)


def _smoothed(module: nn.Module) -> dict[str, Any]:
    """Return what tells the classifier under noise: a certificate of it has the same."""
    if not isinstance(module, Smoothed):
        return {}
    return {"smoothed": {**model_identity(module.base), "sigma": module.sigma}}


def attack_settings(used: Iterable[Column]) -> list[dict[str, Any]]:
    """Return what determines each attack, its own seed among it, as JSON values."""
    settings: dict[tuple[str, float], dict[str, Any]] = {}
    for column in used:
        name, gradient, eps = column.key
        own = describe(column.attack)
        own = own if isinstance(own, dict) else {"held": own}  # a function
        common = {"type": type(column.attack).__name__, "eps": eps, "norm": column.attack.norm}
        named = {"name": name, "gradients": [], "mixed": column.mixed}
        settings.setdefault((name, eps), {**own, **common, **named})["gradients"].append(gradient)
    return list(settings.values())


@dataclass(frozen=True)
class _NoAttack:
    """What is done to the images of the column "clean": nothing."""

    norm: str
    eps: float = 0.0


@dataclass(frozen=True)
class Work:
    """A run, and what is attacked in it."""

    run: Run[Any]
    target: Target
    columns: Sequence[Column]
    images: Chosen
    seed: int
    batch_size: int
    pictured: frozenset[int]
    visible: bool

    def attack(self) -> None:
        """Write the rows and pictures that the run does not hold yet, those without attack first.

        A batch whose pictures alone are missing is attacked again.
        """
        with self.progress() as progress:
            self.target.tick = progress.tick
            for column in (self.clean, *self.columns):
                expected = getattr(column.attack, "nfe", None)
                for batch in self.batches(column):
                    progress.begin(column.name, len(self.missing(column, batch.indices)), expected)
                    rows, found = judged(self.target, batch)
                    self.keep(column, rows, found.flags)  # taking pictures may fail
                    self.run.append(pictures_of(self.target, batch, found.x_adv))
                    expected = progress.nfe / len(batch.indices)
                    progress.end(self.standing(column))

    @property
    def clean(self) -> Column:
        """The column of images without attack."""
        norm = self.columns[0].attack.norm if self.columns else NORMS[0]
        return Column(CLEAN, "none", _NoAttack(norm))

    def progress(self) -> PassProgress:
        """Return the bar of the rows."""
        total = len(self.images.indices) * (1 + len(self.columns))
        done = sum(isinstance(row, AttackRow) for row in self.run.rows.values())
        return PassProgress("attack", total, done=done, visible=self.visible, unit="attacked image")

    def batches(self, column: Column) -> Iterator[Batch]:
        """Yield the batches of a column of which rows or pictures are missing."""
        for first in range(0, len(self.images.indices), self.batch_size):
            block = tuple(self.images.indices[first : first + self.batch_size])
            pictured = self.pictured.intersection(block)
            last = {("image", *column.key, index, _stages(column)[-1]) for index in pictured}
            if not (self.missing(column, block) or last - self.run.rows.keys()):
                continue
            clean = None
            if column.name != CLEAN:  # its rows were written before
                keys = [("attack", self.clean.key, index) for index in block]
                clean = np.array([self.run.rows[key].clean for key in keys])
            x, y = (tensor.cpu().numpy() for tensor in self.images.stack(block))
            yield Batch(column, block, x, y, self._seed(column, block), clean, pictured)

    def missing(self, column: Column, indices: Sequence[int]) -> set[Hashable]:
        """Return the rows of some images that are missing."""
        rows: set[Hashable] = {("attack", column.key, index) for index in indices}
        return rows - self.run.rows.keys()

    def check(self, undefended: nn.Module | None, probes: masking.Probes) -> None:
        """Make the masking checks that the run does not hold yet."""
        log = AttackLog.of(self.run)
        right = [row.index for row in log.rows if row.attack == CLEAN and row.clean]
        chosen = tuple(right or self.images.indices)[: probes.images]
        x, y = (tensor.to(self.target.device) for tensor in self.images.stack(chosen))
        used = tuple(self.columns)
        subject = masking.Subject(self.target, x, y, chosen, log.rows, used, undefended, probes)
        todo = unmade(log.checks)
        done = len(CHECKS) - len(todo)
        with PassProgress(
            "masking checks", len(CHECKS), done=done, visible=self.visible, unit="check"
        ) as progress:
            self.target.tick = progress.tick
            for name in todo:
                progress.begin(name, 1, None)
                self.run.append([masking.make(name, subject)])
                progress.end()
            for row in masking.unmoved(subject):
                if row != self.run.rows.get(row.key):
                    self.run.append([row])

    def keep(self, column: Column, rows: Iterable[AttackRow], flags: Sequence[str]) -> None:
        """Write the rows of a batch, and what AutoAttack says of the model if that is new."""
        held, name = self.run.rows, masking.flags_name(column)
        row = masking.autoattack_flags(name, flags, self.target.randomised)
        known = held[row.key].numbers["flags"] if row.key in held else []
        every = tuple(dict.fromkeys((*known, *flags)))
        said = []
        if len(every) > len(known):
            said.append(masking.autoattack_flags(name, every, self.target.randomised))
        self.run.append([*(row for row in rows if row.key not in held), *said])

    def standing(self, column: Column) -> str:
        """Return the share of the images of a column so far that are right, in words."""
        rows = (row for row in self.run.rows.values() if isinstance(row, AttackRow))
        counted = [row.counted for row in rows if row.column == column.key]
        return f"{sum(counted) / len(counted):.1%} right" if counted else ""

    def _seed(self, column: Column, block: Sequence[int]) -> int:
        """Return the seed of one batch of one column, whatever ran before it."""
        name = zlib.crc32(repr(column.key).encode())
        sequence = np.random.SeedSequence([self.seed, name, block[0]])
        return int(sequence.generate_state(1)[0]) >> 1


@dataclass(frozen=True, eq=False)
class Batch:
    """Images that are attacked together, with random numbers of their own, as they are sent.

    ``clean`` says which are right without attack; None: they are not attacked. Pictures are wanted
    of the images in ``pictured``.
    """

    column: Column
    indices: Sequence[int]
    x: np.ndarray
    y: np.ndarray
    seed: int
    clean: np.ndarray | None
    pictured: frozenset[int]

    def on(self, device: torch.device) -> tuple[Images, Labels]:
        """Return images and labels."""
        return torch.tensor(self.x).to(device), torch.tensor(self.y).to(device)


class Found(NamedTuple):
    """What became of a batch; ``right`` (repeats, batch) is of the later evaluations."""

    x_adv: Images
    clean: Tensor
    counted: Tensor
    right: Tensor
    flags: tuple[str, ...] = ()


def judged(target: Target, batch: Batch) -> tuple[list[AttackRow], Found]:
    """Attack a batch, if it is attacked, and evaluate it."""
    begin, asked = time.perf_counter(), target.queries
    x, y = batch.on(target.device)
    judge = unattacked if batch.clean is None else attacked
    found = judge(target, batch, x, y)
    spent = (time.perf_counter() - begin, target.queries - asked)
    return rows_of(batch, distances(x, found.x_adv), found, *spent), found


def unattacked(target: Target, batch: Batch, x: Images, y: Labels) -> Found:
    """Evaluate images without attack."""
    if target.randomised:
        right = target.right(x, y, batch.seed)
    else:
        right = target.steady(x, y, batch.seed, batch.indices)
    return Found(x, right.any(0), right[0], right)


def attacked(target: Target, batch: Batch, x: Images, y: Labels) -> Found:
    """Attack those images that are right without attack, and evaluate them again."""
    clean = torch.tensor(batch.clean)
    x_adv, counted = x.clone(), torch.zeros(len(clean), dtype=torch.bool)
    right = torch.zeros(target.repeats, len(clean), dtype=torch.bool)
    if not bool(clean.any()):
        return Found(x_adv, clean, counted, right)
    mine = clean.to(x.device)
    x, y = x[mine], y[mine]
    found = target.attempt(batch.column.attack, batch.column.gradient, x, y, batch.seed)
    indices = [index for index, ever in zip(batch.indices, clean.tolist(), strict=True) if ever]
    x_adv[mine] = verified(batch.column, indices, x, found.x_adv)
    right[:, clean] = later = target.right(x_adv[mine], y, batch.seed + 1)
    if found.counted is not None:
        counted[clean] = found.counted.cpu()
    elif target.randomised:  # a draw of its own, which no later evaluation shares
        counted[clean] = target.right(x_adv[mine], y, batch.seed + 2, repeats=1)[0]
    else:
        counted[clean] = later[0]
    return Found(x_adv, clean, counted, right, found.flags)


def verified(column: Column, indices: Sequence[int], x: Images, x_adv: Any) -> Images:
    """Return attacked images after checking that the attack may return them."""
    who, eps, norm = f"attack {column.name!r}", column.attack.eps, column.attack.norm
    if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape:
        raise InputError(
            f"{who} returned {tuple(getattr(x_adv, 'shape', ()))} for images of shape "
            f"{tuple(x.shape)}; it must return one image for each"
        )
    x_adv = x_adv.detach().to(x)
    if not bool(torch.isfinite(x_adv).all()):
        raise InputError(f"{who} returned NaN or infinite pixels; clamp them, or leave it out")
    low, high = float(x_adv.min()), float(x_adv.max())
    if low < -1e-6 or high > 1 + 1e-6:
        raise InputError(f"{who} returned pixels in [{low:g}, {high:g}]; clamp them to [0, 1]")
    if not bool(within(x, x_adv, norm, eps).all()):
        far = distances(x, x_adv)[norm]
        index = indices[int(far.argmax())]
        raise InputError(
            f"{who} returned an example outside the eps-ball: image {index} moved by "
            f"{float(far.max()):.6g} in {norm}, eps is {eps:g}; give the attack the norm and eps "
            "that it works in"
        )
    return x_adv


def rows_of(
    batch: Batch, far: Mapping[str, Tensor], found: Found, seconds: float, queries: int
) -> list[AttackRow]:
    """Return one row for each image; the cost is divided over those that were attacked."""
    attack, gradient, eps = batch.column.key
    norm = batch.column.attack.norm
    each = [round(cost / max(int(found.clean.sum()), 1), 6) for cost in (seconds, queries)]
    tensors = (found.clean, found.counted, found.right.T, far["linf"], far["l2"])
    outcomes = zip(batch.indices, batch.y.tolist(), *(t.tolist() for t in tensors), strict=True)
    return [
        AttackRow(
            *(index, label, attack, gradient, norm, eps, clean, counted, tuple(fresh), linf, l2),
            *(each if clean else (0.0, 0.0)),
        )
        for index, label, clean, counted, fresh, linf, l2 in outcomes
    ]


def pictures_of(target: Target, batch: Batch, x_adv: Images) -> Iterator[ImageRow]:
    """Yield pictures of the wanted images, before and after the defence's purification."""
    attack, gradient, eps = batch.column.key
    for i, index in enumerate(batch.indices):
        for stage in _stages(batch.column) if index in batch.pictured else ():
            x, inside = x_adv[i : i + 1], stage.endswith("denoised")
            image = target.denoised(x) if inside else x
            if image is not None:
                yield ImageRow.of(
                    image[0].detach().float().cpu(),  # numpy has no bfloat16
                    index=index,
                    attack=attack,
                    gradient=gradient,
                    eps=eps,
                    stage=stage,
                    prediction=None if inside else target.predicted(x, batch.seed + 3),
                )


def _stages(column: Column) -> tuple[str, ...]:
    """Return the stages of a column's pictures; the last is the one that every model has."""
    return ("denoised", CLEAN) if column.name == CLEAN else ("attacked and denoised", "attacked")


class PassProgress(Progress):
    """Progress that moves with each forward pass, and shows their number (NFE) within a batch."""

    nfe, found = 0, ""
    _images, _expected, _before = 0, 0, 0.0

    def begin(self, name: str, images: int, expected: float | None) -> None:
        """Begin a batch of ``images``, each of which is expected to take ``expected`` NFE."""
        self.nfe, self._images, self._before = 0, images, self.n
        self._expected = round(images * (expected or 0))
        self.move(self.n, self._words, what=name)

    def tick(self, images: int) -> None:
        """Count a forward pass of ``images``."""
        self.nfe += images
        share = min(self.nfe / self._expected, 1.0) if self._expected else 0.0
        self.move(self._before + share * self._images)

    def end(self, found: str = "") -> None:
        """End the batch, with what was found so far."""
        self.found = found
        self.move(self._before + self._images)
        self._images = 0

    def _words(self) -> str:
        # The count goes on while what the attack made is judged.
        of = f" of {self._expected:,}" if self._expected >= self.nfe else ""
        return ", ".join(filter(None, [f"NFE {self.nfe:,}{of}", self.found]))


def attack_elsewhere(work: Work, place: Place, x: Images) -> None:
    """Write the rows and pictures that a run does not hold yet, in their order, with workers.

    ``x`` are the images with which the target was queried first; workers query theirs with them.
    """
    target = work.target
    plan = _Plan(place.build or SentNetwork(target.given), x.cpu().numpy(), target.choices)
    crew = place.start(plan, gpu=target.device.type == "cuda")
    team: Team[Batch] = Team(crew, _identity(target, x), allow_mixed=place.allow_mixed)
    with closing(team), work.progress() as progress:
        for columns in ((work.clean,), work.columns):  # attacks need to know what is right without
            todo = (batch for column in columns for batch in work.batches(column))
            for batch, outcome in in_order(team, todo):
                column = batch.column
                progress.begin(
                    f"{column.name}, {team}", len(work.missing(column, batch.indices)), None
                )
                work.keep(column, outcome.rows, outcome.flags)
                work.run.append(outcome.pictures)
                progress.end(work.standing(column))


class _Answer(NamedTuple):
    """What a worker made of a batch."""

    rows: list[AttackRow]
    flags: tuple[str, ...]
    pictures: list[ImageRow]


@torch.no_grad()
def _identity(target: Target, x: Images) -> dict[str, Any]:
    """Return what all workers and the driver must agree in."""
    size: Any = target.choices["batch_size"]
    answers: list[float] = []
    if not target.randomised:
        with target.as_asked(), target.session(0):
            answers = target.logits(x[:2].to(target.device)).flatten().tolist()
    return {**agreed(target.module, target.device, size, answers), **target.settings}


@dataclass(frozen=True)
class _Plan:
    """What a worker is built from: the model, and what makes an equal target of it."""

    build: Callable[[], Any]
    x: np.ndarray
    choices: Mapping[str, Any]

    def __call__(self, device: str | None) -> _Attacker:
        model = built(self.build, device)
        x = torch.tensor(self.x)
        return _Attacker(Target(model, x, **self.choices), x)


class _Attacker:
    """Attacks batches."""

    def __init__(self, target: Target, x: Images) -> None:
        self._target, self.identity = target, _identity(target, x)
        self._asked = ExitStack()  # as long as the process lives
        self._asked.enter_context(target.as_asked())

    def answer(self, work: Sequence[Batch]) -> _Answer:
        """Return what became of one batch."""
        (batch,) = work
        rows, found = judged(self._target, batch)
        return _Answer(rows, found.flags, list(pictures_of(self._target, batch, found.x_adv)))
