"""Networks by name, and their weights, which are read without executing anything.

Names are those of timm, torchvision, transformers and RobustBench, or of functions and files.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import pickle
import struct
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from art_denoised import checks
from art_denoised.checks import InputError, one_line
from art_denoised.types import Images, Logits

if TYPE_CHECKING:
    from PIL.Image import Image

# First bytes of what is a pickle: the zip that torch.save writes, or a bare one.
_PICKLES = (b"PK", b"\x80")
# DataParallel adds "module.", torch.compile "_orig_mod.", Lightning and many wrappers "model.", and
# a Sequential(normalise, network) numbers its network 1.
_PREFIXES = ("module.", "_orig_mod.", "model.", "1.")
_PUBLISHED = "art-denoised"  # before the name of weights that this project publishes
_WRAPPED = "network."  # prefix of all names in a `PretrainedClassifier`
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # names of the state dict in a file
_DAMAGED = (  # how torch.load fails on a file that is cut off or of another format
    *(RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError),
    struct.error,
)
_INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
_LONGEST = 300  # characters of another library's message
_SUFFIXES = (".pt", ".pth", ".tar", ".safetensors", ".bin", ".ckpt")
NAMES = (
    "timm:NAME, torchvision:NAME[:WEIGHTS], hf:OWNER/NAME, robustbench:NAME:DATASET:THREAT or "
    "package.module:function"
)
_Statistics = tuple[Sequence[float], Sequence[float]] | None


@dataclass(frozen=True, slots=True)
class EvalTransform:
    """How a photograph becomes the input on which a classifier was evaluated.

    The shorter side is resized, then the centre is cut out, on 8-bit pixels as PIL does it.

    Attributes:
        resize: Length of the shorter side in pixels, or (height, width).
        crop: (height, width) of the centre in pixels.
        interpolation: Name of PIL's filter in lower case.

    Raises:
        InputError: A length below 1 or an unknown filter.

    Example:
        >>> from PIL import Image
        >>> EvalTransform(resize=256, crop=(224, 224))(Image.new("RGB", (640, 480))).size
        (224, 224)
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int]
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        """Refuse what PIL does not know."""
        checks.plain_fields(self)
        sides = (self.resize,) if isinstance(self.resize, int) else self.resize
        for name, lengths in (("resize", sides), ("crop", self.crop)):
            for length in lengths:
                checks.count(name, length)
        if max(self.crop[0] - sides[0], self.crop[1] - sides[-1]) > 0:
            raise InputError(f"crop is {self.crop}, but resize {self.resize}; give a smaller crop")
        checks.choice("interpolation", self.interpolation, _INTERPOLATIONS)

    def __str__(self) -> str:
        """Return it in words."""
        resize = self.resize if isinstance(self.resize, int) else "x".join(map(str, self.resize))
        crop = "x".join(map(str, self.crop))
        return f"resized to {resize}, cut to {crop}, {self.interpolation}"

    def __call__(self, image: Image) -> Image:
        """Return the resized and cut image, of the mode that it had."""
        from PIL import Image as Pil

        width, height = image.size
        if isinstance(self.resize, int):
            # The longer side is cut to whole pixels, as torchvision does it.
            short = min(width, height)
            size = (self.resize * width // short, self.resize * height // short)
        else:
            size = self.resize[::-1]
        if size != image.size:
            image = image.resize(size, Pil.Resampling[self.interpolation.upper()])
        top, left = (
            round((side - cut) / 2) for side, cut in zip(size[::-1], self.crop, strict=True)
        )
        return image.crop((left, top, left + self.crop[1], top + self.crop[0]))


class PretrainedClassifier(nn.Module):
    """A classifier of images in [0, 1], with its normalisation inside.

    Args:
        network: Network that takes normalised images and returns logits.
        mean: Mean of each channel, in units of [0, 1].
        std: Standard deviation of each channel.
        transform: How photographs become its input, where that is known.

    Attributes:
        network: The network.
        transform: The transform, or None.

    Raises:
        InputError: ``mean`` and ``std`` differ in number, or ``std`` is not positive.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
        >>> model = PretrainedClassifier(net, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        >>> model(torch.rand(4, 3, 1, 1)).shape
        torch.Size([4, 2])
    """

    # Not part of the state dict, which then holds the network's own names behind "network.".
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        transform: EvalTransform | None = None,
    ) -> None:
        super().__init__()
        mean, std = checks.numbers("mean", mean), checks.numbers("std", std)
        if len(mean) != len(std) or not len(mean):
            raise InputError(f"mean has {len(mean)} channels and std {len(std)}; give one of each")
        for name, values, least in (("mean", mean, 0.0), ("std", std, 1e-6)):
            for value in values:
                if not least <= value <= 1:
                    raise InputError(f"{name} holds {value}; give it for pixels in [0, 1]")
        self.network, self.transform = network, transform
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).reshape(1, -1, 1, 1), persistent=False)
        self.eval()

    @property
    def input_size(self) -> tuple[int, int] | None:
        """(height, width) on which it was evaluated, where that is known."""
        return None if self.transform is None else self.transform.crop

    def forward(self, x: Images) -> Logits:
        """Return logits for images in [0, 1].

        Raises:
            InputError: The images have another number of channels than ``mean``.
        """
        x = checks.batch(x)
        if x.shape[1] != self.mean.shape[1]:
            raise InputError(
                f"images have {x.shape[1]} channels, mean and std have {self.mean.shape[1]}; give "
                "one number for each channel, or convert the images"
            )
        return checks.unwrapped(self.network((x - self.mean) / self.std))


