"""What a word on the command line means, and the options that commands share."""

# No `from __future__ import annotations`: cyclopts reads the types of inherited fields in the
# module of the subclass, which need not know their names.
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from cyclopts import CycloptsError, Group, Parameter, Token
from cyclopts.validators import Number as InRange

from art_denoised.reports.terminal import escaped

if TYPE_CHECKING:
    import torch
    from torch import nn

    from art_denoised.data import ImageData
    from art_denoised.models.loading import EvalTransform
    from art_denoised.runs.workers import Place


MORE = "More: "  # begins the title of options that help pages only name


def folded(title: str, order: int) -> Group:
    """Return a group of options that few runs need: ``--help-all`` explains them."""
    return Group(f"{MORE}{title}", sort_key=50 + order)


def more(group: Group) -> Parameter:
    """Return the mark of an option of this group that few runs need."""
    return Parameter(group=folded(group.name, group.sort_key))


def notice(text: str) -> None:
    """Print what the user should know on standard error."""
    print(escaped(f"notice: {text}"), file=sys.stderr)


def print_json(value: object) -> None:
    """Print a result for programs."""
    print(json.dumps(value, indent=2, allow_nan=False))


def print_result(value: object, *lines: str, json: bool) -> None:
    """Print a result for programs as JSON, or for people as lines."""
    if json:
        print_json(value)
    else:
        print(*map(escaped, lines), sep="\n")


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


def number(text: str) -> float:
    """Parse a number, or a fraction such as 8/255."""
    above, slash, below = text.partition("/")
    try:
        value = float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a number; give one, or a fraction such as 8/255")
    return value


def numbers(text: str) -> tuple[float, ...]:
    """Parse numbers joined by commas."""
    return tuple(number(part) for part in text.split(","))


