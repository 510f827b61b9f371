"""certify --api: a preview before the first query, a budget, and one line for mistakes."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from art_denoised.cli import main
from art_denoised.evaluation import preview_queries, read_log
from art_denoised.smoothing import AtRadii, BlackBox, Budget, FixedN, Smoother
from tests.api_server import NAMES, Service
from tests.cli.command import DENOISER, refusal, words

PRICE = 0.0015


@pytest.fixture(scope="module")
def service():
    with Service() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def api(service, tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join((*NAMES[:-1], "nine, ninth")))

    def command(*flags: str, **changes: object) -> list[str]:
        options = {
            "api": service.url,
            "answer": "predictions.0.label",
            "classes": tmp_path / "classes.txt",
            "price": PRICE,
            "budget": 50,
            "data": "digits",
            "sigma": 0.25,
            "n": 20,
            "n0": 10,
            "max": 2,
            "out": tmp_path / "run",
        }
        return words("certify", "--quiet", *flags, **(options | changes))

    return command


def test_an_api_is_certified_within_its_budget_and_resumed(api, service, tmp_path, capsys):
    before = len(service.requests)
    assert main(api("--preview", "--json")) == 0
    cost = json.loads(capsys.readouterr().out)
    assert (cost["images"], cost["fewest"], cost["most"]) == (2, 60, 60)
    assert cost["cost"] == pytest.approx(60 * PRICE)
    assert len(service.requests) == before
    assert not (tmp_path / "run").exists()

    assert main(api("--json", denoiser=DENOISER)) == 0
    heard = capsys.readouterr()
    assert json.loads(heard.out)["samples"] == 60
    assert "2 images: 60 queries, cost 0.09" in heard.err
    assert "60 queries so far, 0.09 paid" in heard.err
    assert len(service.requests) == before + 60
    settings = read_log(tmp_path / "run").settings
    assert (settings["model"], settings["denoiser"]) == (service.url, DENOISER)

    assert main(api("--resume", "--preview", "--json", denoiser=DENOISER, max=3)) == 0
    cost = json.loads(capsys.readouterr().out)
    assert (cost["images"], cost["answered"], cost["most"]) == (3, 60, 30)
    assert cost["limit"] == 50 / PRICE // 1 - 60

    assert main(api("--resume", "--json", denoiser=DENOISER, max=3)) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 90
    assert len(service.requests) == before + 90


def test_a_paid_run_that_names_its_choice_of_images_goes_on(api, service, tmp_path, capsys):
    """As logs did until images were compared one by one."""
    assert main(api(max=1)) == 0
    for log in (tmp_path / "run").glob("*.jsonl"):
        header, *rows = log.read_text().splitlines()
        content = json.loads(header)
        content["settings"] |= {"skip": 1, "max": 1}
        log.write_text("\n".join([json.dumps(content), *rows]) + "\n")
    before = len(service.requests)
    assert main(api("--resume", "--json", max=2)) == 0
    assert len(service.requests) == before + 30


def test_a_budget_that_does_not_suffice_is_refused_before_the_first_query(api, service, capsys):
    before = len(service.requests)
    for limit in ({"budget": 0.0885}, {"budget": None, "price": None, "max_queries": 59}):
        message = refusal(capsys, api(**limit))
        assert "60 queries" in message
        assert "allows 59" in message
    assert len(service.requests) == before


@pytest.mark.parametrize(
    ("changes", "flags", "said"),
    [
        ({"api": None}, [], "--api"),
        ({"model": "timm:resnet18"}, [], "--model"),
        ({"num_classes": 3}, [], "--num-classes"),
        ({"classes": None}, [], "--classes"),
        ({"budget": None}, [], "--budget"),
        ({"price": None}, [], "--price"),
        ({"deadline": "90s"}, [], "--deadline"),
        ({"batch_size": "7"}, [], "--batch-size"),
        ({"header": "Authorization"}, [], "--header"),
        ({"header": "Authorization: {NO_SUCH_VARIABLE}"}, [], "NO_SUCH_VARIABLE"),
        ({"shard": "1/2"}, [], "unsharded"),
    ],
    ids=str,
)
def test_what_does_not_fit_an_api_is_refused(api, capsys, changes, flags, said):
    assert said in refusal(capsys, api(*flags, **changes))


def test_keys_come_from_the_environment(api, service, capsys, monkeypatch):
    """The service refuses the key "wrong"."""
    monkeypatch.setenv("API_KEY", "wrong")
    assert "403" in refusal(capsys, api(header="Authorization: {API_KEY}"))


def test_without_the_packages_of_an_api_it_says_what_to_install(api, capsys, monkeypatch):
    monkeypatch.setattr("art_denoised.cli.certify.find_spec", lambda name: None)
    assert "pip install 'art-denoised[api]'" in refusal(capsys, api())


def test_a_preview_of_queries_tells_fewest_and_most():
    box = BlackBox(lambda x: ["a"] * len(x), ["a", "b"], budget=Budget(queries=500), workers=2)
    data = [(torch.full((1, 4, 4), i / 10), 0) for i in range(3)]
    smoother = Smoother(box, sigma=0.25)
    cost = preview_queries(smoother, data, AtRadii([0.1], 1000, 20))
    assert (cost.fewest, cost.most, cost.limit, cost.seconds) == (60, 3060, 500, 1530)
    assert "60 to 3,060 queries" in str(cost)
    assert "the budget allows 500" in str(cost)
    assert preview_queries(smoother, data, FixedN(80, n0=20), indices=[1]).most == 100
