"""The report on attacked models for machines: JSON and TSV. docs/report.md names the keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from art_denoised.evaluation.attack_report.compare import conflicts, differences
from art_denoised.evaluation.attack_report.model import Figure, Model, eps_name
from art_denoised.evaluation.attack_report.survival import Share
from art_denoised.evaluation.attack_report.text import (
    SHARES,
    agreement_words,
    plain,
    shouts,
    trust_words,
)
from art_denoised.evaluation.report import accuracy_table, default_radii
from art_denoised.evaluation.report import to_json as certified_json

_THREATS = {"linf": "Linf", "l2": "L2"}  # as RobustBench spells them
COLUMNS = (
    "model",
    "norm",
    "eps",
    "attack",
    "gradient",
    "images",
    "draws",
    *(f"{name}{end}" for name in SHARES for end in ("", "_low", "_high")),
    "seconds",
    "trusted",
)


def to_json(models: Sequence[Model], notices: Sequence[str] = ()) -> dict[str, Any]:
    """Return the report as plain JSON values; docs/report.md names them.

    Example:
        >>> to_json([])["models"]
        []
    """
    return {
        "art_denoised": "robustness report",
        "version": 1,
        "models": [_model_json(model) for model in models],
        "differences": [
            {
                "first": entry.first,
                "second": entry.second,
                "norm": entry.ball.norm,
                "eps": entry.ball.eps,
                "images": entry.images,
                "only_first": entry.only_first,
                "only_second": entry.only_second,
                "gain": entry.gain,
                "p_value": entry.p_value,
                "trusted": entry.trusted,
            }
            for entry in differences(models)
        ],
        "notices": [*conflicts(models), *notices],
    }


def to_tsv(models: Sequence[Model]) -> str:
    r"""Return all figures as a table with tabs, one line a figure, columns `COLUMNS`.

    Example:
        >>> to_tsv([]).split("\t")[:3]
        ['model', 'norm', 'eps']
    """
    lines = ["\t".join(COLUMNS)]
    for model in models:
        for figure in model.figures:
            values = {"model": model.name, "trusted": model.trusted, **figure_json(figure)}
            for name in SHARES:
                share = values[name] or {"value": None, "low": None, "high": None}
                values |= {name: share["value"], f"{name}_low": share["low"]}
                values[f"{name}_high"] = share["high"]
            cells = ("" if values[name] is None else values[name] for name in COLUMNS)
            lines.append("\t".join(plain(str(cell)) for cell in cells))
    return "\n".join(lines) + "\n"


def figure_json(figure: Figure) -> dict[str, Any]:
    """Return a figure as plain JSON values."""
    shares = {name: getattr(figure, name) for name in SHARES}
    return {
        "norm": figure.ball.norm,
        "eps": figure.ball.eps,
        "attack": figure.attack,
        "gradient": figure.gradient,
        "images": figure.images,
        "draws": figure.draws,
        **{name: value._asdict() if value else None for name, value in shares.items()},
        "seconds": figure.seconds,
    }


def robustbench(model: Model) -> list[dict[str, Any]]:
    """Return an entry in RobustBench's keys for each ball; shares in percent, as text.

    Example:
        >>> robustbench(Model("ours"))
        []
    """
    entries = []
    data = next((s["data"] for _, s in model.settings if "data" in s), None)
    for headline in model.headlines:
        whole = [
            figure
            for figure in model.figures
            if figure.ball == headline.ball and _is_standard(model, figure)
        ]
        entry: dict[str, Any] = {"name": model.name, "dataset": data}
        entry["threat_model"] = _THREATS.get(headline.ball.norm, headline.ball.norm)
        entry["eps"] = eps_name(headline.ball.eps)
        entry["clean_acc"] = _percent(headline.clean) if headline.clean else None
        entry["reported"] = _percent(headline.fresh)
        if whole:
            entry["autoattack_acc"] = _percent(min(figure.counted for figure in whole))
        entry |= {"unreliable": model.trusted is False}
        entry["footnote"] = f"{headline.images} images; {trust_words(model)}"
        entries.append(entry)
    return entries


def _model_json(model: Model) -> dict[str, Any]:
    radii = default_radii(model.certified)
    return {
        "name": model.name,
        "trusted": model.trusted,
        "verdict": trust_words(model),
        "shouts": list(shouts([model])),
        "clean": model.clean._asdict() if model.clean else None,
        "figures": [figure_json(figure) for figure in model.figures],
        "certified": certified_json(
            accuracy_table(model.certified, radii) if model.certified else []
        ),
        "certified_against_robust": [
            {
                "radius": entry.radius,
                "certified": entry.certified._asdict(),
                "robust": entry.empirical._asdict(),
                "paired": entry.paired,
                "certified_yet_broken": list(entry.broken),
                "spared": entry.spared,
                "p_value": entry.p_value,
                "inverted": entry.inverted,
                "words": agreement_words(entry),
            }
            for entry in model.agreements
        ],
        "checks": [
            {
                "name": check.name,
                "passed": check.passed,
                "finding": check.finding,
                "numbers": dict(check.numbers),
            }
            for check in model.checks
        ],
        "robustbench": robustbench(model),
        "logs": [{"path": path, "settings": dict(log)} for path, log in model.settings],
    }


def _is_standard(model: Model, figure: Figure) -> bool:
    """Whether a figure is that of AutoAttack as RobustBench runs it: whole and at full length."""
    listed = [one for _, log in model.settings for one in log.get("attacks") or ()]
    ours = [
        one
        for one in listed
        if (one.get("name"), one.get("norm"), one.get("eps")) == (figure.attack, *figure.ball)
    ]
    return any(
        one.get("type") == "AutoAttack"
        and one.get("version") == "standard"
        and not one.get("parts")
        and one.get("steps", 0) >= 100
        and one.get("queries", 0) >= 5000
        for one in ours
    )


def _percent(share: Share) -> str:
    return f"{100 * share.value:.2f}"
