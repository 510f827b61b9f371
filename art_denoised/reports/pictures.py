"""Images of a run side by side: clean, noisy, denoised, attacked, and the difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.evaluation.attack_rows import CLEAN, AttackRow, ImageRow
from art_denoised.evaluation.logs import Log
from art_denoised.reports.results import Model, eps_name
from art_denoised.smoothing.statistics import ABSTAIN

if TYPE_CHECKING:
    from art_denoised.data import ImageData

STAGES = ("clean", "noisy", "denoised", "attacked", "attacked, denoised", "difference")


@dataclass(frozen=True)
class Strip:
    """Pictures of one image.

    Attributes:
        name: The image and its class.
        attack: The attack with its eps; empty without one.
        pictures: Stage -> bytes (channels, height, width), in the order of ``STAGES``.
        captions: Stage -> what the model answered, or how the picture was made.

    Example:
        >>> Strip("image 0, class 2", "pgd, eps 0.5", {}, {}).titles
        ('image 0', 'class 2', 'pgd', 'eps 0.5')
    """

    name: str
    attack: str
    pictures: Mapping[str, np.ndarray]
    captions: Mapping[str, str]

    @property
    def titles(self) -> tuple[str, ...]:
        """Image, class, attack and eps, as lines."""
        return (*self.name.split(", ", 1), *filter(None, self.attack.split(", ")))


def attacked_strips(model: Model, most: int = 10) -> list[Strip]:
    """Return the first attacked images that the runs of a model kept pictures of.

    Images that were wrong before, which no attack changes, come after all others.
    Captions hold the predicted class and, where the model was also certified, the radius. The noisy
    picture shows noise of the model's sigma.

    Args:
        model: Model of a `Report`.
        most: Number of strips at most.

    Example:
        >>> x, at = np.zeros((1, 8, 8)), {"index": 0, "attack": "pgd", "gradient": "exact"}
        >>> picture = ImageRow.of(x, **at, eps=0.5, stage="attacked", prediction=3)
        >>> attacked_strips(Model("ours", pictures=(picture,)))[0].captions["attacked"]
        '3'
    """
    most = checks.count("most", most)
    right = {(row.index, *row.column): row.clean for row in model.rows}
    attacked = sorted(
        (row for row in model.pictures if row.stage == "attacked"),
        key=lambda row: not right.get((row.index, row.attack, row.gradient, row.eps), True),
    )
    return [_attacked_strip(model, row) for row in attacked[:most]]


def certified_strips(
    log: Log,
    data: ImageData,
    *,
    denoiser: Callable[[Any, float], Any] | None = None,
    most: int = 8,
) -> list[Strip]:
    """Return the first images of a certify or predict run, with labels and radii.

    Args:
        log: Log of the run.
        data: Data set that was certified.
        denoiser: Function from noisy images and sigma to images in [0, 1], for a denoised picture.
        most: Number of strips at most.

    Raises:
        InputError: These are other images than those of the log, or it has no rows.

    Example:
        >>> from art_denoised.data import load_data
        >>> from art_denoised.evaluation import CertifyRow
        >>> row = CertifyRow(index=0, label=2, prediction=2, radius=0.25, seconds=0)
        >>> strip = certified_strips(Log("certify", {"sigma": 0.5}, (row,)), load_data("digits"))[0]
        >>> strip.name, dict(strip.captions)
        ('image 0, class 2', {'clean': '2, right; radius 0.25', 'noisy': 'sigma 0.5'})
    """
    if not log.rows:
        raise InputError("the log holds no rows; certify some images first")
    most, settings = checks.count("most", most), log.settings or {}
    _check_data(settings, data)
    names, sigma = _class_names(settings), settings.get("sigma")
    return [_certified_strip(row, data, names, sigma, denoiser) for row in log.rows[:most]]


def _attacked_strip(model: Model, row: ImageRow) -> Strip:
    pictures = {picture.key: picture for picture in model.pictures}
    alone = {(one.index, one.stage): one for one in model.pictures}
    clean, denoised = alone.get((row.index, "clean")), alone.get((row.index, "denoised"))
    after = pictures.get(msgspec.structs.replace(row, stage="attacked and denoised").key)
    results = {(one.index, *one.column): one for one in model.rows}
    result = results.get((row.index, row.attack, row.gradient, row.eps))
    unattacked = results.get((row.index, CLEAN, "none", 0.0))
    settings = [of_log for _, of_log in model.settings]
    names = next(filter(None, map(_class_names, settings)), ())
    before = _array(clean)
    found: dict[str, tuple[np.ndarray | None, str]] = {
        "clean": (before, _clean_words(model, clean, unattacked, names)),
        "noisy": _noisy(before, _sigma(settings), row.index),
        "denoised": (_array(denoised), ""),
        "attacked": (row.array, _attacked_words(row, result, names)),
        "attacked, denoised": (_array(after), ""),
        "difference": _difference(before, row.array),
    }
    label = model.labels.get(row.index)
    return Strip(
        f"image {row.index}" + ("" if label is None else f", class {_class(label, names)}"),
        f"{row.attack}, eps {eps_name(row.eps)}" + f" ({row.gradient})" * (row.gradient == "bpda"),
        *_parted(found),
    )


def _certified_strip(
    row: Any,
    data: ImageData,
    names: tuple[str, ...],
    sigma: float | None,
    denoiser: Callable[[Any, float], Any] | None,
) -> Strip:
    import torch

    image, label = data[row.index]
    if int(label) != row.label:
        raise InputError(
            f"image {row.index} has label {int(label)} in these data and {row.label} in the log; "
            "give the data that the run used"
        )
    clean = _bytes(np.asarray(image))
    found: dict[str, tuple[np.ndarray | None, str]] = {
        "clean": (clean, "; ".join(_answer_words(row, names)))
    }
    if sigma is not None:
        found["noisy"] = _noisy(clean, sigma, row.index)
    if denoiser is not None and sigma is not None:
        x = torch.as_tensor(image)[None].float()
        with torch.no_grad():
            x_hat = denoiser(x + sigma * torch.from_numpy(_noise(clean.shape, row.index)), sigma)
        found["denoised"] = (_bytes(x_hat[0].float().cpu().numpy()), "")
    return Strip(
        f"image {row.index}, class {_class(row.label, names)}",
        "",
        *_parted(found),
    )


def _parted(
    found: Mapping[str, tuple[np.ndarray | None, str]],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the pictures that there are, and what stands below them."""
    pictures = {stage: picture for stage, (picture, _) in found.items() if picture is not None}
    return pictures, {stage: words for stage, (_, words) in found.items() if words}