def widths(text: str) -> tuple[int, ...]:
    """Parse whole numbers joined by commas."""
    return tuple(int(part) for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """Parse names joined by commas."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise ValueError(f"{text!r} holds no names; give names joined by commas")
    return found


def duration(text: str) -> float:
    """Parse a duration, such as 90, 90s, 10m or 1.5h, into seconds."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([smh]?)", text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not seconds:
        raise ValueError(f"{text!r} is not a duration; give seconds, or 90s, 10m or 2h")
    return seconds


def factory(text: str) -> str:
    """Parse the name of a factory; a path to a Python file stands for its module."""
    module, colon, name = text.partition(":")
    if not colon or not module.endswith(".py"):
        return text
    parts = module.removesuffix(".py").removeprefix("./").split("/")
    if not all(part.isidentifier() for part in parts):
        raise ValueError(f"{text!r} is outside the current folder; give package.module:function")
    return f"{'.'.join(parts)}:{name}"


def shard(text: str) -> tuple[int, int]:
    """Parse one of several equal parts, such as 2/8."""
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    part, parts = map(int, match.groups()) if match else (0, 0)
    if not 1 <= part <= parts:
        raise ValueError(f"{text!r} is not a shard; give I/N, from 1/N to N/N")
    return part, parts


def slurm_shard(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """Return the part that a task of a SLURM array has; None outside one."""
    try:
        number, parts, first, step = (
            int(environment.get(f"SLURM_ARRAY_TASK_{name}", default))
            for name, default in (("ID", ""), ("COUNT", ""), ("MIN", "0"), ("STEP", "1"))
        )
    except ValueError:
        return None
    part, rest = divmod(number - first, step)
    if rest or not 0 <= part < parts:
        raise CycloptsError(
            msg=f"SLURM_ARRAY_TASK_ID is {number} in an array of {parts} from {first} on; "
            "give --shard I/N"
        )
    return part + 1, parts


def gpus(text: str) -> tuple[int, ...] | Literal["all"]:
    """Parse numbers of GPUs joined by commas, or all."""
    if text == "all":
        return "all"
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(f"{text!r} are no GPUs; give all, or numbers such as 0,1")
    return tuple(dict.fromkeys(map(int, text.split(","))))


def norm(text: str) -> str:
    """Parse a norm in any spelling, such as Linf or L_2."""
    plain = text.lower().replace("_", "")
    if plain not in ("linf", "l2"):
        raise ValueError(f"{text!r} is not a norm; give linf or l2")
    return plain


def _reads(parse: Callable[[str], Any], metavar: str, **options: Any) -> Parameter:
    """Return how cyclopts reads an option of one word; ``parse`` may raise a ValueError."""

    def convert(type_: Any, tokens: Sequence[Token]) -> Any:
        return parse(tokens[-1].value)

    def show(default: Any) -> str:
        return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)

    return Parameter(
        converter=convert,
        n_tokens=1,
        accepts_keys=False,
        metavar=metavar,
        show_default=show,
        **options,
    )


Number: TypeAlias = Annotated[float, _reads(number, "X")]
Numbers: TypeAlias = Annotated[tuple[float, ...], _reads(numbers, "X,X,...")]
Radii: TypeAlias = Annotated[
    tuple[float, ...], _reads(numbers, "R,R,...", validator=InRange(gte=0))
]
BallSizes: TypeAlias = Annotated[
    tuple[float, ...], _reads(numbers, "E,E,...", validator=InRange(gt=0))
]
Widths: TypeAlias = Annotated[tuple[int, ...], _reads(widths, "W,W,...")]
Names: TypeAlias = Annotated[tuple[str, ...], _reads(names, "A,A,...")]
Duration: TypeAlias = Annotated[float, _reads(duration, "TIME")]
Factory: TypeAlias = Annotated[str, _reads(factory, "FACTORY")]
Part: TypeAlias = Annotated[tuple[int, int], _reads(shard, "I/N")]
Gpus: TypeAlias = Annotated[tuple[int, ...] | Literal["all"], _reads(gpus, "all|I,I,...")]
Model: TypeAlias = Annotated[str, _reads(factory, "NAME")]
Norm: TypeAlias = Annotated[Literal["linf", "l2"], _reads(norm, "NORM")]

MODEL, DATA, SAMPLING, TRAINING, RUN = (
    Group(title, sort_key=order)
    for order, title in enumerate(("Model", "Data", "Sampling", "Training", "Run"), start=1)
)


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Where a network runs.

    Attributes:
        device: Device: cpu, cuda, cuda:1, ...; auto uses a GPU if there is one.
    """

    device: Annotated[str, more(MODEL)] = "auto"

    def find_device(self) -> "torch.device":
        """Return the device."""
        from art_denoised.models.loading import find_device

        return find_device(self.device)

    def spread(self) -> tuple[str, ...]:
        """Return the devices that several workers share: all GPUs, unless one is named."""
        import torch

        if self.device not in ("auto", "cuda") or self.find_device().type != "cuda":
            return ()
        return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Which weights a named network has, and what it expects of images.

    Attributes:
        weights: Weights of the network (.safetensors, .pth, .tar). Those of train-robust bring
            their denoising blocks and activations.
        num_classes: Number of classes of --weights, for a network of timm, torchvision or hf.
        mean: Mean of each channel that the network expects to be subtracted. By default what the
            library of the network says; your function normalises by itself.
        std: Standard deviation of each channel, with --mean.
    """

    weights: Annotated[Path | None, Parameter(metavar="FILE")] = None
    num_classes: Annotated[int | None, more(MODEL), Parameter(metavar="N")] = None
    mean: Annotated[Numbers | None, more(MODEL)] = None
    std: Annotated[Numbers | None, more(MODEL)] = None

    @property
    def given(self) -> list[str]:
        """The options that were given, as the command line spells them."""
        names = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        return [f"--{name.replace('_', '-')}" for name in names]

    def build(self, name: str, *, pretrained: bool = True) -> "nn.Module":
        """Return the network of this name; without weights it has published or random ones."""
        from art_denoised.models.loading import build_classifier
        from art_denoised.networks.surgery import load_trained

        network = build_classifier(
            name,
            pretrained=pretrained and self.weights is None,
            num_classes=self.num_classes,
            mean=self.mean,
            std=self.std,
        )
        return network if self.weights is None else load_trained(network, self.weights)


PLAIN_NETWORK = NetworkOptions()


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True, kw_only=True)
class ModelOptions(DeviceOptions):
    """Which network, and where it runs.

    Attributes:
        model: Network in eval mode that takes images in [0, 1] and returns logits: your class or
            function package.module:NAME, found from the current folder, which normalises by itself
            or by --mean; or timm:NAME, torchvision:NAME, hf:OWNER/NAME,
            robustbench:NAME:DATASET:THREAT.
        network: Its weights, and what it expects.
        optimize: Make the network faster: fold puts batch norms into convolutions; compile does
            that and compiles it. Results are those of the faster network, which a user deploys.
        denoiser: Function that returns a denoiser(x_noisy, sigma), or a checkpoint of DnCNN, MemNet
            or a U-Net (.safetensors, .pth, .tar, diffusers folder). By default there is none: plain
            smoothing.
        dtype: Type the network computes in; a certificate is one of the network in this type. By
            default the type of its weights.
    """

    model: Model
    network: NetworkOptions = PLAIN_NETWORK
    optimize: Annotated[Literal["fold", "compile"] | None, more(MODEL)] = None
    denoiser: Annotated[Factory | None, Parameter(metavar="FACTORY|FILE")] = None
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, more(MODEL)] = None

    @property
    def identity(self) -> dict[str, Any]:
        """What a log says of the choice."""
        chosen = {} if self.optimize is None else {"optimize": self.optimize}
        # A log has the hash of the weights, in their type.
        return {"model": self.model, **chosen, "denoiser": self.denoiser}

    def load(self) -> "nn.Module":
        """Return the classifier on its device."""
        return self._in_type(self.network.build(self.model).to(self.find_device()))

    def load_denoiser(self, sigma: float) -> "nn.Module | None":
        """Return the denoiser, if one is named."""
        from art_denoised.denoisers.denoisers import load_denoiser

        if self.denoiser is None:
            return None
        with notices(UserWarning):
            denoiser = load_denoiser(self.denoiser, sigma=sigma)
        return self._in_type(denoiser.to(self.find_device()))

    def denoised(
        self, classifier: "nn.Module", denoiser: "nn.Module | None", sigma: float
    ) -> "nn.Module":
        """Return the classifier behind the denoiser, if there is one: what noisy images go to."""
        from art_denoised.smoothing.smoother import DenoisedClassifier

        if denoiser is None:
            return classifier
        return DenoisedClassifier(classifier, denoiser, sigma=sigma)

    def optimized(self, network: "nn.Module", shape: Sequence[int]) -> "nn.Module":
        """Return a network that takes images of a shape, faster if that is asked for."""
        from art_denoised.networks.optimizing import optimize

        if self.optimize is None:
            return network
        half: Any = None if self.dtype == "float32" else self.dtype
        return optimize(
            network, dtype=half, compile=self.optimize == "compile", input_shape=tuple(shape)
        )

    def _in_type(self, network: "nn.Module") -> "nn.Module":
        import torch

        later = self.optimize is not None and self.dtype != "float32"  # rounded once folded
        if self.dtype is None or later:
            return network
        return network.to(getattr(torch, self.dtype))