def eval_transform(model: nn.Module) -> EvalTransform | None:
    """Return the transform of the classifier in a model, behind whatever defends it."""
    found = (getattr(part, "transform", None) for part in model.modules())
    return next((one for one in found if isinstance(one, EvalTransform)), None)


def to_input_size(classifier: object, x: Images) -> Images:
    """Resize images of another size than the ``input_size`` of a classifier, where it has one."""
    size = getattr(classifier, "input_size", None)
    if size is None or x.shape[-2:] == torch.Size(size):
        return x
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # no CPU resizes those
    return F.interpolate(wide, size, mode="bicubic", antialias=True).clamp(0, 1).to(x.dtype)


def image_size(denoiser: nn.Module | None) -> int | None:
    """Return the side of the images of a diffusion model in a module, if it takes no others."""
    parts = [] if denoiser is None else denoiser.modules()
    sizes = (getattr(part, "image_size", None) for part in parts)
    return next((size for size in sizes if isinstance(size, int)), None)


def load_classifier(
    name: str,
    *,
    weights: Path | str | None = None,
    architecture: str | None = None,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """Load a classifier of images in [0, 1] by its name.

    Without ``weights``, published weights are read from the library's cache or fetched from its
    hub. Files are read without executing anything that they hold.

    Args:
        name: ``timm:NAME``, ``torchvision:NAME`` or ``torchvision:NAME:WEIGHTS``,
            ``hf:OWNER/NAME`` or ``hf:FOLDER`` that save_pretrained wrote (transformers),
            ``robustbench:NAME:DATASET:THREAT``,
            ``package.module:function`` (called without arguments), or a file of weights with
            ``architecture``.
        weights: File of weights, which takes the place of the published ones.
        architecture: One of the other names, for a file of weights.
        num_classes: Number of classes of ``weights``, where it is not the library's.
        mean: Mean of each channel that the network expects to be subtracted. None: what its
            library says; a function's network and RobustBench's normalise by themselves.
        std: Standard deviation of each channel; given with ``mean``.

    Returns:
        Module in eval mode that takes images in [0, 1] of its input size and returns logits. Where
        its library says how photographs become its input, ``.transform`` is an `EvalTransform`.

    Raises:
        InputError: The name is unknown, its library is not installed, its hub does not answer, or
            the weights cannot be read or do not fit.

    Example:
        >>> model = load_classifier("art_denoised.demo:digits_classifier")
        >>> model(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    if not isinstance(name, str):
        raise InputError(f"name is a {type(name).__name__}; give {NAMES}")
    if name.endswith(_SUFFIXES) and ":" not in Path(name).name:
        if architecture is None:
            raise InputError(f"{name} is a file of weights; give its architecture: {NAMES}")
        name, weights = architecture, name
    elif architecture is not None:
        raise InputError(
            f"architecture is {architecture!r}, but {name} is no file of weights; give one of them"
        )
    model = build_classifier(
        name, pretrained=weights is None, num_classes=num_classes, mean=mean, std=std
    )
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def build_classifier(
    name: str,
    *,
    pretrained: bool,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """Return the classifier of a name, with its published weights or as its library draws it."""
    if (mean is None) != (std is None):
        raise InputError("mean and std belong together; give both or none")
    library, _, rest = name.partition(":")
    if not rest:
        raise InputError(f"network is {name!r}; give {NAMES}")
    if library not in _LIBRARIES:
        if num_classes is not None:
            raise InputError(f"num_classes is {num_classes}, but {name} has its own; leave it out")
        model = load_module(name)
        if mean is None or std is None:
            return model
        return PretrainedClassifier(model, mean=mean, std=std)
    if num_classes is not None and pretrained:
        raise InputError(
            f"num_classes is {num_classes}, but the published weights of {name} have their own; "
            "give weights too"
        )
    options = (
        {} if num_classes is None else {"num_classes": checks.count("num_classes", num_classes, 2)}
    )
    network, known, transform = _LIBRARIES[library](rest, pretrained, options)
    found = (mean, std) if mean is not None and std is not None else known
    if found is None:
        return network.eval()
    return PretrainedClassifier(network, mean=found[0], std=found[1], transform=transform)


_Found = tuple[nn.Module, _Statistics, EvalTransform | None]


def _timm(name: str, pretrained: bool, options: dict[str, Any]) -> _Found:
    timm = _library("timm")
    checks.choice("timm model", name, [*timm.list_models(), *timm.list_pretrained()])
    with _told(f"timm:{name}"):
        network = timm.create_model(name, pretrained=pretrained, **options)
    config = timm.data.resolve_data_config({}, model=network)
    height, width = config["input_size"][1:]
    pct = config["crop_pct"]
    resize: int | tuple[int, int] = int(height / pct)
    if config["crop_mode"] == "squash" or height != width:
        resize = (int(height / pct), int(width / pct))
    transform = EvalTransform(resize, (height, width), config["interpolation"])
    return network, (config["mean"], config["std"]), transform


def _torchvision(name: str, pretrained: bool, options: dict[str, Any]) -> _Found:
    models = _library("torchvision.models")
    name, _, chosen = name.partition(":")
    checks.choice("torchvision model", name, models.list_models(module=models))
    weights = models.get_model_weights(name)
    chosen = chosen or "DEFAULT"
    checks.choice(f"weights of {name}", chosen, ["DEFAULT", *(one.name for one in weights)])
    published = weights[chosen]
    with _told(f"torchvision:{name}"):
        network = models.get_model(name, weights=published if pretrained else None, **options)
    preset = published.transforms()
    crop, resize = preset.crop_size[0], preset.resize_size[0]
    transform = EvalTransform(resize, (crop, crop), preset.interpolation.value)
    return network, (preset.mean, preset.std), transform


def _transformers(name: str, pretrained: bool, options: dict[str, Any]) -> _Found:
    library = _library("transformers")
    if options:
        options = {"num_labels": options["num_classes"]}
    auto = library.AutoModelForImageClassification
    with _told(f"hf:{name}"):
        if pretrained:
            network, found = auto.from_pretrained(
                name, use_safetensors=True, output_loading_info=True
            )
            if drawn := sorted(found["missing_keys"]):
                raise InputError(f"hf:{name} holds no {drawn[0]}; give a trained classifier")
        else:
            network = auto.from_config(library.AutoConfig.from_pretrained(name, **options))
        processor = library.AutoImageProcessor.from_pretrained(name)
    if getattr(processor, "do_flip_channel_order", False):
        raise InputError(f"hf:{name} takes blue, green, red; convert in a function of your own")
    known = ((0.0,) * 3, (1.0,) * 3)
    if processor.do_normalize:
        known = (tuple(processor.image_mean), tuple(processor.image_std))
    return network, known, _of_processor(processor)


def _of_processor(processor: Any) -> EvalTransform | None:
    """Return what an image processor of transformers does to photographs."""
    from PIL.Image import Resampling

    if not processor.do_resize:
        return None
    size = {name: side for name, side in dict(processor.size).items() if side}
    how = Resampling(int(processor.resample)).name.lower()
    if size.keys() == {"height", "width"}:
        resize: int | tuple[int, int] = (size["height"], size["width"])
    elif size.keys() == {"shortest_edge"}:
        resize = size["shortest_edge"]
    else:
        return None
    if getattr(processor, "do_center_crop", False):
        cut = processor.crop_size
        return EvalTransform(resize, (cut["height"], cut["width"]), how)
    if isinstance(resize, tuple):
        return EvalTransform(resize, resize, how)
    crop, share = (resize, resize), getattr(processor, "crop_pct", None)
    if share is None:
        return None  # the longer side stays as it is
    # ConvNeXt's; larger inputs are not cut.
    return EvalTransform(int(resize / share) if resize < 384 else crop, crop, how)


def _robustbench(name: str, pretrained: bool, options: dict[str, Any]) -> _Found:
    utils = _library("robustbench.utils")
    parts = name.split(":")
    if len(parts) != 3:
        raise InputError(f"network is robustbench:{name}; give robustbench:NAME:DATASET:THREAT")
    if options or not pretrained:
        raise InputError(f"robustbench:{name} comes with its weights; leave weights out")
    model, data, threat = parts
    with _told(f"robustbench:{name}"):
        network = utils.load_model(model_name=model, dataset=data, threat_model=threat)
    return network, None, None


_LIBRARIES: dict[str, Callable[[str, bool, dict[str, Any]], _Found]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _transformers,
    "robustbench": _robustbench,
}


def list_classifiers(pattern: str = "*") -> list[str]:
    """Return the names of classifiers that the libraries installed here know.

    Names of Hugging Face and of RobustBench are not listed: their lists are on the net.

    Args:
        pattern: Pattern of names, with * and ?; a word without them is looked for anywhere.

    Example:
        >>> "torchvision:resnet18" in list_classifiers("resnet18")
        True
    """
    pattern = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    names = []
    with contextlib.suppress(InputError):
        names += [f"timm:{name}" for name in _library("timm").list_pretrained()]
    with contextlib.suppress(InputError):
        models = _library("torchvision.models")
        names += [f"torchvision:{name}" for name in models.list_models(module=models)]
    forms = (pattern, f"*:{pattern}")  # with the name of the library and without
    return [name for name in names if any(fnmatch(name, form) for form in forms)]


def _library(name: str) -> Any:
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name == package:
            remedy = f"{package} is not installed; install it with: pip install {package}"
        else:
            remedy = f"{package} cannot be imported ({one_line(error)}); install what it lacks"
        raise InputError(remedy) from None


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Say in one line what a library could not do, whatever it raises, logs and prints."""
    hub = logging.getLogger("huggingface_hub")  # which logs each of its attempts
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch.hub prints where results belong
            yield
    except InputError:
        raise
    except Exception as error:
        line = one_line(error)
        line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
        raise InputError(f"{name} cannot be loaded: {type(error).__name__}: {line}") from error
    finally:
        hub.setLevel(level)


def load_module(name: str) -> nn.Module:
    """Call the function ``package.module:function`` and return the module that it makes.

    Args:
        name: Name of the function, which is found from the current folder too and is called
            without arguments.

    Raises:
        InputError: It cannot be imported, fails, or returns something else than a module.

    Example:
        >>> type(load_module("art_denoised.demo:digits_denoiser")).__name__
        'DnCNN'
    """
    module_name, colon, factory_name = name.partition(":")
    if not (colon and module_name and factory_name):
        raise InputError(f"network is {name!r}; give package.module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except Exception as error:  # whatever the module runs while it is imported
        known = isinstance(error, (ImportError, AttributeError))
        kind = "" if known else f"{type(error).__name__}: "
        raise InputError(f"{name} cannot be imported: {kind}{one_line(error)}") from error
    try:
        module = factory()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name}() failed: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{name}() returned {type(module).__name__}; return an nn.Module")
    return module


def find_device(name: str) -> torch.device:
    """Return a device that works here.

    Args:
        name: Name of the device, as torch knows it; "auto" is a GPU if there is one, else the CPU.

    Raises:
        InputError: There is no such device.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # the meta device has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name} cannot be used here: {one_line(error)}") from None
    return device


def read_state_dict(path: Path | str) -> dict[str, Tensor]:
    """Read named tensors from a .safetensors file or a torch checkpoint, executing nothing.

    Args:
        path: A .safetensors file, or a file of torch.save (.pt, .pth, .tar) that holds a state
            dict, or a dictionary with one under ``state_dict``, ``model_state_dict``, ``model`` or
            ``net``.

    Returns:
        Name -> tensor, on the CPU.

    Raises:
        InputError: The file is missing, damaged, holds no tensors, or needs unsafe unpickling.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"epoch": 3, "state_dict": {"w": torch.ones(2)}}, folder + "/a.pth.tar")
        ...     read_state_dict(folder + "/a.pth.tar")
        {'w': tensor([1., 1.])}
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist; give a file")
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if isinstance(found, Mapping):
        inside = [name for name in _WRAPPERS if isinstance(found.get(name), Mapping)]
        if len(inside) > 1:
            raise InputError(
                f"checkpoint {path} holds weights under {' and '.join(inside)}; save one of them"
            )
        found = found[inside[0]] if inside else found
    if not (
        isinstance(found, Mapping)
        and found
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())
    ):
        raise InputError(f"checkpoint {path} holds no state dict; save model.state_dict()")
    return {name: checks.dense(f"{name} of checkpoint {path}", v) for name, v in found.items()}


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            tied = file.metadata() or {}
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"checkpoint {path} is not a safetensors file: {error}") from None
    # Of tensors that share memory safetensors.save_model writes one, and notes the others' names.
    return state | {name: state[kept] for name, kept in tied.items() if kept in state}


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():  # about what is refused below anyway
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            is_pickle = file.read(2).startswith(_PICKLES)
        if is_pickle and "weights only" in str(error).lower():
            raise InputError(
                f"checkpoint {path} needs unsafe unpickling, which could run any code; "
                "where you trust it, convert its state dict to safetensors"
            ) from None
    except PermissionError:
        raise InputError(f"checkpoint {path} cannot be read; check its permissions") from None
    except _DAMAGED:
        pass
    raise InputError(f"checkpoint {path} is damaged or of another format; give an intact copy")


