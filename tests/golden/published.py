"""Outputs of the reference implementations of published diffusion models, on random weights.

    python -m tests.golden.published --guided DIR --improved DIR --edm DIR --rdc DIR

runs openai/guided-diffusion, openai/improved-diffusion, NVlabs/edm and
huanranchen/DiffusionClassifier from clones of them, and writes tests/golden/published-*.json.
`tests/diffusion/test_openai.py`, `test_edm.py` and `tests/rdc/test_chen2024.py` compute the same
with this package. Weights and images follow from `weights` and `normal`, whose generator does not
change between versions of numpy. Each figure is one of 16 entries of an output.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
BOTH = (False, True)

# --- OpenAI --------------------------------------------------------------------------------------
HEADS: tuple[dict[str, int], ...] = (
    {"num_heads": 1},
    {"num_heads": 4, "num_heads_upsample": 2},
    {"num_head_channels": 16},
)
SWITCHES = ("resblock_updown", "use_scale_shift_norm", "use_new_attention_order", "class_cond")
SMALL = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2"}
SMALL |= {"attention_resolutions": "8"}
SCHEDULES = list(itertools.product((1000, 4000), ("linear", "cosine"), BOTH))
CLASSES = [3, 999]


def openai_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every combination of switches and heads at size 16, and larger images."""
    names = (*SWITCHES, "learn_sigma")
    for i, (heads, *values) in enumerate(itertools.product(HEADS, *(BOTH for _ in names))):
        yield f"flags-{i}", {**SMALL, **heads, **dict(zip(names, values, strict=True))}
    small = {"num_channels": 32, "num_res_blocks": 1, "num_head_channels": 32}
    yield "size-32", {**small, "image_size": 32, "channel_mult": "1,2,2,2"}
    yield "size-64", {**small, "image_size": 64, "attention_resolutions": "32,16"}


def schedule_flags(steps: int, schedule: str, rescale: bool) -> dict[str, Any]:
    """Flags of a U-Net that both repositories can build."""
    flags = {"image_size": 32, "num_channels": 32, "num_res_blocks": 1, "learn_sigma": True}
    times = {"diffusion_steps": steps, "noise_schedule": schedule, "rescale_timesteps": rescale}
    return {**flags, **times, "attention_resolutions": "8"}


def steps_of(steps: int) -> Tensor:
    """The steps at which x0 is compared."""
    return torch.tensor([0, steps // 10, steps // 2, steps * 9 // 10])


# --- EDM -----------------------------------------------------------------------------------------
def edm_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """SongUNet with each encoder, decoder and embedding, and DhariwalUNet."""
    small = {"img_resolution": 16, "img_channels": 3, "model_channels": 16, "num_blocks": 2}
    small |= {"channel_mult": [1, 2, 2], "attn_resolutions": [8], "augment_dim": 9}
    plus = {"embedding_type": "positional", "channel_mult_noise": 1, "resample_filter": [1, 1]}
    ncsn = {"embedding_type": "fourier", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]}
    encoders, decoders = ("standard", "skip", "residual"), ("standard", "skip")
    for encoder, decoder in itertools.product(encoders, decoders):
        types_of = {"encoder_type": encoder, "decoder_type": decoder, "model_type": "SongUNet"}
        yield f"ddpmpp-{encoder}-{decoder}", {**small, **plus, **types_of}
        yield f"ncsnpp-{encoder}-{decoder}", {**small, **ncsn, **types_of, "label_dim": 5}
    adm = {**small, "model_type": "DhariwalUNet", "attn_resolutions": [16, 8]}
    for width, labels in itertools.product((32, 64), (0, 5)):
        yield f"adm-{width}-{labels}", {**adm, "model_channels": width, "label_dim": labels}


CIFAR10 = {"img_resolution": 32, "img_channels": 3, "model_type": "SongUNet", "augment_dim": 9}
CIFAR10 |= {"model_channels": 128, "channel_mult": [2, 2, 2], "dropout": 0.13}
PLUS = {"resample_filter": [1, 1], "channel_mult_noise": 1}
NCSN = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2}
FULL_SIZE = {  # of EDM, as its train.py builds them
    "cifar10-cond-vp": {**CIFAR10, **PLUS, "label_dim": 10},
    "cifar10-uncond-vp": {**CIFAR10, **PLUS},
    "cifar10-uncond-ve": {**CIFAR10, **NCSN, "resample_filter": [1, 3, 3, 1]},
    "imagenet64-cond-adm": {"img_resolution": 64, "img_channels": 3, "label_dim": 1000},
}

