"""Print what every attack leaves of every defence, counted in four ways.

python table.py > table.txt
"""

from __future__ import annotations

from pathlib import Path

from art_denoised import report
from art_denoised.reports import Share

HERE = Path(__file__).parent
NAMES = {
    "plain": "plain CNN",
    "adversarial": "adversarially trained CNN",
    "diffpure-fixed": "DiffPure-like, fixed noise",
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


def main() -> None:
    heads = ("counted", "average", "majority", "worst")
    for data in ("digits", "mnist"):
        for short, name in NAMES.items():
            folder = HERE / "rows" / f"{data}-{short}"
            if not folder.is_dir():
                continue
            model = report([folder]).models[0]
            first = model.results[0]
            of = f"{data}: {name}; {first.images} images, clean {cell(first.clean)}"
            print(f"{of}, {first.ball}\n")
            print(f"  {'':28}{'gradient':12}" + "".join(f"{head:>14}" for head in heads))
            for result in model.results:
                shares = (result.counted, result.fresh, result.majority, result.worst)
                shown = shares if result.draws > 1 else shares[:1]
                row = f"  {result.attack:28}{result.gradient:12}"
                print(row + "".join(f"{cell(share):>14}" for share in shown))
            print()


if __name__ == "__main__":
    main()
