"""Print the tables of README.md from the certificate logs beside it.

cd results/cifar10; python table.py > table.txt

Certified accuracy comes first. Then come all pairs of defences at one sigma and n, on the images
that both logs hold: the number of images that only one of them certifies at a radius, and the exact
p-value of McNemar's test. Last is the class that each selects most often, right or wrong.
"""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path

from networks import CLASSES

from art_denoised import read_log
from art_denoised.evaluation import CertifyRow
from art_denoised.reports import certified_table, sign_test
from art_denoised.smoothing import top_class


def certified(row: CertifyRow, radius: float) -> bool:
    """Return whether an image is right and certified at a radius."""
    return row.correct and row.radius >= radius


def main() -> None:
    logs = {str(path.parent): read_log(path) for path in sorted(Path().rglob("certify.jsonl"))}
    plans = {tuple(log.settings[key] for key in ("sigma", "n")) for log in logs.values()}
    for sigma, n in sorted(plans):
        alike = {
            name: log
            for name, log in logs.items()
            if (log.settings["sigma"], log.settings["n"]) == (sigma, n)
        }
        radii = next(iter(alike.values())).settings["radii"]
        if any(log.settings["radii"] != radii for log in alike.values()):
            raise SystemExit(f"the logs at sigma {sigma}, n = {n} stopped at several sets of radii")
        named = {
            name: {row.index: row for row in log.rows if isinstance(row, CertifyRow)}
            for name, log in alike.items()
        }
        print(f"sigma {sigma}, n = {n:,}\n")
        print(certified_table(alike, radii))
        if len(named) > 1:
            _print_pairs(named, radii[:3])
        print("\nselected most often")
        for name, rows in named.items():
            certificates = [row.certificate for row in rows.values() if row.certificate]
            chosen = Counter(top_class(found.selection_counts) for found in certificates)
            (most, images), *_ = chosen.most_common(1)
            print(f"{name:58}{CLASSES[most]}, {images / len(certificates):.0%} of images")
        print()


def _print_pairs(named: dict[str, dict[int, CertifyRow]], radii: list[float]) -> None:
    print(f"\n{'only this, only that (p)':58}{''.join(f'r={r:<16g}' for r in radii)}")
    for (this, first), (that, second) in combinations(named.items(), 2):
        cells = ""
        for radius in radii:
            pairs = [
                (certified(first[i], radius), certified(second[i], radius))
                for i in first.keys() & second.keys()
            ]
            lone = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
            cells += f"{f'{lone[0]}, {lone[1]} ({sign_test(*lone):.2g})':18}"
        print(f"{f'{this} : {that}':58}{cells}")


if __name__ == "__main__":
    main()
