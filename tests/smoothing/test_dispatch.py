"""Draws handed out to workers that are slow, or die: nothing is lost and nothing counted twice."""

from __future__ import annotations

import random
from collections import deque
from itertools import pairwise

import pytest
import torch

from art_denoised.checks import InputError
from art_denoised.runs import Answered, Failed, Lost, Ready
from art_denoised.smoothing import Dispatcher, Draw, FixedN, Smoother, Stage, Task, drive

X = torch.zeros(1, 2, 2)
SAME = {"weights": "a"}


def vote(index: int, stage: Stage, sample: int) -> int:
    return (index * 7 + stage * 3 + sample * sample) % 5


def votes(index: int, draw: Draw) -> dict[int, int]:
    counts: dict[int, int] = {}
    for sample in range(draw.start, draw.stop):
        label = vote(index, draw.stage, sample)
        counts[label] = counts.get(label, 0) + 1
    return counts


class Crew:
    """Simulated workers that report in random order; ``deaths`` of them die at work."""

    def __init__(self, size: int = 3, deaths: int = 0, seconds: float = 0.001) -> None:
        self.size, self.deaths, self.seconds = size, deaths, seconds
        self.random = random.Random(0)
        self.held = [deque() for _ in range(size)]
        self.starting = set(range(size))
        self.sent: list[int] = []
        self.closed = False

    def send(self, worker, bundle):
        assert worker not in self.starting
        self.held[worker].append(bundle)
        self.sent.append(self.size_of(bundle))

    def receive(self):
        busy = [w for w in range(self.size) if w in self.starting or self.held[w]]
        worker = self.random.choice(busy)
        if worker in self.starting:
            self.starting.remove(worker)
            return worker, Ready(SAME)
        if self.deaths and self.random.random() < 0.3:
            self.deaths -= 1
            self.held[worker].clear()
            self.starting.add(worker)
            return worker, Lost("exit code -9")
        return worker, self.answer(self.held[worker].popleft())

    def answer(self, bundle):
        return Answered([votes(p.index, p.draw) for p in bundle], self.seconds)

    def size_of(self, bundle):
        return sum(piece.draw.stop - piece.draw.start for piece in bundle)

    def close(self):
        self.closed = True


def asking(*sizes: int):
    total, start = {}, 0
    for size in sizes:
        found = yield Draw(Stage.ESTIMATION, start, start + size)
        total = {c: total.get(c, 0) + found.get(c, 0) for c in sorted({*total, *found})}
        start += size
    return total


def whole(index: int, n: int) -> dict[int, int]:
    return dict(sorted(votes(index, Draw(Stage.ESTIMATION, 0, n)).items()))


@pytest.mark.parametrize(("deaths", "seconds"), [(100, 10.0), (20, 0.001)])
def test_deaths_lose_nothing(deaths, seconds):
    crew = Crew(deaths=deaths, seconds=seconds)
    tasks = [Task(i, X, asking(100, 350, 7000 + i)) for i in range(40)]
    voter = Dispatcher(crew, SAME)
    found = dict(drive(tasks, voter))
    assert crew.deaths == 0
    assert found == {i: whole(i, 7450 + i) for i in range(40)}
    assert voter.pending == 0
    voter.close()
    assert crew.closed


def test_bundles_grow_until_they_take_long_enough():
    quick, slow = Crew(seconds=1e-6), Crew(seconds=3.0)
    for crew in (quick, slow):
        dict(drive([Task(i, X, asking(50_000)) for i in range(3)], Dispatcher(crew, SAME)))
    assert max(quick.sent) == 9_984  # whole passes of 64
    assert max(slow.sent) == 64


def steps(stops: tuple[int, ...]) -> list[int]:
    return [stop - start for start, stop in pairwise((0, *stops))]


@pytest.mark.parametrize("deaths", [0, 30])
def test_idle_workers_sample_ahead(deaths):
    """Of looks that were announced; one procedure stops early, and one goes another way."""
    looks = tuple(range(40, 4000, 40))
    stops = [looks, looks[:30], (*looks[:10], 417, 900), *[looks[:5]] * 5]
    crew = Crew(size=8, deaths=deaths)
    voter = Dispatcher(crew, SAME)
    tasks = [Task(i, X, asking(*steps(known)), looks) for i, known in enumerate(stops)]
    found = dict(drive(tasks, voter))
    assert found == {i: whole(i, known[-1]) for i, known in enumerate(stops)}
    assert voter.pending == 0
    asked = sum(known[-1] for known in stops)
    assert asked < sum(crew.sent)
    assert deaths or sum(crew.sent) < 2 * asked


