"""Entries of a leaderboard: what follows from the votes passes, a forged entry does not."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest

from art_denoised.checks import InputError
from art_denoised.cli import main
from art_denoised.data import load_data
from art_denoised.demo import digits_classifier
from art_denoised.evaluation import certify
from art_denoised.leaderboard import check, leaderboard, read_entries, submit, write_page
from art_denoised.smoothing import FixedN, Smoother
from tests.cli.command import ROOT, refusal

WORDS = {"defence": "noise", "model": "small CNN", "data": "digits", "source": "a test"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    smoother, data = Smoother(digits_classifier(), sigma=0.1), load_data("digits")
    certify(smoother, data, FixedN(100), run=folder, indices=range(4), progress=False)
    return folder


@pytest.fixture
def entry(run, tmp_path):
    return submit(run, tmp_path / "board", name="ours", radii=[0.0, 0.1], **WORDS)


def edit(path, **changes):
    """Change values of an entry; those of its votes are named votes_NAME."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        part = content["votes"] if name.startswith("votes_") else content
        part[name.removeprefix("votes_")] = value
    path.write_text(json.dumps(content))


def forge_log(entry, edit_row, *, rehash):
    log = entry.parent / "logs" / "ours.jsonl"
    lines = log.read_text().splitlines()
    row = json.loads(lines[1])
    edit_row(row)
    lines[1] = json.dumps(row)
    log.write_text("\n".join(lines) + "\n")
    if rehash:
        edit(entry, votes_sha256=hashlib.sha256(log.read_bytes()).hexdigest())


def test_an_entry_holds_what_follows_from_its_log(entry, run):
    (found,) = read_entries(entry.parent).values()
    assert check(entry) == []
    assert (found.sigma, found.votes.images, found.votes.n, found.votes.alpha) == (
        0.1,
        4,
        100,
        0.001,
    )
    assert found.votes.path == "logs/ours.jsonl"
    content = (run / "certify.jsonl").read_bytes()
    assert found.votes.sha256 == hashlib.sha256(content).hexdigest()
    assert set(found.accuracy) == {0.0, 0.1}
    assert 0 < found.accuracy[0.1] <= found.accuracy[0.0] <= 1


def test_a_run_is_entered_once(entry, run):
    with pytest.raises(InputError, match="ours.json"):
        submit(run, entry.parent, name="again", radii=[0.0], **WORDS)
    assert len(read_entries(entry.parent)) == 1


def test_a_log_beside_the_leaderboard_is_not_copied(run, tmp_path):
    shutil.copytree(run, tmp_path / "runs" / "a")
    entry = submit(tmp_path / "runs" / "a", tmp_path / "board", name="ours", **WORDS)
    assert json.loads(entry.read_text())["votes"]["path"] == "../runs/a/certify.jsonl"
    assert not (tmp_path / "board" / "logs").exists()
    assert check(entry) == []


@pytest.mark.parametrize(
    "forged",
    [
        {"accuracy": {"0.1": 1.0}},
        {"accuracy": {"0.1": 0.0}},
        {"sigma": 0.2},
        {"votes_images": 5},
        {"votes_n": 1000},
        {"votes_alpha": 0.0001},
        {"votes_seed": 1},
        {"votes_weights": "0" * 16},
        {"votes_sha256": "0" * 64},
        {"votes_path": "logs/none.jsonl"},
        {"votes_path": "../../elsewhere/certify.jsonl"},
    ],
    ids=str,
)
def test_a_forged_entry_is_found(entry, forged):
    edit(entry, **forged)
    assert check(entry)
    assert main(["verify", str(entry)]) == 1
    with pytest.raises(InputError, match="ours"):
        leaderboard(entry.parent)


def larger_radius(row):
    row["radius"] += 0.1


def other_label(row):
    row["label"] = (row["label"] + 1) % 10


@pytest.mark.parametrize("edit_row", [larger_radius, other_label])
@pytest.mark.parametrize("rehash", [False, True])
def test_a_forged_log_is_found(entry, edit_row, rehash):
    forge_log(entry, edit_row, rehash=rehash)
    assert check(entry)


def test_images_cannot_be_left_out(entry, run, tmp_path):
    log = entry.parent / "logs" / "ours.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:-1]) + "\n")
    edit(entry, votes_sha256=hashlib.sha256(log.read_bytes()).hexdigest(), votes_images=3)
    assert check(entry)[0].problem.startswith("1 ")
    with pytest.raises(InputError, match=": 1 of"):
        submit(log, tmp_path / "other", name="ours", **WORDS)


def without(entry, *keys):
    """Delete keys from the header of the log of an entry, and adapt its hash."""
    log = entry.parent / "logs" / "ours.jsonl"
    first, _, rest = log.read_text().partition("\n")
    header = json.loads(first)
    for key in keys:
        del header["settings"][key]
    log.write_text(json.dumps(header) + "\n" + rest)
    edit(entry, votes_sha256=hashlib.sha256(log.read_bytes()).hexdigest())
    return log


OF_IMAGES = ("images", "indices", "labels", "pixels")


@pytest.mark.parametrize("keys", [("indices",), ("labels",), OF_IMAGES], ids=str)
def test_a_log_that_does_not_name_its_images_is_refused(entry, tmp_path, keys):
    log = without(entry, *keys)
    assert len(check(entry)) == 1
    with pytest.raises(InputError, match=r"indices|labels"):
        submit(log, tmp_path / "other", name="ours", **WORDS)


