"""Pictures of images before and after attack and denoising, as a table of the report's page."""

from __future__ import annotations

from typing import Any

import numpy as np

from art_denoised.evaluation.attack_report.html import Markup, picture, table
from art_denoised.evaluation.attack_report.model import Model, eps_name
from art_denoised.evaluation.attack_rows import AttackRow, ImageRow

_ROWS = 10  # a model


def pictures(model: Model) -> Markup | None:
    """Return the table of a model's pictures, None where the run kept none.

    Example:
        >>> pictures(Model("ours")) is None
        True
    """
    stages = {
        (row.index, row.attack, row.gradient, row.eps, row.stage): row for row in model.pictures
    }
    results = {(row.index, *row.column): row for row in model.rows}
    clean = {row.index: row for row in model.pictures if row.stage == "clean"}
    denoised = {row.index: row for row in model.pictures if row.stage == "denoised"}
    attacked = [row for row in model.pictures if row.stage == "attacked"]
    rows: list[list[Any]] = []
    for row in attacked[:_ROWS]:
        column = (row.attack, row.gradient, row.eps)
        result = results.get((row.index, *column))
        after = stages.get((row.index, *column, "attacked and denoised"))
        before = clean.get(row.index)
        what = f"image {row.index}, {row.attack} {row.gradient} eps {eps_name(row.eps)}"
        rows.append(
            [
                [f"image {row.index}", f", class {result.label}" if result else None],
                _picture(before, f"image {row.index} before"),
                _picture(denoised.get(row.index), f"image {row.index} denoised"),
                _picture(row, f"{what}: attacked"),
                _picture(after, f"{what}: attacked and denoised"),
                _change(before, row, f"{what}: change"),
                [what.partition(", ")[2], _outcome(result)],
            ]
        )
    if not rows:
        return None
    heads = ["image", "before", "denoised", "attacked", "attacked, denoised", "change", "outcome"]
    if all(row[2] == row[4] == "-" for row in rows):  # a model without a denoiser
        kept = (0, 1, 3, 5, 6)
        heads, rows = [heads[i] for i in kept], [[row[i] for i in kept] for row in rows]
    shown = f" ({len(rows)} of {len(attacked)})" if len(attacked) > len(rows) else ""
    caption = f"Images before and after{shown}; change: grey is none, stretched to the full range"
    return table(heads, rows, caption, "pictures")


def _picture(row: ImageRow | None, alt: str) -> Markup | str:
    return picture(row.array, alt) if row else "-"


def _change(before: ImageRow | None, after: ImageRow, alt: str) -> Markup | str:
    if before is None or before.shape != after.shape:
        return "-"
    change = after.array.astype(int) - before.array
    stretched = 127.5 + 127.5 * change / max(abs(change).max(), 1)
    return picture(np.rint(stretched).astype(np.uint8), alt)


def _outcome(row: AttackRow | None) -> str | None:
    if row is None:
        return None
    if not row.clean:
        return ": wrong before, not attacked"
    return f": right in {sum(row.fresh)} of {len(row.fresh)}"
