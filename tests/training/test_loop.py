"""The training loop: exact under interruption, and clean in what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from art_denoised.checks import InputError
from art_denoised.training.loop import train
from art_denoised.training.plan import Plan, augment

ROOT = Path(__file__).parent.parent.parent


def data(n: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 1, 8, 8, generator=generator)
    return TensorDataset(x, torch.arange(n) % 10)


def network() -> nn.Module:
    """Batch norm and dropout: state and randomness that a careless resume would lose."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.2), nn.Conv2d(4, 1, 1)
        )


def loss_of(net: nn.Module):
    return lambda x, y, step: (net(x + 0.1 * torch.randn_like(x)) - x).square().mean()


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("stop", [1, 4, 5, 7, 13])
@pytest.mark.parametrize(
    ("average", "optimizer", "best"), [(0.0, "adam", None), (0.9, "sgd", None), (0.9, "sgd", "up")]
)
def test_an_interrupted_training_ends_in_the_same_bits(tmp_path, stop, average, optimizer, best):
    plan = Plan(epochs=3, batch_size=8, rate=0.01, average=average, optimizer=optimizer)
    judged = {"best": best, "evaluate": lambda weights, rows: {"up": [1.0, 3.0, 2.0][len(rows)]}}
    whole = network()
    rows = train(whole, data(), loss_of(whole), plan, progress=False, **judged)

    net = network()

    def interrupted(x, y, step):
        if step == stop:
            raise InterruptedError
        return loss_of(net)(x, y, step)

    options = {"out": tmp_path, "progress": False, "save_every": 0.0, **judged}
    with pytest.raises(InterruptedError):
        train(net, data(), interrupted, plan, **options)
    again = network()
    resumed = train(again, data(), loss_of(again), plan, resume=True, **options)
    assert states_equal(again, whole)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in rows]
    logged = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert logged[1:] == resumed


_SCRIPT = """
import sys, time, torch
sys.path.insert(0, {root!r})
from tests.training.test_loop import data, loss_of, network
from art_denoised.training.loop import train
from art_denoised.training.plan import Plan
torch.set_num_threads(1)
net = network()
def slow(x, y, step):
    time.sleep(0.02)
    return loss_of(net)(x, y, step)
plan = Plan(epochs=20, batch_size=8, rate=0.01)
train(net, data(), slow, plan, out={out!r}, resume=True, save_every=0.05, progress=False)
"""


def test_a_training_survives_sigkill(tmp_path):
    script = _SCRIPT.format(root=str(ROOT), out=str(tmp_path))
    kills = 0
    for _ in range(3):
        run = subprocess.Popen([sys.executable, "-c", script])
        checkpoint = tmp_path / "checkpoint.pt"
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while run.poll() is None:
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns > before:
                time.sleep(0.3)
                break
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
        kills += run.wait() == -signal.SIGKILL
    assert kills >= 2
    net, whole = network(), network()
    plan = Plan(epochs=20, batch_size=8, rate=0.01)
    train(net, data(), loss_of(net), plan, out=tmp_path, resume=True, progress=False)
    train(whole, data(), loss_of(whole), plan, progress=False)
    assert states_equal(net, whole)


def test_the_seed_is_all_that_matters():
    def weights(seed: int, state: int) -> torch.Tensor:
        net = network()
        torch.manual_seed(state)
        before = torch.get_rng_state()
        plan = Plan(epochs=1, batch_size=8, seed=seed)
        train(net, data(), loss_of(net), plan, progress=False)
        assert torch.equal(before, torch.get_rng_state())
        return net[0].weight

    assert torch.equal(weights(0, 1), weights(0, 2))
    assert not torch.equal(weights(0, 1), weights(1, 1))


FORKED = False


def must_be_spawned(_worker: int) -> None:
    assert not FORKED, "a forked process has the variables of its parent"


def test_a_data_loader_keeps_its_workers_and_gets_our_order(monkeypatch):
    nets = network(), network()
    plan = Plan(epochs=1, batch_size=8)
    train(nets[0], data(), loss_of(nets[0]), plan, progress=False)
    loader = DataLoader(
        data(), batch_size=3, shuffle=True, num_workers=1, multiprocessing_context="spawn",
        worker_init_fn=must_be_spawned,
    )  # fmt: skip
    monkeypatch.setattr(sys.modules[__name__], "FORKED", True)
    train(nets[1], loader, loss_of(nets[1]), plan, progress=False)
    assert states_equal(*nets)


