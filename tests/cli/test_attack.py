"""The command `attack`: which attacks are meant, and what is refused before any work."""

from __future__ import annotations

import importlib.util
import json

import pytest

from art_denoised.checks import InputError
from art_denoised.cli import attack as command
from art_denoised.cli import main
from art_denoised.cli.attack import parse_attacks
from art_denoised.evaluation import read_attack_log
from tests.cli.command import MODEL, refusal, words


def arguments(out: object, *flags: str, **changes: object) -> list[str]:
    options = {"model": MODEL, "data": "digits", "max": 4, "eps": 0.1, "out": out}
    return words("attack", "--quiet", *flags, **(options | changes))


@pytest.mark.parametrize("kind", ["square:queries=2", "autoattack-rand", "torchattacks:PGD"])
def test_a_missing_package_is_said_before_the_first_attack(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    message = refusal(capsys, arguments(tmp_path / "run", attacks=f"pgd:steps=1,{kind}"))
    assert "pip install '.[attacks]'" in message
    assert not (tmp_path / "run").exists()


def missing(name: str, *rest: object, find=importlib.util.find_spec) -> object:
    """Find all packages but those of [attacks]."""
    return None if name.endswith(("autoattack", "torchattacks")) else find(name, *rest)


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"attacks": "foo"}, ["'foo'", "pgd", "torchattacks:NAME"]),
        ({"attacks": "autoatack"}, ["'autoatack'", "autoattack?"]),
        ({"attacks": "pgd:stps=3"}, ["'stps'", "steps"]),
        ({"attacks": "pgd:iters=10"}, ["'iters'", "steps"]),
        ({"attacks": "square:steps"}, ["'steps'", "name=value"]),
        ({"attacks": "art:"}, ["'art:'", "art:SquareAttack"]),
        ({"attacks": "art:squareatack"}, ["'squareatack'", "SquareAttack?"]),
        ({"attacks": "art:SquareAttack:max_iter=ten"}, ["max_iter is 'ten'"]),
        ({"attacks": "art:SquareAttack:steps=3"}, ["'steps'", "max_iter"]),
        ({"attacks": "pgd:steps=2:steps=20"}, ["'steps' twice"]),
        ({"attacks": "pgd:random_start=no"}, ["random_start is 'no'", "True or False"]),
        ({"attacks": "square:eot=20"}, ["'eot'", "queries"]),
        ({"attacks": "apgd-ce:queries=9"}, ["'queries'", "steps, eot"]),
        ({"attacks": "diffattack:path_weight=much"}, ["path_weight is 'much'"]),
        ({"purify": "folder", "purification": "ddim:eta=some"}, ["eta is 'some'"]),
        ({"purify": "folder", "purification": "gdmp:scale=big"}, ["scale is 'big'"]),
        ({"purify": "folder", "purification": "sde:t=nan"}, ["'t=nan'", "finite"]),
        ({"attacks": "torchattacks:steps=3"}, ["torchattacks:Square"]),
        ({"attacks": "torchattacks:pgdd"}, ["'pgdd'"]),
        ({"attacks": ","}, ["','"]),
        ({"attacks": "apgd-ce:eot=0"}, ["eot is 0"]),
        ({"attacks": "pgd:loss=mse"}, ["loss", "'mse'"]),
        ({"attacks": "pgd:eps=0.3"}, ["'eps'"]),
        ({"attacks": "torchattacks:PGD:eps=0.001"}, ["eps = 0.001"]),
        ({"seed": -1}, ["seed is -1"]),
        ({"batch_size": 0}, ["batch_size is 0"]),
        ({"eps": 8}, ["eps is 8", "8/255"]),
        ({"eps": "0.1,0"}, ["--eps", "0.1", "0"]),
        ({"eps": "8/0"}, ["'8/0'"]),
        ({"noise": "loud"}, ["loud", "fixed", "fresh"]),
        ({"purify": "folder", "sigma": 0.1}, ["--purify", "--sigma"]),
        ({"dtype": "bfloat16"}, ["bfloat16", "--sigma"]),
        ({"purify": "folder", "purification": "sdee:t=0.1"}, ["'sdee'", "sde"]),
        ({"purify": "folder", "purification": "sde:eta=1"}, ["'eta'", "t"]),
        ({"purification": "ddim:t=0.1"}, ["ddim:t=0.1", "--purify"]),
        ({"samples": 7}, ["--samples", "--sigma"]),
    ],
    ids=str,
)
def test_refused_before_any_work(tmp_path, capsys, monkeypatch, changes, values):
    monkeypatch.setattr(command.AttackedModelOptions, "load", lambda self: pytest.fail("loaded"))
    message = refusal(capsys, arguments(tmp_path / "out", **changes))
    for value in values:
        assert value in message