def find_published(source: Path | str) -> Path | str:
    """Return the path of weights that this project names ``art-denoised:NAME``; others unchanged.

    They are in the folder ``results`` of a clone, in the current folder or beside the package.
    """
    prefix, colon, name = str(source).partition(":")
    if not colon or prefix != _PUBLISHED:
        return source
    roots = (Path("results"), Path(__file__).parents[2] / "results")
    root = next((one for one in roots if (one / "weights.json").is_file()), None)
    if root is None:
        raise InputError(f"art-denoised:{name} is part of a clone; give the path of its weights")
    known = json.loads((root / "weights.json").read_text(encoding="utf-8"))
    entry = known[checks.choice("published weights", name, known)]
    weights = root / entry["weights"]
    found = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else ""
    if found != entry["sha256"]:
        raise InputError(f"{weights} is not the published file; restore it with git checkout")
    return root / entry["path"]


def load_weights(module: nn.Module, path: Path | str) -> None:
    """Load a checkpoint into a module of your own.

    Prefixes that wrappers give to all names are stripped: ``module.``, ``_orig_mod.``, ``model.``
    and ``1.``.

    Args:
        module: Module that receives the weights in its own dtype; it is not changed where they do
            not fit.
        path: File that `read_state_dict` reads.

    Raises:
        InputError: The file cannot be read, or its names or shapes do not fit.

    Example:
        >>> import tempfile
        >>> layer = nn.Linear(2, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"1.module." + k: v for k, v in layer.state_dict().items()},
        ...                folder + "/a.pth")
        ...     load_weights(layer, folder + "/a.pth")
    """
    module.load_state_dict(fitting_state(module, read_state_dict(path), path))


