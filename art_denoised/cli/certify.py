"""Commands that sample a smoothed classifier, here or behind a paid API: certify, predict, demo."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import CycloptsError, Parameter
from cyclopts.validators import Number as InRange

from art_denoised.cli.options import (
    RUN,
    SAMPLING,
    DataOptions,
    Duration,
    Model,
    ModelOptions,
    Number,
    Radii,
    RunOptions,
    WorkerOptions,
    folded,
    image_shape,
    more,
    notice,
    print_json,
    print_result,
)
from art_denoised.reports.terminal import escaped
from art_denoised.runs.progress import waiting

if TYPE_CHECKING:
    from torch import nn

    from art_denoised.data import ImageData
    from art_denoised.evaluation.logs import Log
    from art_denoised.evaluation.preview import Preview, QueryPreview
    from art_denoised.runs.workers import Place
    from art_denoised.smoothing import BlackBox
    from art_denoised.smoothing.smoother import Smoother
    from art_denoised.smoothing.stops import Anytime, AtRadii, FixedN
    from art_denoised.types import Classifier


@Parameter(name="*", group=folded("Paid API", 2))
@dataclass(frozen=True, kw_only=True)
class ApiOptions:
    """A classifier behind HTTP instead of --model.

    Attributes:
        api: URL of a service that takes a PNG in base64 in a JSON object, and answers in JSON.
        answer: Place of the class in the reply: keys and positions joined by dots.
        image_field: Name of the field with the image.
        header: Header to send, such as "Authorization: Bearer {API_KEY}"; a name in braces stands
            for that variable of the environment. May be repeated.
        timeout: Time until the whole reply must have come.
        price: Price of a query.
        budget: Largest sum to pay, over all runs in --out.
        max_queries: Largest number of queries, over all runs in --out.
    """

    api: Annotated[str | None, Parameter(metavar="URL")] = None
    answer: Annotated[str, Parameter(metavar="PATH")] = "label"
    image_field: str = "image"
    header: Annotated[list[str], Parameter(metavar="NAME:VALUE")] | None = None
    timeout: Duration = 30.0
    price: Annotated[Number, Parameter(validator=InRange(gte=0))] = 0.0
    budget: Annotated[Number, Parameter(validator=InRange(gt=0))] | None = None
    max_queries: Annotated[int, Parameter(metavar="N")] | None = None

    def __post_init__(self) -> None:
        """Refuse options without the service, and a price without a limit."""
        for name in ("header", "price", "budget", "max_queries"):
            if self.api is None and getattr(self, name):
                raise CycloptsError(msg=f"--{name.replace('_', '-')} needs --api; give both")
        if self.price and self.budget is None and self.max_queries is None:
            raise CycloptsError(msg="--price needs a limit; give --budget")
        if self.budget is not None and not self.price:
            raise CycloptsError(msg="--budget needs the price of a query; give --price")

    def load(self, options: DataOptions, workers: int | None) -> tuple[BlackBox, ImageData, Any]:
        """Return the classifier, the images and the indices of those that are chosen."""
        from torch import nn

        from art_denoised.checks import InputError
        from art_denoised.data import read_classes
        from art_denoised.smoothing import BlackBox, Budget, HttpClassifier

        assert self.api is not None
        if missing := [name for name in ("httpx", "tenacity") if find_spec(name) is None]:
            raise InputError(
                f"--api needs {' and '.join(missing)}; pip install 'art-denoised[api]'"
            )
        ask = HttpClassifier(
            self.api,
            answer=self.answer,
            headers=self._headers(),
            image_field=self.image_field,
            timeout=self.timeout,
        )
        folders = options.data.startswith("imagefolder:")
        data, indices = replace(options, classes=options.classes if folders else None).load(
            nn.Identity()
        )
        lines: Sequence[str] = getattr(data, "classes", ())
        if options.classes is not None:
            lines = read_classes(options.classes)
        if not lines or not all(isinstance(line, str) for line in lines):
            raise CycloptsError(msg="--api needs the names of the classes; give --classes FILE")
        words = [[word.strip() for word in line.split(",")] for line in lines]
        box = BlackBox(
            ask,
            [name for name, *_ in words],
            {synonym: name for name, *rest in words for synonym in rest},
            workers=4 if workers is None else workers,
            budget=Budget(self.max_queries, self.budget, self.price),
        )
        return box, data, indices

    def _headers(self) -> dict[str, str]:
        found = {}
        for text in self.header or ():
            name, colon, value = text.partition(":")
            if not colon:
                raise CycloptsError(msg=f"--header is {name!r} without a value; give NAME:VALUE")
            for variable in re.findall(r"\{(\w+)\}", value):
                if variable not in os.environ:
                    raise CycloptsError(
                        msg=f"--header {name} names {variable}, which is not in the environment; "
                        "set it"
                    )
                value = value.replace(f"{{{variable}}}", os.environ[variable])
            found[name.strip()] = value.strip()
        return found


@dataclass(frozen=True, kw_only=True)
class CertifiedModelOptions(ModelOptions):
    """Which classifier, unless it is behind --api, and which denoiser in front of it."""

    model: Model | None = None  # type: ignore[assignment]

    def check(self, api: ApiOptions) -> None:
        """Refuse two classifiers, or none."""
        if (self.model is None) == (api.api is None):
            raise CycloptsError(msg="the classifier is not clear; give either --model or --api")
        types = {"--dtype": self.dtype, "--optimize": self.optimize}
        own = [*self.network.given, *(name for name, value in types.items() if value is not None)]
        if api.api is not None and own:
            raise CycloptsError(msg=f"{own[0]} is of a network; leave it out with --api")


def _build(model: ModelOptions, sigma: float, shape: Sequence[int]) -> Classifier:
    """Return the network that is sampled, for a worker; remarks were made by its driver."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        network = model.denoised(model.load(), model.load_denoiser(sigma), sigma)
        return model.optimized(network, shape)


