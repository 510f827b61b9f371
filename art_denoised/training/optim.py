"""Optimizer, learning-rate schedule and moving average of a training, all of them PyTorch's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel

from art_denoised.training.config import TrainingConfig

Tensors = list[Tensor] | tuple[Tensor, ...]
# When the learning rate falls to a tenth, in parts of the steps.
_MILESTONES = {
    "step": (1, 2, 3),
    "milestones": (35, 70, 95, 110),
    "sat-milestones": (30, 60, 90, 100),
}


def make_optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a training.

    Example:
        >>> type(make_optimizer(nn.Linear(2, 2), TrainingConfig())).__name__
        'Adam'
    """
    groups = config.parameter_groups(network)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        groups,
        config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, config: TrainingConfig, steps: int
) -> lr_scheduler.LRScheduler:
    """Return the schedule of the learning rate, stepped after each step of the optimizer.

    Args:
        optimizer: Optimizer of the training.
        config: Its ``schedule`` counts.
        steps: Number of steps of the whole training.

    Example:
        >>> config = TrainingConfig(lr=1.0, schedule="one-cycle")
        >>> optimizer = make_optimizer(nn.Linear(2, 2), config)
        >>> schedule, lrs = make_schedule(optimizer, config, 10), []
        >>> for _ in range(10):
        ...     lrs += schedule.get_last_lr()[:1]
        ...     optimizer.step()
        ...     schedule.step()
        >>> [round(lr, 3) for lr in lrs]
        [0.333, 0.667, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    """
    kind = config.schedule
    if kind == "constant":
        return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=1)
    warm = max(1, round(0.3 * steps) if kind == "one-cycle" else steps // 20)
    if kind in _MILESTONES:
        *parts, whole = _MILESTONES[kind]
        falls = lr_scheduler.MultiStepLR(optimizer, [-(-steps * p // whole) for p in parts])
        if kind == "step":
            return falls
        return lr_scheduler.ChainedScheduler([_warm_up(optimizer, warm), falls])
    left, down = max(1, steps - warm), lr_scheduler.CosineAnnealingLR
    later = (
        down(optimizer, T_max=left)
        if kind == "cosine"
        # One step more would reach 0.
        else _line(optimizer, left / (left + 1), 1 / (left + 1), left)
    )
    return lr_scheduler.SequentialLR(optimizer, [_warm_up(optimizer, warm), later], [warm])


def _warm_up(optimizer: torch.optim.Optimizer, steps: int) -> lr_scheduler.LinearLR:
    return _line(optimizer, 1 / steps, 1.0, steps)


def _line(
    optimizer: torch.optim.Optimizer, first: float, last: float, steps: int
) -> lr_scheduler.LinearLR:
    return lr_scheduler.LinearLR(optimizer, first, last, total_iters=max(1, steps - 1))


def moving_average(network: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of a network's weights and buffers.

    After t updates the decay is at most (1 + t) / (10 + t), so that early weights are soon
    forgotten. Counters and masks, which have no mean, are copied.

    Args:
        network: Network to average; it is copied.
        decay: Share of the old average that is kept at each update.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> average = moving_average(net, 0.9)
        >>> average.update_parameters(net)
        >>> bool(average.module.bias == net.bias)
        True
    """

    # All tensors of one type at once: a GPU would wait each time that the count is read.
    def average(old: Tensors, new: Tensors, updates: Tensor | int) -> None:
        if not (old[0].is_floating_point() or old[0].is_complex()):
            torch._foreach_copy_(old, new)
            return
        change = torch._foreach_sub(new, old)
        torch._foreach_mul_(change, max(1 - decay, 9 / (10 + int(updates))))
        torch._foreach_add_(old, change)

    return AveragedModel(network, multi_avg_fn=average, use_buffers=True)