def fitting_state(
    module: nn.Module, state: dict[str, Tensor], path: Path | str
) -> dict[str, Tensor]:
    """Return ``state`` under the names of ``module``, which it must fit."""
    own: Any = module.state_dict()
    state = strip_prefixes(state, own.keys())
    if all(name.startswith(_WRAPPED) for name in own) and state.keys() != own.keys():
        state = {_WRAPPED + name: value for name, value in state.items()}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise InputError(
            f"checkpoint {path} does not match {type(module).__name__}: keys "
            f"{' and '.join(parts)}; give the architecture that was trained"
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise InputError(
                f"checkpoint {path} does not match {type(module).__name__}: {name} has shape "
                f"{tuple(state[name].shape)}, not {tuple(tensor.shape)}; give the trained "
                "architecture"
            )
        if tensor.is_floating_point() and not state[name].is_floating_point():
            raise InputError(
                f"checkpoint {path} holds {name} as {state[name].dtype}; "
                "give floating-point weights"
            )
    versioned: Any = OrderedDict(state)
    versioned._metadata = own._metadata  # modules such as torchvision's MNASNet ask for a version
    found: dict[str, Tensor] = versioned
    return found


def strip_prefixes(state: dict[str, Tensor], wanted: object) -> dict[str, Tensor]:
    """Strip known prefixes that all names share, until the names are those wanted."""
    while state.keys() != wanted:
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): value for name, value in state.items()}
                break
        else:
            break
    return state