_HERE, _ANY, _NO_API = WorkerOptions(), CertifiedModelOptions(), ApiOptions()


@Parameter(name="*", group=SAMPLING)
@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How images are sampled.

    Attributes:
        sigma: Standard deviation of the noise; pixels are in [0, 1].
        alpha: Failure probability for each image.
        noise: Kind of noise. With quantised noise, for 8-bit images, certificates also hold in
            floating-point arithmetic.
        seed: Seed of the noise.
        batch_size: Number of noisy copies in every pass; auto measures what is fastest, and takes
            that of the run with --resume, and 64 with --shard. Votes of near ties depend on it.
        tsv: Also write a TSV log with the columns of Cohen et al.
        preview: Only estimate samples, operations, memory and time, from a few images; write no
            log.
    """

    sigma: Number
    alpha: Annotated[float, more(SAMPLING)] = 0.001
    noise: Annotated[Literal["gaussian", "quantised"], more(SAMPLING)] = "gaussian"
    seed: Annotated[int, more(SAMPLING)] = 0
    batch_size: Annotated[int | Literal["auto"], more(SAMPLING)] = "auto"
    tsv: Annotated[bool, more(RUN)] = False
    preview: bool = False

    def smoother(
        self,
        network: nn.Module,
        data: ImageData,
        indices: Sequence[int],
        workers: Place | None,
        run: RunOptions,
    ) -> Smoother:
        """Return the smoothed classifier, after a first look at the images."""
        from art_denoised import checks
        from art_denoised.data.images import Chosen, Shard
        from art_denoised.evaluation.certify import begun_with, first_look
        from art_denoised.smoothing.smoother import Smoother
        from art_denoised.smoothing.voters import best_batch_size

        smoother = Smoother(
            network,
            sigma=self.sigma,
            noise=self.noise,
            seed=self.seed,
            batch_size=64 if self.batch_size == "auto" else self.batch_size,
            workers=workers,
        )
        sharded = isinstance(indices, Shard)
        whole = indices.whole if isinstance(indices, Shard) else indices
        with waiting("classifying the first images"):
            notice(str(first_look(smoother, data, whole)))
        if self.batch_size != "auto" or smoother.network is None:
            return smoother
        if run.resume and (begun := begun_with(run.out, "batch_size")):
            smoother.batch_size = checks.count("batch_size", begun["batch_size"])
        elif not sharded:  # shards of one run must agree
            x, _ = Chosen(data).stack(whole[:1])
            with waiting("measuring the fastest batch size"):
                smoother.batch_size = best_batch_size(smoother.network, smoother.prepare(x)[0])
        return smoother


@Parameter(name="*", group=SAMPLING)
@dataclass(frozen=True, kw_only=True)
class CertifyOptions(SamplingOptions):
    """How much images are sampled to certify them.

    Attributes:
        n: Number of samples for each image, by default 10000; with --radii or --deadline the
            largest number, by default 100000.
        n0: Number of samples that select the class; none with --true-class.
        radii: Radii of interest: an image is sampled only until each of them is proved or out of
            reach.
        deadline: Time for the whole run, such as 90s, 10m or 2h. --resume continues and increases
            the radii.
        all_images: With --radii or --deadline, also sample images whose selected class is wrong.
            They count as wrong in any case.
        true_class: With --radii, certify the true class of each image and select none: this saves
            the n0 samples, and is sound because the true class depends on no sample.
    """

    n: int | None = None
    n0: Annotated[int, more(SAMPLING)] = 100
    radii: Radii | None = None
    deadline: Duration | None = None
    all_images: Annotated[bool, more(SAMPLING)] = False
    true_class: Annotated[bool, more(SAMPLING)] = False

    def __post_init__(self) -> None:
        """Refuse options that exclude each other."""
        if self.deadline and (self.radii or self.preview):
            other = "--radii" if self.radii else "--preview"
            raise CycloptsError(msg=f"--deadline excludes {other}; give one of them")
        if self.true_class and (self.all_images or not self.radii):
            wrong = "excludes --all-images" if self.all_images else "needs --radii"
            raise CycloptsError(msg=f"--true-class {wrong}; see --help")

    def stop(self) -> FixedN | AtRadii | Anytime:
        """Return when an image is done."""
        from art_denoised.smoothing.stops import Anytime, AtRadii, FixedN

        default = 100_000 if self.radii or self.deadline else 10_000
        n, n0, alpha = default if self.n is None else self.n, self.n0, self.alpha
        labels = not self.all_images
        if self.radii:
            known: bool | Literal["class"] = "class" if self.true_class else labels
            return AtRadii(self.radii, n=n, n0=n0, alpha=alpha, labels=known)
        if self.deadline:
            return Anytime(n=n, n0=n0, alpha=alpha, seconds=self.deadline, labels=labels)
        return FixedN(n, n0=n0, alpha=alpha)


@Parameter(name="*", group=SAMPLING)
@dataclass(frozen=True, kw_only=True)
class PredictOptions(SamplingOptions):
    """How much images are sampled to predict them.

    Attributes:
        n: Number of samples for each image.
    """

    n: int = 1000


def certify(
    *,
    model: CertifiedModelOptions = _ANY,
    api: ApiOptions = _NO_API,
    data: DataOptions,
    sampling: CertifyOptions,
    workers: WorkerOptions = _HERE,
    run: RunOptions,
) -> None:
    r"""Certify a data set: a label and an l2 radius for each image.

    Within its radius the smoothed classifier provably keeps its label, wrong
    with probability at most alpha; -1 is an abstention (Cohen et al. 2019; with
    a denoiser, Salman et al. 2020). Rows are written to DIR/certify.jsonl as
    images are finished.

    The packaged digits classifier behind its denoiser:
      art-denoised certify --model art_denoised.demo:digits_classifier \
          --denoiser art_denoised.demo:digits_denoiser --data digits \
          --sigma 0.25 --n 1000 --max 100 --out runs/denoised
      art-denoised table runs/denoised

    Your own network, weights and images, sampled only until each of some radii
    is proved or out of reach; --preview first says what that costs:
      art-denoised certify --model mynets:resnet20 --weights resnet20.pth \
          --data imagefolder:val --sigma 0.25 --radii 0,0.25,0.5 --max 500 \
          --out runs/mine --preview

    Paid APIs: docs/how-to/paid-api.md. Machines: docs/how-to/many-machines.md.
    """
    with waiting("loading PyTorch"):
        from art_denoised.evaluation.certify import certify
        from art_denoised.evaluation.preview import preview
        from art_denoised.smoothing.stops import Anytime

    model.check(api)
    stop = sampling.stop()
    if not sampling.preview:
        run.check("certify" if api.api is None else "answers")
    if api.api is not None:
        _certify_api(model, api, data, sampling, workers, run)
        return
    smoother, images, indices, named = _sampled(model, data, sampling, workers, run)
    if sampling.preview:
        assert not isinstance(stop, Anytime)  # refused with the options
        with waiting("sampling a few images"):
            found = preview(smoother, images, stop, indices=indices)
        _show_preview(found, run)
        return
    log = certify(smoother, images, stop, indices=indices, identity=named, **run.arguments)
    _finish(log, indices, sampling, run)


def _sampled(
    model: ModelOptions,
    data: DataOptions,
    sampling: SamplingOptions,
    workers: WorkerOptions,
    run: RunOptions,
) -> tuple[Smoother, ImageData, Sequence[int], dict[str, Any]]:
    """Return the smoother, the images with the indices of those chosen, and what a log says."""
    with waiting("loading the network and the images"):
        base, denoiser = model.load(), model.load_denoiser(sampling.sigma)
        images, indices = data.load(base, denoiser)
    named = {**model.identity, **data.identity(base, denoiser)}
    shape = image_shape(images, indices)
    place = workers.place(partial(_build, model, sampling.sigma, shape), model)
    network = model.optimized(model.denoised(base, denoiser, sampling.sigma), shape)
    return sampling.smoother(network, images, indices, place, run), images, indices, named


def _certify_api(
    model: CertifiedModelOptions,
    api: ApiOptions,
    data: DataOptions,
    sampling: CertifyOptions,
    workers: WorkerOptions,
    run: RunOptions,
) -> None:
    """Certify a classifier that is paid by the query."""
    from torch import nn

    from art_denoised.checks import InputError
    from art_denoised.evaluation.certify import begun_with, certify
    from art_denoised.evaluation.preview import preview_queries
    from art_denoised.smoothing.smoother import Smoother
    from art_denoised.smoothing.stops import Anytime

    stop = sampling.stop()
    other = {
        "--deadline": isinstance(stop, Anytime),
        "--cluster": workers.cluster is not None,
        "--gpus": workers.gpus is not None,
        "--batch-size": sampling.batch_size != "auto",
    }
    for option in (name for name, given in other.items() if given):
        raise CycloptsError(msg=f"--api excludes {option}; leave it out")
    assert not isinstance(stop, Anytime)
    with waiting("loading the images"):
        box, images, indices = api.load(data, workers.workers)
        denoiser = model.load_denoiser(sampling.sigma)
    smoother = Smoother(
        box, sigma=sampling.sigma, denoiser=denoiser, noise=sampling.noise, seed=sampling.seed
    )
    earlier = run.out if run.resume else None
    cost = preview_queries(smoother, images, stop, run=earlier, indices=indices)
    if sampling.preview:
        _show_preview(cost, run)
        return
    notice(str(cost))
    if cost.fewest > cost.limit:
        raise InputError(
            f"{cost.fewest:,} queries are needed, but the budget allows {max(cost.limit, 0):,.0f}; "
            "raise it, or take fewer images or samples"
        )
    named = {"model": box.identity["url"], "denoiser": model.denoiser}
    named |= data.identity(nn.Identity())
    # Images are compared one by one: a later run may add some. Earlier logs named their choice.
    del named["skip"], named["max"]
    if run.resume:
        named |= begun_with(run.out, "skip", "max")
    log = certify(smoother, images, stop, indices=indices, identity=named, **run.arguments)
    paid = f", {box.spent * api.price:,.2f} paid" if api.price else ""
    notice(f"{box.spent:,} queries so far{paid}")
    _finish(log, indices, sampling, run)


def _show_preview(found: Preview | QueryPreview, run: RunOptions) -> None:
    limits = {name: value for name, value in asdict(found).items() if value != math.inf}
    print_result(limits, str(found), json=run.json)


def _finish(log: Log, indices: Sequence[int], sampling: CertifyOptions, run: RunOptions) -> None:
    """Print what a certify run found and what it cost."""
    from art_denoised.checks.values import counted
    from art_denoised.evaluation.logs import write_tsv
    from art_denoised.reports.certified import certified_table

    if sampling.tsv:
        write_tsv(log, run.out / "certify.tsv")
    if missing := len(set(indices) - {row.index for row in log.rows}):
        notice(f"{missing} images were not reached; pass --resume to continue")
    samples = sum(row.n0 + row.drawn for row in log.rows)
    path, images = run.out / "certify.jsonl", len(log.rows)
    table = certified_table({run.out.name or "run": log}) if log.rows else None
    if run.json:
        rows = [] if table is None else table.to_json()
        print_json({"log": str(path), "images": images, "samples": samples, "table": rows})
        return
    if table is not None:
        table.show()
    print(escaped(f"log: {path}"))
    print(f"{samples:,} samples for {counted(images, 'image')}")


def predict(
    *,
    model: ModelOptions,
    data: DataOptions,
    sampling: PredictOptions,
    workers: WorkerOptions = _HERE,
    run: RunOptions,
) -> None:
    r"""Predict with the smoothed classifier, abstaining where it is unsure.

    The classes of n noisy copies are counted. The prediction is the most
    frequent class, or an abstention, -1, where the two most frequent cannot be
    told apart at level alpha (Cohen et al. 2019, Predict). Rows are written to
    DIR/predict.jsonl as images are finished.

    The packaged digits classifier behind its denoiser:
      art-denoised predict --model art_denoised.demo:digits_classifier \
          --denoiser art_denoised.demo:digits_denoiser --data digits \
          --sigma 0.25 --max 100 --out runs/predicted
    """
    with waiting("loading PyTorch"):
        from art_denoised.evaluation.certify import predict
        from art_denoised.evaluation.logs import write_tsv
        from art_denoised.evaluation.preview import preview
        from art_denoised.smoothing.stops import Voting

    stop = Voting(sampling.n, alpha=sampling.alpha)
    if not sampling.preview:
        run.check("predict")
    smoother, images, indices, named = _sampled(model, data, sampling, workers, run)
    if sampling.preview:
        with waiting("sampling a few images"):
            found = preview(smoother, images, stop, indices=indices)
        _show_preview(found, run)
        return
    log = predict(smoother, images, stop, indices=indices, identity=named, **run.arguments)
    if sampling.tsv:
        write_tsv(log, run.out / "predict.tsv")
    correct = sum(row.correct for row in log.rows)
    abstained = sum(row.prediction == -1 for row in log.rows)
    path, total = str(run.out / "predict.jsonl"), len(log.rows)
    print_result(
        {"log": path, "images": total, "correct": correct, "abstained": abstained},
        f"{correct} of {total} images correct, {abstained} abstentions",
        f"log: {path}",
        json=run.json,
    )


def demo(
    *,
    out: Path = Path("demo-output"),
    images: int = 200,
    n: int = 1000,
    seed: int = 0,
    resume: bool = False,
    json: bool = False,
) -> None:
    """Certify digits with and without a denoiser, in about a minute.

    Held-out handwritten digits of scikit-learn (no download) are certified at
    two noise levels, with and without a denoiser in front of a pretrained
    classifier that has never seen noise.

    Args:
        out: Folder for logs, table and plot.
        images: Number of held-out images, up to 500.
        n: Number of samples for each image.
        seed: Seed of the noise.
        resume: Continue an interrupted demo.
        json: Print the table as JSON; what is done is printed on standard error.
    """
    with waiting("loading PyTorch"):
        from art_denoised.demo.run import run_demo

    with contextlib.redirect_stdout(sys.stderr if json else sys.stdout):
        table = run_demo(out, images=images, n=n, seed=seed, resume=resume)
    if json:
        print_json(table.to_json())
