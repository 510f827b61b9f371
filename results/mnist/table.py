"""The table of README.md, from the rows that robustness.py kept.

python results/mnist/table.py
"""

from __future__ import annotations

from typing import Any

from art_denoised.storage import read_journal
from networks import HERE
from robustness import THREATS, jobs

from art_denoised.smoothing.statistics import proportion_interval

# What counts in a line is the worst that these attacks did to each image.
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


def attacked(defences: list[str], threat: str) -> list[dict[str, Any]]:
    """Return the rows of the images that all of the attacks were run on, the worst of each."""
    known = {job.name: job for job in jobs()}
    tables = []
    for job in (known.get(f"{defence}-{threat}") for defence in defences):
        path = HERE / "rows" / f"{job.name}.jsonl" if job else None
        if path and path.exists():
            rows = read_journal(path).records[: job.images]
            tables.append({row["image"]: row for row in rows})
    common = set.intersection(*map(set, tables)) if tables else set()
    return [min((t[i] for t in tables), key=lambda row: row["robust"]) for i in sorted(common)]


def share(hits: int, images: int) -> str:
    low, high = proportion_interval(hits, images)
    return f"{100 * hits / images:.1f}% ({100 * low:.0f}-{100 * high:.0f})"


def main() -> None:
    threats = [f"{norm}-{eps}" for norm, eps in THREATS]
    header = "".join(f"{threat.replace('-', ' '):>19}" for threat in threats)
    print(f"{'':28}{'images':>12}{'clean':>19}{header}")
    for title, defences in LINES.items():
        tables = [attacked(defences, threat) for threat in threats]
        if not any(tables):
            continue
        images = "/".join(map(str, dict.fromkeys(map(len, tables))))
        draws = next(rows[0]["draws"] for rows in tables if rows)

        def cell(rows: list[dict[str, Any]], name: str, draws: int = draws) -> str:
            return share(sum(r[name] == draws for r in rows), len(rows)) if rows else "-"

        if draws > 1:
            means = [
                f"{100 * sum(r['robust'] for r in rows) / draws / len(rows):.1f}%" if rows else "-"
                for rows in tables
            ]
            print(
                f"{title + ', average':28}{images:>12}{'':19}{''.join(map('{:>19}'.format, means))}"
            )
            title += ", worst"
        clean = cell(next(filter(None, tables)), "clean")
        cells = "".join(f"{cell(rows, 'robust'):>19}" for rows in tables)
        print(f"{title:28}{images:>12}{clean:>19}{cells}")


if __name__ == "__main__":
    main()
