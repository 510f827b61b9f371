"""Findings of a report in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from art_denoised.evaluation.attack_rows import CHECKS, CLEAN, AttackRow
from art_denoised.reports.compare import Difference
from art_denoised.reports.results import Agreement, Model, eps_name
from art_denoised.reports.survival import Share

SHARES = ("clean", "counted", "fresh", "worst")


def shouts(models: Iterable[Model]) -> Iterator[str]:
    """Yield what must be read before any result."""
    for model in models:
        for agreement in model.inversions:
            yield f"INVERSION in {model.name}: {agreement_words(agreement)}"
        named: dict[str, list[str]] = {}
        for check in model.failed:
            named.setdefault(check.finding, []).append(f"'{check.name}'")
        for finding, names in named.items():
            which = f"check{'s' * (len(names) > 1)} {', '.join(names)}"
            yield f"NOT RELIABLE: {model.name} failed the {which}: {finding}"


def agreement_words(agreement: Agreement) -> str:
    """Return in words how certified and robust accuracy agree at a radius.

    Example:
        >>> low, high = Share(0.1, 0.0, 0.3), Share(0.9, 0.7, 1.0)
        >>> agreement_words(Agreement(0.5, low, False, high, 9, (), 8, 1.0))
        'certified accuracy 10.0% is at most robust accuracy 90.0% at l2 radius 0.5, as it must be'
    """
    shares = (
        f"certified accuracy {100 * agreement.certified.value:.1f}% {{}} robust accuracy "
        f"{100 * agreement.robust.value:.1f}% at l2 radius {agreement.radius:g}"
    )
    if agreement.inverted:
        words = shares.format("is above") + ", which cannot be"
        if agreement.p_value is not None:
            words += f" (p = {agreement.p_value:.2g})"
        words += "; check the certificates, and that the attacked model is the certified one"
    elif agreement.certified.value > agreement.robust.value:
        words = shares.format("is above") + ", within what chance explains"
    else:
        words = shares.format("is at most") + ", as it must be"
    if agreement.at_least:
        words += "; certified accuracy is at least this, because the run stopped at other radii"
    if agreement.broken:
        some = ", ".join(map(str, agreement.broken[:8])) + (", ..." * (len(agreement.broken) > 8))
        words += (
            f"; {len(agreement.broken)} of {agreement.paired} images are certified there and yet "
            f"broken ({some}): check whether the attacked model averages fewer draws than were "
            "certified"
        )
    return words


def trust_words(model: Model) -> str:
    """Return in words whether a model's robust accuracy is reliable, and whether it is complete."""
    incomplete = f"incomplete: {model.incomplete}; " if model.incomplete else ""
    return incomplete + _trust_words(model)


def _trust_words(model: Model) -> str:
    if model.trusted is None:
        known = {c.name: c.finding for c in model.checks if "error" in c.numbers}
        lacking = [
            f"{name} ({known[name].removeprefix('not made: ')})" if name in known else name
            for name in model.unmade
        ]
        more = f" and {len(lacking) - 2} more" if len(lacking) > 2 else ""
        some = f"; not made of every run: {', '.join(lacking[:2])}{more}" if model.checks else ""
        return f"not checked for masking{some}"
    if not model.trusted:
        names = ", ".join(check.name for check in model.failed)
        reasons = [f"failed: {names}"] if names else []
        reasons += ["certified accuracy is above it"] * bool(model.inversions)
        return f"NOT RELIABLE, {'; '.join(reasons)}"
    passed = sum(check.passed is True for check in model.checks)
    missing = sum(check.passed is None and check.name in CHECKS for check in model.checks)
    more = f", {missing} could not be made" if missing else ""
    return f"{passed} checks for masking passed{more}"


def verdict_words(model: Model) -> str:
    """Return the verdict that stands beside every result."""
    if model.trusted is False:
        return "not reliable"
    if model.incomplete:
        return "incomplete"
    return "checks passed" if model.trusted else "not checked"


def brief_words(model: Model) -> str:
    """Return the verdict for a narrow column."""
    incomplete = [f"incomplete: {model.incomplete}"] * bool(model.incomplete)
    if model.trusted is None:
        return ", ".join(incomplete) or "not checked"
    counts = [
        f"{sum(check.passed is passed for check in model.checks)} {word}"
        for passed, word in ((True, "passed"), (False, "failed"), (None, "no verdict"))
        if any(check.passed is passed for check in model.checks)
    ]
    return ", ".join(incomplete + counts + ["certified above robust"] * bool(model.inversions))


def unfinished(settings: Mapping[str, Any], rows: Sequence[AttackRow]) -> str:
    """Return in words what an interrupted attack run lacks; empty if nothing, or unknown.

    Args:
        settings: Settings of the run: "images", their number, and "attacks", each with "name",
            "eps" and "gradients".
        rows: Rows of the run.

    Example:
        >>> attacks = [{"name": "pgd", "eps": 0.5, "gradients": ["exact"]}]
        >>> unfinished({"images": 200, "attacks": attacks}, [])
        'pgd eps 0.5 not run'
    """
    images = settings.get("images")
    if not isinstance(images, int):
        return ""
    done = {
        (str(one.get("name")), str(gradient), float(one.get("eps", 0))): 0
        for one in settings.get("attacks") or ()
        for gradient in one.get("gradients") or ()
    }
    for row in rows:
        if row.attack != CLEAN and row.column in done:
            done[row.column] += 1
    begun = [column for column, count in done.items() if count]
    parts = []
    for count in sorted({n for n in done.values() if n < images}, reverse=True):
        columns = [column for column, n in done.items() if n == count]
        names = ", ".join(
            f"{name} eps {eps_name(eps)}"
            for name, eps in dict.fromkeys((name, eps) for name, _, eps in columns)
        )
        if not count:
            parts.append(f"{names} not run")
        else:
            parts.append(f"{count} of {images} images" + f" under {names}" * (columns != begun))
    return "; ".join(parts)


def lower_bound_words(model: Model) -> str:
    """Return the notice on a model whose certify run stopped at some radii; empty for others."""
    if not model.asked:
        return ""
    radii = ", ".join(f"{radius:g}" for radius in model.asked)
    return (
        f"{model.name} was certified at radii {radii}; at others certified accuracy is a lower "
        "bound"
    )


def difference_words(entry: Difference) -> str:
    """Return in words how a model differs from the first on the same images."""
    return (
        f"{entry.second} against {entry.first}, {entry.ball}: {100 * entry.gain:+.1f} points on "
        f"{entry.images} images that both were attacked on ({entry.only_second} kept only by it, "
        f"{entry.only_first} only by the other; p = {entry.p_value:.2g})"
        + "  not reliable"
        * (entry.trusted is False)
    )


def percent(share: Share | None) -> str:
    """Return a share for a table."""
    return f"{100 * share.value:.1f}" if share else "-"


def interval(share: Share | None) -> str:
    """Return an interval for a table."""
    return f"{100 * share.low:.0f}-{100 * share.high:.0f}" if share else ""