def test_gradients_that_the_model_has_not(tmp_path, capsys):
    message = refusal(capsys, arguments(tmp_path, attacks="pgd", gradients="bpda"))
    assert "bpda" in message
    assert not (tmp_path / "attack.jsonl").exists()


def test_classes_of_torchattacks_are_named_as_there():
    pytest.importorskip("torchattacks")
    (_, attack), *_ = parse_attacks(["torchattacks:PGDL2:steps=3"], [0.5], "l2")
    assert (attack.kind, attack.options) == ("PGDL2", {"steps": 3})
    with pytest.raises(InputError, match="mean PGDL2"):
        parse_attacks(["torchattacks:pgdl2"], [0.5], "l2")


def test_options_are_python_values():
    (_, attack), *_ = parse_attacks(["pgd:steps=7:loss=margin:random_start=False"], [0.5], "l2")
    assert (attack.steps, attack.loss, attack.random_start) == (7, "margin", False)
    (_, attack), *_ = parse_attacks(["pgd:random_start=false:step_size=2/255"], [0.5], "l2")
    assert (attack.random_start, attack.step_size) == (False, 2 / 255)
    with pytest.raises(InputError, match=r"steps is 7\.5"):
        parse_attacks(["apgd-ce:steps=7.5"], [0.5], "l2")


def test_the_command_chooses_attacks_that_suit_the_model(tmp_path, capsys, monkeypatch):
    """Cut short: what is looked at is the choice."""
    monkeypatch.setattr(command, "DETERMINISTIC", ("pgd:steps=2",))
    monkeypatch.setattr(command, "RANDOMISED", ("pgd:steps=2:eot=2",))
    chosen = {}
    for factory in (MODEL, "tests.nets:coin"):
        out = tmp_path / factory.rpartition(":")[2]
        assert main(arguments(out, "--no-checks", model=factory, eps="25/255")) == 0
        log = read_attack_log(out)
        chosen[log.settings["randomised"]] = log.settings["attacks"][0]["name"]
        assert log.settings["attacks"][0]["eps"] == 25 / 255
    assert chosen == {False: "pgd:steps=2", True: "pgd:steps=2:eot=2"}
    assert "attack.jsonl" in capsys.readouterr().out


def test_the_sample_is_recorded(tmp_path):
    assert main(arguments(tmp_path, "--no-checks", attacks="pgd:steps=1", skip=2, max=3)) == 0
    settings = read_attack_log(tmp_path).settings
    assert (settings["data"], settings["skip"], settings["max"]) == ("digits", 2, 3)


def test_the_function_that_was_certified_is_the_one_that_is_attacked(tmp_path, capsys):
    """And no other is compared with its certificate: it once was called an inversion."""
    network = ["--model", "art_denoised.demo:digits_classifier", "--data", "digits", "--max", "6"]
    noise = ["--denoiser", "art_denoised.demo:digits_denoiser", "--sigma", "0.25"]
    attack = ["--norm", "l2", "--eps", "0.25", "--attacks", "pgd:steps=2", "--no-checks", "--quiet"]
    runs = {name: str(tmp_path / name) for name in ("both", "bare", "other")}
    certified = [*network, *noise, "--n", "100", "--quiet"]
    for out in runs.values():
        assert main(["certify", *certified, "--out", out]) == 0
    assert main(["attack", *network, *noise, *attack, "--out", runs["both"]]) == 0
    assert main(["attack", *network, *attack, "--out", runs["bare"]]) == 0
    assert main(["attack", *network, *noise[2:], *attack, "--out", runs["other"]]) == 0
    found = {}
    for name, out in runs.items():
        capsys.readouterr()
        assert main(["report", out, "--json"]) == 0
        models = json.loads(capsys.readouterr().out)["models"]
        found[name] = [len(model["certified_against_robust"]) for model in models]
    assert found == {"both": [1], "bare": [0, 0], "other": [0, 0]}
    assert main(["attack", *network, *noise[:2], *attack, "--out", str(tmp_path / "no")]) == 2


def test_the_network_is_attacked_in_the_type_in_which_it_was_certified(tmp_path, capsys):
    network = words("", model=MODEL, data="digits", max=2, sigma=0.25)[1:]
    half = ["--dtype", "bfloat16", "--quiet"]
    attack = ["--norm", "l2", "--eps", "0.25", "--attacks", "pgd:steps=1", "--no-checks"]
    attack += ["--samples", "2"]
    compared = []
    for name, dtype in (("same", half), ("other", ["--quiet"])):
        out = ["--out", str(tmp_path / name)]
        assert main(["certify", *network, *half, "--n", "50", "--batch-size", "50", *out]) == 0
        assert main(["attack", *network, *dtype, *attack, *out]) == 0
        capsys.readouterr()
        assert main(["report", *out[1:], "--json"]) == 0
        models = json.loads(capsys.readouterr().out)["models"]
        compared.append(any(model["certified_against_robust"] for model in models))
    assert compared == [True, False]
