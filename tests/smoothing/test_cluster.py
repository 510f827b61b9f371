"""Actors of Ray that sample: the answers of one process, whatever dies. All of it is local."""

from __future__ import annotations

import builtins
import os
import re
import sys
from pathlib import Path

import pytest

import art_denoised
from art_denoised.checks import InputError
from art_denoised.demo import digits_classifier
from art_denoised.runs import Cluster
from art_denoised.smoothing import AtRadii, FixedN, Smoother
from tests.smoothing.test_workers import Mortal

pytestmark = pytest.mark.filterwarnings("default")  # of Ray


@pytest.fixture(scope="module")
def ray():
    """Two cores of this machine, on 127.0.0.1 alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # how Ray is told so
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        ray = pytest.importorskip("ray")
        quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
        ray.init(address="local", num_cpus=2, **quiet)
        assert ray.get_runtime_context().gcs_address.startswith("127.0.0.1:")
        yield ray
        ray.shutdown()


def smoother(workers=None, base=None) -> Smoother:
    return Smoother(digits_classifier() if base is None else base, sigma=0.25, workers=workers)


def test_answers_are_those_of_one_process_when_actors_die(ray, digits, tmp_path):
    """The network is sent by value, and one actor dies of it."""
    (tmp_path / "death").touch()
    stop, x = AtRadii([0.25, 0.5], n=1000), digits[0][:6]
    found = smoother(Cluster(count=2), Mortal(tmp_path).eval()).certify(x, stop)
    assert not list(tmp_path.iterdir())
    assert found == smoother().certify(x, stop)
    assert ray.is_initialized()  # it was before


def test_a_network_that_is_named_is_built_by_the_actors(ray, digits):
    stop, x = FixedN(500), digits[0][:4]
    found = smoother(Cluster(count=1, build=digits_classifier)).certify(x, stop)
    assert found == smoother().certify(x, stop)


def test_without_ray_one_line_says_what_to_install(digits, monkeypatch):
    known = builtins.__import__

    def missing(name, *rest):
        if name == "ray":
            raise ImportError(name)
        return known(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"pip install '.\[cluster\]'"):
        smoother(Cluster()).certify(digits[0][:1], FixedN(100))


def test_a_cluster_of_nobody_is_refused():
    with pytest.raises(InputError):
        Cluster(count=0)


def test_ray_is_imported_by_one_function_alone():
    package = Path(art_denoised.__file__).parent
    texts = {path.name: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    lines = {name: re.findall(r"^\s*(?:import|from) ray\b.*", t, re.M) for name, t in texts.items()}
    assert {name: found for name, found in lines.items() if found} == {
        "cluster.py": ["        import ray"]
    }
