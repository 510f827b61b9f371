"""Training denoisers: by what they restore, and by what the classifier makes of it.

Source: Salman et al., "Denoised Smoothing: A Provable Defense for Pretrained Classifiers" (NeurIPS
2020, arXiv 2003.01908), section 3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from art_denoised import checks
from art_denoised.attacks.ascent import in_eval
from art_denoised.checks import InputError
from art_denoised.storage import (
    structure_fingerprint,
    tensors_fingerprint,
    weights_fingerprint,
)
from art_denoised.training.holdout import stack_holdout
from art_denoised.training.loop import Rows, first_image, train
from art_denoised.training.plan import Plan
from art_denoised.types import Classifier, Images, Labels

Objective = Callable[[Images, Images, Labels, "Classifier | None"], Tensor]

# Of a fine-tuning in units of the first training's: 20 of 90 epochs, rate 1e-5 after 1e-3.
FINE_EPOCHS, FINE_RATE = 2 / 9, 0.01


def mse(x_hat: Images, x: Images, y: Labels, classifier: Classifier | None) -> Tensor:
    """Mean squared error to the clean image (Salman et al., equation 4); needs no classifier.

    Example:
        >>> float(mse(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.zeros(1), None))
        1.0
    """
    return F.mse_loss(x_hat.float(), x)


def stability(x_hat: Images, x: Images, y: Labels, classifier: Classifier | None) -> Tensor:
    """Cross-entropy to the label that the classifier gives the clean image (equation 5).

    Example:
        >>> x = torch.tensor([[0.0, 1.0]]).reshape(1, 2, 1, 1)
        >>> worse = stability(1 - x, x, torch.tensor([0]), nn.Flatten())
        >>> bool(worse > stability(x, x, torch.tensor([0]), nn.Flatten()))
        True
    """
    classifier = _needed(classifier)
    with torch.no_grad():
        target = classifier(x).argmax(1)
    return F.cross_entropy(classifier(x_hat).float(), target)


def classification(x_hat: Images, x: Images, y: Labels, classifier: Classifier | None) -> Tensor:
    """Cross-entropy to the true label.

    Example:
        >>> x = torch.tensor([[0.0, 1.0]]).reshape(1, 2, 1, 1)
        >>> round(float(classification(x, x, torch.tensor([1]), nn.Flatten())), 4)
        0.3133
    """
    return F.cross_entropy(_needed(classifier)(x_hat).float(), y)


OBJECTIVES: dict[str, Objective] = {
    "mse": mse,
    "stability": stability,
    "classification": classification,
}


def train_denoiser(
    denoiser: nn.Module,
    data: Any,
    *,
    objective: str | Objective = "stability",
    classifiers: Sequence[nn.Module] = (),
    target: nn.Module | None = None,
    sigma: float | tuple[float, float],
    plan: Plan | None = None,
    fine_epochs: int | None = None,
    holdout: Any = None,
    out: Path | str | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    tensorboard: bool = False,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train a denoiser in place, the classifiers frozen.

    With the defended classifier in ``classifiers`` this is the white-box case. In the black-box
    case they are surrogates, taken in turn, one a batch, and ``target`` is the classifier to be
    defended, which must not be among them and is only ever evaluated.

    Args:
        denoiser: Called as ``denoiser(x_noisy, sigma)``, on its device.
        data: As for `train`: images in [0, 1] and labels.
        objective: "mse", "stability", "classification"; "hybrid", which is mse and then
            stability at a hundredth of the rate; or a function like `stability`.
        classifiers: In eval mode, images in [0, 1] to logits; of the objectives by name, mse alone
            needs none.
        target: See above. Without one the figures on ``holdout`` are those of ``classifiers[0]``;
            if that is a surrogate, it was trained on.
        sigma: Noise level in image units, or the lowest and the highest: then it is drawn
            uniformly for each image.
        plan: How to train; of "hybrid", its first part.
        fine_epochs: Epochs of the second part of "hybrid"; by default two for nine of the first.
        holdout: Pairs of image and label on which the target's accuracy under noise is
            measured, after each epoch.
        out: Folder for checkpoint and log; those of the parts of "hybrid" in folders below it.
        resume: Go on from the checkpoint in ``out``.
        identity: As for `train`.
        tensorboard: As for `train`.
        progress: As for `train`.

    Returns:
        A row an epoch: epoch, loss, rate, seconds; with ``holdout`` also ``mse``, and ``accuracy``
        where there is a classifier, both at the highest sigma.

    Raises:
        InputError: A value out of range, no classifier where one is needed, one in training mode,
            the target among the surrogates, networks that cannot take the images, or as for
            `train`.

    Example:
        >>> from art_denoised import DnCNN
        >>> from art_denoised.demo import digits_classifier
        >>> x = torch.rand(64, 1, 8, 8)
        >>> data = torch.utils.data.TensorDataset(x, torch.zeros(64).long())
        >>> rows = train_denoiser(
        ...     DnCNN(1, depth=3, width=4), data, objective="hybrid", sigma=0.25,
        ...     classifiers=[digits_classifier()], plan=Plan(epochs=2, batch_size=32),
        ...     fine_epochs=1, progress=False,
        ... )
        >>> [row["epoch"] for row in rows]
        [1, 2, 1]
    """
    plan = Plan() if plan is None else plan
    low, high = _range(sigma)
    parts = _parts(objective, plan, fine_epochs)
    for name, goal, _ in parts:
        if goal in (stability, classification) and not classifiers:
            raise InputError(f"objective {name} needs a classifier; give one, or surrogates")
    if out is not None:  # of hybrid's parts the folders are below it
        other = Path(out, "." if len(parts) > 1 else "stability", "checkpoint.pt")
        if other.exists():
            raise InputError(f"{out} holds another training ({other}); choose another folder")
    _check_classifiers(classifiers, target)
    judge = target if target is not None else next(iter(classifiers), None)
    asked = [*classifiers, *([] if target is None else [target])]
    counts = _class_counts(denoiser, asked, first_image(data), high)[: len(classifiers)]
    held_out = None if holdout is None else TensorDataset(*stack_holdout(holdout))
    if held_out is not None:
        _class_counts(denoiser, asked, held_out.tensors[0][:1], high)
    rows: list[dict[str, float]] = []
    for name, goal, part in parts:

        def loss(x: Images, y: Labels, step: int, goal: Objective = goal) -> Tensor:
            x_noisy, level = add_noise(x, low, high)
            classifier = classifiers[step % len(classifiers)] if classifiers else None
            return goal(denoiser(x_noisy, level), x, y, classifier)

        def evaluate(network: nn.Module, rows: Rows) -> dict[str, float]:
            return judge_denoiser(network, judge, held_out, high)

        folder = out if out is None or len(parts) == 1 else Path(out, name)
        with _frozen(asked):
            rows += train(
                denoiser,
                data,
                loss,
                part,
                out=folder,
                resume=resume,
                evaluate=None if held_out is None else evaluate,
                classes=min(counts) if goal is classification else None,
                identity={
                    **(identity or {}),
                    "objective": name,
                    "sigma": [low, high],
                    "classifiers": [_identity(c) for c in classifiers],
                    "judge": None if judge is None else _identity(judge),
                    "holdout": None if held_out is None else tensors_fingerprint(*held_out.tensors),
                },
                tensorboard=tensorboard,
                progress=progress,
            )
    return rows