@Parameter(name="*", group=DATA)
@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which images.

    Attributes:
        data: Images with labels: digits, imagefolder:DIR, npz:FILE or torchvision:NAME:DIR.
        skip: Interval between images: every K-th image of the data set is used.
        max: Largest number of images: a random sample of all, the same in every run.
        classes: File with the names of an image folder's classes, one a line in the order of the
            labels; synonyms follow a name after commas. By default the names of its folders, in
            their order.
        resize: Length of the shorter side that photographs are resized to. By default as the
            library of the network says, or to the size of a diffusion model that denoises; for
            imagefolder and torchvision:ImageNet.
        crop: Side of the square that is cut from their centre. By default as the library of the
            network says, or --resize.
        shard: Part I of N equal parts of these images, for one of N machines; the merge command
            joins the parts. By default that of the task in a SLURM array, if this is one; 1/1
            takes all images.
    """

    data: Annotated[str, Parameter(metavar="DATA")]
    skip: Annotated[int, more(DATA), Parameter(metavar="K")] = 1
    max: Annotated[int | None, Parameter(metavar="M")] = None
    classes: Annotated[Path | None, more(DATA), Parameter(metavar="FILE")] = None
    resize: Annotated[int | None, more(DATA), Parameter(metavar="PIXELS")] = None
    crop: Annotated[int | None, more(DATA), Parameter(metavar="PIXELS")] = None
    shard: Annotated[Part | None, more(DATA)] = None

    def identity(self, network: "nn.Module", denoiser: "nn.Module | None" = None) -> dict[str, Any]:
        """What a log says of the choice."""
        chosen = {"data": self.data, "skip": self.skip, "max": self.max}
        transform = self.transform(network, denoiser)
        return chosen if transform is None else {**chosen, "transform": str(transform)}

    def transform(
        self, network: "nn.Module", denoiser: "nn.Module | None" = None
    ) -> "EvalTransform | None":
        """Return how photographs become the input of a network, if they are changed at all."""
        from art_denoised.models.loading import EvalTransform, eval_transform, image_size

        known = eval_transform(network)
        side = image_size(denoiser) if known is not None else None
        if known is not None and side is not None:  # what it returns is resized to the network's
            known = EvalTransform(side, (side, side), known.interpolation)
        if self.resize is not None or self.crop is not None:
            if known is None:  # the one that is given stands for both
                side = self.resize if self.crop is None else self.crop
                known = EvalTransform(side or 0, (side or 0, side or 0))
            resize = known.resize if self.resize is None else self.resize
            crop = known.crop if self.crop is None else (self.crop, self.crop)
            return EvalTransform(resize, crop, known.interpolation)
        return known if self.data.startswith(("imagefolder:", "torchvision:ImageNet:")) else None

    def load(
        self, network: "nn.Module", denoiser: "nn.Module | None" = None
    ) -> "tuple[ImageData, Sequence[int]]":
        """Return the data as the network expects them, and the indices of the chosen images."""
        from art_denoised.data import Shard, load_data, read_classes, select

        names = None if self.classes is None else read_classes(self.classes)
        transform = self.transform(network, denoiser)
        data: Any = load_data(self.data, classes=names, transform=transform)
        if transform is not None:
            notice(f"photographs: {transform}")
        if self.data.startswith("imagefolder:"):  # labels follow from the names of its folders
            named = [f"{label} {name}" for label, name in enumerate(data.classes)]
            notice("classes: " + ", ".join(named[:20]) + (", ..." if len(named) > 20 else ""))
            if names is None and list(data.classes) != sorted(data.classes, key=_number_of):
                notice(
                    "names of folders are sorted as text, so 10 comes before 2; give the order of "
                    "the network's labels by --classes FILE, if it is another"
                )
        indices, part = select(data, self.skip, self.max), self.shard
        if part is None and (part := slurm_shard(os.environ)) is not None:
            notice(
                f"this is shard {part[0]}/{part[1]}, from SLURM_ARRAY_TASK_ID; "
                "pass --shard 1/1 for all images"
            )
        return data, indices if part in (None, (1, 1)) else Shard(indices, *part)


def _number_of(folder: str) -> tuple[int, str]:
    """Return the key by which folders that are named by numbers are in the order of these."""
    return (int(folder) if folder.isdecimal() else 0, folder)


def image_shape(data: "ImageData", indices: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the first image of a run, of all its shards."""
    from art_denoised.data import Shard
    from art_denoised.data.images import Chosen

    whole = indices.whole if isinstance(indices, Shard) else indices
    return tuple(Chosen(data)[whole[0]][0].shape)