@pytest.mark.parametrize("looks", [(), tuple(range(70, 7000, 70))])
def test_workers_pad_few_passes(looks):
    """Of 48 samples. Pieces are smaller, and a pass is filled up with samples ahead."""
    crew = Crew(size=4, seconds=0.5)
    tasks = [Task(i, X, asking(*[70] * 20), looks) for i in range(30)]
    found = dict(drive(tasks, Dispatcher(crew, SAME, batch_size=48)))
    assert found == {i: whole(i, 1400) for i in range(30)}
    assert sum(size % 48 > 0 for size in crew.sent) < 0.05 * len(crew.sent)


def test_few_samples_are_shared_by_all_workers():
    crew = Crew(size=4, seconds=1e-6)
    voter = Dispatcher(crew, SAME)
    dict(drive([Task(0, X, asking(100_000, 800))], voter))
    assert sum(crew.sent) == 100_800
    assert max(crew.sent[-4:]) <= 256


def test_draws_of_dropped_tasks_are_dropped():
    crew = Crew()
    voter = Dispatcher(crew, SAME)
    gone, kept = Task(0, X, asking(1)), Task(1, X, asking(1))
    voter.submit(gone, Draw(Stage.VOTE, 0, 1000))
    voter.submit(kept, Draw(Stage.VOTE, 0, 10))
    del gone
    task, draw, found = voter.next()
    assert (task, draw, sum(found.values())) == (kept, Draw(Stage.VOTE, 0, 10), 10)
    assert voter.pending == 0
    assert sum(crew.sent) == 10


@pytest.mark.parametrize("answers", [0, 1])
def test_workers_that_only_die_are_given_up(answers):
    """The death of a worker that has answered does not count."""

    class Doomed(Crew):
        died, answers = 0, 0

        def receive(self):
            if self.answers:
                worker, report = super().receive()
                self.answers -= isinstance(report, Answered)
                return worker, report
            self.died += 1
            return 0, Lost("exit code -9")

    crew = Doomed(size=1)
    crew.answers = answers
    with pytest.raises(InputError, match="exit code -9"):
        dict(drive([Task(0, X, asking(10, 10))], Dispatcher(crew, SAME)))
    assert crew.died == 6 + answers


@pytest.mark.parametrize(
    ("report", "words"),
    [(Ready({"weights": "b"}), "weights is 'a', not 'b'"), (Failed("no such net"), "no such net")],
)
def test_a_worker_that_differs_or_fails_ends_the_run(report, words):
    class Strange(Crew):
        def receive(self):
            return 1, report

    with pytest.raises(InputError, match=words):
        dict(drive([Task(0, X, asking(10))], Dispatcher(Strange(), SAME)))


class Oracle:
    """A voter of a test's own: it knows the votes of all images."""

    appetite = 1000

    def __init__(self, smoother: Smoother) -> None:
        self.smoother = smoother
        self.asked: deque[tuple[Task, Draw]] = deque()
        self.pending = 0

    def submit(self, task: Task, draw: Draw) -> None:
        self.asked.append((task, draw))
        self.pending += draw.stop - draw.start

    def next(self) -> tuple[Task, Draw, dict[int, int]]:
        task, draw = self.asked.popleft()
        n = draw.stop - draw.start
        self.pending -= n
        return task, draw, {task.index % 2: n}

    def close(self) -> None:
        self.asked.clear()


def test_any_voter_can_answer_a_smoother():
    def base(x):
        return torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], dim=1)

    smoother = Smoother(base, sigma=0.25, workers=Oracle)
    found = smoother.certify(torch.rand(3, 1, 8, 8), FixedN(1000))
    assert [c.label for c in found] == [0, 1, 0]
    assert [c.counts for c in found] == [{0: 1000}, {1: 1000}, {0: 1000}]
