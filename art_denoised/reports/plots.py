"""All plots, with matplotlib: accuracy, grids of images, features, and losses of a classifier.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; lines and markers
differ too, so that a plot can be read in grey.
"""

from __future__ import annotations

import csv
import io
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from art_denoised.checks import InputError
from art_denoised.evaluation.logs import CertifyRow
from art_denoised.reports.certified import accuracy_table
from art_denoised.reports.pictures import Strip, channels_last
from art_denoised.reports.results import Model, Share, norms
from art_denoised.reports.terminal import escaped
from art_denoised.runs.journal import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIXES = (".png", ".pdf", ".svg")
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v")
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.5), (5, 1.5, 1, 1.5), (2, 1), (8, 2))
_GREY = "#7a7a7a"  # of axes and published curves: seen on light and dark pages
# Type 42 fonts and text as text: journals ask for the one, editors of drawings need the other.
_FILES = {"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none"}


@dataclass(frozen=True)
class Curve:
    """A published curve of accuracy.

    Attributes:
        name: Name in the legend.
        radii: l2 radii, or eps, in image units.
        accuracy: Accuracy in [0, 1] at each of them.

    Example:
        >>> Curve("Cohen et al.", (0.0, 0.25), (0.77, 0.61)).accuracy[1]
        0.61
    """

    name: str
    radii: tuple[float, ...]
    accuracy: tuple[float, ...]


@dataclass(frozen=True)
class Look:
    """Size, style and labels of a plot.

    Attributes:
        size: Width and height in inches; None: one that suits the picture.
        style: Name of a style of matplotlib, or path of a style sheet; None: ours.
        title: Title above the plot.
        xlabel, ylabel: Labels of the axes; None: what the axes show.

    Raises:
        InputError: A size that is not two positive numbers, or an unknown style.

    Example:
        >>> Look(size=(3.3, 2.5), style="seaborn-v0_8-paper", title="CIFAR-10").size
        (3.3, 2.5)
    """

    size: tuple[float, ...] | None = None
    style: str | None = None
    title: str = ""
    xlabel: str | None = None
    ylabel: str | None = None

    def __post_init__(self) -> None:
        """Refuse what matplotlib cannot use."""
        if self.size and not (len(self.size) == 2 and all(0 < side <= 100 for side in self.size)):
            raise InputError(f"size is {self.size}; give width and height in inches, as 6.4,4")
        _ = self.settings

    @property
    def settings(self) -> Mapping[str, Any]:
        """The style as settings of matplotlib."""
        if self.style is None:
            return {"axes.spines.top": False, "axes.spines.right": False}
        from matplotlib import rc_params_from_file, style

        if self.style in style.library:
            return dict(style.library[self.style])
        if not Path(self.style).is_file():
            known = ", ".join(sorted(n for n in style.library if not n.startswith("_")))
            raise InputError(f"style is {self.style!r}; give a style sheet or one of {known}")
        with _logged("matplotlib") as faults:
            found = dict(rc_params_from_file(self.style, use_default_template=False))
        if faults:  # it logs lines that it cannot use, and leaves them out
            said = " ".join(faults[0].split())[:80]
            raise InputError(
                f"style is {self.style!r}, which holds a line that is no setting ({said}); give a "
                "style sheet of matplotlib"
            )
        return found


_PLAIN = Look()


@contextmanager
def _logged(name: str) -> Iterator[list[str]]:
    """Collect what a library logs as errors, in place of showing it."""
    found: list[str] = []
    logger, handler = logging.getLogger(name), logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


