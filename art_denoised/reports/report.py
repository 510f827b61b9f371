"""The report on runs: folders are read into models; runs of one model are merged, or refused.

For programs it becomes JSON and TSV; docs/how-to/report.md names the keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.evaluation.attack_rows import (
    ATTACK,
    CHECKS,
    CLEAN,
    AttackLog,
    AttackRow,
    planned_columns,
    unmade,
)
from art_denoised.evaluation.logs import CERTIFY, Log, read_logs
from art_denoised.reports import terminal
from art_denoised.reports.certified import asked_radii, certified_table
from art_denoised.reports.results import Agreement, Model, Result, eps_name, model_differences
from art_denoised.reports.tables import (
    SHARES,
    agreement_words,
    comparison_blocks,
    conflicts,
    report_blocks,
    shouts,
    trust_words,
)
from art_denoised.reports.terminal import separated
from art_denoised.runs.journal import differences, write_whole

# Logs of one model agree in these. Seeds may differ: shards of a run may have their own.
_SAME = (
    *("model", "weights", "options", "structure", "attributes"),
    *("data", "classes", "randomised", "noise", "repeats"),
)
_THREATS = {"linf": "Linf", "l2": "L2"}  # as RobustBench spells them
COLUMNS = (
    *("model", "norm", "eps", "attack", "gradient", "images", "draws"),
    *(f"{name}{end}" for name in SHARES for end in ("", "_low", "_high")),
    *("seconds", "queries", "trusted", "incomplete"),
)


@dataclass(frozen=True)
class Report(terminal.Shown):
    """Results of several models; ``str`` is the report as plain text.

    Attributes:
        models: Models, each with its results, in the order in which they were named.
        notices: Remarks on the logs.
    """

    models: tuple[Model, ...]
    notices: tuple[str, ...] = ()

    def blocks(self) -> list[terminal.Block]:
        """Return what is shown."""
        return report_blocks(self.models, self.notices)

    def comparison(self) -> str:
        """Return the models side by side as plain text: all attacks together, on fresh noise."""
        return terminal.text(comparison_blocks(self.models, self.notices))

    def show_comparison(self) -> None:
        """Print the models side by side: styled on a terminal, plain elsewhere."""
        terminal.show(comparison_blocks(self.models, self.notices))

    def page(self) -> str:
        """Return the report as an HTML page that loads nothing and needs no script."""
        from art_denoised.reports.page import page

        return page(self.models, self.notices)

    def write_page(self, path: Path | str) -> None:
        """Write the HTML page.

        Raises:
            InputError: The file cannot be written.
        """
        write_whole(Path(path), self.page().encode())

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values. docs/how-to/report.md names the keys."""
        return {
            "art_denoised": "robustness report",
            "version": 1,
            "models": [_model_json(model) for model in self.models],
            "differences": [
                {**msgspec.to_builtins(entry), "gain": entry.gain}
                for entry in model_differences(self.models)
            ],
            "notices": [*conflicts(self.models), *self.notices],
        }

    def to_tsv(self) -> str:
        """Return all results under attack as a table with tabs, one line for each."""
        lines = [_line(model, result) for model in self.models for result in model.results]
        return separated([COLUMNS, *([line.get(name) for name in COLUMNS] for line in lines)], "\t")


def report(runs: Sequence[str | Path]) -> Report:
    """Report robust accuracy under attack beside certified accuracy.

    Args:
        runs: Runs, each a folder with ``attack.jsonl``, ``certify.jsonl`` or both, or such a file.
            "NAME=FOLDER" names the model, else it is named like the folder. Runs of one name are
            one model: other attacks on it, or other images. Attacks and certificates of one name
            are joined only if their logs show that they are of one function; else they become two
            models, with a notice.

    Returns:
        The report; print it, or write it as a page.

    Raises:
        InputError: There is no such log, or it is damaged; or runs of one name differ in what makes
            the model, or hold an image twice under one attack.

    Example:
        >>> import tempfile
        >>> from art_denoised.evaluation import ATTACK, AttackRow
        >>> from art_denoised.runs import Run
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Run(folder, ATTACK, {"model": "net"}) as run:
        ...         run.append(
        ...             [AttackRow(0, 1, "pgd", "exact", "l2", 0.5, True, True, (True,), 0, 0, 0)]
        ...         )
        ...     found = report([f"ours={folder}"])
        >>> found.models[0].headlines[0].fresh.value
        1.0
        >>> print(str(found).splitlines()[0])
        ours: not checked for masking
    """
    notices: list[str] = []
    models = []
    several = [runs] if runs is None or isinstance(runs, (str, Path)) else runs
    for name, paths in named_paths([str(checks.path("run", run)) for run in several]).items():
        logs = [log for path in paths for log in read_logs(path, ATTACK, CERTIFY).items()]
        for path, log in logs:
            _check(path, log)
        notices += [f"{path}: {notice}" for path, log in logs for notice in log.notices]
        found, apart = _models(name, logs)
        models += found
        notices += apart
        if paths[1:]:
            notices.append(f"{name} is made of {len(paths)} runs: {', '.join(map(str, paths))}")
    return Report(tuple(models), (*notices, *_same_weights(models)))


