"""The training loop: exact under interruption, and clean in what it leaves behind."""

from __future__ import annotations

import math
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from art_denoised import InputError, ParametricSoftplus, SmoothReLU
from art_denoised.runs import read_run
from art_denoised.training import (
    TRAINING,
    EpochRow,
    Evaluation,
    TrainingConfig,
    train,
)
from art_denoised.training.config import augment, decayed_weights
from tests.forked import forked

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


class Noisy:
    """A loss that can be slow, or fail; neither is part of what is compared on resuming."""

    delay, fails_at = 0.0, -1

    def __call__(self, network, x, y, step):
        if step == self.fails_at:
            raise InterruptedError
        time.sleep(self.delay)
        return (network(x + 0.1 * torch.randn_like(x)) - x).square().mean()


noisy = Noisy()


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


class Rising:
    """A figure that is highest in the second epoch."""

    def __call__(self, network, rows):
        return {"figure": [1.0, 3.0, 2.0][len(rows)]}


@pytest.mark.parametrize("stop", [1, 4, 5, 7, 13])
@pytest.mark.parametrize(
    ("average", "optimizer", "best", "schedule"),
    [
        (0.0, "adam", None, "cosine"),
        (0.9, "sgd", None, "milestones"),
        (0.9, "sgd", "figure", "one-cycle"),
    ],
)
def test_an_interrupted_training_ends_in_the_same_bits(
    tmp_path, monkeypatch, stop, average, optimizer, best, schedule
):
    config = TrainingConfig(
        epochs=3, batch_size=8, lr=0.01, average=average, optimizer=optimizer, schedule=schedule,
        checkpoint_every=0,
    )  # fmt: skip
    options = {"evaluation": Evaluation(Rising(), keep_best=best), "progress": False}
    whole = network()
    rows = train(whole, data(), noisy, config, **options)
    options["run"] = tmp_path
    monkeypatch.setattr(Noisy, "fails_at", stop)
    with pytest.raises(InterruptedError):
        train(network(), data(), noisy, config, **options)
    monkeypatch.undo()
    again = network()
    resumed = train(again, data(), noisy, config, resume=True, **options)
    assert states_equal(again, whole)
    assert [(r.epoch, r.loss, r.lr, r.figures) for r in resumed] == [
        (r.epoch, r.loss, r.lr, r.figures) for r in rows
    ]
    assert list(read_run(tmp_path, TRAINING).rows.values()) == resumed


def test_a_row_that_a_killed_process_did_not_write_is_written_on_resuming(tmp_path):
    """The checkpoint is written first; the log then lacks its last row, or has a torn one."""
    config = TrainingConfig(epochs=3, batch_size=8)
    options = {"run": tmp_path, "progress": False}
    rows = train(network(), data(), noisy, config, **options)
    log = tmp_path / "train.jsonl"
    whole = log.read_bytes()
    for torn in (b"", b'{"epoch": 3, "lo'):
        log.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]) + torn)
        assert train(network(), data(), noisy, config, resume=True, **options) == rows
        assert log.read_bytes() == whole


def train_slowly(out: Path) -> None:
    Noisy.delay = 0.02
    config = TrainingConfig(epochs=20, batch_size=8, lr=0.01, checkpoint_every=0.05)
    train(network(), data(), noisy, config, run=out, resume=True, progress=False)


def test_a_training_survives_sigkill(tmp_path):
    kills = 0
    for _ in range(3):
        checkpoint = tmp_path / "checkpoint.pt"
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        run = forked(train_slowly, tmp_path)
        while run.is_alive():
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns > before:
                time.sleep(0.3)
                break
            time.sleep(0.01)
        run.kill()
        run.join()
        kills += run.exitcode == -signal.SIGKILL
    assert kills >= 2
    net, whole = network(), network()
    config = TrainingConfig(epochs=20, batch_size=8, lr=0.01)
    train(net, data(), noisy, config, run=tmp_path, resume=True, progress=False)
    train(whole, data(), noisy, config, progress=False)
    assert states_equal(net, whole)
    assert list(read_run(tmp_path, TRAINING).rows) == list(range(1, 21))  # one row an epoch


