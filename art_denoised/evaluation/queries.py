"""Certify with a classifier that can only be asked: every answer is journalled as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.data import ImageData
from art_denoised.evaluation.answers import TITLE, Answers, Held, MissingError
from art_denoised.evaluation.records import Log
from art_denoised.evaluation.run import certify_row
from art_denoised.evaluation.runner import open_log
from art_denoised.smoothing.blackbox import BlackBox, Vocabulary
from art_denoised.smoothing.bounds import Looks
from art_denoised.smoothing.certify import certification_plan
from art_denoised.smoothing.procedures import Counts, Draw, Procedure, certifying, simulate
from art_denoised.smoothing.sampling import (
    Gaussian,
    Stream,
    StreamKey,
    model_device,
    model_dtype,
)
from art_denoised.smoothing.statistics import Certificate
from art_denoised.storage import (
    make_folder,
    read_journal,
    structure_fingerprint,
    weights_fingerprint,
)
from art_denoised.types import Denoiser, Image, Images


def certify_queries(
    box: BlackBox,
    data: ImageData,
    out: Path | str,
    *,
    classes: Sequence[str],
    synonyms: Mapping[str, str] | None = None,
    sigma: float,
    denoiser: Denoiser | None = None,
    n0: int = 20,
    n: int = 100,
    alpha: float = 0.001,
    radii: Sequence[float] = (),
    use_labels: bool = True,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Log:
    """Certify images by asking a classifier about noisy, denoised copies of them.

    Answers go to ``out/answers.jsonl`` the moment they come, certificates to
    ``out/certify.jsonl``. A run that stopped, was killed or ran out of budget goes on with
    ``resume=True`` and asks nothing again that was answered; with more images too, but not with
    another number of samples, which would be chosen knowing the votes.

    Args:
        box: The classifier, with its budget.
        data: Pairs of an image in [0, 1] and its class.
        out: Folder for journal and log.
        classes: Names of the classes, in the order of the labels. An answer that is none of them
            is one more class, the last; an empty answer is none, and can never be certified.
        synonyms: Other words for the classes.
        sigma: Noise level in image units.
        denoiser: Runs here, before an image is sent; None: none.
        n0: Selection samples; 20 in Salman et al. for public APIs.
        n: Estimation samples; 100 there.
        alpha: Failure probability of each certificate.
        radii: As for `certify`: stop early at these; saves queries.
        use_labels: With ``radii``: no more queries for images whose selected class is wrong.
        seed: Seed of the noise.
        indices: Which images; None: all.
        identity: What else determines the answers, compared on resuming, as the images are. Of the
            classifier there is what `BlackBox.identity` says, of a denoiser its weights and its
            ``repr``, of a function no more than its name: say here what these leave out, as in
            ``{"classifier": "resnet50 of March"}``.
        resume: Go on from the run in ``out``.
        progress: Show progress.

    Returns:
        The log.

    Raises:
        BudgetError: The budget cannot suffice: before anything is asked. With ``radii`` it may
            also run out later; then answers and rows so far are kept.
        InputError: A value out of range, a classifier that fails for good, or as for `Journal`.

    Example:
        >>> import tempfile
        >>> data = [(torch.zeros(1, 8, 8), 0), (torch.ones(1, 8, 8), 1)]
        >>> box = BlackBox(lambda images: ["dark"] * len(images))
        >>> with tempfile.TemporaryDirectory() as out:
        ...     log = certify_queries(
        ...         box, data, out, classes=["dark", "light"], sigma=0.25, progress=False
        ...     )
        >>> [(row.predict, row.radius) for row in log.rows], box.spent
        ([(0, 0.375118), (0, 0.375118)], 240)
    """
    plan = certification_plan(n0=n0, n=n, alpha=alpha, radii=radii)
    words = Vocabulary(tuple(classes), dict(synonyms or {}))
    sigma, seed = checks.sigma(sigma), checks.count("seed", seed, 0)
    checks.eval_mode(denoiser)
    send = _sender(denoiser, sigma)
    indices = checks.indices(range(len(data)) if indices is None else indices, len(data))
    asked: dict[str, Any] = {
        "classifier": box.identity,
        "denoiser": _named(denoiser),
        **(identity or {}),
        "sigma": sigma,
        "seed": seed,
        # How many answers there are depends on these: a later run must not choose others.
        "n0": plan["n0"],
        "looks": [plan["bound"].first, plan["bound"].last],
        "radii": list(plan["radii"]),
        "use_labels": use_labels,
        "classes": list(words.classes),  # labels are kept as indices of them
    }
    record: dict[str, Any] = {"sigma": sigma, "seed": seed}
    settings = {
        **asked,
        **_certifying_settings(plan),
        "synonyms": dict(words.synonyms),
    }
    if indices and denoiser is not None:
        x, _ = _image(data, indices[0], len(words.classes))
        checks.denoises(lambda x, _: torch.from_numpy(send(x))[None], x[None], sigma)
    folder = make_folder(Path(out))
    begun = (folder / "answers.jsonl").exists()
    if not begun and (folder / "certify.jsonl").exists():
        raise InputError(
            f"{folder} already holds a run of another kind (certify.jsonl without answers.jsonl); "
            "choose another folder"
        )
    with Answers(folder / "answers.jsonl", asked, words, resume) as answers:
        box.spent = max(box.spent, answers.spent)

        def procedure(index: int, label: int) -> Procedure[Certificate]:
            return certifying(**plan, label=label if use_labels and radii else None, **record)

        def needed(index: int) -> int:
            """Return the fewest queries that an image will still take."""
            x, label = _image(data, index, len(words.classes))
            answers.check(index, label, x)
            try:
                simulate(procedure(index, label), partial(answers.votes, index))
            except MissingError as missing:
                # With radii and labels the selection may show that the image is wrong anyway.
                least = n0 + (0 if radii and use_labels else plan["bound"].first)
                return max(len(missing.samples), least - answers.count(index))
            return 0

        box.budget.check(box.spent, sum(map(needed, indices)))
        if begun:  # all of the log follows from the answers: it is made anew, for this plan
            (folder / "certify.jsonl").unlink(missing_ok=True)
        with (
            open_log("certify", folder, settings, resume=False) as log,
            tqdm(desc="certify", unit="image", total=len(indices), disable=not progress) as bar,
        ):
            for index in indices:
                x, label = _image(data, index, len(words.classes))
                answers.begin(index, label, x)

                def votes(draw: Draw, index: int = index, x: Image = x) -> Counts:
                    key = StreamKey(seed, index, draw.stage)
                    queries = _noisy(x, sigma, key, answers.missing(index, draw))
                    box.ask_all(
                        (((index, int(draw.stage), s), send(noisy)) for s, noisy in queries),
                        answers.add,
                        answers.fail,
                    )
                    return answers.votes(index, draw)

                certificate, _ = simulate(procedure(index, label), votes)
                log.append(certify_row(index, label, certificate, 0.0))
                bar.update()
                bar.set_postfix_str(f"{box.spent:,} queries")
            return Log("certify", settings, tuple(log.rows[i] for i in sorted(log.rows)))


def recertify(
    journal: Path | str,
    *,
    classes: Sequence[str] | None = None,
    synonyms: Mapping[str, str] | None = None,
    alpha: float,
    sigma: float | None = None,
    n0: int | None = None,
    n: int | None = None,
) -> Log:
    """Certify again from the answers in a journal, asking nothing.

    At another alpha, with other synonyms, or with fewer samples. For the certificates to hold,
    these must not be chosen by what they make of the answers. How many answers a run with radii
    asked for depends on them, so its journal is restated at the looks of that run and no others.
    Images that an interrupted run did not finish are left out if their answers do not suffice.

    Args:
        journal: The ``answers.jsonl`` of `certify_queries`.
        classes: Names that are expected, to be compared with those of the journal.
        synonyms: As there.
        alpha: As there.
        sigma: Noise level that is expected, to be compared with that of the journal.
        n0: As there; None: that of the last run.
        n: As there; None: that of the last run.

    Returns:
        The log; its ``notices`` name the images that were left out.

    Raises:
        InputError: The journal does not hold these samples or this noise level, is of other
            classes, is damaged, or a value is out of range; or other samples are wanted of a run
            with radii.

    Example:
        >>> import tempfile
        >>> data = [(torch.zeros(1, 8, 8), 0), (torch.ones(1, 8, 8), 1)]
        >>> box = BlackBox(lambda images: ["dark"] * len(images))
        >>> with tempfile.TemporaryDirectory() as out:
        ...     options = {"classes": ["dark", "light"], "n": 50}
        ...     _ = certify_queries(
        ...         box, data, out, sigma=0.25, indices=[0], progress=False, **options
        ...     )
        ...     log = recertify(Path(out, "answers.jsonl"), alpha=0.05, **options)
        >>> log.rows[0].radius, box.spent
        (0.392612, 70)
    """
    path = Path(journal)
    if not path.is_file():
        raise InputError(f"journal {path} does not exist; give an answers.jsonl")
    contents = read_journal(path)
    if contents.title != TITLE:
        raise InputError(f"{path} is a {contents.title}, not a {TITLE}")
    names, held = contents.settings["classes"], contents.settings["sigma"]
    if classes is not None and list(classes) != names:
        raise InputError(
            f"{path} holds answers about the classes {', '.join(names)}, in this order; leave "
            "classes out"
        )
    words = Vocabulary(tuple(names), dict(synonyms or {}))
    if sigma is not None and sigma != held:
        raise InputError(
            f"{path} holds answers at sigma {held:g}, none at {sigma:g}; a certificate needs "
            "answers at its own noise level"
        )
    answers, settings = Held(path, words, contents.records), contents.settings
    bound, early = Looks(*settings["looks"]), bool(settings["radii"])
    if early and (n0, n) != (None, None):
        raise InputError(
            f"{path} is of a run with radii, where the number of answers depends on the votes; "
            "leave n0 and n as they were"
        )
    plan = certification_plan(
        n0=settings["n0"] if n0 is None else n0, n=bound.last if n is None else n, alpha=alpha
    )
    plan["bound"] = bound if early else plan["bound"]
    record: dict[str, Any] = {"sigma": held, "seed": contents.settings["seed"]}
    rows, unfinished = [], []
    for index, label in sorted(answers.labels.items()):
        _check_label(index, label, len(words.classes))
        try:
            certificate = answers.certificate(index, plan, record, stopped_early=early)
        except MissingError as missing:
            if answers.finished(index, settings["n0"], 0 if early else bound.last):
                raise InputError(f"{path} {missing}") from None
            unfinished.append(str(index))
            continue
        rows.append(certify_row(index, label, certificate, 0.0))
    notices = list(contents.notices)
    if unfinished and not rows:
        raise InputError(f"{path} holds no finished image; go on with certify_queries")
    if unfinished:
        notices.append(f"left out, as the run did not finish them: images {', '.join(unfinished)}")
    settings = {**settings, **_certifying_settings(plan)}
    return Log("certify", settings, tuple(rows), tuple(notices))


def _noisy(
    x: Image, sigma: float, key: StreamKey, samples: Sequence[int]
) -> Iterator[tuple[int, Images]]:
    """Yield noisy copies, each as a batch: none depends on what else is missing."""
    noise = Gaussian(sigma)
    for sample in samples:
        stream = Stream(noise, key, x.shape, x.device, sample)
        yield sample, noise.add(x, stream.take(1))


def _sender(denoiser: Denoiser | None, sigma: float) -> Callable[[Images], np.ndarray]:
    """Return the function from a noisy image, a batch of one, to the image that is sent."""

    @torch.no_grad()
    def send(noisy: Images) -> np.ndarray:
        if denoiser is None:
            return noisy[0].cpu().contiguous().numpy()
        noisy = noisy.to(model_device(denoiser), model_dtype(denoiser))
        return denoiser(noisy, sigma)[0].float().cpu().contiguous().numpy()

    return send


def _named(denoiser: Denoiser | None) -> list[str] | None:
    """Return what tells a denoiser from another, as far as it can be known."""
    if denoiser is None:
        return None
    if isinstance(denoiser, nn.Module):
        return [weights_fingerprint(denoiser), structure_fingerprint(denoiser)]
    kind = denoiser if hasattr(denoiser, "__qualname__") else type(denoiser)
    return [f"{kind.__module__}.{kind.__qualname__}"]


def _image(data: ImageData, index: int, classes: int) -> tuple[Image, int]:
    x, label = data[index]
    try:
        x = checks.images(x[None])[0].float()
    except InputError as error:
        raise InputError(f"image {index}: {error}") from None
    return x, _check_label(index, label, classes)


def _check_label(index: int, label: Any, classes: int) -> int:
    try:
        return int(checks.labels([label], classes)[0])
    except InputError as error:
        raise InputError(f"image {index}: {error}") from None


def _certifying_settings(plan: Mapping[str, Any]) -> dict[str, Any]:
    n0, n = plan["n0"], plan["bound"].last
    return {"alpha": plan["alpha"], "n0": n0, "n": n, "dtype": "float32"}
