"""Runs against the clock: sound wherever they stop, and the same however often they did."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from art_denoised.checks import InputError
from art_denoised.data import load_data
from art_denoised.demo import digits_classifier, digits_denoiser
from art_denoised.evaluation.certify import FirstLook, certify, first_look, predict
from art_denoised.evaluation.logs import read_log
from art_denoised.evaluation.preview import preview
from art_denoised.runs.progress import Progress
from art_denoised.smoothing.smoother import DenoisedClassifier, Smoother
from art_denoised.smoothing.stops import Anytime, AtRadii, FixedN, Voting

COMMON = {"indices": range(8), "progress": False}


def smoother(base: nn.Module | None = None, sigma: float = 0.25) -> Smoother:
    return Smoother(digits_classifier() if base is None else base, sigma=sigma)


class Slow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = digits_classifier()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return self.net(x)


def test_interrupted_and_resumed_runs_end_in_the_same_rows(tmp_path):
    """Interrupted wherever the clock will have it, inside turns and parts of noise streams."""
    slow, data = smoother(Slow().eval()), load_data("digits")
    whole = certify(slow, data, Anytime(700), run=tmp_path / "whole", **COMMON)
    runs = 0
    log = None
    while log is None or len(log.rows) < 8 or any(unfinished(row, 700) for row in log.rows):
        stop = Anytime(700, seconds=0.25)
        log = certify(slow, data, stop, run=tmp_path / "parts", resume=runs > 0, **COMMON)
        runs += 1
        assert runs < 1000  # a busy machine does little in each
    assert runs > 3
    assert log.rows == whole.rows
    assert read_log(tmp_path / "parts").rows == whole.rows


def test_progress_moves_by_samples_within_an_image(tmp_path, monkeypatch):
    moves: list[float] = []

    monkeypatch.setattr(Progress, "move", lambda shown, n, *words, **names: moves.append(n))
    options = {**COMMON, "indices": range(2), "run": tmp_path}
    certify(smoother(), load_data("digits"), FixedN(300), **options)
    assert moves[0] == 0.25  # the samples that select the class of the first image
    assert moves == sorted(moves)
    assert moves[-1] == 2


def unfinished(row, n: int) -> bool:
    return row.n < n and bool(row.counts)


def test_more_time_tightens(tmp_path):
    data = load_data("digits")
    few = certify(smoother(), data, Anytime(200), run=tmp_path, **COMMON)
    more = certify(smoother(), data, Anytime(2000), run=tmp_path, resume=True, **COMMON)
    certified = [(a, b) for a, b in zip(few.rows, more.rows, strict=True) if a.prediction != -1]
    assert len(certified) > 4
    assert all(b.n == 2000 for _, b in certified)
    assert sum(b.radius > a.radius for a, b in certified) >= len(certified) - 1
    log = (tmp_path / "certify.jsonl").read_text().splitlines()
    assert len(log) > 1 + 2 * len(more.rows)  # every turn is a row: a killed run keeps them


def test_the_deadline_is_kept(tmp_path):
    start = time.monotonic()
    slow = smoother(Slow().eval())
    log = certify(slow, load_data("digits"), Anytime(seconds=0.5), run=tmp_path, **COMMON)
    assert time.monotonic() - start < 5
    assert all(0 <= row.n < 100_000 for row in log.rows)


def test_images_that_are_wrong_cost_nothing_more(tmp_path):
    stop = Anytime(200)
    log = certify(
        smoother(sigma=0.5), load_data("digits"), stop, run=tmp_path, indices=range(60),
        progress=False,
    )  # fmt: skip
    skipped = [row for row in log.rows if row.n == 0]
    assert skipped
    assert all(not row.correct for row in skipped)
    assert all(row.n == 200 for row in log.rows if row not in skipped)


STOPS = {"fixed": FixedN(150), "radii": AtRadii([0.0, 0.25], 1000), "anytime": Anytime(300)}


@pytest.mark.parametrize("name", STOPS)
def test_a_log_holds_what_certify_says_of_each_image(tmp_path, name):
    """Batches are shared between images, and no certificate depends on it."""
    stop, data = STOPS[name], load_data("digits")
    log = certify(smoother(), data, stop, run=tmp_path, indices=[3, 17, 40], progress=False)
    for row in log.rows:
        x, label = data[row.index]
        alone = smoother().certify(x[None], stop, labels=[label], first_index=row.index)[0]
        assert row.certificate == alone
        assert row.label == label


def test_a_predict_log_holds_the_votes_of_each_image(tmp_path):
    data = load_data("digits")
    log = predict(smoother(), data, Voting(120), run=tmp_path, indices=[3, 17], progress=False)
    for row in log.rows:
        assert (
            row.vote
            == smoother().vote(data[row.index][0][None], Voting(120), first_index=row.index)[0]
        )


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_killed_run_ends_in_the_rows_of_one_that_was_not(tmp_path, cut):
    options = {"run": tmp_path, "indices": range(5), "progress": False}
    whole = certify(smoother(), load_data("digits"), FixedN(100), **options)
    path = tmp_path / "certify.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:cut]) + lines[cut][:20])
    again = certify(smoother(), load_data("digits"), FixedN(100), resume=True, **options)
    assert again.rows == whole.rows == read_log(path).rows


class Changed:
    """The digits, one of them with another pixel, or another label."""

    def __init__(self, *, pixel: float = 0.0, label: int | None = None) -> None:
        self._digits, self._pixel, self._label = load_data("digits"), pixel, label

    def __len__(self) -> int:
        return len(self._digits)

    def __getitem__(self, index: int):
        x, label = self._digits[index]
        if index != 2:
            return x, label
        x = x.clone()
        x[0, 0, 0] = self._pixel
        return x, label if self._label is None else self._label


def sloping(slope: float = 0.1, **attributes: object) -> nn.Module:
    """Networks of equal weights."""
    net = nn.Sequential(nn.LeakyReLU(slope), digits_classifier()).eval()
    for name, value in attributes.items():
        setattr(net, name, value)
    return net


@pytest.mark.parametrize("stop", [FixedN(100), Anytime(200)])
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"data": Changed(pixel=0.51)}, "pixels"),
        ({"data": Changed(label=9)}, "labels"),
        ({"indices": [0, 1, 3]}, "indices"),
        ({"base": sloping(0.2)}, "structure"),
        ({"base": sloping(shift=0.5)}, "attributes"),
        ({"sigma": 0.3}, "sigma is 0.25, not 0.3"),
        ({"identity": {"model": "b"}}, "model is 'a', not 'b'"),
    ],
)
def test_rows_of_different_runs_are_never_mixed(tmp_path, stop, change, word):
    """Votes of both would be added: a radius of .501 where the true one was .08."""

    def start(resume=False, base=None, sigma=0.25, data=None, **more):
        more = {"indices": [0, 1, 2], "identity": {"model": "a"}, **more}
        certify(
            smoother(base or sloping(), sigma), data or Changed(), stop, run=tmp_path,
            resume=resume, progress=False, **more,
        )  # fmt: skip

    start()
    before = (tmp_path / "certify.jsonl").read_bytes()
    with pytest.raises(InputError, match=word) as error:
        start(resume=True, **change)
    assert "\n" not in str(error.value)
    assert (tmp_path / "certify.jsonl").read_bytes() == before
    start(resume=True)


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ((torch.zeros(1, 9, 9), 0), "image 1.*9, 9"),
        ((torch.zeros(1, 8, 8), 0, "id"), "image 1.*3 values"),
        (("picture", 0), "image 1.*str"),
        ((torch.zeros(1, 8, 8), 1.5), "image 1.*label"),
        ((torch.zeros(1, 8, 8), 11), "image 1.*11"),
    ],
)
def test_data_that_cannot_be_used_are_named_before_the_work(tmp_path, entry, word):
    data = [(torch.zeros(1, 8, 8), 0), entry]
    with pytest.raises(InputError, match=word):
        certify(smoother(), data, FixedN(100), run=tmp_path, progress=False)
    assert not (tmp_path / "certify.jsonl").exists()


@pytest.mark.parametrize("indices", [5, 0.5, "12", [0.5], torch.tensor(3), {1: 2}])
def test_indices_that_are_no_sequence_of_numbers_are_refused(tmp_path, indices):
    with pytest.raises(InputError, match="index is|indices is") as error:
        certify(smoother(), load_data("digits"), FixedN(100), run=tmp_path, indices=indices)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("radii", [0.1, "12", torch.tensor(0.1), ["x"]])
def test_radii_that_are_no_sequence_of_numbers_are_refused(radii):
    with pytest.raises(InputError, match="radii is|radius is"):
        AtRadii(radii)


def test_sparse_images_are_refused(tmp_path):
    sparse = torch.zeros(1, 8, 8).to_sparse()
    with pytest.raises(InputError, match=r"image 0: .*sparse"):
        certify(smoother(), [(sparse, 0)], FixedN(100), run=tmp_path, progress=False)
    with pytest.raises(InputError, match="sparse"):
        smoother().certify(sparse[None], FixedN(100))


def test_more_images_for_a_finished_run_are_refused_with_the_remedy(tmp_path):
    data, options = load_data("digits"), {"run": tmp_path, "progress": False}
    certify(smoother(), data, FixedN(100), indices=range(2), **options)
    with pytest.raises(InputError, match=r"images is 2, not 3.*folder of their own") as error:
        certify(smoother(), data, FixedN(100), indices=range(3), resume=True, **options)
    assert "\n" not in str(error.value)


def test_a_smoother_of_other_units_is_refused(tmp_path):
    """Data sets hold images in [0, 1], which are all but black in [0, 255]."""
    other = Smoother(digits_classifier(), sigma=64, clip_values=(0, 255))
    with pytest.raises(InputError, match=r"\(0, 255\)"):
        certify(other, load_data("digits"), FixedN(100), run=tmp_path, **COMMON)


def test_predict_takes_votes_only(tmp_path):
    with pytest.raises(InputError, match="stop is FixedN"):
        predict(smoother(), load_data("digits"), FixedN(100), run=tmp_path, **COMMON)


@pytest.mark.parametrize("door", [certify, preview, first_look])
def test_every_door_refuses_images_of_other_units(tmp_path, door):
    """Data sets hold images in [0, 1]: in other units all of them would be almost black."""
    other = Smoother(digits_classifier(), sigma=64, clip_values=(0, 255))
    options = {first_look: ([0],)}.get(door, (FixedN(100),))
    more = {"run": tmp_path, "progress": False} if door is certify else {}
    with pytest.raises(InputError, match="255"):
        door(other, load_data("digits"), *options, **more)


def look(base: nn.Module, images: int = 100, sigma: float = 0.5) -> FirstLook:
    return first_look(Smoother(base, sigma=sigma), load_data("digits"), range(images))


def test_a_denoiser_shows_on_noisy_images():
    classifier = digits_classifier()
    plain = look(classifier)
    denoised = look(DenoisedClassifier(classifier, digits_denoiser(), sigma=0.5))
    assert (plain.images, denoised.images) == (32, 32)
    assert plain.clean >= 30
    assert denoised.noisy > plain.noisy + 5


def test_a_missing_normalisation_shows_on_clean_images():
    class Unnormalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = digits_classifier()

        def forward(self, x):
            return self.net((x - 0.5).abs() * 3)

    assert look(Unnormalised().eval()).clean < 20


def test_a_first_look_says_its_numbers():
    text = str(FirstLook(images=32, clean=30, noisy=17, sigma=0.25))
    for value in ("30", "32", "17", "0.25"):
        assert value in text


def test_a_first_look_blames_the_denoiser_before_the_files():
    def blind(x, sigma):
        return torch.zeros_like(x)

    denoised = look(DenoisedClassifier(digits_classifier(), blind, sigma=0.5))
    assert "classifier behind the denoiser" in str(denoised)
    assert "first without the denoiser" in str(denoised)
    assert "denoiser" not in str(look(digits_classifier()))


def test_a_first_look_is_the_same_each_time_and_leaves_random_numbers_alone():
    torch.manual_seed(3)
    classifier = digits_classifier()
    before = torch.get_rng_state()
    assert look(classifier) == look(classifier)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_first_look_at_other_types_and_few_images():
    assert look(digits_classifier().bfloat16(), images=2).images == 2


@pytest.mark.parametrize("base", [nn.Dropout(), nn.Conv2d(3, 1, 1)])
def test_a_first_look_refuses_misfits(base):
    with pytest.raises(InputError):
        look(base)
