"""Plots: what is drawn is what the rows say, and files are what journals and editors need."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from art_denoised.checks import InputError
from art_denoised.data import load_data
from art_denoised.data.images import Chosen
from art_denoised.demo import digits_diffusion
from art_denoised.diffusion import noise_levels
from art_denoised.evaluation import CERTIFY, CertifyRow, CheckRow, read_log
from art_denoised.networks import FeatureDenoising
from art_denoised.rdc import DiffusionClassifier
from art_denoised.reports import (
    Curve,
    Look,
    Model,
    accuracy_figure,
    attacked_strips,
    certified_strips,
    feature_figure,
    loss_figure,
    picture_figure,
    read_curves,
    report,
    save_figure,
)
from art_denoised.reports.certified import accuracy_table
from art_denoised.reports.plots import appearance
from art_denoised.runs import Run
from tests.reports.rows import certificate, clean_row, row, write_run

OUTCOMES = [(1, 1, 0.5), (1, 1, 0.25), (2, 1, 0.75), (0, -1, 0.0)]
ROWS = tuple(
    CertifyRow(index=i, label=label, prediction=prediction, radius=radius, seconds=0)
    for i, (label, prediction, radius) in enumerate(OUTCOMES)
)
CERTIFIED = Model("ours", certified=ROWS)
LIMITED = Model("limited", certified=ROWS, asked=(0.25, 0.5))
ATTACKED = Model("net", (clean_row(0), clean_row(1), row(0, True), row(1, False)))


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_curve_is_the_certified_accuracy_at_every_radius():
    """Read off the drawn step function between and at its knots."""
    axes = accuracy_figure([CERTIFIED], look=Look(title="t")).axes[0]
    x, y = axes.lines[0].get_data()
    assert axes.lines[0].get_drawstyle() == "steps-pre"
    for radius in (0.1, 0.25, 0.3, 0.5):
        drawn = y[np.searchsorted(x, radius)]  # steps-pre: y[i] holds on (x[i-1], x[i]]
        assert drawn == pytest.approx(100 * accuracy_table(ROWS, [radius])[0].certified_accuracy)
    assert (x[0], y[0]) == (0, 50)
    assert (x[-1], y[-1]) == (0.5, 0)
    assert axes.get_title() == "t"


def test_a_run_that_stopped_at_radii_has_markers_there_and_no_band():
    figure = accuracy_figure([LIMITED])
    points, line = (figure.axes[0].lines[i] for i in (0, -1))
    assert points.get_marker() == appearance(0).marker
    np.testing.assert_array_equal(points.get_data(), ([0.25, 0.5], [50, 25]))
    assert line.get_linewidth() < 1
    bands = [c for c in figure.axes[0].collections if "Poly" in type(c).__name__]
    assert bands == []
    assert legend(figure) == ["limited", "between markers: a lower bound"]


def test_certified_and_robust_accuracy_share_one_axis():
    both = Model("both", ATTACKED.rows, certified=(certificate(0, 0.5), certificate(1, 0.1)))
    published = Curve("Cohen et al.", (0.0, 0.5), (0.8, 0.4))
    figure = accuracy_figure([both, CERTIFIED], published=[published])
    axes = figure.axes[0]
    assert legend(figure) == [
        *("both, certified", "both, attacked", "ours, certified", "Cohen et al.")
    ]
    drawn = {tuple(map(tuple, line.get_data())): line for line in axes.lines}
    robust = drawn[((0.0, 0.5), (100.0, 50.0))]
    assert (robust.get_color(), robust.get_marker()) == appearance(0)[:2]
    thin = drawn[((0.0, 0.5), (80.0, 40.0))]
    assert thin.get_linewidth() < 1
    assert axes.get_xlabel() == "l2 eps and l2 radius (image units)"


def test_unreliable_points_are_hollow():
    bad = Model("bad", ATTACKED.rows, (CheckRow("logits", False, "words"),))
    figure = accuracy_figure([bad])
    assert figure.axes[0].lines[0].get_markerfacecolor() == "none"
    assert legend(figure) == ["bad (not reliable)"]


def test_models_differ_in_more_than_colour():
    looks = [appearance(i) for i in range(25)]
    assert len(set(looks)) == 25
    for i in range(5):
        for j in range(i):
            assert all(a != b for a, b in zip(looks[i], looks[j], strict=True))


def test_norms_are_not_mixed():
    linf = Model("linf", (row(0, True, norm="linf", eps=0.1),))
    with pytest.raises(InputError, match="l2 and linf"):
        accuracy_figure([ATTACKED, linf])
    with pytest.raises(InputError, match="linf has no results in l2"):
        accuracy_figure([ATTACKED, linf], norm="l2")
    assert legend(accuracy_figure([linf])) == ["linf"]


def test_labels_and_size():
    look = Look(size=(3, 2), xlabel="radius $r$", ylabel="y", style="grayscale")
    figure = accuracy_figure([CERTIFIED], look=look)
    assert tuple(figure.get_size_inches()) == (3, 2)
    assert figure.axes[0].get_xlabel() == r"radius \$r\$"
    assert figure.axes[0].get_ylabel() == "y"
    with pytest.raises(InputError, match="size is"):
        Look(size=(3, 2, 1))
    with pytest.raises(InputError, match="style is 'nosuch'"):
        Look(style="nosuch")


def test_a_style_sheet_of_other_lines_is_refused(tmp_path, capsys):
    """Matplotlib would log them, and draw without the style that was meant."""
    sheet = tmp_path / "my.mplstyle"
    sheet.write_text("axes.grid: True\nlines.linewidth: 3 # points\n")
    assert Look(style=str(sheet)).settings["lines.linewidth"] == 3
    for line in ("root:x:0:0", "axes.grid: perhaps"):
        sheet.write_text(line)
        with pytest.raises(InputError, match=r"style is .*my\.mplstyle"):
            Look(style=str(sheet))
    assert "".join(capsys.readouterr()) == ""


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("a,0,.5\na,0.25,.4\na,0,.6\n", "radius 0 of a 2 times"),  # two curves of one name
        ("a,inf,.5\n", "radius inf"),
    ],
)
def test_published_curves_that_cannot_be_drawn_are_refused(tmp_path, lines, words):
    file = tmp_path / "curves.csv"
    file.write_text(f"name,radius,certified_accuracy\n{lines}")
    with pytest.raises(InputError, match=words):
        read_curves(file)


def test_files_carry_fonts_and_text(tmp_path):
    name = r"$\frac{$ red" + "\x1b[31m"
    figure, again = (
        accuracy_figure([Model(name, certified=ROWS)], look=Look(title=name, size=(3, 2)))
        for _ in range(2)
    )
    for suffix in ("svg", "pdf", "png"):
        save_figure(figure, tmp_path / f"a.{suffix}")
    assert r"red\x1b[31m</text>" in (tmp_path / "a.svg").read_text()
    pdf = (tmp_path / "a.pdf").read_bytes()
    assert b"/Type42" in pdf or b"/CIDFontType2" in pdf
    assert b"/Type3" not in pdf
    save_figure(again, tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_bytes() == (tmp_path / "a.svg").read_bytes()
    with pytest.raises(InputError, match=r"\.png"):
        save_figure(figure, tmp_path / "a.doc")
    with pytest.raises(InputError, match=r"missing/a\.png cannot be written"):
        save_figure(figure, tmp_path / "missing" / "a.png")


def test_pictures_of_an_attack_have_labels_and_radii(tmp_path):
    (model,) = report([write_run(tmp_path / "ours", certified=0.3)]).models
    (strip,) = attacked_strips(model)
    assert strip.titles == ("image 0", "class 1", "pgd", "eps 0.5")
    assert list(strip.pictures) == ["clean", "noisy", "attacked", "difference"]
    assert strip.captions["clean"] == "1, right; 1 certified, radius 0.3"
    assert strip.captions["noisy"] == "sigma 0.25"
    assert strip.captions["attacked"].startswith("one answer: 7; right in ")
    assert strip.captions["attacked"].endswith(" of 4")
    assert (strip.pictures["difference"] == 128).all()  # the row holds the same picture twice
    wrong = {"index": 99, "clean": False, "counted": False, "fresh": (False,)}
    rows = tuple(msgspec.structs.replace(row, **wrong) for row in model.rows if row.index == 0)
    pictures = tuple(msgspec.structs.replace(row, index=99) for row in model.pictures)
    wrong_last = replace(model, rows=rows + model.rows, pictures=pictures + model.pictures)
    assert [one.titles[0] for one in attacked_strips(wrong_last)] == ["image 0", "image 99"]
    figure = picture_figure([strip])
    assert [axes.get_title() for axes in figure.axes] == list(strip.pictures)
    assert [len(axes.images) for axes in figure.axes] == [1] * 4
    with pytest.raises(InputError, match="no pictures"):
        picture_figure([])


def test_pictures_of_a_certify_run_are_those_of_its_data(tmp_path):
    data = load_data("digits")
    settings = {"sigma": 0.5, "data": "digits", **Chosen(data, [3, 5]).settings()}
    with Run(tmp_path, CERTIFY, settings) as run:
        run.append([certificate(index, 0.25, label=int(data[index][1])) for index in (3, 5)])
    log = read_log(tmp_path)
    strips = certified_strips(log, data, denoiser=lambda x, sigma: x * 0, most=1)
    assert list(strips[0].pictures) == ["clean", "noisy", "denoised"]
    assert strips[0].captions["clean"].endswith(", right; radius 0.25")
    np.testing.assert_array_equal(
        strips[0].pictures["clean"], np.rint(255 * data[3][0].numpy()).astype(np.uint8)
    )
    assert not strips[0].pictures["denoised"].any()
    other = [(image.flip(2), label) for image, label in (data[i] for i in range(10))]
    with pytest.raises(InputError, match="pixels"):
        certified_strips(log, other)


def test_feature_maps_before_and_after_a_block():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), FeatureDenoising(4, "mean")).eval()
    with torch.no_grad():
        network[1].bn.weight.fill_(1.0)
    x = torch.rand(2, 1, 8, 8)
    figure = feature_figure(network, {"clean": x[0], "attacked": x[1]}, channel=2)
    before, after = (figure.axes[place].images[0].get_array() for place in (4, 5))
    with torch.no_grad():
        expected = network[0](x)[1, 2]
        np.testing.assert_allclose(before, expected, atol=1e-6)
        np.testing.assert_allclose(after, network(x)[1, 2], atol=1e-6)
    for wrong in ({"block": "nosuch"}, {"channel": 4}):
        with pytest.raises(InputError):
            feature_figure(network, {"clean": x[0]}, **wrong)


def test_losses_by_level_and_class_add_up_to_the_logits():
    data = load_data("digits")
    classifier = DiffusionClassifier(digits_diffusion(), levels=noise_levels(4), seed=0)
    x, label = data[0][0][None], int(data[0][1])
    losses = classifier.level_losses(x)
    assert losses.shape == (1, 4, 10)
    np.testing.assert_allclose(-losses.sum(1), classifier(x), rtol=1e-5)
    figure = loss_figure(losses[0], classifier.levels.sigmas, label=label)
    left, right = figure.axes
    assert len(left.lines) == 10
    assert right.get_yticklabels()[0].get_text() == str(int(classifier(x).argmax()))
    assert f"{label}: predicted, right" in [t.get_text() for t in left.get_legend().get_texts()]
    with pytest.raises(InputError, match="shape"):
        loss_figure(losses[0], (0.1,))
