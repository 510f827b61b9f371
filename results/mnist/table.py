"""The table of README.md, from the rows that robustness.py kept.

python results/mnist/table.py
"""

from __future__ import annotations

from networks import HERE
from robustness import THREATS, jobs

from art_denoised.smoothing.statistics import proportion_interval
from art_denoised.storage import read_journal

NAMES = {
    "plain": "plain CNN",
    "adversarial": "adversarially trained CNN",
    "dc": "diffusion classifier",
    "rdc-exact": "RDC, exact gradients",
    "rdc-bpda": "RDC, BPDA",
    "rdc-fresh": "RDC, fresh noise, EOT",
}


def share(hits: int, images: int) -> str:
    low, high = proportion_interval(hits, images)
    return f"{100 * hits / images:.1f}% ({100 * low:.0f}-{100 * high:.0f})"


def main() -> None:
    header = "".join(f"{f'{norm} {eps}':>19}" for norm, eps in THREATS)
    print(f"{'':28}{'images':>10}{'clean':>19}{header}")
    known = {job.name: job for job in jobs()}
    for defence, title in NAMES.items():
        mean, worst, clean, counts = [], [], "", []
        for norm, eps in THREATS:
            job = known[f"{defence}-{norm}-{eps}"]
            path = HERE / "rows" / f"{job.name}.jsonl"
            rows = read_journal(path).records[: job.images] if path.exists() else []
            counts.append(len(rows))
            if not rows:
                mean.append("-")
                worst.append("-")
                continue
            draws = rows[0]["draws"]
            worst.append(share(sum(row["robust"] == draws for row in rows), len(rows)))
            average = sum(row["robust"] for row in rows) / draws / len(rows)
            mean.append(f"{100 * average:.1f}%" if draws > 1 else worst[-1])
            clean = clean or share(sum(row["clean"] == draws for row in rows), len(rows))
        if not any(counts):
            continue
        counted = "/".join(str(n) for n in dict.fromkeys(counts))
        cells = "".join(f"{cell:>19}" for cell in worst)
        last = ", worst" if defence == "rdc-fresh" else ""
        if last:
            averages = "".join(f"{cell:>19}" for cell in mean)
            print(f"{title + ', average':28}{counted:>10}{'':19}{averages}")
        print(f"{title + last:28}{counted:>10}{clean:>19}{cells}")


if __name__ == "__main__":
    main()