def test_an_entry_of_an_older_log_is_marked(entry, capsys):
    without(entry, *OF_IMAGES)
    edit(entry, votes_named=False)
    assert check(entry) == []
    assert "| votes, images not named |" in leaderboard(entry.parent).to_markdown()
    assert main(["verify", str(entry)]) == 0
    shown = capsys.readouterr()
    assert "does not name" in shown.out
    assert "images not named" in shown.err


def test_an_entry_does_not_mark_a_log_that_names_its_images(entry):
    edit(entry, votes_named=False)
    assert [finding.index for finding in check(entry)] == [None]


@pytest.mark.parametrize("key", ["sigma", "alpha", "seed"])
def test_a_header_that_lacks_a_setting_is_one_fault(entry, key):
    without(entry, key)
    (found,) = check(entry)
    assert key in found.problem


def test_entries_of_different_alpha_are_not_ranked_together(entry, tmp_path):
    smoother, data = Smoother(digits_classifier(), sigma=0.1), load_data("digits")
    stop = FixedN(100, alpha=0.01)
    certify(smoother, data, stop, run=tmp_path / "run", indices=range(4), progress=False)
    submit(tmp_path / "run", entry.parent, name="easier", radii=[0.0, 0.1], **WORDS)
    page = leaderboard(entry.parent).to_markdown().split("## ")
    (ours,) = [part for part in page if "| ours |" in part]
    (easier,) = [part for part in page if "| easier |" in part]
    assert ours.splitlines()[0] == "digits, alpha = 0.001"
    assert easier.splitlines()[0] == "digits, alpha = 0.01"
    assert "| 4 | 100 | 0.01 |" in easier


@pytest.mark.parametrize("field", ["defence", "model", "data", "source", "votes_path"])
@pytest.mark.parametrize("bad", ["a\nb", "a\0b", "a\x1bb", "a\u2028b", "a\u202eb"], ids=ascii)
def test_control_characters_are_refused(entry, field, bad):
    edit(entry, **{field: bad})
    with pytest.raises(InputError) as caught:
        check(entry)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "A B"}, "name is 'A B'"),
        ({"name": "../x"}, r"\.\./x"),
        ({"model": " "}, "model is ' '"),
    ],
)
def test_a_name_that_no_file_can_have_and_blank_words_are_refused(run, tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        submit(run, tmp_path / "board", **({"name": "ours"} | WORDS | changes))


def test_words_are_no_markup(entry):
    edit(entry, source="<b>#x|[y](z)", data="# d_e_")
    page = leaderboard(entry.parent).to_markdown()
    assert "- ours: &#60;b&#62;\\#x\\|\\[y\\](z)" in page
    assert "## \\# d\\_e\\_, alpha" in page


@pytest.mark.parametrize(
    "bad",
    [
        *({"name": "Ours"}, {"name": "../ours"}, {"name": "ours"}, {"name": "b", "defence": ""}),
        *({"name": "b\n"}, {"name": "b\0"}, {"name": "b", "source": "a\nb"}),
        *({"name": "b", "radii": ["a"]}, {"name": "b", "radii": []}, {"name": "b", "radii": [-1]}),
    ],
    ids=ascii,
)
def test_what_cannot_be_an_entry_is_refused(entry, run, bad):
    with pytest.raises(InputError):
        submit(run, entry.parent, **{**WORDS, **bad})
    assert len(list(entry.parent.rglob("*.json*"))) == 2


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"schema": 2}', '{"name": "bad", "extra": 1}', "\udcff"],
)
def test_a_file_of_another_format_is_refused(tmp_path, content):
    (tmp_path / "bad.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match="bad.json"):
        read_entries(tmp_path)


def test_published_figures_are_marked_as_unverified(entry, capsys):
    edit(entry, votes=None, sigma=None)
    board = leaderboard(entry.parent)
    assert "unverified" in str(board)
    assert "best" in str(board)
    assert main(["verify", str(entry.parent)]) == 0
    assert "not verified" in capsys.readouterr().err


def test_the_commands_make_an_entry_and_a_page(run, tmp_path, capsys):
    board, page = tmp_path / "board", tmp_path / "page.md"
    words = [f"--{name}={value}" for name, value in (WORDS | {"defence": "a|b"}).items()]
    command = ["submit", str(run), "--name", "ours", "--board", str(board), *words, "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == {"entry": str(board / "ours.json")}
    assert "exists" in refusal(capsys, command)
    assert main(["leaderboard", str(board), "--out", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "ours"
    (row,) = [line for line in page.read_text().splitlines() if line.startswith("| ours")]
    assert row.endswith("| votes |")
    assert "a\\|b" in row
    assert "- ours: a test" in page.read_text()


def test_the_committed_entries_and_their_page_are_sound(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = ROOT / "results" / "leaderboard"
    kinds = {entry.votes is None for entry in read_entries(folder).values()}
    assert kinds == {True, False}
    write_page("results/leaderboard", tmp_path / "page.md")
    page = next((ROOT / "docs").rglob("leaderboard.md")).read_text(encoding="utf-8")
    assert page.splitlines()[3:] == (tmp_path / "page.md").read_text().splitlines()[3:]