def add_noise(x: Images, low: float, high: float) -> tuple[Images, Tensor]:
    """Return noisy images and their noise levels, uniform in [low, high].

    Draws from torch's global random state.

    Example:
        >>> x_noisy, sigma = add_noise(torch.zeros(5, 3, 8, 8), 0.25, 0.25)
        >>> x_noisy.shape, sigma.tolist()
        (torch.Size([5, 3, 8, 8]), [0.25, 0.25, 0.25, 0.25, 0.25])
    """
    sigma = torch.empty(len(x), device=x.device).uniform_(low, high)
    return x + sigma.reshape(-1, 1, 1, 1) * torch.randn_like(x), sigma


def judge_denoiser(
    denoiser: nn.Module, classifier: nn.Module | None, data: Any, sigma: float
) -> dict[str, float]:
    """Return the mean squared error of a denoiser and what a classifier makes of its output.

    One noisy copy of each image, from a noise stream of its own: the same in every call.

    Args:
        denoiser: In eval mode.
        classifier: In eval mode, or None.
        data: Pairs of image and label.
        sigma: Noise level.

    Example:
        >>> from art_denoised.demo import digits_classifier, digits_denoiser
        >>> from art_denoised.data import load_data
        >>> data = [load_data("digits")[i] for i in range(50)]
        >>> judged = judge_denoiser(digits_denoiser(), digits_classifier(), data, 0.25)
        >>> judged["accuracy"] > 0.8
        True
    """
    device = next(denoiser.parameters()).device
    generator = torch.Generator().manual_seed(0)
    error, hits, size = 0.0, 0, 0
    loader = torch.utils.data.DataLoader(data, batch_size=128, generator=torch.Generator())
    with torch.no_grad():
        for x, y in loader:
            x = x.float()
            x_noisy = x + sigma * torch.randn(x.shape, generator=generator)
            x_hat = denoiser(x_noisy.to(device), sigma).float()
            error += float((x_hat.cpu() - x).square().mean((1, 2, 3)).sum())
            size += len(x)
            if classifier is not None:
                hits += int((classifier(x_hat).argmax(1).cpu() == torch.as_tensor(y)).sum())
    judged = {"mse": round(error / size, 6)}
    return judged if classifier is None else {**judged, "accuracy": hits / size}


