"""One door for images, labels and models: what is tried and checked before work starts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from art_denoised.autograd import is_traced
from art_denoised.checks.values import InputError, first_line, one_line

if TYPE_CHECKING:
    from art_denoised.types import Images, Labels, Logits

_TOLERANCE = 1e-6  # rounding of an image that was scaled into the range in float32
_TF32_EPS = 2.0**-10  # of float32 convolutions on GPUs, by PyTorch's default


def batch(x: Any) -> Images:
    """Return ``x`` as a tensor of NCHW images, whose pixels are not looked at.

    So it does not wait for a device, and every module can call it.
    """
    if not isinstance(x, Tensor):
        x = _tensor("images", x, "numbers")
    if x.ndim != 4:
        raise InputError(
            f"images have shape {tuple(x.shape)}; give (batch, channels, height, width), "
            "for one image x[None]"
        )
    if not x.is_floating_point():
        raise InputError(
            f"images have dtype {str(x.dtype).removeprefix('torch.')}; "
            "convert them to floating point in clip_values, for 8-bit images x / 255"
        )
    return x


def images(
    x: Any,
    *,
    clip_values: tuple[Any, Any] = (0.0, 1.0),
    shape: Sequence[int] | None = None,
    slack: float = 0.0,
) -> Images:
    """Return ``x`` as a tensor of NCHW images after checking it.

    Args:
        x: Array or tensor of shape (batch, channels, height, width), floating point.
        clip_values: Smallest and largest pixel value, scalars or arrays of one image's shape.
        shape: The (channels, height, width) that the model expects.
        slack: How far outside ``clip_values`` pixels may lie, as a share of the range. An attack
            in progress may leave the range a little; images in other units leave it by far.
    """
    x = dense("images", batch(x))
    if shape is not None and tuple(x.shape[1:]) != tuple(shape):
        hint = ""
        if tuple(x.shape[1:]) == (*tuple(shape)[1:], shape[0]):
            hint = "; they look channels-last, transpose them with (0, 3, 1, 2)"
        raise InputError(
            f"images have shape {tuple(x.shape[1:])} each; the model takes {tuple(shape)}{hint}"
        )
    if x.numel() == 0:
        raise InputError("there are no images; give at least one")
    finite = torch.isfinite(x).all()
    if bool(~finite | _outside(x, clip_values, slack)):  # one wait for a GPU
        if not bool(finite):
            raise InputError("images hold NaN or infinite pixels; clean them first")
        raise _out_of_range(x, clip_values)
    return x


def attacked_images(
    x: Any,
    *,
    clip_values: tuple[Any, Any] = (0.0, 1.0),
    shape: Sequence[int] | None = None,
    slack: float = 0.5,
) -> Images:
    """Return ``x`` as `images` does, with a warning in place of an error on pixels out of range.

    Some attacks leave the range on their way and clip at the end only.
    """
    x = images(x, clip_values=clip_values, shape=shape, slack=math.inf)
    if bool(_outside(x, clip_values, slack)):
        warnings.warn(str(_out_of_range(x, clip_values)), stacklevel=3)
    return x


def _outside(x: torch.Tensor, clip_values: tuple[Any, Any], slack: float) -> torch.Tensor:
    """Return whether a pixel is out of the range, on the device of the images."""
    low, high = (torch.as_tensor(v, dtype=torch.float64) for v in clip_values)
    margin, x = slack * (high - low) + _TOLERANCE, x.detach()
    low, high = ((v if v.ndim == 0 else v.to(x.device)) for v in (low - margin, high + margin))
    return ((x < low) | (x > high)).any()


def _out_of_range(x: torch.Tensor, clip_values: tuple[Any, Any]) -> InputError:
    x, low, high = x.detach(), *(torch.as_tensor(v, dtype=torch.float64) for v in clip_values)
    remedy = "divide by 255" if float(x.max()) > 2 and float(high.max()) <= 1 else "rescale"
    return InputError(
        f"images span [{float(x.min()):g}, {float(x.max()):g}] but clip_values are "
        f"({float(low.min()):g}, {float(high.max()):g}); {remedy} or set clip_values"
    )


def labels(y: Any, nb_classes: int | None = None) -> Labels:
    """Return ``y`` as a tensor of class indices below ``nb_classes``, shape (batch,)."""
    y = _tensor("labels", y, "class indices")
    if y.ndim != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise InputError(
            f"labels have shape {tuple(y.shape)} and dtype {str(y.dtype).removeprefix('torch.')}; "
            "give one integer class index an image"
        )
    high = "" if nb_classes is None else f" to {nb_classes - 1}"
    y = y.long()  # not every unsigned type can be compared
    bad = y[(y < 0) | (y >= nb_classes)] if nb_classes is not None else y[y < 0]
    if bad.numel():
        raise InputError(f"label {int(bad[0])} is out of range; labels go from 0{high}")
    return y


def class_indices(y: Any, nb_classes: int) -> Labels:
    """Return labels in any form that ART takes as class indices, shape (batch,).

    ART takes indices, of shape (batch,) or (batch, 1), and one-hot rows or probabilities.
    """
    y = _tensor("labels", y, "class indices")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    elif y.ndim == 2 and y.shape[1] == nb_classes:
        first, second = probabilities(y).topk(2, dim=1).values.unbind(1)
        if bool((first <= second).any()):
            raise InputError("labels hold rows without a likeliest class; give one an image")
        y = probabilities(y).argmax(1)
    return labels(y, nb_classes)


def label_rows(y: Any, nb_classes: int) -> Tensor:
    """Return labels in any form that ART takes as rows of probabilities, (batch, classes)."""
    y = _tensor("labels", y, "class indices")
    if tuple(y.shape[1:]) == (nb_classes,):
        return probabilities(y)
    return nn.functional.one_hot(class_indices(y, nb_classes), nb_classes)


def probabilities(y: Any) -> Tensor:
    """Return one-hot rows or probabilities, (batch, classes), as floating-point numbers."""
    rows = _tensor("labels", y, "probabilities")
    rows = rows if rows.is_floating_point() else rows.float()
    if not bool((torch.isfinite(rows) & (rows >= 0)).all() & (rows.sum(1) > 0).all()):
        raise InputError(
            "labels hold rows that are no probabilities (NaN, negative or all zero); give one-hot "
            "rows, probabilities or class indices"
        )
    return rows


def dense(name: str, x: Tensor) -> Tensor:
    """Return a tensor that holds all of its values, as a sparse or a meta tensor does not."""
    if x.layout is not torch.strided or x.is_nested or x.is_meta:
        kind = "nested" if x.is_nested else "meta" if x.is_meta else "sparse"
        raise InputError(f"{name} is a {kind} tensor; give a dense one, such as x.to_dense()")
    return x


def _tensor(name: str, value: Any, content: str) -> Tensor:
    parts = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(part, np.ma.MaskedArray) for part in parts):
        raise InputError(f"{name} are a masked array; give the values that are meant, by .filled()")
    if isinstance(value, np.ndarray):  # of memory as torch takes it: native, ascending, writeable
        value = value.astype(value.dtype.newbyteorder("="), copy=False)
        value = (
            value if value.flags.writeable and min(value.strides, default=0) >= 0 else value.copy()
        )
    try:
        if isinstance(value, (list, tuple)) and value:
            if isinstance(value[0], Tensor):
                value = torch.stack([*value])
            elif isinstance(value[0], (np.ndarray, np.generic)):
                value = np.asarray(value)
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be an array of {content}: {one_line(error)}") from None
    return dense(name, tensor)


@torch.no_grad()
def classifier(model: Callable[..., Any], x: Images, *, random: bool = False) -> int:
    """Try a classifier on one image, and return its number of classes.

    The classifier must be in eval mode and return a row of logits without NaN for each image. The
    row of an image must not depend on the other images of its batch, and must be the same when
    the image is classified again, and its buffers, such as running means, must not change. The
    classifier gets copies, so it may write into its input.

    Args:
        model: Module or function from images to logits.
        x: Images in the model's dtype and on its device. The first is tried; the others are
            classified beside it.
        random: Whether the model may be random on purpose. Its answers are not compared then.
    """
    eval_mode(model)
    image = x[:1]
    # A second image that is surely another one: pictures may be constant.
    other = torch.rand(image.shape, generator=torch.Generator().manual_seed(0)).to(image)
    alone = logits(_tried("model", model, image), 1)
    before = _statistics(model)  # after the first call, which may have filled caches
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
        (
            logits(_tried("model", model, x), len(x))[:1] if len(x) > 2 else alone,
            "the model's answer to an image depends on the size of its batch (logits differ by "
            "{}); use a model that classifies each image by itself",
        ),
    ):
        if gap := apart(answer, alone, image):
            raise InputError(problem.format(f"{gap:.3g}"))
    for name, value in _statistics(model).items():
        if name in before and not torch.equal(before[name], value):
            raise InputError(
                f"the model changes its buffer {name!r} when it classifies, so that an answer "
                "depends on the images before; keep it fixed in eval mode"
            )
    return alone.shape[1]


def _statistics(model: object) -> dict[str, Tensor]:
    """Return copies of the floating-point buffers of a module; counters may count."""
    buffers = model.named_buffers() if isinstance(model, nn.Module) else ()
    return {
        name: value.clone()
        for name, value in buffers
        if value.is_floating_point() and value.layout is torch.strided
    }


def apart(logits: Logits, others: Logits, x: Images) -> float:
    """Return by how much two answers to ``x`` differ; 0 where rounding explains it."""
    gap = float((logits - others).abs().masked_fill(logits == others, 0).max())  # of -inf, too
    return gap if gap > near(logits, x) * max(_size(logits), _size(others)) else 0.0


def near(logits: Logits, x: Images) -> float:
    """Return how near two logits may be, as a share of the largest, for rounding to part them.

    It is the square root of the machine epsilon: 0.03% in float32, far above what the choice of
    kernels changes. Epsilon is that of the arithmetic, not of the logits alone.
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
    """Check that no part of a model is in training mode; what is no module passes.

    A certificate or an attack is about one function of an image. In training mode, batch norm,
    dropout and custom layers are not; which ones are cannot be known from their class.
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
    """Return whether one of some parts is in training mode: so is a module that wraps them."""
    return any(isinstance(part, nn.Module) and part.training for part in parts)


def unwrapped(output: Any) -> Any:
    """Return the ``logits`` of an output that has them, as those of Hugging Face do."""
    return getattr(output, "logits", output)


def logits(output: Any, batch: int) -> Logits:
    """Return a copy of the output of a classifier: a readable row of logits for each image."""
    rows = logit_rows(output, batch)
    if bool(unreadable(rows).any()):
        raise nan_logits()
    return rows.clone()  # networks with CUDA graphs write all answers into the same memory


def unreadable(logits: Logits) -> Tensor:
    """Return of which rows no label can be read: they hold NaN, or their largest is infinite.

    Classes may have -inf, as in log-probabilities.
    """
    return ~logits.amax(1).isfinite()  # amax passes NaN on


def nan_logits() -> InputError:
    """Return the error of a classifier whose logits are `unreadable`."""
    return InputError("the model returned NaN or infinite logits; a label cannot be read from them")


def finite_answer(values: Tensor) -> None:
    """Check once what all passes of a diffusion model add up to: NaN does not go away in a sum."""
    if not bool(torch.isfinite(values).all()):
        raise InputError("the diffusion model returned NaN or infinite values")


def logit_rows(output: Any, batch: int) -> Logits:
    """Return what `logits` does, without waiting for the device: rows may be `unreadable`."""
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
    if not output.is_floating_point():
        raise InputError(
            f"the model returned {str(output.dtype).removeprefix('torch.')}; it must return "
            "floating-point logits, of hard labels such as one_hot(labels, classes).float()"
        )
    return dense("the output of the model", output)


@torch.no_grad()
def class_count(model: Callable[[Images], Any], x: Images) -> int:
    """Return how many logits a classifier gives, by classifying the first image before a run."""
    return logits(_tried("model", model, x[:1]), 1).shape[1]


@torch.no_grad()
def denoises(denoiser: Callable[..., Any], x: Images, sigma: float) -> None:
    """Check that a denoiser makes an image of an image, by denoising ``x`` before a run."""
    x_hat = _tried("denoiser", denoiser, x, torch.full((len(x),), sigma, device=x.device))
    if getattr(x_hat, "shape", None) != x.shape:
        what = tuple(x_hat.shape) if isinstance(x_hat, torch.Tensor) else type(x_hat).__name__
        raise InputError(
            f"the denoiser returned {what} for an image of shape {tuple(x.shape)}; it must return "
            "an image of that shape"
        )


def first_derivative(name: str) -> None:
    """Raise in a backward pass that autograd records: its derivative would be wrong, unnoticed."""
    if torch.is_grad_enabled():
        raise InputError(
            f"gradients of {name} cannot be differentiated again; take them without "
            "create_graph=True"
        )


def untraced(name: str) -> None:
    """Raise where calls are recorded: noise that is drawn on the host would not follow its seed."""
    if is_traced():
        raise InputError(
            f"{name} cannot be traced or exported: its noise would not follow its seed; trace the "
            "network in it"
        )


def model_dtype(model: object, default: torch.dtype = torch.float32) -> torch.dtype:
    """Return the floating-point type a model computes in: that of its first such parameter."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return next((p.dtype for p in parameters if p.is_floating_point()), default)


def model_device(model: object) -> torch.device:
    """Return the device of a model's first parameter, the CPU where it has none."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return next((p.device for p in parameters), torch.device("cpu"))


def placed(x: Tensor, model: object) -> Tensor:
    """Return a tensor on the device and in the type of a model."""
    return x.to(model_device(model), model_dtype(model))


def _tried(name: str, model: Callable[..., Any], x: Images, *more: Any) -> Any:
    """Return a model's output for a copy of ``x``, which it may write into."""
    try:
        return model(x.clone(), *more)
    except InputError:
        raise
    except torch.OutOfMemoryError:
        raise InputError(
            f"a batch of {len(x)} images does not fit into memory; give a smaller batch size"
        ) from None
    except Exception as error:
        reason = first_line(error)
        raise InputError(
            f"the {name} failed on an image of shape {tuple(x.shape[1:])}, {x.dtype} "
            f"({type(error).__name__}: {reason}); give the shape and dtype that it was made for"
        ) from error
