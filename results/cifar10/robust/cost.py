"""Time a training step with each block and activation, beside the plain network.

    cd results/cifar10; python robust/cost.py > robust/cost.txt

A step is one of the recipe `sat` on 128 images, on one thread. Networks take turns; the figure is
the median over rounds.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from networks import small
from run import BLOCKS

from art_denoised.networks import change_network
from art_denoised.training import RECIPES

ROUNDS = 15


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    changes = {"relu": {}, "softplus": {"activation": "softplus"}, "silu": {"activation": "silu"}}
    changes |= {f"relu-{name}": {"feature_denoising": BLOCKS[name]} for name in BLOCKS}
    x = torch.rand(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (128,))
    networks = {
        name: change_network(small(), {**change, "input_shape": (3, 32, 32)})
        .to(memory_format=torch.channels_last)
        .train()
        for name, change in changes.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(ROUNDS):
        for name, network in networks.items():
            start = time.perf_counter()
            RECIPES["sat"].loss(network, x, y).backward()
            seconds[name].append(time.perf_counter() - start)
    plain = median(seconds["relu"])
    print(f"{'':24}{'parameters':>12}{'MFLOP':>8}{'ms a step':>11}{'x plain':>9}")
    for name, network in networks.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.eval()(x[:1])
        size, time_ = sum(p.numel() for p in network.parameters()), median(seconds[name])
        flop = counter.get_total_flops() / 1e6
        print(f"{name:24}{size:12,}{flop:8.1f}{1e3 * time_:11.0f}{time_ / plain:9.2f}")


if __name__ == "__main__":
    main()