def _parts(
    objective: str | Objective, plan: Plan, fine_epochs: int | None
) -> list[tuple[str, Objective, Plan]]:
    if fine_epochs is not None and objective != "hybrid":
        raise InputError("fine_epochs is of the second part of hybrid; leave it out")
    if callable(objective):
        return [(getattr(objective, "__name__", "objective"), objective, plan)]
    if objective in OBJECTIVES:
        return [(objective, OBJECTIVES[objective], plan)]
    if objective != "hybrid":
        known = ", ".join([*OBJECTIVES, "hybrid"])
        raise InputError(f"objective is {objective!r}; give one of {known}")
    if fine_epochs is None:
        fine_epochs = max(1, round(FINE_EPOCHS * plan.epochs))
    fine_epochs = checks.count("fine_epochs", fine_epochs)
    fine = replace(plan, epochs=fine_epochs, rate=FINE_RATE * plan.rate, schedule="constant")
    return [("mse", mse, plan), ("stability", stability, fine)]


def _range(sigma: float | tuple[float, float]) -> tuple[float, float]:
    if isinstance(sigma, tuple) and len(sigma) != 2:
        raise InputError(f"sigma is {sigma}; give one noise level, or the lowest and the highest")
    low, high = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    low, high = checks.sigma(low), checks.sigma(high)
    if low > high:
        raise InputError(f"sigma goes from {low:g} to {high:g}; give the lower one first")
    return low, high


def _identity(classifier: nn.Module) -> list[str]:
    return [weights_fingerprint(classifier), structure_fingerprint(classifier)]


def _check_classifiers(classifiers: Sequence[nn.Module], target: nn.Module | None) -> None:
    for classifier in (*classifiers, *([] if target is None else [target])):
        checks.eval_mode(classifier)
    if target is not None and any(_holds(c, target) or _holds(target, c) for c in classifiers):
        raise InputError(
            "the classifier to defend is among the surrogates; black box means that it is not"
        )


def _holds(a: nn.Module, b: nn.Module) -> bool:
    """Whether classifier ``a`` is ``b`` or wraps it, whatever its weights are called there."""
    if any(module is b for module in a.modules()):
        return True
    held, wanted = (Counter(tensors_fingerprint(p) for p in c.parameters()) for c in (a, b))
    return bool(wanted) and wanted <= held


def _class_counts(
    denoiser: nn.Module, classifiers: Sequence[nn.Module], x: Images, sigma: float
) -> list[int]:
    """Denoise and classify one image, to find a misfit before the work starts."""
    x = x.to(next(denoiser.parameters(), torch.zeros(0)).device)
    with in_eval(denoiser):
        checks.denoises(denoiser, x, sigma)
    return [checks.class_count(classifier, x) for classifier in classifiers]


@contextmanager
def _frozen(classifiers: Sequence[nn.Module]) -> Iterator[None]:
    """Put classifiers into eval mode, their weights without gradients, and back."""
    parameters = [p for c in classifiers for p in c.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        with ExitStack() as modes:
            for classifier in classifiers:
                modes.enter_context(in_eval(classifier))
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _needed(classifier: Classifier | None) -> Classifier:
    if classifier is None:
        raise InputError("this objective needs a classifier")
    return classifier
