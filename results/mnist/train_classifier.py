"""Train the MNIST classifiers that RDC is compared with; resumable.

    python results/mnist/train_classifier.py plain [--epochs 5]
    python results/mnist/train_classifier.py adversarial [--epochs 6]

"adversarial" is the training of Madry et al. (ICLR 2018): every step uses PGD images, l_inf 0.2, 7
steps of 0.05 from a random start. eps rises over the first quarter. One thread.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from networks import HERE, cnn, held_out
from safetensors.torch import save_file
from torch.nn import functional as F

from art_denoised import TrainingConfig, load_data
from art_denoised.training import Evaluation, train

EPS, STEP, STEPS = 0.2, 0.05, 7


class InMemory(torch.utils.data.Dataset):
    """A data set whose images are decoded once."""

    def __init__(self, data) -> None:
        self.pairs = [data[i] for i in range(len(data))]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int):
        return self.pairs[index]


def pgd(network, x: torch.Tensor, y: torch.Tensor, eps: float, steps: int) -> torch.Tensor:
    start = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    x_adv = start
    for _ in range(steps):
        leaf = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(leaf), y), leaf)
        x_adv = leaf.detach() + STEP * eps / EPS * gradient.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv.detach()


@dataclass(frozen=True)
class Loss:
    """Cross-entropy on PGD images, whose eps rises for ``warm`` steps; 0: on clean images."""

    warm: int

    def __call__(self, network, x: torch.Tensor, y: torch.Tensor, step: int) -> torch.Tensor:
        if self.warm:
            x = pgd(network, x, y, EPS * min(1.0, (step + 1) / self.warm), STEPS)
        return F.cross_entropy(network(x), y)


@dataclass(frozen=True)
class Robustness:
    """Measure accuracy on images, clean and under PGD."""

    x: torch.Tensor
    y: torch.Tensor

    def __call__(self, averaged, rows) -> dict[str, float]:
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(0)
            x_adv = pgd(averaged, self.x, self.y, EPS, 20)
        clean, robust = (
            float((averaged(x).argmax(1) == self.y).double().mean()) for x in (self.x, x_adv)
        )
        return {"validation": clean, "validation_linf_0.2_pgd20": robust}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("plain", "adversarial"))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--out", type=Path, help="folder of checkpoints; default: runs/KIND")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    adversarial = arguments.kind == "adversarial"
    epochs = arguments.epochs or (6 if adversarial else 5)
    config = TrainingConfig(epochs=epochs, batch_size=128, lr=2e-3, augment="none", average=0.99)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = cnn()
    data = InMemory(load_data(f"imagefolder:{HERE / 'data' / 'train'}", train=True))
    loss = Loss(epochs * (len(data) // config.batch_size) // 4 if adversarial else 0)
    rows = train(
        network,
        data,
        loss,
        config,
        evaluation=Evaluation(Robustness(*held_out(10, first=5))),
        run=arguments.out or HERE.parents[1] / "runs" / f"mnist-{arguments.kind}",
        resume=True,
        progress=False,
    )
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(state, HERE / f"{arguments.kind}.safetensors")
    print(rows[-1])


if __name__ == "__main__":
    main()
