"""Commands that check logs and make a leaderboard of them: verify, submit and leaderboard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import CycloptsError, Parameter

from art_denoised.cli.options import Radii, notice, print_json, print_result
from art_denoised.reports.terminal import escaped
from art_denoised.runs.progress import waiting

if TYPE_CHECKING:
    from art_denoised.evaluation import Finding, Log


@dataclass(frozen=True)
class _Checked:
    """What was found in a log or an entry."""

    path: Path
    rows: int
    findings: list[Finding]
    summary: str
    log: Log | None = None  # of certify or predict

    def show(self) -> None:
        for finding in self.findings:
            where = "" if finding.index is None else f"image {finding.index}: "
            print(escaped(f"{self.path}: {where}{finding.problem}"))
        print(escaped(f"{self.path}: {self.summary}"))


def verify(
    *logs: Annotated[Path, Parameter(name="LOG", required=True)],
    family_alpha: Annotated[float | None, Parameter(metavar="A")] = None,
    family_images: Annotated[int | None, Parameter(metavar="M")] = None,
    json: bool = False,
) -> int:
    """Check all logs of a run: votes and radii of certify, balls of attacks.

    Label, bound and radius of each row are recomputed from its votes, alpha,
    sigma and mode; attacked images must lie in their ball. The figures of an
    entry of a leaderboard are recomputed from the votes of its log. Exit code
    0: all rows are consistent; 1: some are not. A log cannot show that the
    votes are those of the network.

    To also print a table whose certificates hold all together:
      art-denoised verify runs/denoised --family-alpha 0.05

    All entries of a leaderboard:
      art-denoised verify results/leaderboard

    Args:
        logs: Folder of a run, whose logs of certify, predict and attack are all checked, or one of
            these logs; folder of a leaderboard, or one of its entries (.json).
        family_alpha: Also print the table at alpha = A / images, where all certificates of a log
            hold together with probability 1 - A. Needs a log whose rows are all consistent.
        family_images: Number of images that the run was planned for, if the log has fewer. It must
            be fixed before the votes are seen. By default the number in the log.
        json: Print a JSON list of {log, rows, findings}.
    """
    if family_images is not None and family_alpha is None:
        raise CycloptsError(msg="--family-images needs --family-alpha; give both")
    if json and family_alpha is not None:
        raise CycloptsError(msg="--json excludes --family-alpha; give one of them")
    with waiting("checking the rows against their votes"):
        from art_denoised import checks

        if family_alpha is not None:
            checks.alpha(family_alpha)
        checked = list(chain.from_iterable(map(_check, logs)))
    if json:
        print_json(
            [
                {
                    "log": str(one.path),
                    "rows": one.rows,
                    "findings": [asdict(finding) for finding in one.findings],
                }
                for one in checked
            ]
        )
    else:
        for one in checked:
            one.show()
            if family_alpha is not None and one.log is not None and not one.findings:
                _show_together(one.log, family_alpha, family_images)
    return 1 if any(one.findings for one in checked) else 0


def _check(path: Path) -> Iterator[_Checked]:
    from art_denoised.evaluation import ATTACK, CERTIFY, PREDICT
    from art_denoised.evaluation.logs import Log, read_logs
    from art_denoised.evaluation.verify import verify

    if path.suffix == ".json" or (any(path.glob("*.json")) and not any(path.glob("*.jsonl"))):
        yield from _check_entries(path)
        return
    for file, log in read_logs(path, CERTIFY, PREDICT, ATTACK).items():
        for text in log.notices:
            notice(f"{file}: {text}")
        findings, settings = verify(log), log.settings or {}
        total, done = len(log.rows), len({row.index for row in log.rows})
        planned = settings.get("images", done)
        if "shard" not in settings and isinstance(planned, int) and done < planned:
            notice(f"{file}: {done} of {planned} images; the others were not reached, or left out")
        bad = len({row.index for row in log.rows} & {finding.index for finding in findings})
        basis = "their votes" if isinstance(log, Log) else "the plan of the run"
        summary = f"{total - bad} of {total} rows are consistent with {basis}"
        yield _Checked(file, total, findings, summary, log if isinstance(log, Log) else None)


def _check_entries(path: Path) -> Iterator[_Checked]:
    from art_denoised.leaderboard import check, read_entries

    for file, entry in read_entries(path).items():
        if entry.votes is None:
            notice(f"{file}: not verified; the entry quotes published figures, without votes")
            continue
        findings = check(file)
        images = entry.votes.images
        summary = "the entry is not consistent with its log"
        if not findings:
            summary = f"the entry is consistent with the votes of {images} images"
        if not findings and not entry.votes.named:
            summary += ", which the log does not name"
            notice(
                f"{file}: images not named; in a log of that version neither images that were left "
                "out nor changed labels are found"
            )
        yield _Checked(file, images, findings, summary)


def _show_together(log: Log, alpha: float, images: int | None) -> None:
    from art_denoised.evaluation.verify import family_wise
    from art_denoised.reports.certified import certified_table

    together = family_wise(log, alpha, images=images)
    certified_table({"each": log, f"all together, {1 - alpha:g}": together}).show()


def submit(
    run: Annotated[Path, Parameter(name="RUN")],
    /,
    *,
    name: str,
    defence: Annotated[str, Parameter(metavar="TEXT")],
    model: Annotated[str, Parameter(metavar="TEXT")],
    data: Annotated[str, Parameter(metavar="TEXT")],
    source: Annotated[str, Parameter(metavar="TEXT")],
    radii: Radii | None = None,
    board: Annotated[Path, Parameter(metavar="DIR")] = Path("results/leaderboard"),
    json: bool = False,
) -> None:
    r"""Make the entry of a leaderboard from a certify run, with its votes.

    The log must be consistent and hold all images of its run. The entry is
    DIR/NAME.json; it holds the hash of the log, and verify recomputes it.

    For example:
      art-denoised submit runs/denoised --name digits-dncnn \
          --defence "denoised smoothing, DnCNN" --model "small CNN" \
          --data "digits, 100 held-out images" --source "my thesis, chapter 3" \
          --board runs/leaderboard
      art-denoised verify runs/leaderboard
      art-denoised leaderboard runs/leaderboard

    Args:
        run: Folder of a certify run, or its certify.jsonl.
        name: Name of the entry: lower-case letters, digits, dots and hyphens.
        defence: What makes the classifier robust.
        model: The classifier.
        data: Data set, and which of its images.
        source: Where the run is described: a paper, a page or a command.
        radii: l2 radii. By default those that the run stopped at, or a grid.
        board: Folder of the leaderboard. The log is copied to its folder logs, unless it lies
            beside it.
        json: Print the name of the entry as JSON.
    """
    from art_denoised.leaderboard import submit

    with waiting("checking the rows against their votes"):
        path = submit(
            run,
            board,
            name=name,
            defence=defence,
            model=model,
            data=data,
            source=source,
            radii=radii,
        )
    print_result({"entry": str(path)}, f"entry: {path}", json=json)


def leaderboard(
    board: Annotated[Path, Parameter(name="DIR")] = Path("results/leaderboard"),
    /,
    *,
    out: Annotated[Path | None, Parameter(alias="-o", metavar="FILE")] = None,
    json: bool = False,
) -> None:
    """Show a leaderboard, once each entry has been recomputed from its votes.

    For example:
      art-denoised leaderboard results/leaderboard

    Args:
        board: Folder of the leaderboard.
        out: Page to write, in Markdown.
        json: Print a JSON list of the entries.
    """
    from art_denoised.leaderboard import leaderboard, write_page

    with waiting("recomputing the entries from their votes"):
        found = leaderboard(board)
    if out is not None:
        write_page(board, out)
    if json:
        print_json(found.to_json())
    elif out is None:
        found.show()
    else:
        print(escaped(f"page: {out}"))
