"""What words on the command line mean."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from PIL import Image
from torch import nn

from art_denoised.cli import main
from art_denoised.cli.options import DataOptions, duration, factory, names, norm, number, numbers
from tests.cli.command import MODEL, refusal, words


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (number, "0.5", 0.5),
        (number, "51/255", 0.2),
        (numbers, "0,0.25", (0.0, 0.25)),
        (names, "exact, bpda", ("exact", "bpda")),
        (duration, "90", 90.0),
        (duration, "10m", 600.0),
        (duration, "1.5h", 5400.0),
        (factory, "mynets:resnet20", "mynets:resnet20"),
        (factory, "mynets/small.py:resnet20", "mynets.small:resnet20"),
        (norm, "Linf", "linf"),
        (norm, "L_2", "l2"),
    ],
)
def test_values(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "texts"),
    [
        (number, ["a/b", "1e400", "8/0", "nan", "-inf", "8/255/2"]),
        (numbers, ["a", "0,", "nan", "0,1e400"]),
        (names, [",", " , "]),
        (norm, ["l7", "inf", "linf2"]),
        (duration, ["soon", "0s", "-1s", "5d", "1e3"]),
        (factory, ["/elsewhere/model.py:net", "../model.py:net", "my-model.py:net"]),
    ],
)
def test_refusals_quote_the_text(parse, texts):
    for text in texts:
        with pytest.raises(ValueError, match="'") as caught:
            parse(text)
        quoted = re.search("'(.*?)'", str(caught.value))
        assert quoted is not None
        assert quoted[1] in text


def test_words_are_known_in_any_spelling(tmp_path, capsys):
    options = {"model": "no.such:net", "data": "digits", "eps": 0.1, "out": tmp_path}
    for spelling in ("Linf", "L_inf", "l2", "L2"):
        assert "no.such" in refusal(capsys, words("attack", norm=spelling, **options))
    message = refusal(capsys, words("attack", norm="l7", **options))
    assert "l7" in message
    assert "linf or l2" in message


def test_a_python_file_stands_for_its_module(tmp_path, monkeypatch, capsys):
    package = tmp_path / "nets_of_mine"
    package.mkdir()
    (package / "small.py").write_text("from art_denoised.demo import digits_classifier as net\n")
    monkeypatch.chdir(tmp_path)
    common = {"data": "digits", "eps": 0.1, "attacks": "pgd:steps=1", "max": 2}
    names = ("nets_of_mine/small.py:net", "./nets_of_mine/small.py:net", MODEL)
    for place, name in enumerate(names):
        run = words("attack", "--quiet", "--no-checks", model=name, out=f"{place}", **common)
        assert main(run) == 0


def test_choices_are_those_of_the_library():
    from art_denoised.attacks.pgd import Norm
    from art_denoised.cli import options
    from art_denoised.cli import train as ours
    from art_denoised.training import config as theirs

    def same(one: object, other: object) -> bool:
        return set(get_args(one)) == set(get_args(other))

    assert same(ours.Optimizer, theirs.Optimizer)
    assert same(ours.Schedule, theirs.Schedule)
    assert same(ours.Augmentation, theirs.Augmentation)
    assert same(get_args(options.Norm)[0], Norm)


def test_defaults_are_those_of_the_library():
    from art_denoised.cli.train import DiffusionOptions, RobustTrainingOptions, TrainingOptions
    from art_denoised.diffusion.levels import P_MEAN, P_STD
    from art_denoised.training import ROBUST_CONFIG, TrainingConfig

    assert TrainingOptions().config() == TrainingConfig()
    assert RobustTrainingOptions().config() == ROBUST_CONFIG
    assert (DiffusionOptions().p_mean, DiffusionOptions().p_std) == (P_MEAN, P_STD)


@pytest.mark.parametrize(("folders", "said"), [(range(11), True), (range(10), False)])
def test_folders_that_are_numbers_in_another_order_are_named(tmp_path, capsys, folders, said):
    for folder in folders:
        (tmp_path / str(folder)).mkdir()
        Image.new("L", (2, 2)).save(tmp_path / str(folder) / "0.png")
    DataOptions(data=f"imagefolder:{tmp_path}").load(nn.Identity())
    assert ("--classes" in capsys.readouterr().err) == said
