"""Shared fixtures. One thread a process; property-based tests draw the same examples always."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two threads that wait for each other are slower on small nets

import pytest
import torch
from hypothesis import settings

gc.disable()  # until all tests are collected
torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """Modules are no garbage; to look through them takes a quarter of the time of importing."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The held-out digits: images (500, 1, 8, 8) and labels."""
    from art_denoised.data import load_data

    data = load_data("digits")
    images, labels = zip(*(data[i] for i in range(len(data))), strict=True)
    return torch.stack(images), torch.tensor(labels)


@pytest.fixture
def as_program(monkeypatch, tmp_path) -> Iterator[Path]:
    """An empty working folder for a program, whose changes to this process are undone.

    Programs run in this process, because importing torch takes longer than most of them.
    """
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))  # of its child processes
    monkeypatch.setattr(sys, "path", list(sys.path))
    # The server of new processes holds what tests/forked.py imports.
    monkeypatch.setattr(multiprocessing, "set_forkserver_preload", lambda names: None)
    yield tmp_path
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)