def named_paths(runs: Sequence[str]) -> dict[str, list[Path]]:
    """Return the paths of each model by its name, which is the folder's where none is given."""
    split = [_split(run) for run in runs]
    given = {name for name, _ in split if name}
    plain = [_run_name(path) for name, path in split if not name]
    named: dict[str, list[Path]] = {}
    for name, path in split:
        short = _run_name(path)
        alone = plain.count(short) == 1 and short not in given
        whole = name or (short if alone else str(path))
        if not name and whole in named:
            raise InputError(f"run {path} is given twice; give every run once")
        named.setdefault(whole, []).append(path)
    return named


def _split(run: str) -> tuple[str, Path]:
    """Return name and path of a run; the name is empty where none is given."""
    name, equals, folder = run.partition("=")
    if not equals or Path(run).exists():
        return "", Path(run)
    if not (name.strip() and folder.strip()):
        raise InputError(f"run {run!r} has an empty name or folder; give NAME=FOLDER")
    return name, Path(folder)


def _run_name(path: Path) -> str:
    """Return the name of a run's folder; that of the file for a log under another name."""
    if path.is_file() and path.name not in ("attack.jsonl", "certify.jsonl"):
        return path.stem
    return (path if path.is_dir() else path.parent).resolve().name


def _check(path: Path, log: AttackLog | Log) -> None:
    """Refuse a log of predict, and settings that no report can be made of."""
    if isinstance(log, Log):
        if log.kind != CERTIFY.name:
            raise InputError(f"{path} is a log of {log.kind}; give a log of attack or certify")
        return
    listed = log.settings.get("attacks") or []
    if not (isinstance(listed, list) and all(map(_is_attack, listed))):
        raise InputError(f"{path}: the attacks in its settings are damaged")


def _is_attack(one: Any) -> bool:
    return (
        isinstance(one, Mapping)
        and isinstance(one.get("eps", 0), int | float)
        and isinstance(one.get("gradients", []), list)
    )


def _models(
    name: str, logs: Sequence[tuple[Path, AttackLog | Log]]
) -> tuple[list[Model], list[str]]:
    """Return the model of these logs; if they are not of one function two, and why."""
    attacks = [(path, log) for path, log in logs if isinstance(log, AttackLog)]
    certificates = [(path, log) for path, log in logs if isinstance(log, Log)]
    if not (reason := _apart(attacks, certificates)):
        return [_model(name, logs)], []
    apart = [_model(f"{name} (attacked)", attacks), _model(f"{name} (certified)", certificates)]
    return apart, [f"{name}: {reason}, so its attacks and certificates are not compared"]


def _model(name: str, logs: Sequence[tuple[Path, AttackLog | Log]]) -> Model:
    attacks = [(path, log) for path, log in logs if isinstance(log, AttackLog)]
    certificates = [(path, log) for path, log in logs if isinstance(log, Log)]
    if len(certificates) > 1:
        paths = " and ".join(str(path) for path, _ in certificates)
        raise InputError(f"{name} has two logs of certify, {paths}; give each model one")
    for one, other in itertools.combinations(attacks, 2):
        _check_same(name, one, other)
    rows = _distinct(name, [row for _, log in attacks for row in log.rows])
    certified = tuple(row for _, log in certificates for row in log.rows)
    if not rows and not certified:
        raise InputError(f"{name} holds no rows yet; attack or certify some images first")
    missing = {check for _, log in attacks if log.rows for check in unmade(log.checks)}
    settings = [(str(path), log.settings or {}) for path, log in logs]
    return Model(
        name=name,
        rows=rows,
        checks=tuple(check for _, log in attacks for check in log.checks),
        certified=certified,
        asked=tuple(radius for _, log in certificates for radius in asked_radii(log.settings)),
        pictures=tuple(picture for _, log in attacks for picture in log.images),
        settings=tuple(settings),
        same_images=_same_images([of_log for _, of_log in settings], (*rows, *certified)),
        unmade=tuple(check for check in CHECKS if check in missing),
        incomplete="; ".join(filter(None, (_lacking(log) for _, log in attacks))),
        begun=tuple(log.begun for _, log in logs if log.begun),
    )