# --- RDC -----------------------------------------------------------------------------------------
RDC_NETWORK = {"img_resolution": 8, "img_channels": 3, "model_type": "SongUNet"}
RDC_NETWORK |= {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "label_dim": 4}
RDC_UNCONDITIONAL = {**RDC_NETWORK, "label_dim": 0}
RDC_LEVELS, RDC_SEED = 70, 3  # more than the 64 that the reference takes at once


# --- what both sides share -----------------------------------------------------------------------
def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers."""
    values = np.random.RandomState(seed).standard_normal(shape)
    return torch.from_numpy(values.astype(np.float32))


def weights(module: nn.Module, seed: int = 0, prefix: str = "") -> None:
    """Give a module random weights that depend on names and shapes alone."""
    state = {name.removeprefix(prefix): value for name, value in module.state_dict().items()}
    numbers = np.random.RandomState(seed)
    filled = {}
    for name, value in sorted(state.items()):
        drawn = torch.from_numpy(numbers.standard_normal(value.shape).astype(np.float32))
        if value.ndim > 1:
            drawn = drawn / math.sqrt(value[0].numel())
        elif name.endswith("freqs"):
            drawn = 16 * drawn
        else:
            drawn = 0.1 * drawn + name.endswith("weight")
        filled[prefix + name] = value if name.endswith("resample_filter") else drawn
    module.load_state_dict(filled)


def figures(output: Tensor) -> list[float]:
    """Sixteen entries of an output, spread over it."""
    flat = output.detach().double().flatten()
    return [float(f"{flat[i]:.8g}") for i in torch.linspace(0, len(flat) - 1, 16).long()]


def frozen(name: str) -> Any:
    """Return what was written."""
    return json.loads((HERE / f"published-{name}.json").read_text())


def parameters(module: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in module.parameters())


# --- the reference implementations ---------------------------------------------------------------
def openai(guided: Path, improved: Path) -> dict[str, Any]:
    """Run both repositories of OpenAI."""
    sys.path[:0] = [str(guided), str(improved)]
    for absent in ("blobfile", "mpi4py"):  # their training needs them
        sys.modules.setdefault(absent, types.ModuleType(absent)).MPI = None  # type: ignore[attr-defined]
    modules = {
        name: importlib.import_module(f"{name}_diffusion.script_util")
        for name in ("guided", "improved")
    }

    def make(name: str, flags: dict[str, Any]) -> Any:
        defaults = modules[name].model_and_diffusion_defaults()
        return modules[name].create_model_and_diffusion(**{**defaults, **flags})

    found: dict[str, Any] = {"flags": {}, "x0": {}, "parameters": {}}
    for name, flags in openai_cases():
        unet, _ = make("guided", flags)
        weights(unet.eval())
        size = flags["image_size"]
        y = torch.tensor(CLASSES) if flags.get("class_cond") else None
        output = unet(normal(1, 2, 3, size, size), torch.tensor([10, 700]), y)[:, :3]
        found["flags"][name] = figures(output)
    for repository, schedule in itertools.product(modules, SCHEDULES):
        flags = schedule_flags(*schedule)
        extra = {"channel_mult": "1,2,2,2"} if repository == "guided" else {}
        unet, diffusion = make(repository, {**flags, **extra})
        weights(unet.eval())
        t = steps_of(flags["diffusion_steps"])
        x_t = diffusion.q_sample(normal(1, 4, 3, 32, 32), t, normal(2, 4, 3, 32, 32))
        answer = diffusion.p_mean_variance(unet, x_t, t, clip_denoised=False)["pred_xstart"]
        label = "-".join(map(str, (repository, *schedule)))
        found["x0"][label] = [figures(x0) for x0 in answer]
    from art_denoised.diffusion.openai import PUBLISHED

    for model in PUBLISHED:
        source = "guided" if "diffusion" in model.file or "lsun_" in model.file[:5] else "improved"
        source = "improved" if "uncond_100M" in model.file else source
        with torch.device("meta"):
            unet, _ = make(source, dict(model.flags))
        found["parameters"][model.name] = parameters(unet)
    return found


def edm(repository: Path) -> dict[str, Any]:
    """Run EDM."""
    sys.path.insert(0, str(repository))
    networks = importlib.import_module("training.networks")
    found: dict[str, Any] = {"D": {}, "parameters": {}}
    for name, config in edm_cases():
        net = networks.EDMPrecond(**config).eval()
        weights(net, prefix="model.")
        labels = config.get("label_dim", 0)
        y = torch.eye(5)[[1, 4]] if labels else None
        found["D"][name] = figures(net(normal(1, 2, 3, 16, 16), torch.tensor([0.3, 2.0]), y))
    for name, config in FULL_SIZE.items():
        with torch.device("meta"):
            found["parameters"][name] = parameters(networks.EDMPrecond(**config))
    return found


def rdc(repository: Path) -> dict[str, Any]:
    """Run the release of RDC on the noise that this package draws."""
    from art_denoised.diffusion import LevelNoise

    def package(name: str, folder: str) -> None:  # without its __init__, which imports everything
        module = types.ModuleType(name)
        module.__path__ = [str(repository / folder)]
        sys.modules[name] = module

    defence = "defenses/PurificationDefenses/DiffPure"
    package("utils", "utils")
    package("released_dc", f"{defence}/DiffusionClassifier")
    package("released_lm", f"{defence}/LikelihoodMaximization")
    package("released_edm", "models/unets/EDM")
    optimizer = types.ModuleType("optimizer")
    optimizer.DifferentiableAdam = None  # type: ignore[attr-defined]
    sys.modules["optimizer"] = optimizer
    torch.cuda.default_generators = (torch.default_generator,)  # type: ignore[assignment]
    sys.path.insert(0, str(repository / "models/unets/EDM"))  # its dnnlib
    released_dc = importlib.import_module("released_dc.EDMDC")
    released_lm = importlib.import_module("released_lm.EDMLM")
    networks = importlib.import_module("released_edm.edm_nets")

    def network(config: dict[str, Any], seed: int) -> Any:
        net = networks.EDMPrecond(**config).eval()
        weights(net, seed, prefix="model.")
        return net

    cpu = {"device": torch.device("cpu")}
    x = normal(4, 1, 3, 8, 8).mul(0.2).add(0.5).clamp(0, 1)
    unconditional = network(RDC_UNCONDITIONAL, 1)
    lm = released_lm.EDMEulerIntegralLM(released_dc.EDMEulerIntegralDC(unconditional, **cpu), **cpu)
    noise = LevelNoise(RDC_SEED, stream=(1,))
    drawn = iter(noise(x, [0] * 10, range(10)).split(1))
    levels = [next(drawn) if i % 2 == 0 else next(drawn).flatten()[:1] for i in range(10)]
    uniforms = iter([torch.special.ndtr(level) for level in levels[1::2]])
    steps = iter(levels[::2])
    lm.uniform_noise = lambda *_, begin, end: next(uniforms) * (end - begin) + begin
    released_lm.set_seed = lambda seed: None  # type: ignore[attr-defined]
    with patched(torch, "randn_like", lambda like: next(steps)):
        purified = lm.likelihood_maximization_T1(x)

    grid = torch.linspace(1e-4, 3, RDC_LEVELS + 1)
    dc = released_dc.EDMEulerIntegralDC(network(RDC_NETWORK, 0), timesteps=grid, **cpu)
    dc.share_noise, dc.target_class = True, list(range(4))
    eps = LevelNoise(RDC_SEED)(x, [0] * RDC_LEVELS, range(RDC_LEVELS))
    chunks = itertools.cycle(eps.split(64))
    with patched(torch, "randn", lambda *_, **__: next(chunks)):
        logits, alone = dc(purified), dc(x)
    found = {"images": figures(purified), "logits": logits.tolist(), "alone": alone.tolist()}
    return {**found, "moved": float((purified - x).abs().mean())}


class patched:  # noqa: N801
    """Replace an attribute for a while."""

    def __init__(self, owner: Any, name: str, value: Callable[..., Any]) -> None:
        self.owner, self.name, self.value = owner, name, value

    def __enter__(self) -> None:
        self.before = getattr(self.owner, self.name)
        setattr(self.owner, self.name, self.value)

    def __exit__(self, *_: object) -> None:
        setattr(self.owner, self.name, self.before)


def main() -> None:
    """Write the figures of the repositories that are given."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("guided", "improved", "edm", "rdc"):
        parser.add_argument(f"--{name}", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    with torch.no_grad():
        if given.guided and given.improved:
            found["openai"] = openai(given.guided, given.improved)
        if given.edm:
            found["edm"] = edm(given.edm)
        if given.rdc:
            found["rdc"] = rdc(given.rdc)
    for name, values in found.items():
        rows = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
        text = "{\n" + ",\n".join(rows) + "\n}\n"
        (HERE / f"published-{name}.json").write_text(text.replace("], ", "],\n "))


if __name__ == "__main__":
    main()