@Parameter(name="*", group=folded("Workers", 4))
@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """What computes. No result depends on it.

    Attributes:
        workers: Number of processes, each with a copy of the network, in turn on the GPUs that
            there are. By default one, with --gpus one for each GPU, with --cluster as many as there
            is room for. With certify --api the number of queries at once, by default 4.
        gpus: GPUs of this machine that the processes use in turn: all, or numbers such as 0,1.
        cluster: Ray cluster whose actors compute: auto, or an address such as ray://HOST:10001.
            auto takes the cluster that runs on this machine, or starts one.
        allow_mixed: Accept workers with other models of GPU or CPU than this process, on which
            votes close to a tie may depend; the log says so.
    """

    workers: Annotated[int | None, Parameter(metavar="N")] = None
    gpus: Gpus | None = None
    cluster: Annotated[str | None, Parameter(metavar="ADDRESS")] = None
    allow_mixed: bool = False

    def __post_init__(self) -> None:
        """Refuse options that exclude each other."""
        if self.gpus is not None and self.cluster is not None:
            raise CycloptsError(
                msg="--gpus names GPUs of this machine; leave it out with --cluster"
            )

    def place(self, build: Callable[[], Any], device: DeviceOptions) -> "Place | None":
        """Return where workers run that call ``build`` for their network; None: there are none."""
        from art_denoised.runs import Cluster, Workers

        mixed = self.allow_mixed
        if self.cluster is not None:
            return Cluster(self.cluster, self.workers, build, allow_mixed=mixed)
        if self.gpus is None and self.workers in (None, 1):
            return None
        devices = device.spread() if self.gpus is None else self._gpus()
        count = len(devices) if self.workers is None else self.workers
        return Workers(count, build, devices, allow_mixed=mixed)

    def _gpus(self) -> tuple[str, ...]:
        import torch

        known = range(torch.cuda.device_count())
        chosen = known if self.gpus == "all" else self.gpus or ()
        if not chosen or not set(chosen) <= set(known):
            asked = "all" if self.gpus == "all" else ",".join(map(str, chosen))
            raise CycloptsError(
                msg=f"--gpus is {asked}, and this machine has {len(known)} GPUs; name some of them"
            )
        return tuple(f"cuda:{number}" for number in chosen)


@Parameter(name="*", group=RUN)
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run is written.

    Attributes:
        out: Folder of the run.
        resume: Continue the run in that folder.
        quiet: Show no progress.
        json: Print the result as JSON.
    """

    out: Annotated[Path, Parameter(metavar="DIR")]
    resume: bool = False
    quiet: Annotated[bool, more(RUN)] = False
    json: bool = False

    def check(self, kind: str) -> None:
        """Refuse a folder that holds such a run already, before anything is loaded."""
        from art_denoised.runs.journal import refuse_existing

        if not self.resume:
            refuse_existing(self.out, kind)

    @property
    def arguments(self) -> dict[str, Any]:
        """The same as arguments of a function that writes a run."""
        return {"run": self.out, "resume": self.resume, "progress": not self.quiet}
