"""Print the tables of README.md from the logs of run.py.

cd results/cifar10; python robust/table.py > robust/table.txt

A difference is the mean over seeds of paired differences between two trainings of one seed, with a
95% bootstrap interval over images. The difference of each seed is printed beside it, because the
interval does not include how trainings vary.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
from run import BLOCKS, Training, trainings

from art_denoised.evaluation import read_attack_log
from art_denoised.smoothing import proportion_interval

RESAMPLES = 10_000
COLUMNS = ("clean", "PGD-50", "APGD-CE+T")
_BLOCKS = [f"relu-{block}" for block in BLOCKS if block != "1x1"]
COMPARED = [
    *((title, "relu", "PGD-50") for title in ("softplus", "silu")),
    *((title, "relu", "APGD-CE+T") for title in ("softplus", "silu", "relu-1x1", *_BLOCKS)),
    *((title, "relu-1x1", "APGD-CE+T") for title in _BLOCKS),
    ("feature-denoising-relu-mean", "feature-denoising-relu", "APGD-CE+T"),
    *(("feature-denoising-relu", "relu", column) for column in ("clean", "APGD-CE+T")),
    ("clean-relu-mean", "clean-relu", "clean"),
]


def survivors(folder: Path) -> dict[str, np.ndarray] | None:
    """Return for each column whether each image, in order, is still right; None if incomplete."""
    if not (folder / "attack.jsonl").exists():
        return None
    by_attack: dict[str, dict[int, bool]] = defaultdict(dict)
    for row in read_attack_log(folder).rows:
        by_attack["clean"][row.index] = row.clean
        by_attack[row.attack.partition(":")[0]][row.index] = row.counted
    kept = {attack: np.array([r[i] for i in sorted(r)]) for attack, r in by_attack.items()}
    if len(kept) < 4 or len({len(right) for right in kept.values()}) > 1:
        return None
    return {
        "clean": kept["clean"],
        "PGD-50": kept["pgd"],
        "APGD-CE+T": kept["apgd-ce"] & kept["apgd-t"],
    }


def name(training: Training) -> str:
    """Return the name without its seed. Seeds of one name are averaged."""
    return training.name.removesuffix(f"-{training.seed}")


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """Return a 95% interval of the mean of values, one for each image."""
    generator = np.random.default_rng(0)
    chosen = generator.integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[chosen].mean(1), [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    found: dict[str, dict[int, dict[str, np.ndarray]]] = defaultdict(dict)
    for training in trainings():
        if (kept := survivors(training.folder)) is not None:
            found[name(training)][training.seed] = kept

    print(f"{'':32}{'seeds':>6}{''.join(map('{:>18}'.format, COLUMNS))}   {COLUMNS[-1]} by seed")
    for title, seeds in found.items():
        cells = ""
        for column in COLUMNS:
            right = np.mean([kept[column] for kept in seeds.values()], 0)
            # Seeds attack the same images: the interval is that of one network.
            low, high = proportion_interval(round(right.sum()), len(right))
            cells += f"{f'{right.mean():.1%} ({100 * low:.0f}-{100 * high:.0f})':>18}"
        by_seed = ", ".join(f"{kept[COLUMNS[-1]].mean():.1%}" for kept in seeds.values())
        print(f"{title:32}{len(seeds):6}{cells}   {by_seed}")

    print("\nDifferences in percentage points")
    for title, other, column in COMPARED:
        common = sorted(set(found.get(title, {})) & set(found.get(other, {})))
        if not common:
            continue
        each = [
            100.0 * found[title][seed][column] - 100.0 * found[other][seed][column]
            for seed in common
        ]
        paired = np.mean(each, 0)
        low, high = bootstrap(paired)
        by_seed = ", ".join(f"{one.mean():+.1f}" for one in each)
        line = f"{column}: {title} - {other}"
        print(f"{line:64}{paired.mean():+6.1f} ({low:+.1f} to {high:+.1f})   seeds: {by_seed}")


if __name__ == "__main__":
    main()