def _check_same(name: str, one: tuple[Path, AttackLog], other: tuple[Path, AttackLog]) -> None:
    """Refuse logs of one name that are not of one model, or not of attacks with one setting."""
    (path, log), (other_path, other_log) = one, other
    pairs = [(key, log.settings.get(key), other_log.settings.get(key)) for key in _SAME]
    if log.settings.get("indices", ()) == other_log.settings.get("indices"):
        pairs.append(("pixels", log.settings.get("pixels"), other_log.settings.get("pixels")))
    attacks, others = _attacks(log), _attacks(other_log)
    shared = sorted(attacks.keys() & others.keys())
    pairs += [(f"attack {key}", attacks[key], others[key]) for key in shared]
    changes = [f"{key} {ours!r} and {theirs!r}" for key, ours, theirs in pairs if ours != theirs]
    if changes:
        raise InputError(
            f"{path} and {other_path} are both called {name} but differ in {', '.join(changes)}; "
            "give them other names"
        )


def _attacks(log: AttackLog) -> dict[str, Any]:
    listed = log.settings.get("attacks") or []
    return {f"{one.get('name')} eps {one.get('eps')}": one for one in listed}


def _distinct(name: str, rows: Sequence[AttackRow]) -> tuple[AttackRow, ...]:
    """Return rows of one model without repeated clean rows; refuse images that runs share."""
    seen: dict[Any, AttackRow] = {}
    labels: dict[int, int] = {}
    for row in rows:
        key = (CLEAN, row.index) if row.attack == CLEAN else (row.norm, *row.column, row.index)
        if seen.setdefault(key, row) is not row and row.attack != CLEAN:
            raise InputError(
                f"the runs of {name} both hold image {row.index} under {row.attack} at eps "
                f"{row.eps:g}; give them other names to see them side by side"
            )
        if labels.setdefault(row.index, row.label) != row.label:
            raise InputError(
                f"image {row.index} of {name} has labels {labels[row.index]} and {row.label}; "
                "these are runs of other data, give them other names"
            )
    return tuple(seen.values())


def _same_images(settings: Sequence[Mapping[str, Any]], rows: Sequence[Any]) -> bool:
    """Whether logs of one model call the same images by the same indices, as far as they tell."""
    data = {str(of_log["data"]) for of_log in settings if "data" in of_log}
    pixels: dict[str, Any] = {}
    labels: dict[int, int] = {}
    return (
        len(data) < 2
        # Only of the same choice of images can pixels be compared.
        and all(
            pixels.setdefault(str(of_log["indices"]), of_log["pixels"]) == of_log["pixels"]
            for of_log in settings
            if {"indices", "pixels"} <= of_log.keys()
        )
        and all(labels.setdefault(row.index, row.label) == row.label for row in rows)
    )


def _apart(
    attacks: Sequence[tuple[Path, AttackLog]], certificates: Sequence[tuple[Path, Log]]
) -> str:
    """Return why attacks and certificates are not of one function, in words; empty: they are."""
    for (_, attack), (_, certificate) in itertools.product(attacks, certificates):
        attacked, certified = attack.settings, certificate.settings or {}
        smoothed = attacked.get("smoothed")
        if smoothed is None and attacked.get("weights", 0) == certified.get("weights"):
            return "the attacks are on the classifier without noise, the certificates with noise"
        if not isinstance(smoothed, Mapping) and "structure" in attacked:
            return "the attacked model is not a classifier under noise that certify certifies"
        if not isinstance(smoothed, Mapping) or "structure" not in certified:
            return "the logs do not say that the attacked function is the certified one"
        # A function is the same on any device. Attacked classifiers add Gaussian noise.
        told = {"noise": "gaussian", **smoothed}
        told.pop("device", None)
        if changes := differences({name: certified.get(name) for name in told}, told):
            return f"the function that was attacked is not the certified one ({changes})"
    return ""