class Weight(nn.Module):
    """One number, as network; the loss is a multiple of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))


@pytest.mark.parametrize(("slope", "clip", "length"), [(0.5, 1.0, 0.5), (9, 1.0, 1), (9, 0.0, 9)])
def test_steps_are_the_rate_of_the_plan_times_the_clipped_gradient(slope, clip, length):
    plan = Plan(epochs=2, batch_size=8, optimizer="sgd", rate=0.1, momentum=0, weight_decay=0,
                clip=clip, average=0)  # fmt: skip
    net, seen = Weight(), []

    def loss(x, y, step):
        seen.append(float(net.weight.detach()))
        return slope * net.weight

    train(net, data(), loss, plan, progress=False)
    steps = [a - b for a, b in zip(seen, [*seen[1:], float(net.weight.detach())], strict=True)]
    assert steps == pytest.approx([length * plan.rate_at(i, 10) for i in range(10)], rel=1e-4)


@pytest.mark.parametrize(("kind", "moved"), [("none", False), ("crop", True), ("crop+flip", True)])
def test_the_loss_sees_augmented_images(kind, moved):
    seen, net, images = [], Weight(), data().tensors[0]

    def loss(x, y, step):
        seen.extend(x)
        return net.weight + 0

    train(net, data(), loss, Plan(epochs=1, batch_size=8, augment=kind), progress=False)
    known = sum(any(torch.equal(x, image) for image in images) for x in seen)
    assert (known < 20) if moved else (known == 40)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_loss_is_autocast_if_the_plan_says_so(bf16):
    seen, net = [], Weight()

    def loss(x, y, step):
        seen.append(torch.is_autocast_enabled("cpu"))
        return net.weight + 0

    train(net, data(), loss, Plan(epochs=1, batch_size=8, bf16=bf16), progress=False)
    assert seen == [bf16] * 5


def test_progress_shows_steps_loss_and_time(capsys):
    net = network()
    train(net, data(), loss_of(net), Plan(epochs=2, batch_size=8))
    last = capsys.readouterr().err.split("\r")[-1]
    assert re.search(r"train: 100%.* 10/10 \[\d\d:\d\d<\d\d:\d\d, .*loss \d\.\d{4}\]", last)


def test_convolutions_of_any_dimension_are_trained():
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(1, 1, 3, padding=1)

        def forward(self, x):
            return self.conv(x[:, None])[:, 0]

    net = Deep()
    rows = train(net, data(), loss_of(net), Plan(epochs=2, batch_size=8, rate=0.1), progress=False)
    assert rows[1]["loss"] < rows[0]["loss"]


def test_the_average_is_that_of_the_weights():
    net, seen = network(), []

    def loss(x, y, step):
        seen.append(net[3].bias.detach().clone())
        return loss_of(net)(x, y, step)

    train(net, data(), loss, Plan(epochs=4, batch_size=8, rate=0.05, average=0.5), progress=False)
    # Decay 0.5 forgets all but the last weights; those of the first step are far from them.
    assert (net[3].bias - seen[-1]).abs().item() < 0.2 * (seen[0] - seen[-1]).abs().item()


def test_it_stops_when_asked_and_returns_the_best(tmp_path):
    """Rate 0.1 for ever: the second epoch's figure is the highest, the third's ends it."""
    figures, seen = [1.0, 3.0, 2.0], []

    def evaluate(weights, rows):
        seen.append(weights[0].weight.detach().clone())
        return {"figure": figures[len(rows)]}

    net, plan = network(), Plan(epochs=9, batch_size=8, rate=0.1, schedule="constant", average=0)
    options = {"out": tmp_path, "evaluate": evaluate, "best": "figure", "progress": False}
    stop = lambda rows: rows[-1]["figure"] == 2  # noqa: E731
    rows = train(net, data(), loss_of(net), plan, stop=stop, **options)
    assert len(rows) == 3
    assert torch.equal(net[0].weight, seen[1])
    assert not torch.equal(net[0].weight, seen[2])
    again = network()
    assert train(again, data(), loss_of(again), plan, stop=stop, resume=True, **options) == rows
    assert states_equal(again, net)


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle", "step", "milestones", "constant"])
def test_schedules(schedule):
    plan = Plan(rate=0.1, schedule=schedule)
    rates = [plan.rate_at(step, 100) for step in range(100)]
    assert max(rates) == pytest.approx(0.1)
    assert all(0 < rate <= 0.1 for rate in rates)
    assert rates[-1] == pytest.approx(
        {"cosine": 0, "one-cycle": 0.1 / 71, "step": 0.001, "milestones": 1e-4, "constant": 0.1}[
            schedule
        ],
        abs=1e-4,
    )


def test_augmentation_moves_and_flips_each_image_whole():
    x = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(200, 2, 1, 1)
    torch.manual_seed(0)
    moved = augment(x)
    assert moved.shape == x.shape
    assert torch.equal(moved[:, 0], moved[:, 1])  # channels stay together
    kinds = {tuple(image.flatten().tolist()) for image in moved[:, 0]}
    assert len(kinds) == 2 * 3 * 3  # flips, and one pixel each way
    flips = (moved[:, 0, 4, 4] > moved[:, 0, 4, 3]).float().mean()
    assert 0.3 < flips < 0.7
    assert torch.equal(augment(x, "none"), x)
    assert {tuple(i.flatten().tolist()) for i in augment(x, "crop")[:, 0]} <= kinds


def test_scalars_for_tensorboard(tmp_path):
    net = network()
    train(
        net, data(), loss_of(net), Plan(epochs=2, batch_size=1), out=tmp_path, tensorboard=True,
        progress=False, evaluate=lambda weights, rows: {"figure": 0.5},
    )  # fmt: skip
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.value for e in events.Scalars("figure")] == [0.5, 0.5]
    assert {"loss", "rate"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("loss of the step")] == [50]


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.rand(1, 8, 8), 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"rate": -1}, "rate is -1"),
        ({"schedule": "linear"}, "schedule is 'linear'"),
        ({"augment": "cutout"}, "augment is 'cutout'"),
        ({"average": 1.0}, "average is 1.0"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"optimizer": "lamb"}, "optimizer is 'lamb'; give one of adam, sgd"),
        ({"momentum": 1}, "momentum is 1"),
        ({"clip": -1}, "clip is -1"),
        ({"seed": 2**64}, r"seed is 18446744073709551616; give a whole number below 2\^64"),
    ],
)
def test_bad_plans(changes, message):
    with pytest.raises(InputError, match=message):
        Plan(**changes)


def test_bad_data_and_folders(tmp_path):
    net, plan = network(), Plan(epochs=1, batch_size=8)

    def run(what, loss=None, **options):
        return train(net, what, loss or loss_of(net), plan, progress=False, **options)

    with pytest.raises(InputError, match="no parameters"):
        train(nn.Flatten(), data(), loss_of(net), plan, progress=False)
    with pytest.raises(InputError, match="stream without length"):
        run(Endless())
    with pytest.raises(InputError, match="no images"):
        run([])
    with pytest.raises(InputError, match="divide by 255"):
        run(TensorDataset(255 * torch.rand(8, 1, 8, 8), torch.zeros(8).long()))
    with pytest.raises(InputError, match="pairs"):
        run(TensorDataset(torch.rand(8, 1, 8, 8)))
    with pytest.raises(InputError, match="nan at step 0; train with a smaller rate"):
        run(data(), lambda x, y, step: net(x).mean() * float("nan"))
    for loss, message in (
        (
            lambda x, y, step: net(x).flatten(1).mean(1),
            r"a Tensor of shape \(8,\); return a scalar",
        ),
        (lambda x, y, step: 0.5, "a float; return a scalar tensor"),
        (lambda x, y, step: net(x).mean().detach(), "that depends on the network"),
    ):
        with pytest.raises(InputError, match=message):
            run(data(), loss)
    for name in ("resume", "tensorboard"):
        with pytest.raises(InputError, match=f"{name} needs a folder; give out"):
            run(data(), **{name: True})
    for chosen in (
        {"sampler": SubsetRandomSampler(range(32))},
        {"sampler": RandomSampler(data(), num_samples=32)},
        {"batch_sampler": [[0, 1], [2, 3]]},
        {"batch_size": None},
    ):
        with pytest.raises(InputError, match=r"sampler of its own.* give Subset\(data, indices\)"):
            run(DataLoader(data(), **chosen))
    net = network()
    run(data(), out=tmp_path)
    net = network()
    with pytest.raises(InputError, match="already holds a training"):
        run(data(), out=tmp_path)
    with pytest.raises(InputError, match=r"images 40 -> 32"):
        run(data(32), out=tmp_path, resume=True)
    (tmp_path / "checkpoint.pt").write_bytes(b"PK rubbish")
    with pytest.raises(InputError, match="no checkpoint of ours"):
        run(data(), out=tmp_path, resume=True)
    (tmp_path / "checkpoint.pt").unlink()  # as in a clone: the log of a training is kept
    before = (tmp_path / "train.jsonl").read_bytes()
    for resume in (False, True):
        with pytest.raises(InputError, match="no checkpoint to go on from"):
            run(data(), out=tmp_path, resume=resume)
    assert (tmp_path / "train.jsonl").read_bytes() == before
    assert os.listdir(tmp_path).count("train.jsonl") == 1


def test_two_trainings_do_not_share_a_folder(tmp_path):
    outer, plan = network(), Plan(epochs=1, batch_size=8)

    def loss(x, y, step):
        inner = network()
        with pytest.raises(InputError, match="being written by another process"):
            train(inner, data(), loss_of(inner), plan, out=tmp_path, resume=True, progress=False)
        return loss_of(outer)(x, y, step)

    train(outer, data(), loss, plan, out=tmp_path, progress=False)
    train(outer, data(), loss_of(outer), plan, out=tmp_path / "other", progress=False)


def test_a_last_smaller_batch_sits_out():
    net, sizes = network(), []

    def loss(x, y, step):
        sizes.append(len(x))
        return loss_of(net)(x, y, step)

    train(net, data(20), loss, Plan(epochs=2, batch_size=8), progress=False)
    assert sizes == [8, 8, 8, 8]


class Drawing(Dataset):
    """Labels are drawn at random in the worker processes."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(1, 8, 8), int(torch.randint(2**40, ()))


