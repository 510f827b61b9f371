"""Works given to workers that are slow, or die: all come back, in order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from art_denoised.checks import InputError
from art_denoised.runs.workers import Answered, Ready, Team, in_order
from tests.smoothing.test_dispatch import Crew as Simulated

SAME = {"processor": "A", "weights": "a"}


@dataclass(frozen=True, eq=False)
class Work:
    number: int
    x: np.ndarray


class Crew(Simulated):
    """Simulated workers that answer with the number of the work, of one processor or several."""

    processors = "AAA"

    def receive(self):
        worker, report = super().receive()
        if isinstance(report, Ready):
            report = Ready({**SAME, "processor": self.processors[worker]})
        return worker, report

    def answer(self, work):
        return Answered(-work[0].number, self.seconds)

    def size_of(self, work):
        return len(work)


@pytest.mark.parametrize("deaths", [0, 100])
def test_works_come_back_in_order(deaths):
    crew = Crew(deaths=deaths)
    team = Team(crew, SAME, allow_mixed=False)
    works = [Work(i, np.zeros(1)) for i in range(300)]
    found = list(in_order(team, iter(works)))
    assert found == [(work, -work.number) for work in works]
    assert crew.deaths == 0
    assert list(in_order(team, iter([]))) == []


def test_few_works_are_begun_before_earlier_ones_are_done():
    begun = 0

    def works():
        nonlocal begun
        for begun in range(1, 100):
            yield Work(begun, np.zeros(1))

    ahead = [
        begun - work.number
        for work, _ in in_order(Team(Crew(deaths=20), SAME, allow_mixed=False), works())
    ]
    assert 0 < max(ahead) <= 12


def test_other_processors_are_refused_unless_that_is_allowed():
    works = [Work(i, np.zeros(1)) for i in range(9)]
    crew = Crew()
    crew.processors = "AAB"
    with pytest.raises(InputError, match="processor is 'A', not 'B'") as refusal:
        list(in_order(Team(crew, SAME, allow_mixed=False), works))
    assert refusal.value.remedy == {"allow_mixed": True}
    crew = Crew()
    crew.processors = "AAB"
    assert len(list(in_order(Team(crew, SAME, allow_mixed=True), works))) == 9


@pytest.mark.parametrize(
    ("answers", "refused"),
    [([3.0, -10.0], False), ([3.01, -10.04], False), ([3.0, -8.0], True), ([-3.0, -10.0], True)],
)
def test_networks_that_answer_otherwise_are_refused(answers, refused):
    """A private tensor that each process draws is in no identity."""

    class Answering(Crew):
        def receive(self):
            worker, report = super().receive()
            known = {**SAME, "answers": answers}
            return worker, Ready(known) if isinstance(report, Ready) else report

    team = Team(Answering(), {**SAME, "answers": [3.0, -10.0]}, allow_mixed=False)
    works = [Work(i, np.zeros(1)) for i in range(9)]
    if refused:
        with pytest.raises(InputError, match="buffer"):
            list(in_order(team, works))
    else:
        assert len(list(in_order(team, works))) == 9
