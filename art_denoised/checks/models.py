"""One door for models: what every classifier and denoiser is tried for before work starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from art_denoised.checks.values import InputError

if TYPE_CHECKING:
    from art_denoised.types import Images, Logits

_TF32_EPS = 2.0**-10  # of float32 convolutions on GPUs, by PyTorch's default


@torch.no_grad()
def classifier(model: Callable[..., Any], x: Images, *, random: bool = False) -> int:
    """Try a classifier on one image, and return its number of classes.

    The classifier must be in eval mode and return a row of logits without NaN for each image. The
    row of an image must not depend on the other images of its batch, and must be the same when
    the image is classified again. The classifier gets copies, so it may write into its input.

    Args:
        model: Module or function from images to logits.
        x: Images (batch, channels, height, width) in the model's dtype and on its device, at least
            one; the first is used.
        random: Whether the model may be random on purpose. Its answers are not compared then.

    Raises:
        InputError: The classifier is in training mode, cannot take the image, or returns something
            else.

    Example:
        >>> import torch
        >>> classifier(torch.nn.Flatten().eval(), torch.zeros(1, 1, 8, 8))
        64
    """
    eval_mode(model)
    image = x[:1]
    # A second image that is surely another one: pictures may be constant.
    other = torch.rand(image.shape, generator=torch.Generator().manual_seed(0)).to(image)
    alone = logits(_tried("model", model, image), 1)
    pair = logits(_tried("model", model, torch.cat([image, other])), 2)
    if alone.shape[1] != pair.shape[1]:
        raise InputError(
            f"the model returned {alone.shape[1]} logits for one image and {pair.shape[1]} for "
            "each of two; it must return one logit for each class"
        )
    if random:
        return alone.shape[1]
    for answer, problem in (
        (
            logits(_tried("model", model, image), 1),
            "the model gave two answers to one image (logits differ by {}); fix its noise, for "
            "example by its seed",
        ),
        (
            pair[:1],
            "the model's answer to an image depends on the other images of its batch (logits "
            "differ by {}); use a model that classifies each image by itself",
        ),
    ):
        gap = (answer - alone).abs().masked_fill(answer == alone, 0).max()  # of -inf, too
        if gap > near(answer, image) * max(_size(answer), _size(alone)):
            raise InputError(problem.format(f"{float(gap):.3g}"))
    return alone.shape[1]


def near(logits: Logits, x: Images) -> float:
    """Return how near two logits may be, as a share of the largest, for rounding to part them.

    It is the square root of the machine epsilon: 0.03% in float32, far above what the choice of
    kernels changes. Epsilon is that of the arithmetic, not of the logits alone.

    Example:
        >>> import torch
        >>> near(torch.zeros(1, 10), torch.zeros(1, 1, 8, 8))
        0.00034526698300124393
    """
    eps = max(torch.finfo(dtype).eps for dtype in (logits.dtype, x.dtype))
    if x.is_cuda and _tf32_is_on():
        eps = max(eps, _TF32_EPS)
    return eps**0.5


def _tf32_is_on() -> bool:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # once that is set, allow_tf32 raises
        return "tf32" in (cudnn.conv.fp32_precision, matmul.fp32_precision)  # type: ignore[attr-defined]
    return bool(cudnn.allow_tf32 or matmul.allow_tf32)


def _size(logits: Logits) -> float:
    return float(logits.abs().masked_fill(logits.isinf(), 0).max())


def eval_mode(model: object) -> None:
    """Check that no part of a model is in training mode.

    A certificate or an attack is about one function of an image. In training mode, batch norm,
    dropout and custom layers are not; which ones are cannot be known from their class.

    Args:
        model: Module; anything else passes.

    Raises:
        InputError: A submodule is in training mode.

    Example:
        >>> eval_mode(nn.Dropout().eval())
    """
    if not isinstance(model, nn.Module):
        return
    for name, module in model.named_modules():
        if module.training:
            raise InputError(
                f"the model is in training mode ({type(module).__name__} at "
                f"{name or 'the top'!r}); call model.eval() first"
            )


def in_training(*parts: object) -> bool:
    """Return whether one of some parts is in training mode: so is a module that wraps them.

    Example:
        >>> in_training(nn.ReLU().eval(), len), in_training(nn.ReLU())
        (False, True)
    """
    return any(isinstance(part, nn.Module) and part.training for part in parts)


def unwrapped(output: Any) -> Any:
    """Return the ``logits`` of an output that has them, as those of Hugging Face do.

    Example:
        >>> from types import SimpleNamespace
        >>> unwrapped(SimpleNamespace(logits=3)), unwrapped(3)
        (3, 3)
    """
    return getattr(output, "logits", output)


def logits(output: Any, batch: int) -> Logits:
    """Return the output of a classifier as one row of logits for each image.

    Args:
        output: Tensor of shape (batch, classes), or an object with such a tensor as ``logits``.
        batch: Number of images.

    Raises:
        InputError: Another type or shape, a single class, or NaN among the values.

    Example:
        >>> logits(torch.zeros(2, 10), batch=2).shape
        torch.Size([2, 10])
    """
    output = unwrapped(output)
    if not isinstance(output, torch.Tensor):
        kind, entry = type(output).__name__, "0"
        if isinstance(output, Mapping):
            entry = repr(next(iter(output), "logits"))
        raise InputError(
            f"the model returned {kind}; wrap it in a module that returns the tensor of logits"
            + (f", such as model(x)[{entry}]" if isinstance(output, (tuple, Mapping)) else "")
        )
    if output.ndim != 2 or output.shape[0] != batch or output.shape[1] < 2:
        raise InputError(
            f"the model returned shape {tuple(output.shape)} for {batch} images; "
            f"it must return logits of shape ({batch}, classes)"
        )
    if bool(torch.isnan(output).any()):
        raise InputError("the model returned NaN logits; a label cannot be read from them")
    return output


@torch.no_grad()
def class_count(model: Callable[[Images], Any], x: Images) -> int:
    """Return how many logits a classifier gives, by classifying ``x``: one image, before a run.

    Raises:
        InputError: The model cannot take such an image, or does not return logits.

    Example:
        >>> class_count(nn.Flatten(), torch.zeros(1, 1, 8, 8))
        64
    """
    return logits(_tried("model", model, x), len(x)).shape[1]


@torch.no_grad()
def denoises(denoiser: Callable[..., Any], x: Images, sigma: float) -> None:
    """Check that a denoiser makes an image of an image, by denoising ``x`` before a run.

    Raises:
        InputError: It cannot take such an image, or returns something of another shape.

    Example:
        >>> denoises(lambda x_noisy, sigma: x_noisy, torch.zeros(1, 1, 8, 8), 0.25)
    """
    x_hat = _tried("denoiser", denoiser, x, torch.full((len(x),), sigma, device=x.device))
    if getattr(x_hat, "shape", None) != x.shape:
        what = tuple(x_hat.shape) if isinstance(x_hat, torch.Tensor) else type(x_hat).__name__
        raise InputError(
            f"the denoiser returned {what} for an image of shape {tuple(x.shape)}; it must return "
            "an image of that shape"
        )


def model_dtype(model: object) -> torch.dtype:
    """Return the floating-point type a model computes in: that of its first such parameter.

    Example:
        >>> model_dtype(torch.nn.Linear(2, 2).bfloat16())
        torch.bfloat16
    """
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.float32


def model_device(model: object) -> torch.device:
    """Return the device of a model's first parameter, the CPU where it has none.

    Example:
        >>> model_device(torch.nn.ReLU())
        device(type='cpu')
    """
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            return parameter.device
    return torch.device("cpu")


def _tried(name: str, model: Callable[..., Any], x: Images, *more: Any) -> Any:
    """Return a model's output for a copy of ``x``, which it may write into."""
    try:
        return model(x.clone(), *more)
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"the {name} failed on an image of shape {tuple(x.shape[1:])}, {x.dtype} "
            f"({type(error).__name__}: {reason}); give the shape and dtype that it was made for"
        ) from error