def _array(row: ImageRow | None) -> np.ndarray | None:
    return None if row is None else row.array


def _check_data(settings: Mapping[str, Any], data: ImageData) -> None:
    """Refuse data whose pixels are not those of the log, if it has a hash of them."""
    from art_denoised.data.images import Chosen, index_range

    if {"pixels", "indices"} <= settings.keys():
        found = Chosen(data, index_range(settings["indices"])).settings()
        if found["pixels"] != settings["pixels"]:
            raise InputError(
                "the pixels of these data are not those of the log; give the data that the run "
                f"used, which it calls {settings.get('data')!r}"
            )


def _answer_words(row: Any, names: tuple[str, ...]) -> Iterator[str]:
    """Yield what was certified or predicted."""
    if row.prediction == ABSTAIN:
        yield "abstained"
        return
    yield f"{_class(row.prediction, names)}, {'right' if row.correct else 'wrong'}"
    if hasattr(row, "radius"):
        yield f"radius {row.radius:.3g}"


def _clean_words(
    model: Model, picture: ImageRow | None, result: AttackRow | None, names: tuple[str, ...]
) -> str:
    """Return what the model said of the clean image: its class, and its certificate."""
    if picture is None:
        return ""
    label = model.labels.get(picture.index)
    words = [_outcome(picture, result, names)]
    certified = next((row for row in model.certified if row.index == picture.index), None)
    if certified is not None and certified.label == label and model.same_images:
        words.append(", ".join(_answer_words(certified, names)).replace(", right", " certified"))
    return "; ".join(filter(None, words))


def _attacked_words(row: ImageRow, result: AttackRow | None, names: tuple[str, ...]) -> str:
    if result is not None and not result.clean:
        return "wrong before, not attacked"
    return _outcome(row, result, names)


def _outcome(picture: ImageRow, result: AttackRow | None, names: tuple[str, ...]) -> str:
    """Return the class that the model gave a picture, and how often it was right."""
    said = "" if picture.prediction is None else _class(picture.prediction, names)
    if result is None:
        return said
    if len(result.fresh) > 1:
        one = f"one answer: {said}; " if said else ""  # of a randomised model
        return f"{one}right in {sum(result.fresh)} of {len(result.fresh)}"
    return f"{said}, {'right' if result.fresh[0] else 'wrong'}".removeprefix(", ")


def _noisy(
    clean: np.ndarray | None, sigma: float | None, index: int
) -> tuple[np.ndarray | None, str]:
    """Return the image under noise of this size; of no noise stream that was used elsewhere."""
    if clean is None or sigma is None:
        return None, ""
    return _bytes(clean / 255 + sigma * _noise(clean.shape, index)), f"sigma {sigma:g}"


def _noise(shape: tuple[int, ...], index: int) -> np.ndarray:
    return np.random.default_rng(index).standard_normal(shape, dtype=np.float32)


def _difference(before: np.ndarray | None, after: np.ndarray) -> tuple[np.ndarray | None, str]:
    """Return the change, grey where there is none and stretched to the full range, and its size."""
    if before is None or before.shape != after.shape:
        return None, ""
    change = after.astype(int) - before
    largest = int(abs(change).max())
    stretched = 127.5 + 127.5 * change / max(largest, 1)
    return np.rint(stretched).astype(np.uint8), f"largest change {largest}/255"


def channels_last(pixels: np.ndarray) -> np.ndarray:
    """Return the first three channels of a picture, or the first, as they are displayed."""
    return pixels[:3].transpose(1, 2, 0) if len(pixels) >= 3 else pixels[0]


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


def _sigma(settings: list[Mapping[str, Any]]) -> float | None:
    """Return the size of the noise that these logs tell of."""
    held = [s.get("smoothed") or s for s in settings]
    return next((s["sigma"] for s in held if isinstance(s.get("sigma"), int | float)), None)


def _class_names(settings: Mapping[str, Any]) -> tuple[str, ...]:
    names = settings.get("classes")
    return tuple(map(str, names)) if isinstance(names, list | tuple) else ()


def _class(label: int, names: tuple[str, ...]) -> str:
    return names[label] if 0 <= label < len(names) else str(label)
