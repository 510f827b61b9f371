"""What the trainings share: options, data, epochs that fit, and files small enough to travel."""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from art_denoised import TrainingConfig
from art_denoised.training import EpochRow

DATA = Path(__file__).parent.parent / "data" / "jpeg.npz"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHARD = 15_000_000  # bytes of a file of weights; larger ones do not come back
SAMPLE = 40  # steps that are timed to choose the number of epochs
IMAGES = 50_000
THROUGHPUT = 60  # TFLOP/s that are assumed, in bfloat16: a twelfth of what an H100 multiplies at

Data = dict[str, TensorDataset]


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        tiny: Whether to try the script in seconds, with random images and small networks.
        minutes: Minutes that the training may take.
        epochs: Number of epochs at most.
        out: Folder for log and weights.
        data: Packed images.
    """

    tiny: bool
    minutes: float
    epochs: int
    out: Path
    data: Path


def parser(doc: str, epochs: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all trainings take."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, help="folder for log and weights")
    parser.add_argument("--minutes", type=float, default=8.0, help="for training (%(default)g)")
    parser.add_argument("--epochs", type=int, default=epochs, help="at most (%(default)s)")
    parser.add_argument("--count", action="store_true", help="print FLOP, train nothing")
    parser.add_argument("--tiny", action="store_true", help="smallest size, to try the script")
    return parser


def chosen(given: argparse.Namespace, name: str) -> Options:
    """Return the options that were given; ``name`` is that of the folder by default."""
    out = Path(__file__).parent / name if given.out is None else given.out
    return Options(given.tiny, given.minutes, 1 if given.tiny else given.epochs, out, given.data)


def print_cost(network: nn.Module, flop: dict[str, float], epochs: dict[str, float]) -> None:
    """Print parameters, the FLOP of one image, and what all epochs take."""
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters")
    for what, value in flop.items():
        print(f"{what:26}{value / 1e9:8.2f} GFLOP an image")
    total = IMAGES * sum(number * flop[what] for what, number in epochs.items())
    words = " and ".join(f"{number:g} epochs of {what}" for what, number in epochs.items())
    minutes = total / (60e12 * THROUGHPUT)
    print(f"{words}: {total / 1e15:.1f} PFLOP, {minutes:.1f} minutes at {THROUGHPUT} TFLOP/s")


def load(given: Options) -> Data:
    """Return the parts "train", "test" (9,000 images) and "holdout" (1,000), in [0, 1]."""
    if given.tiny:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(32, 3, 32, 32, generator=generator)
        part = TensorDataset(x, torch.arange(32) % 10)
        return {"train": part, "test": part, "holdout": part}
    held = np.load(given.data)
    parts = {split: decoded(held, split) for split in ("train", "test")}
    x, y = parts["test"].tensors
    return {
        "train": parts["train"],
        "test": TensorDataset(x[:9000], y[:9000]),
        "holdout": TensorDataset(x[9000:], y[9000:]),
    }


def decoded(held: Any, split: str) -> TensorDataset:
    """Return the images of one split, which are held as the bytes of their JPEG files."""
    files = np.split(held[f"{split}_jpeg"], held[f"{split}_ends"][:-1])

    def pixels(file: np.ndarray) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(file.tobytes())))

    with ThreadPoolExecutor() as pool:
        images = torch.from_numpy(np.stack(list(pool.map(pixels, files))))
    x = images.permute(0, 3, 1, 2).contiguous().float() / 255
    return TensorDataset(x, torch.from_numpy(held[f"{split}_labels"].astype(np.int64)))


def fitting(
    given: Options,
    data: Data,
    config: TrainingConfig,
    parts: Mapping[Callable[[Any, TrainingConfig], object], float],
) -> TrainingConfig:
    """Return a config with as many epochs as fit: each part is timed, after a run to warm up.

    Args:
        given: Options.
        data: All images.
        config: Config of one epoch.
        parts: Functions of data and config that train a copy, and the share of the epochs of each.
    """
    steps = 1 if given.tiny else SAMPLE
    few = Subset(data["train"], range(min(len(data["train"]), steps * config.batch_size)))
    taken = sum(share * seconds(partial(part, few, config)) for part, share in parts.items())
    epoch = taken * len(data["train"]) / len(few)
    fit = max(1, min(given.epochs, int(60 * given.minutes / epoch)))
    print(f"{epoch:.1f} s an epoch; {fit} epochs, of {given.epochs} at most", flush=True)
    return replace(config, epochs=fit)


def seconds(task: Callable[[], object]) -> float:
    """Return what the second of two runs takes."""
    begin = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        task()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - begin


def flop(task: Callable[[], object]) -> float:
    """Return the operations of a task; a multiplication and addition counts twice."""
    with FlopCounterMode(display=False) as counter:
        task()
    return float(counter.get_total_flops())


@torch.no_grad()
def accuracy(network: Callable[[Tensor], Tensor], data: TensorDataset) -> float:
    """Return the accuracy of a network in eval mode."""
    hits = torch.zeros((), dtype=torch.long, device=DEVICE)
    for x, y in zip(*(t.split(500) for t in data.tensors), strict=True):
        hits += (network(x.to(DEVICE)).argmax(1) == y.to(DEVICE)).sum()
    return float(hits) / len(data)


def write(given: Options, network: nn.Module, rows: Sequence[EpochRow], **figures: Any) -> None:
    """Write `rounded` weights in files of at most 15 MB, and figures; remove the checkpoints."""
    trained = dict(network.cpu().named_parameters())
    state = {
        name: value.half() if name in trained and value.ndim > 1 else value
        for name, value in network.state_dict().items()
    }
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in state.items():
        size += value.nbytes
        if size > SHARD and parts[-1]:
            parts.append({})
            size = value.nbytes
        parts[-1][name] = value.contiguous()
    given.out.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts, start=1):
        save_file(part, given.out / f"weights-{number}-of-{len(parts)}.safetensors")
    found = {
        "data": "CIFAR-10 (JPEG copy)",
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "parameters": sum(p.numel() for p in network.parameters()),
        "epochs": len(rows),
        "seconds": round(sum(row.seconds for row in rows), 1),
        **figures,
    }
    for checkpoint in given.out.rglob("checkpoint.pt"):  # larger than what comes back
        checkpoint.unlink()
    (given.out / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found), flush=True)


def read(network: nn.Module, folder: Path) -> nn.Module:
    """Put the weights of a folder into a network, and return it in eval mode."""
    state: dict[str, Tensor] = {}
    files = sorted(folder.glob("weights-*.safetensors"))
    for number, file in enumerate(files, start=1):
        if file.name != f"weights-{number}-of-{len(files)}.safetensors":
            raise SystemExit(f"{folder} lacks a file of its weights; copy all of them")
        state |= load_file(file)
    network.load_state_dict(state)  # which converts them
    return network.eval()


@torch.no_grad()
def rounded(network: nn.Module) -> nn.Module:
    """Round weights to float16, so that figures are about the network that is read."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.copy_(parameter.half())
    return network
