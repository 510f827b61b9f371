"""Small networks in the ways people write them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Basic(nn.Module):
    """The residual block of most CIFAR code: functional ReLU."""

    def __init__(self, channels: int, out: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class CifarResNet(nn.Module):
    """Its six blocks lie in one Sequential, three stages told by channels only."""

    def __init__(self, widths: tuple[int, ...] = (8, 12, 16), side: int = 32):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, 1, 1)
        pairs = zip((widths[0], *widths), widths, strict=False)
        blocks = [(Basic(a, b, 1 if a == b else 2), Basic(b, b)) for a, b in pairs]
        self.blocks = nn.Sequential(*(block for pair in blocks for block in pair))
        self.fc = nn.Linear(widths[-1] * (side >> len(widths)) ** 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.blocks(F.relu(self.stem(x)))
        return self.fc(F.avg_pool2d(out, 2).reshape(out.size(0), -1))


class Awkward(nn.Module):
    """Calls ReLU in every way, with functional dropout and batch norm that ask for the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 1, 1)
        self.relu = nn.ReLU()
        self.in_place = nn.ReLU(inplace=True)
        self.acts = nn.ModuleList([nn.ReLU(), self.relu])
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))
        self.unused = nn.Parameter(torch.ones(1))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x) + 0.1)  # module, first call
        x = F.batch_norm(x, self.mean, self.var, training=self.training)
        y = self.relu(x)  # the same module
        z = x - 0.1
        a = self.in_place(z)  # in place: z is what it made of it, below
        b = x - 0.2
        F.relu(b, inplace=True)  # its result is b
        c = (x - 0.3).relu_() + torch.relu(x - 0.4) + (x - 0.5).relu()
        d = self.acts[0](x - 0.6) + self.acts[1](x - 0.7)
        x = F.dropout(y + z + a + b + c + d, 0.5, self.training)
        return self.fc(x.mean((2, 3)))


class WithAuxiliary(nn.Module):
    """Takes another path in training, in a module that calls ReLU or in one that does not."""

    def __init__(self, functional: bool):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
        self.aux = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        if self.training:
            out = out + self.aux(x)
        return F.relu(out) if self.functional else out


class Deciding(nn.Module):
    """Decides by the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Basic(3, 4)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return self.act(x) if x.mean() > 0 else x


class Optional(nn.Module):
    """Takes a shortcut, or makes its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, shortcut: Tensor | None = None, scale: float = 0.5) -> Tensor:
        return F.relu(self.conv(x) + scale * (x if shortcut is None else shortcut))


class Tree(nn.Module):
    """Gives a shortcut to some of its blocks and not to others."""

    def __init__(self, shared: bool):
        super().__init__()
        self.a, self.b = Optional(), Optional()
        self.c = self.b if shared else Optional()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x, None)
        return self.c(self.b(x, shortcut=y))
