"""Folders of runs, read into models: what belongs to one model is merged, or refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from art_denoised.attacks.ascent import NORMS
from art_denoised.checks import InputError
from art_denoised.evaluation.attack_rows import (
    CHECKS,
    CLEAN,
    AttackLog,
    AttackRow,
    read_attack_log,
    unmade,
)
from art_denoised.evaluation.rows import Log, read_log
from art_denoised.reports.certified import asked_radii
from art_denoised.reports.results import Model
from art_denoised.reports.words import unfinished
from art_denoised.runs.identity import differences

# Logs of one model agree in these. Seeds may differ: shards of a run may have their own.
_SAME = (
    *("model", "weights", "options", "structure", "attributes"),
    *("data", "classes", "randomised", "noise", "repeats"),
)


def read_models(runs: Sequence[str]) -> tuple[list[Model], list[str]]:
    """Read runs, as `report` takes them.

    Returns:
        Models in the order in which they are named, and remarks on the logs.

    Raises:
        InputError: See `report`.
    """
    notices: list[str] = []
    models = []
    for name, paths in _named(runs).items():
        logs = [(source, log) for path in paths for source, log in _read(path)]
        notices += [f"{source}: {notice}" for source, log in logs for notice in log.notices]
        models.append(
            _model(
                name,
                [(source, log) for source, log in logs if isinstance(log, AttackLog)],
                [(source, log) for source, log in logs if isinstance(log, Log)],
            )
        )
        if paths[1:]:
            notices.append(f"{name} is made of {len(paths)} runs: {', '.join(map(str, paths))}")
    return models, notices + _same_weights(models)


def _named(runs: Sequence[str]) -> dict[str, list[Path]]:
    named: dict[str, list[Path]] = {}
    plain = []
    for run in runs:
        name, equals, folder = run.partition("=")
        if equals and not Path(run).exists():
            if not (name.strip() and folder.strip()):
                raise InputError(f"run {run!r} has an empty name or folder; give NAME=FOLDER")
            named.setdefault(name, []).append(Path(folder))
        else:
            plain.append(Path(run))
    folders = [path if path.is_dir() else path.parent for path in plain]
    names = [folder.resolve().name for folder in folders]
    for path, name in zip(plain, names, strict=True):
        alone = names.count(name) == 1 and name not in named
        whole = name if alone else str(path)
        if whole in named:
            raise InputError(f"run {path} is given twice; give every run once")
        named[whole] = [path]
    return named


def _read(path: Path) -> list[tuple[Path, AttackLog | Log]]:
    if not path.exists():
        raise InputError(f"run {path} does not exist; give a folder that attack or certify wrote")
    if path.is_file():
        with path.open("rb") as file:
            first = file.readline(200)
        is_attack = first.startswith(b"{") and b'"attack log"' in first
        return [(path, _attack_log(path) if is_attack else _certify_log(path))]
    readers: dict[str, Callable[[Path], AttackLog | Log]] = {
        "attack.jsonl": _attack_log,
        "certify.jsonl": _certify_log,
    }
    found = [(path / name, read) for name, read in readers.items() if (path / name).exists()]
    if not found:
        raise InputError(
            f"{path} holds neither attack.jsonl nor certify.jsonl; give a folder that attack or "
            "certify wrote"
        )
    return [(source, read(source)) for source, read in found]


def _attack_log(path: Path) -> AttackLog:
    log = read_attack_log(path)
    listed = log.settings.get("attacks") or []
    if not (isinstance(listed, list) and all(map(_is_attack, listed))):
        raise InputError(f"{path}: the attacks in its settings are damaged")
    for row in log.rows:
        if row.norm not in NORMS or not 0 <= row.eps < math.inf or not row.seconds >= 0:
            raise InputError(f"{path}: the row of image {row.index} is damaged")
    for picture in log.images:
        try:
            size = picture.array.size if picture.array.ndim == 3 else 0
        except (ValueError, TypeError):
            size = 0
        if not size:
            raise InputError(f"{path}: the picture of image {picture.index} is damaged")
    return log


def _is_attack(one: Any) -> bool:
    return (
        isinstance(one, Mapping)
        and isinstance(one.get("eps", 0), int | float)
        and isinstance(one.get("gradients", []), list)
    )


def _certify_log(path: Path) -> Log:
    log = read_log(path)
    if log.kind != "certify":
        raise InputError(f"{path} is a log of {log.kind}; give a log of attack or certify")
    return log


def _model(
    name: str, attacks: list[tuple[Path, AttackLog]], certificates: list[tuple[Path, Log]]
) -> Model:
    if len(certificates) > 1:
        paths = " and ".join(str(path) for path, _ in certificates)
        raise InputError(f"{name} has two logs of certify, {paths}; give each model one")
    for one, other in itertools.combinations(attacks, 2):
        _compare(name, one, other)
    rows = _distinct(name, [row for _, log in attacks for row in log.rows])
    if not rows and not any(log.rows for _, log in certificates):
        raise InputError(f"{name} holds no rows yet; attack or certify some images first")
    missing = {check for _, log in attacks if log.rows for check in unmade(log.checks)}
    settings = [(str(path), log.settings or {}) for path, log in attacks]
    settings += [(str(path), log.settings or {}) for path, log in certificates]
    data = {str(of_log["data"]) for _, of_log in settings if "data" in of_log}
    return Model(
        name=name,
        rows=rows,
        checks=tuple(check for _, log in attacks for check in log.checks),
        certified=tuple(row for _, log in certificates for row in log.rows),
        asked=tuple(radius for _, log in certificates for radius in asked_radii(log.settings)),
        pictures=tuple(picture for _, log in attacks for picture in log.images),
        settings=tuple(settings),
        same_images=len(data) < 2 and not _of_other_images(settings, rows, certificates),
        unlike=_unlike(attacks, certificates),
        unmade=tuple(check for check in CHECKS if check in missing),
        incomplete="; ".join(
            filter(None, (unfinished(log.settings, log.rows) for _, log in attacks))
        ),
    )


def _of_other_images(
    settings: Sequence[tuple[str, Mapping[str, Any]]],
    rows: Sequence[AttackRow],
    certificates: Sequence[tuple[Path, Log]],
) -> bool:
    """Whether logs call different pixels or labels by one index."""
    pixels: dict[str, Any] = {}
    for _, of_log in settings:
        if not {"indices", "pixels"} <= of_log.keys():
            continue  # only of the same choice can pixels be compared
        if pixels.setdefault(str(of_log["indices"]), of_log["pixels"]) != of_log["pixels"]:
            return True
    labels = {row.index: row.label for row in rows}
    certified = [row for _, log in certificates for row in log.rows]
    return any(labels.get(row.index, row.label) != row.label for row in certified)


def _unlike(
    attacks: Sequence[tuple[Path, AttackLog]], certificates: Sequence[tuple[Path, Log]]
) -> str:
    """Return why an attack and a certificate are not of one function; empty: they may be."""
    for (_, attack), (_, certificate) in itertools.product(attacks, certificates):
        attacked, certified = attack.settings, certificate.settings or {}
        if "structure" not in certified or "weights" not in attacked:
            continue  # an older log or a TSV, which does not tell
        smoothed = attacked.get("smoothed")
        if smoothed is None and attacked["weights"] == certified["weights"]:
            return "the attacks are on the classifier without noise, the certificates with noise"
        if smoothed is None and "structure" in attacked:
            return "the attacked model adds no noise, and certificates are of one with noise"
        if isinstance(smoothed, Mapping):
            wanted = {name: certified.get(name) for name in smoothed}
            if changes := differences(wanted, smoothed):
                return f"the function that was attacked is not the certified one ({changes})"
    return ""


def _distinct(name: str, rows: Sequence[AttackRow]) -> tuple[AttackRow, ...]:
    seen: dict[Any, AttackRow] = {}
    for row in rows:
        key = (CLEAN, row.index) if row.attack == CLEAN else (row.norm, *row.column, row.index)
        if seen.setdefault(key, row) is not row and row.attack != CLEAN:
            raise InputError(
                f"the runs of {name} both hold image {row.index} under {row.attack} at eps "
                f"{row.eps:g}; give them other names to see them side by side"
            )
    labels: dict[int, int] = {}
    for row in rows:
        if labels.setdefault(row.index, row.label) != row.label:
            raise InputError(
                f"image {row.index} of {name} has labels {labels[row.index]} and {row.label}; "
                "these are runs of other data, give them other names"
            )
    return tuple(seen.values())


def _compare(name: str, one: tuple[Path, AttackLog], other: tuple[Path, AttackLog]) -> None:
    (path, log), (other_path, other_log) = one, other
    pairs = [(key, log.settings.get(key), other_log.settings.get(key)) for key in _SAME]
    if log.settings.get("indices", ()) == other_log.settings.get("indices"):
        pairs.append(("pixels", log.settings.get("pixels"), other_log.settings.get("pixels")))
    shared = _attacks(log).keys() & _attacks(other_log).keys()
    pairs += [
        (f"attack {key}", _attacks(log)[key], _attacks(other_log)[key]) for key in sorted(shared)
    ]
    changes = [f"{key} {ours!r} and {theirs!r}" for key, ours, theirs in pairs if ours != theirs]
    if changes:
        raise InputError(
            f"{path} and {other_path} are both called {name} but differ in {', '.join(changes)}; "
            "give them other names"
        )


def _attacks(log: AttackLog) -> dict[str, Any]:
    listed = log.settings.get("attacks") or []
    return {f"{one.get('name')} eps {one.get('eps')}": one for one in listed}


def _same_weights(models: Sequence[Model]) -> list[str]:
    """Say which models are the same; they are merged only if the user gives them one name."""
    names: dict[str, list[str]] = {}
    for model in models:
        weights = {s["weights"] for _, s in model.settings if "attacks" in s and "weights" in s}
        for fingerprint in weights:
            names.setdefault(str(fingerprint), []).append(model.name)
    return [
        f"{' and '.join(same)} have the same weights ({fingerprint}); give them one name, "
        "NAME=FOLDER NAME=FOLDER, if they are one model"
        for fingerprint, same in names.items()
        if len(same) > 1
    ]
