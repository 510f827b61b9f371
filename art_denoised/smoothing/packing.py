"""Votes of a base classifier: samples of many images share batches, and no result depends on it.

The noise of a sample does not depend on its batch. Its logits do, in their last bits: libraries
choose other kernels for other batch sizes. A sample whose two leading logits are that close is
therefore decided by a pass of its own (`_decide`), and the votes are those of the classifier
applied to one image at a time.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from art_denoised import checks
from art_denoised.smoothing.procedures import Draw, Procedure, Stage
from art_denoised.smoothing.sampling import Noise, Stream, StreamKey, model_dtype

if TYPE_CHECKING:
    from art_denoised.types import Classifier, Image, Images, Labels

T = TypeVar("T")
_TF32_EPS = 2.0**-10  # of float32 convolutions on GPUs, by PyTorch's default


@dataclass(frozen=True)
class Task(Generic[T]):
    """One image and what is to be found out about it.

    Attributes:
        index: Of the image in its data set; selects its noise.
        x: The image, (channels, height, width), float32, on the device of the base classifier.
        procedure: Asks for votes, at least once, and returns the answer.
    """

    index: int
    x: Image
    procedure: Procedure[T]


def run_packed(
    base: Classifier,
    tasks: Iterable[Task[T]],
    *,
    noise: Noise,
    seed: int,
    batch_size: int = 64,
    channels_last: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, T]]:
    """Run procedures on images, filling each batch with samples of as many as it takes.

    A batch is filled from the oldest unfinished image on, and a new image is begun only when those
    want no more samples for the moment. So memory does not grow with the number of images or of
    samples, and a procedure that stops early saves time at once.

    Args:
        base: Images to logits.
        tasks: Consumed as needed.
        noise: Kind of noise.
        seed: Non-negative seed of the run.
        batch_size: Samples classified at once; changes nothing but speed.
        channels_last: Memory order in which images are handed to ``base``; the same.
        stop: Asked before each batch. Once it says True, procedures in the estimation stage are
            sent the votes that have come in, as if they had asked for no more: for `tightening`.

    Yields:
        (index, answer) of each task, as it is finished.

    Raises:
        InputError: ``base`` does not return a row of logits for each image, or returns NaN.

    Example:
        >>> from art_denoised.smoothing.procedures import voting
        >>> from art_denoised.smoothing.sampling import Gaussian
        >>> base = lambda x: torch.stack([x.mean((1, 2, 3)), 0.5 - x.mean((1, 2, 3))], dim=1)
        >>> tasks = [
        ...     Task(i, torch.full((1, 8, 8), float(i)), voting(50, alpha=0.001, sigma=0.25))
        ...     for i in range(2)
        ... ]
        >>> [(i, v.counts) for i, v in run_packed(base, tasks, noise=Gaussian(0.25), seed=0)]
        [(0, {1: 50}), (1, {0: 50})]
    """
    waiting = iter(tasks)
    jobs: deque[_Job[T]] = deque()
    dtype = model_dtype(base)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    while not stop():
        pieces, shares = _fill(waiting, jobs, noise, seed, batch_size)
        if not pieces:
            return
        batch = torch.cat(pieces).to(dtype).contiguous(memory_format=memory_format)
        for job, votes in zip(shares, _votes(base, batch, list(shares.values())), strict=True):
            job.votes.update(votes)
            if job.wanted == 0 and job.answer():
                jobs.remove(job)
                yield job.index, job.result
    for job in jobs:
        if job.draw.stage is Stage.ESTIMATION and job.votes and job.answer():
            yield job.index, job.result


class _Job(Generic[T]):
    """A task under way: its present draw, and the votes that have come in for it."""

    draw: Draw
    wanted: int  # samples of the draw that are in no batch yet
    votes: Counter[int]
    result: T

    def __init__(self, task: Task[T], noise: Noise, seed: int) -> None:
        self.index = task.index
        self._x, self._procedure, self._noise, self._seed = task.x, task.procedure, noise, seed
        # Channels-last in memory, as the noise is: their sum is three times faster so.
        centre = noise.centre(task.x).permute(1, 2, 0).contiguous()
        self._centre = centre.permute(2, 0, 1)
        self._streams: dict[Stage, Stream] = {}
        self._ask(next(self._procedure))

    def take(self, n: int) -> list[Images]:
        """Return noisy copies for up to ``n`` of the samples that are wanted."""
        n = min(n, self.wanted)
        self.wanted -= n
        return [self._noise.add(self._centre, piece) for piece in self._stream.pieces(n)]

    def answer(self) -> bool:
        """Send the votes to the procedure and say whether that finished it."""
        try:
            self._ask(self._procedure.send({c: self.votes[c] for c in sorted(self.votes)}))
        except StopIteration as end:
            self.result = end.value
            return True
        return False

    def _ask(self, draw: Draw) -> None:
        self.draw, self.wanted, self.votes = draw, draw.stop - draw.start, Counter()
        stream = self._streams.get(draw.stage)
        if stream is None or stream.position != draw.start:
            key = StreamKey(self._seed, self.index, draw.stage)
            stream = Stream(self._noise, key, self._x.shape, self._x.device, draw.start)
            self._streams[draw.stage] = stream
        self._stream = stream


def _fill(
    waiting: Iterator[Task[T]],
    jobs: deque[_Job[T]],
    noise: Noise,
    seed: int,
    batch_size: int,
) -> tuple[list[Images], dict[_Job[T], int]]:
    """Return the pieces of a batch and how many samples, in order, belong to which job."""
    pieces: list[Images] = []
    shares: dict[_Job[T], int] = {}
    room = batch_size
    candidates = [job for job in jobs if job.wanted]
    while room:
        if candidates:
            job = candidates.pop(0)
        elif (task := next(waiting, None)) is not None:
            job = _Job(task, noise, seed)
            jobs.append(job)
        else:
            break
        taken = job.take(room)
        pieces += taken
        shares[job] = sum(map(len, taken))
        room -= shares[job]
    return pieces, shares


@torch.no_grad()
def _votes(base: Classifier, batch: Images, shares: list[int]) -> list[dict[int, int]]:
    """Classify a batch and count, on its device, the votes of each share of it."""
    logits = checks.logits(base(batch), len(batch))
    labels, classes = _decide(base, batch, logits), logits.shape[1]
    owner = torch.repeat_interleave(torch.arange(len(shares)), torch.tensor(shares))
    cells = owner.to(labels.device) * classes + labels
    table = torch.bincount(cells, minlength=len(shares) * classes).reshape(len(shares), classes)
    return [{c: votes for c, votes in enumerate(row) if votes} for row in table.tolist()]


def _decide(base: Classifier, batch: Images, logits: torch.Tensor) -> Labels:
    """Return the class of each sample as a pass over that sample alone would.

    Only samples whose leading logits are within sqrt(machine epsilon) of each other, relative to
    the largest logit, take that second pass: 0.03% of the scale in float32, far above what
    the choice of kernels changes. Epsilon is that of the arithmetic, not of the logits alone.
    """
    eps = max(torch.finfo(dtype).eps for dtype in (logits.dtype, batch.dtype))
    if batch.is_cuda and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32):
        eps = max(eps, _TF32_EPS)
    (first, second), label = logits.topk(2, dim=1).values.unbind(1), logits.argmax(1)
    scale = logits.abs().amax(1)
    clear = first - second > scale * eps**0.5
    for i in (~clear).nonzero().flatten().tolist():
        label[i] = base(batch[i : i + 1].contiguous()).argmax(1)[0]
    return label


def takes_channels_last(base: Classifier, x: Image) -> bool:
    """Whether ``base`` can classify images in channels-last memory order.

    Networks that flatten with ``view`` cannot; they get their images in the default order.

    Example:
        >>> takes_channels_last(torch.nn.Flatten(), torch.zeros(3, 8, 8))
        True
        >>> takes_channels_last(lambda x: x.view(len(x), -1), torch.zeros(3, 8, 8))
        False
    """
    two = torch.stack([x, x]).to(model_dtype(base))
    with torch.no_grad():
        try:
            base(two.contiguous(memory_format=torch.channels_last))
        except RuntimeError:
            return False
    return True
