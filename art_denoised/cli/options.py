"""Options that commands share, each described once."""

# No `from __future__ import annotations`: cyclopts reads the types of inherited fields in the
# module of the subclass, which need not know their names.
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from art_denoised.cli.words import Factory
from art_denoised.reports.terminal import escaped

if TYPE_CHECKING:
    import torch
    from torch import nn

    from art_denoised.data import ImageData

MODEL, DATA, SAMPLING, TRAINING, RUN = (
    Group(title, sort_key=order)
    for order, title in enumerate(("Model", "Data", "Sampling", "Training", "Run"), start=1)
)


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which network, and where it runs.

    Attributes:
        model: Function without arguments that returns the network, as package.module:function,
            found from the current folder. It takes images in [0, 1], normalises them itself,
            returns logits, and is in eval mode.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
    """

    model: Factory
    device: str = "auto"

    def find_device(self) -> "torch.device":
        """Return the device."""
        from art_denoised.models.loading import find_device

        return find_device(self.device)

    def load(self) -> "nn.Module":
        """Return the network on its device."""
        from art_denoised.models.loading import load_module

        return load_module(self.model).to(self.find_device())


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True, kw_only=True)
class DenoisedModelOptions(ModelOptions):
    """Which classifier, and which denoiser in front of it.

    Attributes:
        denoiser: Function that returns a denoiser(x_noisy, sigma), or a checkpoint of DnCNN, MemNet
            or a U-Net (.safetensors, .pth, .tar, diffusers folder). Without it: plain smoothing.
        dtype: Type the network computes in; a certificate is one of the network in this type. By
            default the type it comes in.
    """

    denoiser: Annotated[Factory | None, Parameter(metavar="FACTORY|FILE")] = None
    dtype: Literal["float32", "bfloat16"] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What a log says of the choice."""
        return {"model": self.model, "denoiser": self.denoiser}

    def load(self) -> "nn.Module":
        """Return the classifier."""
        return self._in_type(super().load())

    def load_denoiser(self, sigma: float) -> "nn.Module | None":
        """Return the denoiser, if one is named, for noise of this level."""
        from art_denoised.denoisers.checkpoints import load_denoiser

        if self.denoiser is None:
            return None
        with notices(UserWarning):
            denoiser = load_denoiser(self.denoiser, sigma=sigma)
        return self._in_type(denoiser.to(self.find_device()))

    def _in_type(self, network: "nn.Module") -> "nn.Module":
        import torch

        return network if self.dtype is None else network.to(getattr(torch, self.dtype))


@Parameter(name="*", group=DATA)
@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which images.

    Attributes:
        data: Images with labels: digits, imagefolder:DIR, npz:FILE or torchvision:NAME:DIR.
        skip: Distance of the images in the data set: K takes every K-th.
        max: Number of images at most: a random sample of all, the same in every run.
        classes: File with the names of an image folder's classes, one a line in the order of the
            labels; synonyms follow a name after commas. By default the folders in their order.
    """

    data: Annotated[str, Parameter(metavar="DATA")]
    skip: Annotated[int, Parameter(metavar="K")] = 1
    max: Annotated[int | None, Parameter(metavar="M")] = None
    classes: Annotated[Path | None, Parameter(metavar="FILE")] = None

    @property
    def identity(self) -> dict[str, Any]:
        """What a log says of the choice."""
        return {"data": self.data, "skip": self.skip, "max": self.max}

    def load(self) -> "tuple[ImageData, Sequence[int]]":
        """Return the data set and the indices of the chosen images."""
        from art_denoised.data import load_data, read_classes, select

        names = None if self.classes is None else read_classes(self.classes)
        data: Any = load_data(self.data, classes=names)
        if self.data.startswith("imagefolder:"):  # labels follow from the names of its folders
            named = [f"{label} {name}" for label, name in enumerate(data.classes)]
            notice("classes: " + ", ".join(named[:20]) + (", ..." if len(named) > 20 else ""))
        return data, select(data, self.skip, self.max)


@Parameter(name="*", group=RUN)
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run is written.

    Attributes:
        out: Folder of the run.
        resume: Continue the run in that folder.
        quiet: Show no progress bar.
    """

    out: Annotated[Path, Parameter(metavar="DIR")]
    resume: bool = False
    quiet: bool = False


def notice(text: str) -> None:
    """Print what the user should know on standard error."""
    print(escaped(f"notice: {text}"), file=sys.stderr)


@contextmanager
def notices(kind: type[Warning]) -> Iterator[None]:
    """Show warnings of this kind as one line, each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", kind)
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if issubclass(category, kind):
                notice(str(message))
            else:
                shown(message, category, *place)

        warnings.showwarning = show  # type: ignore[assignment]
        yield