def test_the_seed_is_all_that_matters():
    def weights(seed: int, state: int) -> torch.Tensor:
        net = network()
        torch.manual_seed(state)
        before = torch.get_rng_state()
        config = TrainingConfig(epochs=1, batch_size=8, seed=seed)
        train(net, data(), noisy, config, progress=False)
        assert torch.equal(before, torch.get_rng_state())
        return net[0].weight

    assert torch.equal(weights(0, 1), weights(0, 2))
    assert not torch.equal(weights(0, 1), weights(1, 1))


FORKED = False


def must_not_be_a_fork(_worker: int) -> None:
    assert not FORKED, "a forked process has the variables of its parent"


def test_a_data_loader_keeps_its_workers_and_gets_our_order(monkeypatch):
    nets = network(), network()
    config = TrainingConfig(epochs=1, batch_size=8)
    train(nets[0], data(), noisy, config, progress=False)
    loader = DataLoader(
        data(), batch_size=3, shuffle=True, num_workers=1, multiprocessing_context="forkserver",
        worker_init_fn=must_not_be_a_fork,
    )  # fmt: skip
    monkeypatch.setattr(sys.modules[__name__], "FORKED", True)
    train(nets[1], loader, noisy, config, progress=False)
    assert states_equal(*nets)


class Weight(nn.Module):
    """One number, as network; the loss is a multiple of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))


@pytest.mark.parametrize(("slope", "clip", "length"), [(0.5, 1.0, 0.5), (9, 1.0, 1), (9, 0.0, 9)])
def test_steps_are_the_learning_rate_times_the_clipped_gradient(slope, clip, length):
    config = TrainingConfig(epochs=2, batch_size=8, optimizer="sgd", lr=0.1, momentum=0,
                            weight_decay=0, clip=clip, average=0)  # fmt: skip
    net, seen = Weight(), []

    def loss(network, x, y, step):
        seen.append(float(net.weight.detach()))
        return slope * net.weight

    train(net, data(), loss, config, progress=False)
    steps = [a - b for a, b in zip(seen, [*seen[1:], float(net.weight.detach())], strict=True)]
    cosine = [(1 + math.cos(math.pi * (i - 1) / 9)) / 20 for i in range(1, 10)]
    assert steps == pytest.approx([length * lr for lr in (0.1, *cosine)], rel=1e-4)


@pytest.mark.parametrize(("kind", "moved"), [("none", False), ("crop", True), ("crop+flip", True)])
def test_the_loss_sees_augmented_images(kind, moved):
    seen, net, images = [], Weight(), data().tensors[0]

    def loss(network, x, y, step):
        seen.extend(x)
        return net.weight + 0

    train(net, data(), loss, TrainingConfig(epochs=1, batch_size=8, augment=kind), progress=False)
    known = sum(any(torch.equal(x, image) for image in images) for x in seen)
    assert (known < 20) if moved else (known == 40)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_loss_is_autocast_if_the_config_says_so(bf16):
    seen, net = [], Weight()

    def loss(network, x, y, step):
        seen.append(torch.is_autocast_enabled("cpu"))
        return net.weight + 0

    train(net, data(), loss, TrainingConfig(epochs=1, batch_size=8, bf16=bf16), progress=False)
    assert seen == [bf16] * 5


def test_progress_shows_images_speed_and_loss(capsys):
    net = network()
    train(net, data(), noisy, TrainingConfig(epochs=2, batch_size=8))
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"train: 80/80 images, [\d.e+]+ images/s, loss \d\.\d{4}", last)


def test_convolutions_of_any_dimension_are_trained():
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(1, 1, 3, padding=1)

        def forward(self, x):
            return self.conv(x[:, None])[:, 0]

    net = Deep()
    rows = train(net, data(), noisy, TrainingConfig(epochs=2, batch_size=8, lr=0.1), progress=False)
    assert rows[1].loss < rows[0].loss


def test_the_average_is_that_of_the_weights():
    net, seen = network(), []

    def loss(network, x, y, step):
        seen.append(net[3].bias.detach().clone())
        return noisy(network, x, y, step)

    train(
        net,
        data(),
        loss,
        TrainingConfig(epochs=4, batch_size=8, lr=0.05, average=0.5),
        progress=False,
    )
    # Decay 0.5 forgets all but the last weights; those of the first step are far from them.
    assert (net[3].bias - seen[-1]).abs().item() < 0.2 * (seen[0] - seen[-1]).abs().item()


def test_it_stops_when_asked_and_returns_the_best(tmp_path):
    """The second epoch's figure is the highest, the third's ends it."""
    weights = []

    class Seeing(Rising):
        def __call__(self, network, rows):
            weights.append(network[0].weight.detach().clone())
            return super().__call__(network, rows)

    def stop(rows):
        return rows[-1].figures["figure"] == 2

    config = TrainingConfig(epochs=9, batch_size=8, lr=0.1, schedule="constant", average=0)
    evaluation = Evaluation(Seeing(), keep_best="figure", stop=stop)
    options = {"run": tmp_path, "evaluation": evaluation, "progress": False}
    net, again = network(), network()
    rows = train(net, data(), noisy, config, **options)
    assert len(rows) == 3
    assert torch.equal(net[0].weight, weights[1])
    assert not torch.equal(net[0].weight, weights[2])
    assert train(again, data(), noisy, config, resume=True, **options) == rows
    assert states_equal(again, net)


def lr_at(schedule: str, step: int, steps: int) -> float:
    """The learning rate as the schedules are documented, for a peak of 1."""
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return 0.1 ** int(3 * step / steps + 1e-9)
    warm = max(1, round(0.3 * steps) if schedule == "one-cycle" else steps // 20)
    if step < warm:
        return (step + 1) / warm
    if schedule == "one-cycle":
        return (steps - step) / (steps - warm + 1)
    if schedule == "cosine":
        return (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
    falls, whole = ((35, 70, 95), 110) if schedule == "milestones" else ((30, 60, 90), 100)
    return 0.1 ** sum(step * whole >= part * steps for part in falls)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 40, 110, 150])
@pytest.mark.parametrize(
    "schedule", ["cosine", "one-cycle", "step", "milestones", "sat-milestones", "constant"]
)
def test_schedules(schedule, steps):
    """The learning rate of each step, as the row of an epoch of one step says it."""
    config = TrainingConfig(
        epochs=steps, batch_size=1, lr=0.2, schedule=schedule, average=0, augment="none",
        optimizer="sgd",
    )  # fmt: skip
    rows = train(Weight(), data(1), lambda network, x, y, step: network.weight + 0, config,
                 progress=False)  # fmt: skip
    expected = [0.2 * lr_at(schedule, step, steps) for step in range(steps)]
    assert [row.lr for row in rows] == pytest.approx(expected, rel=1e-7)


class Learnt(nn.Module):
    """Weights, biases, a normalisation over three dimensions, and activations that are learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.LayerNorm((4, 6, 6))
        self.smooth, self.softplus = SmoothReLU(), ParametricSoftplus()
        self.batch, self.prelu, self.linear = nn.BatchNorm2d(4), nn.PReLU(4), nn.Linear(144, 10)

    def forward(self, x):
        x = self.prelu(self.softplus(self.smooth(self.batch(self.norm(self.conv(x))))))
        return self.linear(x.flatten(1))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_weight_decay_is_on_weights_alone(optimizer):
    """Fault 15: SmoothReLU's root fell from 20 to 14.8 by decay alone, with biases and norms."""
    config = TrainingConfig(epochs=4, batch_size=8, weight_decay=0.5, lr=0.05, optimizer=optimizer,
                            average=0)  # fmt: skip
    net = Learnt()
    before = {name: value.clone() for name, value in net.named_parameters()}
    train(net, data(), lambda network, x, y, step: 0 * network(x).sum(), config, progress=False)
    moved = {n for n, value in net.named_parameters() if not torch.equal(value, before[n])}
    assert moved == {"conv.weight", "linear.weight"}
    assert all(p.norm() < before[n].norm() for n, p in net.named_parameters() if n in moved)


