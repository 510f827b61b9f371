"""Train and attack the networks of this comparison; finished ones are skipped, others continued.

    cd results/cifar10
    python robust/run.py --list           # the names, in order
    python robust/run.py                  # all
    python robust/run.py relu-0 softplus-0  # some

Every network is trained by `art-denoised train-robust` and attacked by `art-denoised attack`; the
commands are printed. Each runs on one thread, so that a seed gives the same weights.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from art_denoised.evaluation import read_attack_log

EPS, EPOCHS, IMAGES = "8/255", 4, 1000
# "1x1" is the null control: the block's convolution and its sum, without a denoising operation.
BLOCKS = {"1x1": "none", **{o: o for o in ("mean", "dot_product", "gaussian", "median")}}
SHARED = "--data npz:data/train.npz --validation npz:data/holdout.npz --lr 0.2 --quiet"
HERE = Path("robust")


@dataclass(frozen=True)
class Training:
    """One network: an activation, a block, a seed and a recipe."""

    activation: str = "relu"
    block: str | None = None
    seed: int = 0
    recipe: str = "sat"

    @property
    def name(self) -> str:
        """Return its name: [recipe-]activation-[block-]seed."""
        parts = [] if self.recipe == "sat" else [self.recipe]
        parts += [self.activation, *([self.block] if self.block else []), str(self.seed)]
        return "-".join(parts)

    @property
    def folder(self) -> Path:
        """Return the folder of its weights and logs."""
        return HERE / self.name

    def train(self) -> str:
        """Return the command that trains it."""
        options = f"--recipe {self.recipe} --epochs {EPOCHS} --seed {self.seed}"
        if self.recipe != "clean":
            options += f" --eps {EPS}"
        if self.recipe == "feature-denoising":
            options += " --steps 5"  # of 30; at the paper's a training takes 6 times as long
        if self.activation != "relu":
            options += f" --activation {self.activation}"
        if self.block:
            options += f" --feature-denoising {BLOCKS[self.block]}"
        return f"train-robust --model networks:small {SHARED} {options} --out {self.folder}"

    def attack(self) -> str:
        """Return the command that attacks it."""
        return (
            f"attack --model networks:small --weights {self.folder}/model.safetensors "
            f"--data npz:data/attacked.npz --eps {EPS} --batch-size 250 --no-checks --quiet "
            f"--attacks pgd:steps=50,apgd-ce,apgd-t --out {self.folder}"
        )

    @property
    def attacked(self) -> bool:
        """Whether the log of the attacks holds every image under each of them."""
        if not (self.folder / "attack.jsonl").exists():
            return False
        columns = read_attack_log(self.folder).columns
        return len(columns) == 4 and {len(rows) for rows in columns.values()} == {IMAGES}


def trainings() -> list[Training]:
    """Return all networks, the most wanted first."""
    plain = [Training("relu"), Training("softplus"), Training("silu")]
    order = plain + [Training(block=block) for block in BLOCKS]
    clean = Training(recipe="clean")
    order += [replace(t, seed=1) for t in plain] + [clean, replace(clean, block="mean")]
    order += [replace(t, seed=2) for t in plain]
    order += [Training(block=block, seed=1) for block in ("1x1", "mean", "dot_product")]
    order += [Training(recipe="feature-denoising")]
    order += [Training(block="mean", recipe="feature-denoising")]
    order += [Training(block=block, seed=1) for block in ("gaussian", "median")]
    return order + [Training(block=block, seed=2) for block in BLOCKS]


def _run(command: str) -> None:
    print(f"art-denoised {command}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = Path(sys.executable).with_name("art-denoised")
    subprocess.run([program, *shlex.split(command)], check=True, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    known = {training.name: training for training in trainings()}
    if unknown := [name for name in arguments.names if name not in known]:
        parser.error(f"there is no network {unknown[0]!r}; --list names them")
    for training in [known[name] for name in arguments.names] or known.values():
        if arguments.list:
            print(training.name)
            continue
        if not (training.attacked or (training.folder / "model.safetensors").exists()):
            started = (training.folder / "checkpoint.pt").exists()
            _run(training.train() + " --resume" * started)
        if not training.attacked:
            started = (training.folder / "attack.jsonl").exists()
            _run(training.attack() + " --resume" * started)


if __name__ == "__main__":
    main()
