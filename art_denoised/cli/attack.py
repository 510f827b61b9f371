"""The command that attacks a model."""

from __future__ import annotations

import ast
import contextlib
import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import CycloptsError, Group, Parameter

from art_denoised.cli.options import (
    MODEL,
    BallSizes,
    DataOptions,
    Factory,
    Model,
    ModelOptions,
    Names,
    Norm,
    Number,
    RunOptions,
    WorkerOptions,
    image_shape,
    more,
    notice,
    number,
    print_json,
    print_result,
)
from art_denoised.reports.terminal import escaped
from art_denoised.runs.progress import waiting

if TYPE_CHECKING:
    from torch import nn

    from art_denoised.data import ImageData
    from art_denoised.purification import Sampler

# Options that parts of AutoAttack have: others would be ignored. Those of APGD are steps and eot.
_TAKES = {
    "autoattack": ("steps", "queries", "eot"),
    "fab": ("steps",),
    "fab-t": ("steps",),
    "square": ("queries",),
}
_MEANT = {"iters": "steps", "iterations": "steps", "max_iter": "steps", "stepsize": "step_size"}
ATTACK = Group("Attack", sort_key=3)
DETERMINISTIC = ("autoattack",)
RANDOMISED = ("pgd:eot=20:loss=margin", "autoattack-rand", "square")


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True, kw_only=True)
class AttackedModelOptions(ModelOptions):
    """Which model is attacked.

    Attributes:
        undefended: The classifier without its defence, named as --model; a masking check tests that
            attacks on it do not transfer.
        noise: Noise of the defence: fixed, which the attacker knows, or fresh in every call. With
            fresh noise any model is evaluated as randomised. By default the model's own setting.
        gradients: Gradients to attack with, for defences that offer both: exact, bpda or
            exact,bpda. By default all that the defence offers.
        sigma: Noise level of certify: the smoothed classifier that certify certifies is attacked,
            with its --denoiser and --dtype.
        samples: Number of noisy copies that the smoothed classifier averages, by default 32.
        purify: Diffusion model that purifies images in front of the network: a diffusers folder, a
            file of EDM or OpenAI, a model of the Hugging Face hub, or a function.
        purification: Sampler of --purify with options after colons: ddpm, ddim (eta), sde, euler,
            heun or gdmp (scale); t or sigma, several joined by commas for several passes; steps,
            surrogate_steps, copies, vote (mean, majority). By default sde:t=0.1:steps=20.
    """

    undefended: Model | None = None
    noise: Annotated[Literal["fixed", "fresh"] | None, more(MODEL)] = None
    gradients: Annotated[Names | None, more(MODEL)] = None
    sigma: Number | None = None
    samples: Annotated[int | None, more(MODEL), Parameter(metavar="N")] = None
    purify: Annotated[Factory | None, more(MODEL), Parameter(metavar="FOLDER|FACTORY")] = None
    purification: Annotated[str | None, more(MODEL), Parameter(metavar="SAMPLER:OPTION=VALUE")] = (
        None
    )

    def __post_init__(self) -> None:
        """Refuse what needs noise without it, and two defences at once."""
        if self.purify is not None and (self.sigma is not None or self.denoiser is not None):
            raise CycloptsError(msg="--purify adds its own noise; leave out --sigma and --denoiser")
        if self.denoiser is not None and self.sigma is None:
            raise CycloptsError(msg="--denoiser needs noise; give --sigma as well")
        if self.samples is not None and self.sigma is None:
            raise CycloptsError(msg="--samples are of a classifier under noise; give --sigma too")
        if self.purification is not None and self.purify is None:
            raise CycloptsError(
                msg=f"--purification {self.purification} purifies with no model; give --purify too"
            )
        if self.dtype in ("bfloat16", "float16") and self.sigma is None:
            raise CycloptsError(
                msg=f"--dtype {self.dtype} is of a classifier under noise; give --sigma as well"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What a log says of the choice."""
        named = {"undefended": self.undefended}
        if self.purify is not None:
            named |= {"purify": self.purify, "purification": self._purification}
        return {**super().identity, **named}

    def load_defended(self, seed: int) -> nn.Module:
        """Return the network, alone or behind its defence.

        With --sigma that is the classifier under noise that certify certifies.
        """
        from art_denoised.smoothing.smoother import SmoothedClassifier

        if self.purify is not None:
            parse_purification(self._purification)  # what is wrong is found before all is loaded
        network = self.load()
        if self.purify is not None:
            return self._purified(network, seed)
        if self.sigma is None:
            return network
        network = self.denoised(network, self.load_denoiser(self.sigma), self.sigma)
        samples = 32 if self.samples is None else self.samples
        smoothed = SmoothedClassifier(network, sigma=self.sigma, samples=samples, seed=seed)
        return smoothed.eval()

    def optimized(self, network: nn.Module, shape: Sequence[int]) -> nn.Module:
        """Return the network, faster if that is asked for: what certify samples, under noise."""
        from art_denoised.smoothing.smoother import SmoothedClassifier

        if isinstance(network, SmoothedClassifier):
            network.base = super().optimized(network.base, shape)
            return network
        return super().optimized(network, shape)

    def build(self, seed: int, shape: Sequence[int]) -> nn.Module:
        """Return the same for a worker; remarks were made by its driver."""
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            return self.optimized(self.load_defended(seed), shape)

    @property
    def _purification(self) -> str:
        return "sde:t=0.1:steps=20" if self.purification is None else self.purification

    def _purified(self, network: nn.Module, seed: int) -> nn.Module:
        """Return the network behind a purification."""
        from art_denoised.diffusion.folders import load_diffusion
        from art_denoised.models.loading import load_module
        from art_denoised.purification.classifier import PurifiedClassifier
        from art_denoised.purification.purification import Purification

        sampler, options, voting = parse_purification(self._purification)
        source = str(self.purify)
        is_factory = ":" in source and not Path(source).exists()
        model: Any = load_module(source) if is_factory else load_diffusion(source)
        model = model.to(self.find_device()).eval()
        purification = Purification(model, sampler=sampler, seed=seed, **options)
        return PurifiedClassifier(purification, network, **voting).eval()

    def load_undefended(self) -> nn.Module | None:
        """Return the classifier without its defence, if it is named."""
        from art_denoised.models.loading import load_classifier

        if self.undefended is None:
            return None
        return load_classifier(self.undefended).to(self.find_device())


@Parameter(name="*", group=ATTACK)
@dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """Which attacks, and how they are evaluated.

    Attributes:
        eps: Radii of the balls, such as 8/255 or 0.5,1; pixels are in [0, 1].
        norm: Norm of the balls.
        attacks: Attacks, see above. By default autoattack; for randomised models
            pgd:eot=20:loss=margin,autoattack-rand,square.
        repeats: Number of evaluations of a randomised model with fresh noise.
        no_checks: Skip the masking checks; the result is then marked as not checked.
        preview: Only estimate forward passes, operations, memory and time; write no log.
        seed: Seed of all random choices.
        batch_size: Number of images attacked at once; random starts depend on it.
    """

    eps: BallSizes
    norm: Norm = "linf"
    attacks: Names | None = None
    repeats: Annotated[int, more(ATTACK)] = 10
    no_checks: Annotated[bool, more(ATTACK)] = False
    preview: bool = False
    seed: Annotated[int, more(ATTACK)] = 0
    batch_size: Annotated[int, more(ATTACK)] = 64

    def parse(self, names: Sequence[str]) -> list[tuple[str, Any]]:
        """Return these attacks, at each eps."""
        return parse_attacks(names, self.eps, self.norm)


_HERE = WorkerOptions()


def attack(
    *,
    model: AttackedModelOptions,
    data: DataOptions,
    attack: AttackOptions,
    workers: WorkerOptions = _HERE,
    run: RunOptions,
) -> None:
    r"""Attack a model, and check that its robust accuracy is reliable.

    Masking checks then look for signs that the attacks failed although the model
    is not robust; a failed check marks the result as not reliable. Rows are
    written to DIR/attack.jsonl as batches are finished.

    Attacks, joined by commas, with options after colons as in pgd:steps=100:eot=20:
      pgd                 PGD: steps, step_size, loss (ce, margin, dlr), restarts,
                          eot, targeted
      autoattack          AutoAttack's standard version, for deterministic models
      autoattack-rand     AutoAttack for randomised models: EOT over 20 draws
      apgd-ce apgd-dlr apgd-t fab fab-t square
                          its parts: steps (not square), eot (apgd), queries
                          (square)
      diffattack          PGD that drives --purify off its path: path_weight
      diffhammer          PGD on the draws of --purify that break together: eot
      torchattacks:NAME   any attack of torchattacks: torchattacks:PGD:steps=50
      art:NAME            any evasion attack of ART: art:HopSkipJump:max_iter=10

    The packaged digits classifier, in seconds:
      art-denoised attack --model art_denoised.demo:digits_classifier \
          --data digits --eps 0.05,0.1 --attacks pgd,apgd-ce,square:queries=200 \
          --max 50 --out runs/plain
      art-denoised report runs/plain

    A defence of your own, beside the classifier it protects; AutoAttack takes up
    to 7,000 forward passes an image, and --preview says what that costs:
      art-denoised attack --model mynets:defended --undefended mynets:resnet \
          --data imagefolder:val --eps 8/255 --attacks autoattack-rand,square \
          --max 500 --out runs/defended --preview

    Smoothed classifiers: --denoiser and --sigma as in certify, with --norm l2.
    Diffusion purifiers: docs/how-to/referee-a-purifier.md.
    """
    with waiting("loading PyTorch"):
        from art_denoised import checks
        from art_denoised.data import Shard
        from art_denoised.evaluation.attack import evaluate
        from art_denoised.evaluation.preview import preview_attack
        from art_denoised.reports.report import report

    # What is wrong with the attacks is found before anything is loaded.
    checks.count("seed", attack.seed, 0)
    checks.count("batch_size", attack.batch_size)
    attack.parse(attack.attacks or DETERMINISTIC)
    if not attack.preview:
        run.check("attack")
    with waiting("loading the network"):
        network, undefended = model.load_defended(attack.seed), model.load_undefended()
    denoisers = (getattr(part, "denoiser", None) for part in network.modules())
    denoiser = next(filter(None, denoisers), None)
    with waiting("loading the images"):
        images, indices = data.load(network, denoiser)
    named = {**model.identity, **data.identity(network, denoiser)}
    shape = image_shape(images, indices)
    network = model.optimized(network, shape)
    if isinstance(indices, Shard) and not attack.no_checks:
        notice("the masking checks need all shards; merge says how to make them")
    with waiting("calling the model repeatedly to detect randomness"):
        names = attack.attacks or _default_attacks(network, images, indices, model, attack)
    if attack.preview:
        with waiting("timing one batch"):
            cost = preview_attack(
                network,
                images,
                attack.parse(names),
                indices=indices,
                noise=model.noise,
                gradients=model.gradients,
                repeats=attack.repeats,
                batch_size=attack.batch_size,
            )
        print_result(asdict(cost), str(cost), json=run.json)
        return
    log = evaluate(
        network,
        images,
        attack.parse(names),
        repeats=attack.repeats,
        noise=model.noise,
        gradients=model.gradients,
        undefended=undefended,
        masking_checks=not attack.no_checks,
        seed=attack.seed,
        batch_size=attack.batch_size,
        indices=indices,
        identity=named,
        workers=workers.place(partial(model.build, attack.seed, shape), model),
        **run.arguments,
    )
    if run.json:
        print_json(report([run.out]).to_json())
        return
    if log.rows:
        report([run.out]).show()
    print(escaped(f"log: {run.out / 'attack.jsonl'}"))


def _default_attacks(
    network: nn.Module,
    data: ImageData,
    indices: Sequence[int],
    model: AttackedModelOptions,
    attack: AttackOptions,
) -> Sequence[str]:
    """Return attacks that suit the model: randomised models need EOT."""
    from art_denoised.data.images import Chosen, Shard
    from art_denoised.evaluation.target import LOOKED, Target

    whole = indices.whole if isinstance(indices, Shard) else indices
    x, _ = Chosen(data).stack(whole[:LOOKED])
    size, seed = attack.batch_size, attack.seed
    target = Target(network, x, noise=model.noise, repeats=1, seed=seed, batch_size=size)
    return RANDOMISED if target.randomised else DETERMINISTIC


def parse_attacks(specs: Sequence[str], eps: Sequence[float], norm: str) -> list[tuple[str, Any]]:
    """Return (name, attack) for each attack, such as ``pgd:steps=100:eot=20``, and each eps."""
    return [(spec, _parse(spec, radius, norm)) for spec in specs for radius in eps]


def _named_attacks() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return the class of each attack that has a name, and what else it is made with."""
    from art_denoised.attacks.pgd import PGD
    from art_denoised.attacks.purification import DiffAttack, DiffHammer
    from art_denoised.attacks.suites import PARTS, AutoAttack

    return {
        "pgd": (PGD, {}),
        "diffattack": (DiffAttack, {}),
        "diffhammer": (DiffHammer, {}),
        "autoattack": (AutoAttack, {"version": "standard"}),
        "autoattack-rand": (AutoAttack, {"version": "rand"}),
        **{part: (AutoAttack, {"parts": (part,)}) for part in PARTS},
    }


def _parse(spec: str, eps: float, norm: Any) -> Any:
    head, *rest = spec.split(":")
    if head in ("torchattacks", "art"):
        if not rest or not rest[0] or "=" in rest[0]:
            raise CycloptsError(
                msg=f"attack {spec!r} names no class; give {head}:NAME, such as "
                "torchattacks:Square or art:SquareAttack"
            )
        kind, options = rest[0], _options(spec, rest[1:])
        if head == "torchattacks":
            from art_denoised.attacks.suites import TorchAttack

            return TorchAttack(eps, norm=norm, kind=kind, options=options)
        from art_denoised.estimators.defended import ArtAttack

        return ArtAttack(eps, norm=norm, kind=kind, options=options)
    options, named = _options(spec, rest), _named_attacks()
    if head not in named:
        known = [*named, "torchattacks:NAME", "art:NAME"]
        raise CycloptsError(msg=f"there is no attack {head!r}; {_hint(head, known)}")
    attack, own = named[head]
    _check_options(spec, options, attack, _TAKES.get(head, ("steps", "eot")) if own else None)
    return attack(eps, norm=norm, **own, **options)


def parse_purification(spec: str) -> tuple[Sampler, dict[str, Any], dict[str, Any]]:
    """Return the sampler, and arguments of `Purification` and of `PurifiedClassifier`."""
    from art_denoised.purification.purification import named_sampler

    name, *rest = spec.split(":")
    options = _options(spec, rest)
    of_sampler = {"ddim": ("eta",), "gdmp": ("scale",)}.get(name, ())
    groups = (of_sampler, ("sigma", "t", "steps", "surrogate_steps"), ("copies", "vote"))
    known = [option for group in groups for option in group]
    for option in options:
        if option not in known:
            words = f"purification {spec!r} has no option {option!r}"
            raise CycloptsError(msg=f"{words}; {_hint(option, known)}")
    own, purification, voting = (
        {option: options[option] for option in group if option in options} for group in groups
    )
    return named_sampler(name, **own), purification, voting


def _options(spec: str, texts: Iterable[str]) -> dict[str, Any]:
    """Return the options after the colons of an attack or a sampler, each given once."""
    options: dict[str, Any] = {}
    for text in texts:
        name, value = _option(spec, text)
        if name in options:
            raise CycloptsError(msg=f"{spec!r} has the option {name!r} twice; give it once")
        options[name] = value
    return options


def _option(spec: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise CycloptsError(msg=f"{spec!r} has the option {text!r}; give name=value")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        pass
    try:
        return name, number(value)  # a fraction, such as 2/255
    except ValueError:
        if value.lower().lstrip("+-") in ("nan", "inf", "infinity"):
            raise CycloptsError(msg=f"{spec!r} has {text!r}; give a finite number") from None
        return name, value


def _check_options(
    spec: str, options: Iterable[str], attack: Any, taken: Sequence[str] | None = None
) -> None:
    given = {"eps", "norm", "seed", "parts", "version", "_"}  # by other options
    known = [field.name for field in fields(attack) if field.name not in given]
    known = [name for name in known if taken is None or name in taken]
    for name in options:
        if name not in known:
            meant = _MEANT.get(name, name)
            raise CycloptsError(
                msg=f"attack {spec!r} has no option {name!r}; {_hint(meant, known)}"
            )


def _hint(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"give one of {', '.join(known)}"
