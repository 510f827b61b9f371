"""Print the table of README.md from the rows of robustness.py.

python results/mnist/table.py > results/mnist/table.txt
"""

from __future__ import annotations

from networks import HERE
from robustness import THREATS, ImageRow, jobs, rows

from art_denoised.smoothing import proportion_interval

# Each line counts for each image the worst result of these attacks.
LINES = {
    "plain CNN": ["plain"],
    "adversarially trained CNN": ["adversarial"],
    "diffusion classifier": ["dc"],
    "RDC, exact gradients": ["rdc-exact"],
    "RDC, exact, 50 steps": ["rdc-long"],
    "RDC, BPDA": ["rdc-bpda"],
    "RDC, worst of the above": ["rdc-exact", "rdc-long", "rdc-bpda"],
    "RDC, fresh noise, EOT": ["rdc-fresh"],
}


def attacked(defences: list[str], threat: str) -> list[ImageRow]:
    """Return the worst row of each image that all of the attacks were run on."""
    known = {job.name: job for job in jobs()}
    tables = []
    for job in (known.get(f"{defence}-{threat}") for defence in defences):
        if job and (found := rows(job, HERE / "rows")):
            tables.append({row.index: row for row in found[: job.images]})
    common = set.intersection(*map(set, tables)) if tables else set()
    return [min((t[i] for t in tables), key=lambda row: row.robust) for i in sorted(common)]


def share(hits: int, images: int) -> str:
    low, high = proportion_interval(hits, images)
    return f"{100 * hits / images:.1f}% ({100 * low:.0f}-{100 * high:.0f})"


def average(column: list[ImageRow]) -> str:
    """Return robust accuracy as the mean over draws."""
    if not column:
        return "-"
    return f"{100 * sum(row.robust / row.draws for row in column) / len(column):.1f}%"


def worst(column: list[ImageRow]) -> str:
    """Return robust accuracy where an image counts only if it is right in every draw."""
    right = sum(row.robust == row.draws for row in column)
    return share(right, len(column)) if column else "-"


def main() -> None:
    threats = [f"{norm}-{eps}" for norm, eps in THREATS]
    header = "".join(f"{threat.replace('-', ' '):>19}" for threat in threats)
    print(f"{'':28}{'images':>12}{'clean':>19}{header}")
    for title, defences in LINES.items():
        columns = [attacked(defences, threat) for threat in threats]
        if not any(columns):
            continue
        images = "/".join(map(str, dict.fromkeys(map(len, columns))))
        first = next(filter(None, columns))
        if first[0].draws > 1:
            cells = "".join(f"{average(column):>19}" for column in columns)
            print(f"{title + ', average':28}{images:>12}{'':19}{cells}")
            title += ", worst"
        clean = share(sum(row.clean == row.draws for row in first), len(first))
        cells = "".join(f"{worst(column):>19}" for column in columns)
        print(f"{title:28}{images:>12}{clean:>19}{cells}")


if __name__ == "__main__":
    main()
