"""Print what every attack leaves of every defence, counted in four ways.

    python table.py > table.txt

On fixed noise the last column compares a gradient with the exact one, image by image: how many
images it alone leaves right, how many it alone breaks, and the p-value of a sign test.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scipy.stats import binomtest

from art_denoised import report
from art_denoised.evaluation import AttackRow, read_attack_log
from art_denoised.reports import Share

HERE = Path(__file__).parent
NAMES = {
    "plain": "plain CNN",
    "adversarial": "adversarially trained CNN",
    "diffpure-fixed": "DiffPure-like, fixed noise",
    "diffpure-autoattack": "DiffPure-like, fixed noise",
    "diffpure-fresh": "DiffPure-like, fresh noise",
    "gdmp-fixed": "GDMP-like, fixed noise",
    "gdmp-fresh": "GDMP-like, fresh noise",
    "maximization-fixed": "likelihood maximization + CNN, fixed noise",
    "maximization-fresh": "likelihood maximization + CNN, fresh noise",
    "rdc-fixed": "RDC, fixed noise",
}


def cell(share: Share | None) -> str:
    if share is None:
        return "-"
    return f"{100 * share.value:.0f} ({100 * share.low:.0f}-{100 * share.high:.0f})"


def beside_exact(rows: Sequence[AttackRow], attack: str, gradient: str) -> str:
    exact, other = (
        {row.index for row in rows if (row.attack, row.gradient) == (attack, how) and row.counted}
        for how in ("exact", gradient)
    )
    more, fewer = len(other - exact), len(exact - other)
    p = binomtest(more, more + fewer).pvalue if more + fewer else 1.0
    return f"   +{more} -{fewer}, p = {p:.1g}"


def main() -> None:
    heads = ("counted", "average", "majority", "worst")
    for data in ("digits", "mnist"):
        for short, name in NAMES.items():
            folder = HERE / "rows" / f"{data}-{short}"
            if not folder.is_dir():
                continue
            model = report([folder]).models[0]
            rows = read_attack_log(folder / "attack.jsonl").rows
            first = model.results[0]
            of = f"{data}: {name}; {first.images} images, clean {cell(first.clean)}"
            print(f"{of}, {first.ball}\n")
            print(f"  {'':28}{'gradient':12}" + "".join(f"{head:>14}" for head in heads))
            for result in model.results:
                shares = (result.counted, result.fresh, result.majority, result.worst)
                shown = shares if result.draws > 1 else shares[:1]
                row = f"  {result.attack:28}{result.gradient:12}"
                paired = result.draws == 1 and result.gradient not in ("exact", "")
                row += "".join(f"{cell(share):>14}" for share in shown)
                print(row + beside_exact(rows, result.attack, result.gradient) * paired)
            print()


if __name__ == "__main__":
    main()
