"""The journal of answers that were paid for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from art_denoised.checks import InputError
from art_denoised.smoothing.blackbox import Answer, Vocabulary
from art_denoised.smoothing.procedures import Counts, Draw, Stage
from art_denoised.smoothing.statistics import Certificate
from art_denoised.storage import Closing, Journal, tensors_fingerprint
from art_denoised.types import Image

TITLE = "journal of answers"
Key = tuple[int, int, int]  # image, stage, sample


class MissingError(Exception):
    """Samples without an answer."""

    def __init__(self, index: int, draw: Draw, samples: Sequence[int]) -> None:
        self.samples = samples
        super().__init__(
            f"holds {draw.stop - len(samples)} of the {draw.stop} samples of image {index} that "
            f"are needed ({draw.stage.name.lower()}); give a smaller n or n0, or go on with "
            "certify_queries"
        )


class Held:
    """The answers in a journal."""

    def __init__(self, path: Path, words: Vocabulary, records: Sequence[Mapping[str, Any]]) -> None:
        self._words = words
        self._answers: dict[Key, int] = {}
        self._count: Counter[int] = Counter()
        self.labels: dict[int, int] = {}
        self._images: dict[int, str] = {}
        self.spent = 0
        for number, record in enumerate(records, start=2):
            try:
                self._read(record)
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{path}:{number} is damaged ({error})") from None

    def _read(self, record: Mapping[str, Any]) -> None:
        if "failed" in record:
            self.spent += record["queries"]
        elif "answer" in record:
            self._keep((record["idx"], record["stage"], record["sample"]), record["answer"])
            self.spent += 1
        else:
            self.labels[record["idx"]] = record["label"]
            self._images[record["idx"]] = record["image"]

    def _keep(self, key: Key, answer: Answer) -> None:
        self._answers[key] = self._words.index(answer)
        self._count[key[0]] += 1

    def check(self, index: int, label: int, x: Image) -> None:
        """Refuse another image or label than the one that the answers are about.

        Raises:
            InputError: It is another one.
        """
        if index not in self.labels:
            return
        changes = []
        if label != self.labels[index]:
            changes.append(f"label {self.labels[index]} -> {label}")
        if tensors_fingerprint(x) != self._images[index]:
            changes.append("pixels differ")
        if changes:
            raise InputError(
                f"image {index} is not the one that the journal holds answers about "
                f"({', '.join(changes)}); give the same data or choose another folder"
            )

    def count(self, index: int) -> int:
        """How many answers about an image there are."""
        return self._count[index]

    def finished(self, index: int, n0: int, n: int) -> bool:
        """Whether there are so many answers about an image."""
        draws = Draw(Stage.SELECTION, 0, n0), Draw(Stage.ESTIMATION, 0, n)
        return not any(self.missing(index, draw) for draw in draws)

    def missing(self, index: int, draw: Draw) -> list[int]:
        """Which samples of a draw have no answer."""
        stage = int(draw.stage)
        samples = range(draw.start, draw.stop)
        return [s for s in samples if (index, stage, s) not in self._answers]

    def certificate(
        self,
        index: int,
        plan: Mapping[str, Any],
        record: Mapping[str, Any],
        *,
        stopped_early: bool,
    ) -> Certificate:
        """Certify from all samples; of a run that stopped early, from the best look it reached.

        Raises:
            MissingError: There are not all of them.
        """
        selection = self.votes(index, Draw(Stage.SELECTION, 0, plan["n0"]))
        whole = {**record, "alpha": plan["alpha"], "bound": plan["bound"]}
        skipped = Certificate.from_counts(selection, {}, **whole)
        best, counts, reached = skipped, Counter[int](), 0
        for start, stop in pairwise((0, *plan["bound"].counts)):
            draw = Draw(Stage.ESTIMATION, start, stop)
            if stopped_early and self.missing(index, draw):
                break
            counts, reached = counts + Counter(self.votes(index, draw)), stop
            found = Certificate.from_counts(selection, counts, **whole)
            best = max(best, found, key=lambda c: (c.p_lower, c.n))
        return best.after(drawn=reached)

    def votes(self, index: int, draw: Draw) -> Counts:
        """Count the answers of a draw.

        Raises:
            MissingError: There are not all of them.
        """
        missing = self.missing(index, draw)
        if missing:
            raise MissingError(index, draw, missing)
        samples = range(draw.start, draw.stop)
        return Counter(self._answers[index, int(draw.stage), sample] for sample in samples)


class Answers(Held, Closing):
    """The answers in a journal that is being written; a context manager."""

    def __init__(
        self, path: Path, settings: Mapping[str, Any], words: Vocabulary, resume: bool
    ) -> None:
        self._journal = Journal(path, TITLE, settings, resume=resume)
        try:
            super().__init__(path, words, self._journal.records)
        except BaseException:
            self._journal.close()
            raise

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()

    def begin(self, index: int, label: int, x: Image) -> None:
        """Note the class of an image, and which one it is."""
        if index not in self.labels:
            record = {"idx": index, "label": label, "image": tensors_fingerprint(x)}
            self._journal.append(record)
            self._read(record)

    def add(self, answers: Mapping[Key, Answer]) -> None:
        """Write answers that have come: first of all, since they are paid.

        Raises:
            InputError: One is none. The others were written.
        """
        bad: InputError | None = None
        for key, answer in answers.items():
            try:
                label = self._words.index(answer)
            except InputError as error:
                bad = error
                self.fail(str(error), 1)
                continue
            index, stage, sample = key
            plain = answer if answer is None or isinstance(answer, str) else label
            record = {"idx": index, "stage": stage, "sample": sample, "answer": plain}
            self._journal.append(record)
            self._keep(key, plain)
        if bad is not None:
            raise bad

    def fail(self, reason: str, queries: int) -> None:
        """Note an attempt that may have been paid in vain."""
        self._journal.append({"failed": reason, "queries": queries})
