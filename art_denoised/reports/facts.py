"""How a model was measured, in words for the page: data, images, noise, samples, seed, cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from art_denoised.reports.results import Model
from art_denoised.words import duration

FACTS = {  # with their headings
    "data": "data",
    "images": "images",
    "noise": "noise",
    "samples": "samples of an image",
    "alpha": "alpha",
    "attacks": "attacks",
    "seed": "seed",
    "begun": "date",
    "cost": "time and queries",
}
_OPTIONS = ("steps", "restarts", "eot")
_NOISE = ("gaussian", "quantised")  # earlier logs held the device here


def facts(model: Model) -> dict[str, str]:
    """Return how a model was measured, by the names of ``FACTS``; empty: its logs do not tell."""
    logs = [settings for _, settings in model.settings]
    attacks = [settings for settings in logs if "attacks" in settings]
    certificates = [settings for settings in logs if "attacks" not in settings]
    return {
        "data": _joined(logs, "data", "transform"),
        "images": _images(model),
        "noise": "; ".join(filter(None, (_noise(certificates), _evaluations(attacks)))),
        "samples": _samples(certificates),
        "alpha": _joined(certificates, "alpha"),
        "attacks": "; ".join(_attacks(attacks)),
        "seed": _joined(logs, "seed"),
        "begun": ", ".join(dict.fromkeys(time[:10] for time in model.begun)),
        "cost": "; ".join(_cost(model)),
    }


def _images(model: Model) -> str:
    attacked = len({row.index for row in model.rows})
    certified = len(model.certified)
    parts = [f"{attacked:,} attacked"] * bool(attacked)
    return ", ".join(parts + [f"{certified:,} certified"] * bool(certified))


def _noise(certificates: Sequence[Mapping[str, Any]]) -> str:
    sigma, kind = _each(certificates, "sigma", "noise")
    return f"sigma {sigma}" + f", {kind}" * (kind in _NOISE) if sigma else ""


def _evaluations(attacks: Sequence[Mapping[str, Any]]) -> str:
    """Return how attacked images were evaluated."""
    sigmas = [s["smoothed"] for s in attacks if isinstance(s.get("smoothed"), Mapping)]
    sigma, kind, repeats = _joined(sigmas, "sigma"), *_each(attacks, "noise", "repeats")
    if kind in ("", "none"):
        return "attacked without noise" if kind else ""
    words = f"attacked with {kind} noise" + f" of sigma {sigma}" * bool(sigma)
    return words + f", {repeats} evaluations" * (repeats not in ("", "1"))


def _samples(certificates: Sequence[Mapping[str, Any]]) -> str:
    n, n0, radii = _each(certificates, "n", "n0", "radii")
    if not n:
        return ""
    words = f"at most {n}" * bool(radii) or n
    words += f", {n0} more to select the class" * (n0 != "")
    return words + f", until radii {radii.strip('[]')} are decided" * bool(radii)


def _attacks(logs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield each attack with those of its options that say how strong it is."""
    seen: dict[str, str] = {}
    for one in (one for settings in logs for one in settings["attacks"] or ()):
        name = str(one.get("name"))
        options = [f"{key} {one[key]}" for key in _OPTIONS if one.get(key) not in (None, "", 1)]
        known = ":" in name or not options  # a name of the command line holds its options
        seen.setdefault(name, name if known else f"{name} ({', '.join(options)})")
    yield from seen.values()


def _cost(model: Model) -> Iterator[str]:
    """Yield the time and the forward passes of attacks, and of certificates."""
    samples = sum(row.n0 + row.drawn for row in model.certified)
    asked = sum(row.queries for row in model.rows)
    attacked, certified = ("attacks", model.rows, asked), ("certify", model.certified, samples)
    for what, rows, queries in (attacked, certified):
        if rows:
            count = f", {queries:,.0f} forward passes" if queries else ""
            yield f"{what}: {duration(sum(row.seconds for row in rows))}{count}"


def _joined(logs: Sequence[Mapping[str, Any]], *names: str) -> str:
    """Return the different values of some settings in words."""
    values = [log[name] for log in logs for name in names if log.get(name) is not None]
    return ", ".join(dict.fromkeys(_words(value) for value in values))


def _each(logs: Sequence[Mapping[str, Any]], *names: str) -> list[str]:
    return [_joined(logs, name) for name in names]


def _words(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
