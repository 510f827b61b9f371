"""Models with a planted defect, each around the digits classifier, that fool careless attacks."""

from __future__ import annotations

import torch
from torch import nn

from art_denoised.demo import digits_classifier


class Defect(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = digits_classifier()


class Quantising(Defect):
    """Rounds its input, so that every gradient is zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net((x * 8).round() / 8)


class Shattered(Defect):
    """Adds a ripple too small to matter and too steep to follow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x + 0.03 * torch.sin(3000 * x))


class Constant(Defect):
    """Answers the same for every image: the class 2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0 * self.net(x) + nn.functional.one_hot(torch.tensor(2), 10).float()


class Scaled(Defect):
    """Logits so large that the gradient of cross-entropy underflows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1000 * self.net(x)


class Coin(Defect):
    """Ignores its input: the class 2, but in 15% of all answers a random one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        random = torch.randint(0, 10, (len(x),))
        answer = torch.where(torch.rand(len(x)) < 0.15, random, 2)
        return 5 * nn.functional.one_hot(answer, 10).float() + 0 * x.sum()


class Resetting(Defect):
    """Noise that is the same in every call, since the forward pass sets the global seed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return self.net(x + 0.1 * torch.randn(x.shape))


class Detached(Defect):
    """Autograd does not reach the image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.net(x)


class Failing(Defect):
    """Works for a number of calls, and then raises or answers nonsense."""

    def __init__(self, calls: int, then: str) -> None:
        super().__init__()
        self._left, self.then = calls, then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._left -= 1
        logits = self.net(x)
        if self._left >= 0:
            return logits
        if self.then == "raises":
            raise RuntimeError("out of\nmemory")
        return {"nan": logits * torch.nan, "shape": logits[:, :, None], "classes": logits[:, :9]}[
            self.then
        ]


class Log(nn.Module):
    """Minus infinity for what is 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs().log()