def drawn(seed: int, workers: int) -> list[int]:
    seen: list[int] = []
    net = network()

    def loss(x, y, step):
        seen.extend(y.tolist())
        return loss_of(net)(x, y, step)

    loader = DataLoader(Drawing(), num_workers=workers)
    torch.seed()  # what the data draw must not depend on it
    train(net, loader, loss, Plan(epochs=2, batch_size=8, seed=seed), progress=False)
    return seen


@pytest.mark.parametrize("workers", [0, 1])
def test_data_draw_anew_each_epoch_and_seed(workers):
    first, again, other = (drawn(seed, workers) for seed in (0, 0, 1))
    assert first == again
    assert len({*first, *other}) == 64


def test_a_buffer_of_booleans_is_copied_into_the_average():
    net = network()
    net.register_buffer("mask", torch.tensor([False, False]))

    def loss(x, y, step):
        net.mask[step % 2] = True
        return loss_of(net)(x, y, step)

    train(net, data(), loss, Plan(epochs=1, batch_size=8, average=0.9), progress=False)
    assert net.mask.tolist() == [True, True]
    assert int(net[1].num_batches_tracked) == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_two_sizes_are_one_line(workers):
    net, odd = network(), [(torch.rand(1, 8 + i % 2, 8), 0) for i in range(16)]
    with pytest.raises(InputError, match="differ in size") as caught:
        train(net, DataLoader(odd, num_workers=workers), loss_of(net), Plan(batch_size=8),
              progress=False)  # fmt: skip
    assert "\n" not in str(caught.value)


def test_other_devices_keep_their_random_states(monkeypatch):
    """`torch.manual_seed` would reseed every GPU; the training's alone is put back."""
    reseeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    net = network()
    reseeded.clear()
    train(net, data(), loss_of(net), Plan(epochs=1, batch_size=8), progress=False)
    assert not reseeded
