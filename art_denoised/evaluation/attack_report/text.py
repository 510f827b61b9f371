"""The report on attacked models for the terminal, and its findings in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from art_denoised.evaluation.attack_report.compare import conflicts, differences
from art_denoised.evaluation.attack_report.model import ALL, Agreement, Model, ball_name
from art_denoised.evaluation.attack_report.survival import Share
from art_denoised.evaluation.attack_rows import CHECKS
from art_denoised.evaluation.report import accuracy_table, default_radii, format_table

SHARES = ("clean", "counted", "fresh", "worst")
FLAG = "  not to be trusted"
VERDICTS = {True: "checks passed", False: "! NOT TO BE TRUSTED", None: "not checked"}


def format_report(models: Sequence[Model], notices: Sequence[str] = ()) -> str:
    """Return the report for the terminal.

    Args:
        models: At least one.
        notices: What the user should know of the logs.

    Example:
        >>> from art_denoised.evaluation.attack_rows import AttackRow
        >>> row = AttackRow(0, 1, "pgd", "exact", "l2", 0.5, True, True, (True,), 0, 0, 0.1)
        >>> print(format_report([Model("ours", (row,))]).splitlines()[0])
        ours: not checked for masking
    """
    blocks = [list(shouts(models))]
    width = max([len(ALL), *(len(plain(f.attack)) for m in models for f in m.figures)])
    blocks += [_model_lines(model, width) for model in models]
    others = [*conflicts(models), *notices]
    blocks.append([f"notice: {plain(words)}" for words in others])
    if any(model.figures for model in models):
        blocks.append(
            [
                "Accuracy in percent, below it the 95% interval over images. counted: by the "
                "attack itself;\nfresh: on fresh noise, averaged; worst: right in every "
                "evaluation. Quote `fresh` of all attacks."
            ]
        )
    return "\n\n".join("\n".join(block) for block in blocks if block)


def format_comparison(models: Sequence[Model], notices: Sequence[str] = ()) -> str:
    """Return models side by side for the terminal: accuracy on fresh noise under all attacks.

    Example:
        >>> from art_denoised.evaluation.attack_rows import AttackRow
        >>> row = AttackRow(0, 1, "pgd", "exact", "l2", 0.5, True, True, (True,), 0, 0, 0.1)
        >>> models = [Model("plain", (row,)), Model("denoised", (row,))]
        >>> print(format_comparison(models).splitlines()[1].split())
        ['l2', 'eps', '0.5', '100.0', '100.0']
    """
    names = [plain(model.name) for model in models]
    balls = sorted({ball for model in models for ball in model.columns})
    width = max([len("certified, l2 r=0.000"), *(len(ball_name(ball)) for ball in balls)]) + 2
    wide = max([len(VERDICTS[False]) + 2, *(len(name) + 2 for name in names)])
    lines = [" " * width + "".join(f"{name:>{wide}}" for name in names)]
    if any(model.clean for model in models):
        lines.extend(_side_by_side("clean", [model.clean for model in models], width, wide))
    for ball in balls:
        found = [{f.ball: f.fresh for f in model.headlines}.get(ball) for model in models]
        lines.extend(_side_by_side(ball_name(ball), found, width, wide, models))
    for radius in default_radii([row for model in models for row in model.certified]):
        found = [certified_share(model, radius) for model in models]
        if any(found):
            lines.extend(_side_by_side(f"certified, l2 r={radius:g}", found, width, wide))
    verdicts = [VERDICTS[m.trusted] if m.columns else "" for m in models]
    lines.append(" " * width + "".join(f"{verdict:>{wide}}" for verdict in verdicts))
    blocks = [list(shouts(models)), lines, list(difference_lines(models))]
    blocks.append([f"notice: {plain(words)}" for words in [*conflicts(models), *notices]])
    return "\n\n".join("\n".join(block) for block in blocks if block)


def shouts(models: Iterable[Model]) -> Iterator[str]:
    """Yield what must be read before any figure."""
    for model in models:
        for agreement in model.inversions:
            yield f"INVERSION in {plain(model.name)}: {agreement_words(agreement)}"
        named: dict[str, list[str]] = {}
        for check in model.failed:
            named.setdefault(plain(check.finding), []).append(f"'{plain(check.name)}'")
        for finding, names in named.items():
            which = f"check{'s' * (len(names) > 1)} {', '.join(names)}"
            yield f"NOT TO BE TRUSTED: {plain(model.name)} failed the {which}: {finding}"


def agreement_words(agreement: Agreement) -> str:
    """Return in words how certified and robust accuracy agree at a radius.

    Example:
        >>> low, high = Share(0.1, 0.0, 0.3), Share(0.9, 0.7, 1.0)
        >>> agreement_words(Agreement(0.5, low, high, 9, (), 8, 1.0))
        'certified accuracy 10.0% is at most robust accuracy 90.0% at l2 radius 0.5, as it must be'
    """
    figures = (
        f"certified accuracy {100 * agreement.certified.value:.1f}% {{}} robust accuracy "
        f"{100 * agreement.empirical.value:.1f}% at l2 radius {agreement.radius:g}"
    )
    if agreement.inverted:
        words = figures.format("is above") + ", which cannot be"
        if agreement.p_value is not None:
            words += f" (p = {agreement.p_value:.2g})"
        words += "; the certificates, or the model that was attacked, are not what they seem"
    elif agreement.certified.value > agreement.empirical.value:
        words = figures.format("is above") + ", within what chance explains"
    else:
        words = figures.format("is at most") + ", as it must be"
    if agreement.broken:
        some = ", ".join(map(str, agreement.broken[:8])) + (", ..." * (len(agreement.broken) > 8))
        words += (
            f"; {len(agreement.broken)} of {agreement.paired} images are certified there and yet "
            f"broken ({some}): look whether the attacked model averages fewer draws than were "
            "certified"
        )
    return words


def trust_words(model: Model) -> str:
    """Return the verdict on a model's robust accuracy in words.

    Example:
        >>> trust_words(Model("ours"))
        'not checked for masking'
    """
    if model.trusted is None:
        known = {c.name: plain(c.finding) for c in model.checks if "error" in c.numbers}
        lacking = [
            f"{name} ({known[name].removeprefix('not made: ')})" if name in known else name
            for name in model.unmade
        ]
        more = f" and {len(lacking) - 2} more" if len(lacking) > 2 else ""
        some = f"; not made of every run: {', '.join(lacking[:2])}{more}" if model.checks else ""
        return f"not checked for masking{some}"
    if not model.trusted:
        names = ", ".join(plain(check.name) for check in model.failed)
        reasons = [f"failed: {names}"] if names else []
        reasons += ["certified accuracy is above it"] * bool(model.inversions)
        return f"NOT TO BE TRUSTED, {'; '.join(reasons)}"
    passed = sum(check.passed is True for check in model.checks)
    missing = sum(check.passed is None and check.name in CHECKS for check in model.checks)
    more = f", {missing} could not be made" if missing else ""
    return f"{passed} checks for masking passed{more}"


def brief_words(model: Model) -> str:
    """Return the verdict for a narrow column.

    Example:
        >>> brief_words(Model("ours"))
        'not checked'
    """
    if model.trusted is None:
        return "not checked"
    counts = [
        f"{sum(check.passed is passed for check in model.checks)} {word}"
        for passed, word in ((True, "passed"), (False, "failed"), (None, "no verdict"))
        if any(check.passed is passed for check in model.checks)
    ]
    return ", ".join(counts + ["certified above robust"] * bool(model.inversions))


def difference_lines(models: Sequence[Model]) -> Iterator[str]:
    """Yield how each model differs from the first on the same images."""
    for entry in differences(models):
        yield (
            f"{plain(entry.second)} against {plain(entry.first)}, {ball_name(entry.ball)}: "
            f"{100 * entry.gain:+.1f} points on {entry.images} images that both were attacked on "
            f"({entry.only_second} kept only by it, {entry.only_first} only by the other; "
            f"p = {entry.p_value:.2g}){FLAG if entry.trusted is False else ''}"
        )


def certified_share(model: Model, radius: float) -> Share | None:
    """Return certified accuracy of a model, None where it has no certificates."""
    if not model.certified:
        return None
    _, *entry = accuracy_table(model.certified, [radius])[0]
    return Share(*entry)


def percent(share: Share | None) -> str:
    """Return a share for a table.

    Example:
        >>> percent(Share(0.625, 0.3, 0.9)), percent(None)
        ('62.5', '-')
    """
    return f"{100 * share.value:.1f}" if share else "-"


def interval(share: Share | None) -> str:
    """Return an interval for a table.

    Example:
        >>> interval(Share(0.625, 0.3, 0.9))
        '30-90'
    """
    return f"{100 * share.low:.0f}-{100 * share.high:.0f}" if share else ""


def plain(text: str) -> str:
    r"""Return text from a log without characters that steer a terminal or hide.

    Example:
        >>> plain("red\x1b[31m")
        'red�[31m'
    """
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _model_lines(model: Model, width: int) -> list[str]:
    lines = [
        f"{plain(model.name)}: {trust_words(model) if model.columns else 'no attack was made'}"
    ]
    flag = FLAG if model.trusted is False else ""
    for ball in model.columns:
        figures = [figure for figure in model.figures if figure.ball == ball]
        title = f"  {ball_name(ball)}"
        heads = "".join(f"{head:>9}" for head in ("images", *SHARES, "s/image"))
        lines += ["", f"{title:{width + 6}}gradient{heads}"]
        for figure in figures:
            shares = [getattr(figure, name) for name in SHARES]
            cells = "".join(f"{percent(share):>9}" for share in shares)
            name = f"    {plain(figure.attack)}"
            lines.append(
                f"{name:{width + 6}}{plain(figure.gradient):8}{figure.images:9}{cells}"
                f"{figure.seconds:9.2g}{flag}"
            )
            lines.append(" " * (width + 23) + "".join(f"{interval(share):>9}" for share in shares))
    if model.certified:
        radii = default_radii(model.certified)
        lines += ["", *format_table({plain(model.name): model.certified}, radii).splitlines()[:4]]
    lines += [f"  {agreement_words(entry)}" for entry in model.agreements if not entry.inverted]
    return lines


def _side_by_side(
    title: str,
    shares: Sequence[Share | None],
    width: int,
    wide: int,
    attacked: Sequence[Model] = (),
) -> Iterator[str]:
    bad = [model.trusted is False for model in attacked] or [False] * len(shares)
    cells = [
        "! " * (flag and bool(one)) + percent(one) for one, flag in zip(shares, bad, strict=True)
    ]
    yield f"{title:{width}}" + "".join(f"{cell:>{wide}}" for cell in cells)
    yield " " * width + "".join(f"{interval(share):>{wide}}" for share in shares)