class Affine(nn.Module):
    """A normalisation of its own, as in ResMLP and ConvNeXt: scales that look like weights."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, 3, 1, 1))
        self.layer_scale = nn.Parameter(torch.ones(3, 1, 1))


def test_scales_of_channels_are_not_decayed_whatever_their_shape():
    network = nn.Sequential(nn.Conv2d(1, 3, 3), Affine(), nn.Conv2d(3, 1, 1), nn.Linear(5, 1))
    decayed, others = (group["params"] for group in decayed_weights(network))
    assert [tuple(p.shape) for p in decayed] == [(3, 1, 3, 3), (1, 3, 1, 1), (1, 5)]
    assert len(others) == 5


def test_other_parameter_groups_on_request(tmp_path):
    def all_decayed_slow_head(network):
        body = [p for n, p in network.named_parameters() if not n.startswith("linear")]
        return [{"params": body}, {"params": network.linear.parameters(), "lr": 1e-9}]

    def zero(network, x, y, step):
        return 0 * network(x).sum()

    config = TrainingConfig(epochs=2, batch_size=8, weight_decay=0.5, average=0, optimizer="sgd",
                            parameter_groups=all_decayed_slow_head)  # fmt: skip
    net, kept = Learnt(), Learnt().linear
    net.linear.load_state_dict(kept.state_dict())
    train(net, data(), zero, config, run=tmp_path, progress=False)
    assert net.smooth.root < 20
    assert torch.allclose(net.linear.weight, kept.weight, rtol=1e-6)
    again = replace(config, parameter_groups=decayed_weights)
    with pytest.raises(InputError, match="parameter_groups"):
        train(Learnt(), data(), zero, again, run=tmp_path, resume=True, progress=False)


class Counting(TorchDispatchMode):
    """Counts how often a value of a tensor is read, which a GPU has to be waited for."""

    reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_averaging_reads_no_value_for_each_tensor():
    """Fault 38: it copied and waited once for each tensor and step."""

    def reads(layers: int) -> int:
        net = nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(layers)))
        config = TrainingConfig(epochs=1, batch_size=8, average=0.9, clip=0, optimizer="sgd")
        with Counting() as counting:
            train(net, data(), noisy, config, progress=False)
        return counting.reads

    assert reads(9) == reads(1)


def test_the_average_against_its_formula():
    """The decay is at most (1 + t) / (10 + t); the first update copies."""
    net, seen = Weight(), []

    def loss(network, x, y, step):
        seen.append(network.weight.detach().clone())
        return network.weight + 0

    config = TrainingConfig(epochs=2, batch_size=8, average=0.5, optimizer="sgd", lr=0.1)
    train(net, data(), loss, config, progress=False)
    plain = TrainingConfig(epochs=2, batch_size=8, average=0, optimizer="sgd", lr=0.1)
    last = Weight()
    train(last, data(), lambda network, x, y, step: network.weight + 0, plain, progress=False)
    average, weights = seen[1], [*seen[2:], last.weight.detach()]
    for t, weight in enumerate(weights, start=1):
        average = average + (weight - average) * max(0.5, 9 / (10 + t))
    assert torch.allclose(net.weight, average)


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


def test_the_seconds_of_a_row_are_those_of_its_steps(monkeypatch):
    """On a clock that goes on by 1 with each step and by 100 with the evaluation."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def loss(network, x, y, step):
        clock[0] += 1
        return (network(x) - x).square().mean()

    def measure(network, rows):
        clock[0] += 100
        return {}

    config = TrainingConfig(epochs=2, batch_size=8)
    rows = train(network(), data(), loss, config, evaluation=Evaluation(measure), progress=False)
    assert [row.seconds for row in rows] == [5, 5]


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.rand(1, 8, 8), 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"lr": -1}, "lr is -1"),
        ({"schedule": "linear"}, "schedule is 'linear'"),
        ({"augment": "cutout"}, "augment is 'cutout'"),
        ({"average": 1.0}, "average is 1.0"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"optimizer": "lamb"}, "optimizer is 'lamb'; give one of adam, sgd"),
        ({"optimizer": None}, "optimizer is None"),
        ({"momentum": 1}, "momentum is 1"),
        ({"clip": -1}, "clip is -1"),
        ({"seed": 2**64}, r"seed is 18446744073709551616; give a whole number below 2\^64"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(InputError, match=message):
        TrainingConfig(**changes)


def test_bad_data_and_folders(tmp_path):
    net, config = network(), TrainingConfig(epochs=1, batch_size=8)

    def run(what, loss=None, **options):
        return train(net, what, loss or noisy, config, progress=False, **options)

    with pytest.raises(InputError, match="no parameters"):
        train(nn.Flatten(), data(), noisy, config, progress=False)
    with pytest.raises(InputError, match="stream without length"):
        run(Endless())
    with pytest.raises(InputError, match="no images"):
        run([])
    with pytest.raises(InputError, match="divide by 255"):
        run(TensorDataset(255 * torch.rand(8, 1, 8, 8), torch.zeros(8).long()))
    with pytest.raises(InputError, match="pairs"):
        run(TensorDataset(torch.rand(8, 1, 8, 8)))
    with pytest.raises(InputError, match="nan at step 0"):
        run(data(), lambda network, x, y, step: net(x).mean() * float("nan"))
    for loss, message in (
        (
            lambda network, x, y, step: net(x).flatten(1).mean(1),
            r"a Tensor of shape \(8,\); return a scalar",
        ),
        (lambda network, x, y, step: 0.5, "a float; return a scalar tensor"),
        (lambda network, x, y, step: net(x).mean().detach(), "that depends on the network"),
    ):
        with pytest.raises(InputError, match=message):
            run(data(), loss)
    with pytest.raises(InputError, match="give run"):
        run(data(), resume=True)
    for chosen in (
        {"sampler": SubsetRandomSampler(range(32))},
        {"sampler": RandomSampler(data(), num_samples=32)},
        {"batch_sampler": [[0, 1], [2, 3]]},
        {"batch_size": None},
    ):
        with pytest.raises(InputError, match=r"Subset\(data, indices\)"):
            run(DataLoader(data(), **chosen))


def test_folders_that_cannot_be_used(tmp_path):
    config = TrainingConfig(epochs=1, batch_size=8)

    def run(what=None, changed=config, *, resume=False):
        options = {"run": tmp_path, "resume": resume, "progress": False}
        return train(network(), data() if what is None else what, noisy, changed, **options)

    run()
    with pytest.raises(InputError, match="already holds a run"):
        run()
    other = data().tensors[0].clone()
    other[39] += 0.01
    for what, changed, named in [
        (data(32), config, r"data\.images is 40, not 32"),
        (TensorDataset(other.clamp(0, 1), data().tensors[1]), config, r"data\.sample differs"),
        (TensorDataset(data().tensors[0], data().tensors[1] + 1), config, "sample differs"),
        (data(), replace(config, lr=0.5), r"lr is 0\.001, not 0\.5"),
    ]:
        with pytest.raises(InputError, match=named) as caught:
            run(what, changed, resume=True)
        assert "\n" not in str(caught.value)
    assert len(run(changed=replace(config, checkpoint_every=1), resume=True)) == 1
    (tmp_path / "checkpoint.pt").write_bytes(b"PK rubbish")
    with pytest.raises(InputError, match=r"checkpoint\.pt is not a checkpoint"):
        run(resume=True)
    (tmp_path / "checkpoint.pt").unlink()  # as in a clone: the log of a training is kept
    before = (tmp_path / "train.jsonl").read_bytes()
    for resume, words in ((False, "already holds a run"), (True, "without its checkpoint")):
        with pytest.raises(InputError, match=words):
            run(resume=resume)
    assert (tmp_path / "train.jsonl").read_bytes() == before
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(InputError, match="checkpoint without the log"):
        run(resume=True)


class Unrepeatable(Dataset):
    """Draws from a random state that is not torch's."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 8, 8), float(np.random.rand())), 0


def test_data_that_cannot_be_repeated_are_resumed(tmp_path):
    options = {"run": tmp_path, "progress": False}
    config = TrainingConfig(epochs=1, batch_size=8)
    train(network(), Unrepeatable(), noisy, config, **options)
    assert len(train(network(), Unrepeatable(), noisy, config, resume=True, **options)) == 1


def test_a_log_of_version_1_is_read(tmp_path):
    """As trainings under results/ wrote them."""
    log = tmp_path / "train.jsonl"
    log.write_text(
        '{"art_denoised": "training log", "version": 1, "settings": {"rate": 0.1}}\n'
        '{"epoch": 1, "loss": 0.5, "rate": 0.05, "seconds": 3.2, "accuracy": 0.9}\n'
    )
    contents = read_run(log, TRAINING)
    assert contents.settings["rate"] == 0.1
    assert contents.rows == {
        1: EpochRow(epoch=1, loss=0.5, lr=0.05, seconds=3.2, figures={"accuracy": 0.9})
    }


def test_two_trainings_do_not_share_a_folder(tmp_path):
    outer, config = network(), TrainingConfig(epochs=1, batch_size=8)

    def loss(trained, x, y, step):
        inner = network()
        with pytest.raises(InputError, match="being written by another process"):
            train(inner, data(), noisy, config, run=tmp_path, resume=True, progress=False)
        return noisy(trained, x, y, step)

    train(outer, data(), loss, config, run=tmp_path, progress=False)
    train(outer, data(), noisy, config, run=tmp_path / "other", progress=False)


def test_a_last_smaller_batch_sits_out():
    net, sizes = network(), []

    def loss(network, x, y, step):
        sizes.append(len(x))
        return noisy(network, x, y, step)

    train(net, data(20), loss, TrainingConfig(epochs=2, batch_size=8), progress=False)
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

    def loss(network, x, y, step):
        seen.extend(y.tolist())
        return noisy(network, x, y, step)

    loader = DataLoader(Drawing(), num_workers=workers)
    torch.seed()  # what the data draw must not depend on it
    train(net, loader, loss, TrainingConfig(epochs=2, batch_size=8, seed=seed), progress=False)
    return seen


@pytest.mark.parametrize("workers", [0, 1])
def test_data_draw_anew_each_epoch_and_seed(workers):
    first, again, other = (drawn(seed, workers) for seed in (0, 0, 1))
    assert first == again
    assert len({*first, *other}) == 64


def test_a_buffer_of_booleans_is_copied_into_the_average():
    net = network()
    net.register_buffer("mask", torch.tensor([False, False]))

    def loss(network, x, y, step):
        network.mask[step % 2] = True
        return noisy(network, x, y, step)

    train(net, data(), loss, TrainingConfig(epochs=1, batch_size=8, average=0.9), progress=False)
    assert net.mask.tolist() == [True, True]
    assert int(net[1].num_batches_tracked) == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_two_sizes_are_one_line(workers):
    net, odd = network(), [(torch.rand(1, 8 + i % 2, 8), 0) for i in range(16)]
    with pytest.raises(InputError, match="differ in size") as caught:
        train(net, DataLoader(odd, num_workers=workers), noisy, TrainingConfig(batch_size=8),
              progress=False)  # fmt: skip
    assert "\n" not in str(caught.value)


def test_other_devices_keep_their_random_states(monkeypatch):
    """`torch.manual_seed` would reseed every GPU; the training's alone is put back."""
    reseeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    net = network()
    reseeded.clear()
    train(net, data(), noisy, TrainingConfig(epochs=1, batch_size=8), progress=False)
    assert not reseeded
