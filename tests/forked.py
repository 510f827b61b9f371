"""Calls in processes of their own, for tests that kill or interrupt them.

They are forked from a server that has imported this module once, and with it what would take each
of them seconds.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import anyio.streams.tls  # noqa: F401
import httpcore  # noqa: F401
import hypothesis  # noqa: F401
import PIL.PngImagePlugin  # noqa: F401
import pytest  # noqa: F401
import tenacity  # noqa: F401
import torch

import art_denoised.cli.attack
import art_denoised.cli.certify
import art_denoised.denoisers.denoisers
import art_denoised.evaluation.attack
import art_denoised.models.loading
import art_denoised.runs.workers
import art_denoised.smoothing.dispatch  # noqa: F401
from art_denoised import AutoAttack, BlackBox, certify, evaluate, load_data, train_robust  # noqa: F401
from art_denoised.evaluation.verify import verify  # noqa: F401
from art_denoised.runs.journal import versions
from art_denoised.smoothing.http import HttpClassifier  # noqa: F401

load_data("digits"), versions()  # both are read from files once a process
gc.freeze()  # no process looks through the modules, so they share the pages of them

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.forked"])


def forked(
    function: Callable[..., int | None],
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    errors: Path | str = os.devnull,
    prepare: Callable[[], object] = bool,
) -> ForkServerProcess:
    """Start a call in a process of its own, whose exit code is what it returns.

    Args:
        function: Function of a module.
        arguments: Its arguments.
        environment: Variables that are added to the environment.
        errors: File for what it writes to stderr.
        prepare: Function that is called first.
    """
    process = _CONTEXT.Process(
        target=_call, args=(function, arguments, dict(environment or {}), str(errors), prepare)
    )
    process.start()
    return process


def _call(
    function: Callable[..., int | None],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    errors: str,
    prepare: Callable[[], object],
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.stderr = open(errors, "w", buffering=1)  # noqa: SIM115  until the process ends
    prepare()
    sys.exit(function(*arguments))
