"""The report for programs: JSON and TSV. docs/how-to/report.md names the keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from art_denoised.reports.certified import certified_table
from art_denoised.reports.results import Agreement, Model, Result, differences, eps_name
from art_denoised.reports.tables import (
    SHARES,
    agreement_words,
    conflicts,
    shouts,
    trust_words,
)
from art_denoised.reports.terminal import separated

_THREATS = {"linf": "Linf", "l2": "L2"}  # as RobustBench spells them
COLUMNS = (
    *("model", "norm", "eps", "attack", "gradient", "images", "draws"),
    *(f"{name}{end}" for name in SHARES for end in ("", "_low", "_high")),
    *("seconds", "queries", "trusted", "incomplete"),
)


def to_json(models: Sequence[Model], notices: Sequence[str] = ()) -> dict[str, Any]:
    """Return the report as plain JSON values."""
    return {
        "art_denoised": "robustness report",
        "version": 1,
        "models": [_model_json(model) for model in models],
        "differences": [
            {**msgspec.to_builtins(entry), "gain": entry.gain} for entry in differences(models)
        ],
        "notices": [*conflicts(models), *notices],
    }


def to_tsv(models: Sequence[Model]) -> str:
    """Return all results as a table with tabs, one line for each, with columns `COLUMNS`."""
    lines = [_line(model, result) for model in models for result in model.results]
    return separated([COLUMNS, *([line.get(name) for name in COLUMNS] for line in lines)], "\t")


def robustbench(model: Model) -> list[dict[str, Any]]:
    """Return one entry with the keys of RobustBench for each ball; shares in percent, as text."""
    return [_robustbench(model, headline) for headline in model.headlines]


def _robustbench(model: Model, headline: Result) -> dict[str, Any]:
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
        "robustbench": robustbench(model),
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