def _lacking(log: AttackLog) -> str:
    """Return in words what an interrupted attack run lacks; empty if nothing, or unknown."""
    images = log.settings.get("images")
    if not isinstance(images, int):
        return ""
    done = dict.fromkeys(planned_columns(log.settings), 0)
    for row in log.rows:
        if row.attack != CLEAN and row.column in done:
            done[row.column] += 1
    begun = [column for column, count in done.items() if count]
    parts = []
    for count in sorted({n for n in done.values() if n < images}, reverse=True):
        columns = [column for column, n in done.items() if n == count]
        attacks = dict.fromkeys(f"{name} eps {eps_name(eps)}" for name, _, eps in columns)
        under = ", ".join(attacks)
        if not count:
            parts.append(f"{under} not run")
        else:
            parts.append(f"{count} of {images} images" + f" under {under}" * (columns != begun))
    return "; ".join(parts)


def _same_weights(models: Sequence[Model]) -> list[str]:
    """Say which models are the same; they are merged only if the user gives them one name."""
    names: dict[str, list[str]] = {}
    for model in models:
        logs = [log for _, log in model.settings if "attacks" in log and "weights" in log]
        for fingerprint in {str(log["weights"]) for log in logs}:
            names.setdefault(fingerprint, []).append(model.name)
    return [
        f"{' and '.join(same)} have the same weights ({fingerprint}); give them one name, "
        "NAME=FOLDER NAME=FOLDER, if they are one model"
        for fingerprint, same in names.items()
        if len(same) > 1
    ]


def _robustbench(model: Model, headline: Result) -> dict[str, Any]:
    """Return an entry with the keys of RobustBench; shares in percent, as text."""
    standard = [
        result.counted.value
        for result in model.results
        if result.ball == headline.ball and _is_standard(model, result)
    ]
    return {
        "name": model.name,
        "dataset": next((s["data"] for _, s in model.settings if "data" in s), None),
        "threat_model": _THREATS.get(headline.norm, headline.norm),
        "eps": eps_name(headline.eps),
        "clean_acc": _percent(headline.clean.value) if headline.clean else None,
        "reported": _percent(headline.fresh.value),
        **({"autoattack_acc": _percent(min(standard))} if standard else {}),
        "unreliable": model.trusted is False,
        "footnote": f"{headline.images} images; {trust_words(model)}",
    }


def _is_standard(model: Model, result: Result) -> bool:
    """Whether a result is that of AutoAttack as RobustBench runs it: whole and at full length."""
    return any(
        (one.get("name"), one.get("norm"), one.get("eps")) == (result.attack, *result.ball)
        and one.get("type") == "AutoAttack"
        and one.get("version") == "standard"
        and not one.get("parts")
        and one.get("steps", 0) >= 100
        and one.get("queries", 0) >= 5000
        for _, log in model.settings
        for one in log.get("attacks") or ()
    )


def _model_json(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "trusted": model.trusted,
        "verdict": trust_words(model),
        "incomplete": model.incomplete or None,
        "shouts": list(shouts([model])),
        "clean": msgspec.to_builtins(model.clean),
        "figures": msgspec.to_builtins(model.results),
        "certified": (
            certified_table({model.name: model.certify_log}).to_json() if model.certified else []
        ),
        "certified_against_robust": [_agreement_json(entry) for entry in model.agreements],
        "checks": [
            {name: getattr(check, name) for name in ("name", "passed", "finding", "numbers")}
            for check in model.checks
        ],
        "robustbench": [_robustbench(model, headline) for headline in model.headlines],
        "logs": [{"path": path, "settings": dict(log)} for path, log in model.settings],
    }


def _agreement_json(entry: Agreement) -> dict[str, Any]:
    values = msgspec.to_builtins(entry)
    values["certified_yet_broken"] = values.pop("broken")
    return {**values, "inverted": entry.inverted, "words": agreement_words(entry)}


def _line(model: Model, result: Result) -> dict[str, Any]:
    values = msgspec.to_builtins(result)
    for name in SHARES:
        limits = values[name] or {}
        values |= {f"{name}{end}": limits.get(end[1:] or "value") for end in ("", "_low", "_high")}
    named = {"model": model.name, "trusted": model.trusted, "incomplete": model.incomplete or None}
    return values | named


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
