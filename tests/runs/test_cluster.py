"""Actors of Ray that sample and attack: the answers of one process, whatever dies.

All of it is on this machine: one cluster of two nodes, of which one is removed.
"""

from __future__ import annotations

import builtins
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import art_denoised
from art_denoised.checks import InputError
from art_denoised.cli import main
from art_denoised.demo import digits_classifier
from art_denoised.runs import Cluster
from art_denoised.smoothing import AtRadii, FixedN, Smoother
from tests.cli.command import MODEL, words
from tests.forked import forked
from tests.runs.test_workers import Mortal, alive, certify_slowly, lines, pids, wait

pytestmark = pytest.mark.filterwarnings("default")  # of Ray
HEAD = {"num_cpus": 1, "include_dashboard": False}


@pytest.fixture(scope="module")
def nodes():
    """A node of one core, on 127.0.0.1 alone; a test adds another one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # how Ray is told so
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        pytest.importorskip("ray")
        from ray.cluster_utils import Cluster as Nodes

        nodes = Nodes(initialize_head=True, head_node_args=HEAD)
        assert nodes.address.startswith("127.0.0.1:")
        patch.setenv("RAY_ADDRESS", nodes.address)
        yield nodes
        nodes.shutdown()


class OnNodes(nn.Module):
    """Names the nodes on which it runs by files, is mortal, and slow until one of them is lost."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.net, self.folder = Mortal(folder / "deaths"), str(folder)
        self.driver = os.getpid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if os.getpid() != self.driver:
            import ray

            Path(self.folder, ray.get_runtime_context().get_node_id()).touch()
            if not Path(self.folder, "lost").exists():
                time.sleep(0.1)
        return self.net(x)


def smoother(workers=None, base=None) -> Smoother:
    return Smoother(digits_classifier() if base is None else base, sigma=0.25, workers=workers)


def test_answers_are_those_of_one_process_when_a_node_joins_and_is_lost(nodes, digits, tmp_path):
    """And when an actor dies. There is room for the second actor on the node that joins alone."""
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    (deaths / "one").touch()

    stop, x = AtRadii([0.25, 0.5], n=3000), digits[0][:6]
    many = smoother(Cluster(count=2), OnNodes(tmp_path).eval())
    with ThreadPoolExecutor() as pool:  # Ray adds nodes in the main thread alone
        found = pool.submit(many.certify, x, stop)
        wait(lambda: (tmp_path / nodes.head_node.node_id).exists() or found.done())
        second = nodes.add_node(num_cpus=1)
        known = tmp_path / second.node_id
        wait(lambda: found.done() or (known.exists() and not any(deaths.iterdir())))
        assert not found.done()
        nodes.remove_node(second)
        (tmp_path / "lost").touch()
    assert found.result() == smoother().certify(x, stop)


@pytest.fixture(scope="module")
def client(nodes):
    """Address for clients, which `ray start --head` gives on port 10001."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--address", nodes.address, "--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "ray.util.client.server", *where, "--mode", "specific-server"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait(lambda: listens(port) or server.poll() is not None)
        assert server.poll() is None
        yield f"ray://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_answers_are_those_of_one_process_through_a_client(client, digits):
    x, stop = digits[0][:2], FixedN(200)
    assert smoother(Cluster(client, count=1)).certify(x, stop) == smoother().certify(x, stop)


def test_an_interrupt_ends_all_actors(nodes, tmp_path):
    driver = forked(certify_slowly, tmp_path, Cluster(nodes.address))
    try:
        wait(lambda: bool(pids(tmp_path)) or driver.exitcode is not None)
        os.kill(driver.pid, signal.SIGINT)
        driver.join(timeout=60)
    finally:
        driver.kill()
    assert driver.exitcode == 130
    wait(lambda: not any(map(alive, pids(tmp_path))))


def test_the_command_line_attacks_on_a_cluster(nodes, tmp_path):
    """The network is built by the actor."""
    options = {"model": MODEL, "data": "digits", "eps": 0.1, "attacks": "pgd:steps=2"}
    options |= {"max": 6, "batch_size": 3}
    for name, flags in (("one", ()), ("many", ("--cluster", "auto"))):
        flags = ("--quiet", "--no-checks", *flags)
        assert main(words("attack", *flags, **options, out=tmp_path / name)) == 0
    assert lines(tmp_path / "many" / "attack.jsonl") == lines(tmp_path / "one" / "attack.jsonl")
    import ray

    assert not ray.is_initialized()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_that_cannot_be_reached_is_one_line(digits, address):
    with pytest.raises(InputError, match=f"the cluster {address} cannot be reached"):
        smoother(Cluster(address)).certify(digits[0][:1], FixedN(100))


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


@pytest.mark.parametrize("address", ["", "ray://", "ray://head", "ray://head:port", "head:0"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(InputError, match=f"the cluster is '{address}'"):
        Cluster(address)


def test_ray_is_imported_by_one_function_alone():
    package = Path(art_denoised.__file__).parent
    texts = {path.name: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    lines = {name: re.findall(r"^\s*(?:import|from) ray\b.*", t, re.M) for name, t in texts.items()}
    assert {name: found for name, found in lines.items() if found} == {
        "cluster.py": ["        import ray"]
    }