@contextmanager
def _drawing(look: Look, size: tuple[float, float], **settings: Any) -> Iterator[Figure]:
    """Yield a figure to draw into: in this look, and of this size where the look has none."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**look.settings, **_FILES, **settings}):
        width, height = look.size or size
        yield Figure(figsize=(width, height), layout="constrained")


def read_curves(path: Path | str) -> list[Curve]:
    r"""Read published curves from a CSV with the columns name, radius and certified_accuracy.

    `CertifiedTable.to_csv` writes such a file; other columns are ignored.

    Args:
        path: The file; accuracy is a share in [0, 1].

    Raises:
        InputError: The file cannot be read, lacks a column, or holds no share.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        ...     _ = file.write("name,radius,certified_accuracy\nCohen et al.,0.25,0.61\n")
        ...     file.flush()
        ...     read_curves(file.name)
        [Curve(name='Cohen et al.', radii=(0.25,), accuracy=(0.61,))]
    """
    points: dict[str, list[tuple[float, float]]] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for number, line in enumerate(csv.DictReader(file), start=2):
                try:
                    point = float(line["radius"]), float(line["certified_accuracy"])
                    points.setdefault(line["name"], []).append(point)
                except (KeyError, TypeError, ValueError):
                    raise InputError(
                        f"{path}:{number} is no point of a curve; give the columns name, radius "
                        "and certified_accuracy"
                    ) from None
                if not (0 <= point[0] < math.inf and 0 <= point[1] <= 1):
                    raise InputError(
                        f"{path}:{number} has radius {point[0]:g} and accuracy {point[1]:g}; give "
                        "accuracy as a share in [0, 1]"
                    )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}); give a CSV of curves") from None
    for name, of_one in points.items():
        radius, times = Counter(radius for radius, _ in of_one).most_common(1)[0]
        if times > 1:
            raise InputError(
                f"{path} gives radius {radius:g} of {name} {times} times; give each curve its own "
                "name"
            )
    if not points:
        raise InputError(
            f"{path} holds no curves; give the columns name, radius and certified_accuracy"
        )
    return [Curve(name, *zip(*sorted(of_one), strict=True)) for name, of_one in points.items()]


def save_figure(figure: Figure, path: Path | str) -> None:
    """Write a figure: PDF with Type 42 fonts, SVG with text as text, or PNG.

    Args:
        figure: Figure of matplotlib.
        path: A .png, .pdf or .svg file; replaced as a whole. Figures that are made
            alike give the same bytes.

    Raises:
        InputError: Another suffix, or the file cannot be written.

    Example:
        >>> import tempfile
        >>> from matplotlib.figure import Figure
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_figure(Figure(), folder + "/a.pdf")
        ...     Path(folder, "a.pdf").read_bytes()[:4]
        b'%PDF'
    """
    from matplotlib import rc_context

    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise InputError(f"plot file is {path}; give a name ending in {', '.join(_SUFFIXES)}")
    buffer = io.BytesIO()
    undated: Any = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}[suffix]
    with rc_context({**_FILES, "svg.hashsalt": "art-denoised"}):
        figure.savefig(buffer, format=suffix[1:], dpi=200, metadata=undated)
    write_whole(path, buffer.getvalue())


def accuracy_figure(
    models: Sequence[Model],
    *,
    norm: str | None = None,
    published: Sequence[Curve] = (),
    look: Look = _PLAIN,
) -> Figure:
    """Draw certified accuracy against radius and robust accuracy against eps on one axis.

    Steps with a band are certified accuracy. Points with bars, joined by a line, are robust
    accuracy under all attacks on fresh noise, from clean accuracy at eps 0 on; hollow points on a
    dotted line are not reliable. Bands and bars are 95% intervals. Where a run stopped sampling at
    some radii, its certified accuracy has a marker there, and is a lower bound elsewhere.

    Args:
        models: Models, as in a `Report`.
        norm: "l2" or "linf"; None: the only one that these models have results in. Certificates
            are in l2.
        published: Curves to draw as thin lines.
        look: Size, style and labels.

    Raises:
        InputError: Several norms and none is chosen; or a model has nothing in this norm.

    Example:
        >>> rows = [
        ...     CertifyRow(index=i, label=1, prediction=1, radius=i / 4, seconds=0)
        ...     for i in range(4)
        ... ]
        >>> figure = accuracy_figure([Model("ours", certified=tuple(rows))])
        >>> figure.axes[0].get_ylabel()
        'certified accuracy (%)'
    """
    norm = _norm(models, norm)
    for model in models:
        if not has_results(model, norm):
            raise InputError(f"{model.name} has no results in {norm}; leave it out, or give norm")
    with _drawing(look, (6.4, 4.0)) as figure:
        axes = figure.add_subplot(title=literal(look.title))
        _draw_accuracy(axes, models, norm, named=True)
        for i, curve in enumerate(published):
            line: dict[str, Any] = {"color": _GREY, "lw": 0.9, "marker": ".", "ms": 3, "zorder": 1}
            line |= {"label": literal(curve.name), "linestyle": appearance(i).linestyle}
            axes.plot(curve.radii, [100 * share for share in curve.accuracy], **line)
        given = {"xlabel": look.xlabel, "ylabel": look.ylabel}
        axes.set(**{name: literal(words) for name, words in given.items() if words is not None})
        drawn = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        names = [name for pair in _labels(models, norm) for name in pair]
        names += [literal(curve.name) for curve in published]
        handles = {name: drawn[name] for name in names if name in drawn}
        if any(model.asked and _is_certified(model, norm) for model in models):
            (bound,) = axes.plot([], [], color=_GREY, lw=0.9)
            handles["between markers: a lower bound"] = bound
        axes.legend(handles.values(), handles.keys(), frameon=False)
    return figure


def _draw_accuracy(axes: Any, models: Sequence[Model], norm: str, *, named: bool = False) -> None:
    """Draw all models in one norm, as `accuracy_figure` explains, if asked with names."""
    from matplotlib.ticker import MaxNLocator

    certified = any(_is_certified(model, norm) for model in models)
    attacked = any(_points(model, norm) for model in models)
    for i, (model, names) in enumerate(zip(models, _labels(models, norm), strict=True)):
        proved, kept = (dict[str, Any](label=name) if named else {} for name in names)
        if _is_certified(model, norm):
            _draw_certified(axes, model.certified, appearance(i), model.asked, **proved)
        if points := _points(model, norm):
            kept |= {"linewidth": 1.2, "marker": appearance(i).marker}
            if model.trusted is False:
                kept |= {"markerfacecolor": "none", "linestyle": ":"}
            places, shares = zip(*points, strict=True)
            _draw_shares(axes, places, shares, color=appearance(i).colour, **kept)
    kinds = {(True, False): "certified ", (False, True): "robust "}
    kind = kinds.get((certified, attacked), "")
    where = " and ".join([f"{norm} eps"] * attacked + ["l2 radius"] * certified)
    if kind == "certified ":
        where = "certified l2 radius"
    axes.set(xlabel=f"{where} (image units)", ylabel=f"{kind}accuracy (%)", ylim=(-3, 103))
    axes.set_xlim(left=-0.03 * axes.get_xlim()[1])  # so that points on the edge are whole
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(alpha=0.25, color=_GREY)


def _labels(models: Sequence[Model], norm: str) -> Iterator[tuple[str, str]]:
    """Yield the names of certified and robust accuracy of each model in a legend."""
    certified = any(_is_certified(model, norm) for model in models)
    attacked = any(_points(model, norm) for model in models)
    for model in models:
        name = literal(model.name)
        flag = " (not reliable)" * (model.trusted is False)
        yield name + ", certified" * attacked, name + ", attacked" * certified + flag


def _draw_certified(
    axes: Any, rows: Sequence[CertifyRow], shown: Appearance, asked: Sequence[float], **named: Any
) -> None:
    """Draw certified accuracy against radius with its 95% band.

    A run that stopped at radii has markers there. Elsewhere it is a lower bound: thin, no band.
    """
    # Accuracy is constant up to and including each certified radius, then drops.
    knots = np.unique([0.0, *(row.radius for row in rows if row.correct)])
    table = np.array(accuracy_table(rows, [*knots.tolist(), np.inf]))
    edges = np.append(knots, knots[-1])
    line: dict[str, Any] = {"color": shown.colour, "linestyle": shown.linestyle}
    if asked:
        shares = [Share(*found[1:]) for found in accuracy_table(rows, asked)]
        marked: dict[str, Any] = {
            "color": shown.colour,
            "marker": shown.marker,
            "linestyle": "none",
        }
        _draw_shares(axes, asked, shares, **marked, **named)
        line |= {"linewidth": 0.9, "alpha": 0.7}
    else:
        line |= named
        band: dict[str, Any] = {"step": "pre", "alpha": 0.15, "lw": 0, "color": shown.colour}
        axes.fill_between(edges, 100 * table[:, 2], 100 * table[:, 3], **band)
    axes.step(edges, 100 * table[:, 1], where="pre", **line)


def _draw_shares(axes: Any, places: Sequence[float], shares: Sequence[Share], **line: Any) -> None:
    """Draw shares in percent as points with 95% bars."""
    value, low, high = 100 * np.array([(one.value, one.low, one.high) for one in shares]).T
    style = {"markersize": 5, "elinewidth": 1, "capsize": 3, **line}
    axes.errorbar(places, value, yerr=[value - low, high - value], **style)


class Appearance(NamedTuple):
    """Colour and marker of a model, and the lengths of dashes and gaps in its certified curve."""

    colour: str
    marker: str
    dashes: tuple[float, ...]

    @property
    def linestyle(self) -> Any:
        """The dashes as matplotlib takes them."""
        return (0, self.dashes) if self.dashes else "-"


def appearance(i: int) -> Appearance:
    """Return what the i-th model looks like."""
    n = len(_COLOURS)
    return Appearance(_COLOURS[i % n], _MARKERS[(i + i // n) % n], _DASHES[(i + i // n) % n])


def page_figure(models: Sequence[Model], norms: Sequence[str], *, wide: bool) -> Figure:
    """Return the figure of the page, without names: a panel for each norm, in a row if wide."""
    shape = (1, len(norms)) if wide else (len(norms), 1)
    size = (10.0, 3.9) if wide else (4.0, 3.3 * len(norms))
    with _drawing(_PLAIN, size, **{"font.size": 12 if wide else 10}) as figure:
        for axes, norm in zip(figure.subplots(*shape, squeeze=False).flat, norms, strict=True):
            _draw_accuracy(axes, models, norm)
            axes.tick_params(color=_GREY)
            for spine in axes.spines.values():
                spine.set_color(_GREY)
    return figure


def _norm(models: Sequence[Model], norm: str | None) -> str:
    """Return the norm to draw."""
    known = norms(models)
    if norm is None and len(known) != 1:
        raise InputError(f"these runs are in {' and '.join(known)}; choose one", norm=known[0])
    return known[0] if norm is None else norm


def has_results(model: Model, norm: str) -> bool:
    """Return whether a model was certified or attacked in a norm."""
    return _is_certified(model, norm) or bool(_points(model, norm))


def _is_certified(model: Model, norm: str) -> bool:
    return norm == "l2" and bool(model.certified)


def _points(model: Model, norm: str) -> list[tuple[float, Share]]:
    """Return (eps, robust accuracy), from clean accuracy at eps 0 on."""
    points = [(result.eps, result.fresh) for result in model.headlines if result.norm == norm]
    if points and model.clean:
        points.insert(0, (0.0, model.clean))
    return points


def literal(words: str) -> str:
    """Return words that matplotlib shows as they are: no formulas."""
    return escaped(words).replace("$", r"\$")


def picture_figure(strips: Sequence[Strip], *, look: Look = _PLAIN) -> Figure:
    """Draw a grid of images: one row for each image, one column for each stage.

    Args:
        strips: Images with what stands below them, such as those of `attacked_strips` and
            `certified_strips`.
        look: Title, style and size.

    Raises:
        InputError: There are no images.

    Example:
        >>> from art_denoised.reports import Strip
        >>> x = np.zeros((1, 8, 8), np.uint8)
        >>> strip = Strip("image 0, class 2", "", {"clean": x}, {"clean": "2, right"})
        >>> picture_figure([strip]).axes[0].get_xlabel()
        '2, right'
    """
    if not strips:
        raise InputError("there are no pictures; give a run that kept some")
    stages = list(dict.fromkeys(stage for strip in strips for stage in strip.pictures))
    with _drawing(look, (1.5 * len(stages) + 0.4, 1.8 * len(strips) + 0.3)) as figure:
        grid = figure.subplots(len(strips), len(stages), squeeze=False)
        for axes, strip in zip(grid, strips, strict=True):
            for one, stage in zip(axes, stages, strict=True):
                _draw_picture(one, strip.pictures.get(stage), strip.captions.get(stage, ""))
            axes[0].set_ylabel("\n".join(map(literal, strip.titles)), fontsize=7)
        for one, stage in zip(grid[0], stages, strict=True):
            one.set_title(literal(stage), fontsize=9)
        figure.suptitle(literal(look.title))
    return figure


def _draw_picture(axes: Any, pixels: np.ndarray | None, caption: str) -> None:
    """Draw bytes (channels, height, width) without a frame, with words below."""
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if pixels is not None:
        axes.imshow(channels_last(pixels), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_xlabel("\n".join(map(literal, caption.split("; "))), fontsize=7)


def feature_figure(
    network: Any,
    images: Mapping[str, Any],
    *,
    block: str | None = None,
    channel: int | None = None,
    look: Look = _PLAIN,
) -> Figure:
    """Draw feature maps before and after a denoising block, beside the images.

    Source: Xie et al., "Feature Denoising for Improving Adversarial Robustness" (CVPR 2019, arXiv
    1812.03411), figures 1, 2 and 3.

    Args:
        network: Network with denoising blocks, in eval mode.
        images: Name -> image (channels, height, width) in [0, 1], such as an image and what an
            attack made of it.
        block: Name of the block in the network; None: the first.
        channel: Channel of the features; None: the one that the block changes most, on average
            over these images.
        look: Title, style and size.

    Raises:
        InputError: The network has no such block, or the features no such channel.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from art_denoised.networks import FeatureDenoising
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), FeatureDenoising(4)).eval()
        >>> figure = feature_figure(network, {"clean": torch.rand(1, 8, 8)})
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['image', 'before block 1', 'after block 1']
    """
    name, before, after = _features(network, images, block)
    if channel is None:
        channel = int(np.square(after - before).mean(axis=(0, 2, 3)).argmax())
    if not 0 <= channel < before.shape[1]:
        raise InputError(f"channel is {channel}; {name} has {before.shape[1]}, counted from 0")
    with _drawing(look, (5.2, 1.5 * len(images) + 0.3)) as figure:
        grid = figure.subplots(len(images), 3, squeeze=False)
        titles = ("image", f"before block {name}", f"after block {name}")
        for axes, title in zip(grid[0], titles, strict=True):
            axes.set_title(literal(title), fontsize=9)
        high = max(before[:, channel].max(), after[:, channel].max())
        low = min(before[:, channel].min(), after[:, channel].min())
        for row, (axes, (label, image)) in enumerate(zip(grid, images.items(), strict=True)):
            pixels = np.clip(255 * np.asarray(image.cpu()), 0, 255).astype(np.uint8)
            _draw_picture(axes[0], pixels, "")
            axes[0].set_ylabel(literal(label), fontsize=9)
            for one, features in zip(axes[1:], (before, after), strict=True):
                _draw_picture(one, None, "")
                drawn = one.imshow(features[row, channel], cmap="viridis", vmin=low, vmax=high)
        figure.colorbar(drawn, ax=list(grid[:, 2]), shrink=0.8, label=f"channel {channel}")
        figure.suptitle(literal(look.title))
    return figure


def _features(
    network: Any, images: Mapping[str, Any], block: str | None
) -> tuple[str, np.ndarray, np.ndarray]:
    """Return the name of a denoising block, and its input and output for these images."""
    import torch

    from art_denoised import checks
    from art_denoised.networks.feature_denoising import FeatureDenoising

    checks.eval_mode(network)
    blocks = {n: m for n, m in network.named_modules() if isinstance(m, FeatureDenoising)}
    name = next(iter(blocks), "") if block is None else block
    if name not in blocks:
        known = ", ".join(blocks) or "none"
        raise InputError(f"block is {block!r}; the denoising blocks of this network are: {known}")
    seen: list[Any] = []
    hook = blocks[name].register_forward_hook(lambda _, x, y: seen.extend((x[0], y)))
    try:
        with torch.no_grad():
            x = torch.stack([torch.as_tensor(image) for image in images.values()])
            network(x.to(checks.model_device(network)))
    finally:
        hook.remove()
    before, after = (part.float().cpu().numpy() for part in seen)
    return name, before, after


def loss_figure(
    losses: Any,
    sigmas: Sequence[float],
    *,
    label: int | None = None,
    names: Sequence[str] | None = None,
    look: Look = _PLAIN,
) -> Figure:
    """Draw the loss of a diffusion classifier for one image, by noise level and class.

    On the left each line is a class: its weighted loss at each level, minus the mean over classes.
    The line below the others is the class that this level favours. On the right are the sums over
    levels of the ten likeliest classes, of which the lowest is the prediction.

    Source: Chen et al., "Robust Classification via a Single Diffusion Model" (ICML 2024, arXiv
    2305.15241), section 3.1.

    Args:
        losses: Losses (levels, classes), as `DiffusionClassifier.level_losses` returns them for one
            image.
        sigmas: Noise levels.
        label: True class, which is marked.
        names: Names of the classes; None: their numbers.
        look: Size, style and labels.

    Raises:
        InputError: The shapes do not fit.

    Example:
        >>> losses = np.arange(12.0).reshape(4, 3)
        >>> figure = loss_figure(losses, (0.1, 0.2, 0.4, 0.8), label=1)
        >>> [text.get_text() for text in figure.axes[1].get_yticklabels()]
        ['0', '1', '2']
    """
    table = np.asarray(losses, dtype=np.float64)
    classes = [str(i) for i in range(table.shape[-1])] if names is None else [*map(literal, names)]
    if table.shape != (len(sigmas), len(classes)):
        raise InputError(
            f"losses have the shape {table.shape}; give (levels, classes), here "
            f"({len(sigmas)}, {len(classes)})"
        )
    relative = table - table.mean(axis=1, keepdims=True)
    totals = relative.sum(axis=0)
    order = totals.argsort()
    marked = dict(_marked(order.tolist(), label))
    with _drawing(look, (7.5, 3.4)) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(2.2, 1))
        for one in sorted(range(len(classes)), key=lambda one: one in marked):
            words, style = marked.get(one, ("", {"color": _GREY, "lw": 0.7, "alpha": 0.6}))
            named = {"label": f"{classes[one]}: {words}"} if words else {}
            left.plot(sigmas, relative[:, one], **style, **named)
        left.set(xscale="log", xlabel="noise level sigma", ylabel="loss minus mean of classes")
        left.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
        shown = order[:10].tolist()
        colours = [marked.get(one, ("", {"color": _GREY}))[1]["color"] for one in shown]
        above = totals[shown] - totals[order[0]]
        right.barh(range(len(shown)), above, color=colours, height=0.15)
        right.scatter(above, range(len(shown)), color=colours, s=25)
        right.set_yticks(range(len(shown)), [classes[one] for one in shown])
        right.set(xlabel="sum, above the lowest")
        right.invert_yaxis()
        figure.suptitle(literal(look.title))
    return figure


def _marked(order: Sequence[int], label: int | None) -> Iterator[tuple[int, tuple[str, Any]]]:
    """Yield prediction, true class and runner-up with their words and style."""
    first = "predicted" if label is None else "predicted, right"
    if label is not None and label != order[0]:
        first = "predicted, wrong"
        yield label, ("true class", {"color": _COLOURS[0], "lw": 1.8, "marker": "o", "ms": 3})
    colour = _COLOURS[1] if first.endswith("wrong") else _COLOURS[0]
    yield order[0], (first, {"color": colour, "lw": 1.8, "marker": "s", "ms": 3})
    if len(order) > 1 and label in (None, order[0]):
        yield order[1], ("runner-up", {"color": _COLOURS[2], "lw": 1.4, "linestyle": "--"})
