"""AutoAttack, from pyautoattack or the official package."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from art_denoised import checks
from art_denoised.attacks.suites import INSTALL, Outcome, Suite, as_module
from art_denoised.checks import InputError
from art_denoised.types import Images, Labels

PARTS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
_VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}  # that DLR and its targeted form need
_FLAG = "Warning: "  # how the official package begins the lines that it prints


@dataclass(frozen=True)
class AutoAttack(Suite):
    """AutoAttack, whole or in parts.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks" (ICML 2020, arXiv 2003.01690).

    It judges a randomised model by the attack's last draw: evaluate again with fresh noise, as
    `art_denoised.evaluate` does.

    Attributes:
        version: "standard", or "rand" for randomised models (EOT over 20 draws, no Square).
        parts: Attacks to run in this order instead of a version, such as ("apgd-ce", "square").
        steps: Number of steps of APGD and FAB.
        queries: Number of queries of Square.
        eot: Number of gradients that a step of APGD averages; None: 20 for "rand" and else 1.

    Raises:
        InputError: Neither package is installed, or a value is out of range.

    Example:
        >>> from art_denoised.demo import digits_classifier
        >>> attack = AutoAttack(0.2, parts=("apgd-ce",), steps=5)
        >>> x = torch.rand(2, 1, 8, 8)
        >>> x_adv = attack(digits_classifier(), x, torch.tensor([3, 8]))
        >>> attack.name, bool((x_adv - x).abs().max() <= 0.2 + 1e-6)
        ('apgd-ce', True)
    """

    version: Literal["standard", "rand"] = "standard"
    parts: tuple[str, ...] = ()
    steps: int = 100
    queries: int = 5000
    eot: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.count("steps", self.steps)
        checks.count("queries", self.queries)
        if self.eot is not None:
            checks.count("eot", self.eot)
        if self.version not in _VERSIONS:
            raise InputError(f"version is {self.version!r}; give standard or rand")
        if not isinstance(self.parts, (tuple, list)):
            raise InputError(f"parts is {self.parts!r}; give a sequence, such as ('apgd-ce',)")
        if self.parts and self.version != "standard":
            raise InputError(
                f"version is {self.version!r} and parts are given, which run instead of a version; "
                "leave version out, and for a randomised model give eot=20"
            )
        for part in self.parts:
            if part not in PARTS:
                raise InputError(f"AutoAttack has no part {part!r}; give of {', '.join(PARTS)}")
        _package()  # a run that lacks it ends before its first attack

    @property
    def name(self) -> str:
        """Its parts, or its version."""
        if self.parts:
            return "+".join(self.parts)
        return "autoattack" if self.version == "standard" else "autoattack-rand"

    @property
    def _run(self) -> tuple[str, ...]:
        return self.parts or _VERSIONS[self.version]

    @property
    def gradient_free(self) -> bool:
        """Whether it is Square alone."""
        return set(self._run) == {"square"}

    @property
    def mixed(self) -> bool:
        """Whether it holds Square beside attacks that take gradients; the standard version does."""
        return "square" in self._run and not self.gradient_free

    @property
    def nfe(self) -> int:
        """Number of function evaluations for an image that withstands the attack, about."""
        apgd = (self.steps + 1) * (self.eot or (20 if self.version == "rand" else 1))
        fab = 2 * (self.steps + 1)
        of = {"apgd-t": 9 * apgd, "fab": fab, "fab-t": 9 * fab, "square": self.queries}
        return sum(of.get(part, apgd) for part in self._run)

    def run(self, model: Any, x: Images, y: Labels) -> Outcome:
        """Attack; the flags are AutoAttack's warnings.

        Raises:
            InputError: The model has too few classes.
        """
        module = as_module(model)
        package = _package()
        classes = checks.class_count(module, x)
        for part in self._run:
            if classes < (needed := _CLASSES.get(part, 2)):  # AutoAttack would crash
                raise InputError(
                    f"{part} of AutoAttack needs {needed} classes and the model has "
                    f"{classes}; give the parts apgd-ce, fab-t and square instead"
                )
        attack = self._build(package, module, x.device, classes)
        with _flags(package) as flags:
            if package == "pyautoattack":
                found = attack.run_standard_evaluation(x, y, batch_size=len(x))
            else:
                found = attack.run_standard_evaluation(x, y, bs=len(x), return_labels=True)
        x_adv, y_adv = found
        return Outcome(x_adv, y_adv == y, tuple(dict.fromkeys(flags)))

    def _build(self, package: str, module: nn.Module, device: torch.device, classes: int) -> Any:
        version, parts = ("custom", list(self.parts)) if self.parts else (self.version, None)
        options: dict[str, Any] = {
            "norm": {"linf": "Linf", "l2": "L2"}[self.norm],
            "eps": self.eps,
            "version": version,
            "seed": self.seed,
            "device": str(device),
        }
        if package == "autoattack":
            options |= {"verbose": False, "attacks_to_run": parts or []}
        else:
            options["attacks"] = parts
        attack = importlib.import_module(package).AutoAttack(module, **options)
        targets = min(9, classes - 1)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
        attack.apgd.n_restarts = attack.fab.n_restarts = 1  # those of the standard version
        attack.fab.n_iter = self.steps
        for apgd in (attack.apgd, attack.apgd_targeted):
            apgd.n_iter = apgd.n_iter_orig = self.steps
            apgd.n_iter_2 = max(int(0.22 * self.steps), 1)  # as in its constructor
            apgd.n_iter_min = max(int(0.06 * self.steps), 1)
            apgd.size_decr = max(int(0.03 * self.steps), 1)
        if self.eot is not None:
            attack.apgd.eot_iter = attack.apgd_targeted.eot_iter = self.eot
        attack.square.n_queries = self.queries
        return attack


def _package() -> str:
    for package in ("pyautoattack", "autoattack"):
        if importlib.util.find_spec(package) is not None:
            return package
    raise InputError(f"AutoAttack needs pyautoattack; {INSTALL}")


@contextlib.contextmanager
def _flags(package: str) -> Iterator[list[str]]:
    """Collect AutoAttack's warnings, and put back the logger, the counters and the trace.

    pyautoattack logs its warnings, the official package prints them; both use the warnings module
    where they have no logger. AutoAttack detects "dynamic" defences by counting calls with a trace
    function. It never resets the counters, so that after one such model it would flag all others.
    """
    flags: list[str] = []
    counters = importlib.import_module(f"{package}.checks").funcs
    logger, trace = logging.getLogger("auto-attack"), sys.gettrace()
    before = (logger.handlers, logger.propagate, logger.level)
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: flags.append(record.getMessage())  # type: ignore[method-assign]
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.WARNING)
    counters.update(dict.fromkeys(counters, 0))
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
            warnings.simplefilter("always")
            yield flags
        lines = printed.getvalue().splitlines()
        flags += [line.removeprefix(_FLAG) for line in lines if line.startswith(_FLAG)]
        flags += [str(one.message) for one in caught if one.category is Warning]
    finally:
        counters.update(dict.fromkeys(counters, 0))
        sys.settrace(trace)
        logger.handlers, logger.propagate = before[0], before[1]
        logger.setLevel(before[2])
