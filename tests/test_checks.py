"""Every refusal: one line that names the value and the remedy."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import DropBlock2d

from art_denoised import PGD, AutoAttack, checks
from art_denoised.attacks import DiffAttack
from art_denoised.checks import InputError
from art_denoised.data import ImageFolder, digits, load_data
from art_denoised.diffusion import EDM, Levels, noise_levels
from art_denoised.estimators import ArtAttack, MaiteDataset, MaiteModel
from art_denoised.evaluation import (
    CERTIFY,
    CertifyRow,
    Log,
    certify,
    evaluate,
    merge,
    predict,
    verify,
)
from art_denoised.models import EvalTransform
from art_denoised.purification import DDIM, Guided, vp_sigma, vp_time
from art_denoised.rdc import Adam
from art_denoised.reports import certified_table, report
from art_denoised.runs import Run
from art_denoised.smoothing import (
    Anytime,
    BlackBox,
    Budget,
    FixedN,
    HttpClassifier,
    Retry,
    Smoother,
)
from art_denoised.training import Adversarial, EDMLoss, Objective, TrainingConfig, Validation

X = torch.full((2, 3, 4, 4), 0.5)
DATA = [(X[0], 1)]


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1)


SMOOTHER = Smoother(flat, sigma=0.1)


class Functional(nn.Module):
    """Drops values in training mode, which its class does not say."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(flat(x), 0.5, self.training)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: checks.positive("sigma", 0), ["sigma is 0", "positive"]),
        (lambda: checks.positive("sigma", "a"), ["'a'", "number"]),
        (lambda: checks.positive("sigma", float("nan")), ["nan"]),
        (lambda: checks.sigma(64), ["64", "image units"]),
        (lambda: checks.alpha(0), ["alpha is 0", "0.001"]),
        (lambda: checks.alpha(0.5), ["0.5"]),
        (lambda: checks.alpha(None), ["None"]),
        (lambda: checks.sigma(0.25, (0, float("nan"))), ["nan", "smaller and a larger"]),
        (lambda: checks.sigma(0.25, (1, 0)), ["(1, 0)", "smaller and a larger"]),
        (lambda: checks.sigma(0.25, None), ["None", "smaller and a larger"]),
        (lambda: checks.pixel_bounds((0, True)), ["True"]),
        (lambda: checks.pixel_bounds((0, "1")), ["'1'"]),
        (lambda: checks.pixel_bounds((np.ones((9, 9)), np.zeros((9, 9)))), ["array"]),
        (lambda: checks.pixel_bounds(([0] * 3, [1] * 3), (3, 3, 3)), ["(3,)", "(3, 3, 3)"]),
        (lambda: checks.unit_range("PGD", (0, 255)), ["(0, 255)", "PGD"]),
        (lambda: checks.unit_range("PGD", (np.array([0, 0.5]), 1)), ["(0, 1)", "[0, 1]"]),
        (lambda: checks.several("batch", None, "images"), ["batch is None", "images"]),
        (lambda: checks.label_rows([[1, 2], [3]], 3), ["class indices"]),
        (lambda: checks.images([np.ma.masked_less(X[0].numpy(), 1)]), ["masked", "filled"]),
        (lambda: checks.positive("sigma", np.True_), ["True", "number"]),
        (lambda: checks.count("seed", torch.tensor(True), 0), ["True", "whole"]),
        (lambda: checks.sample_count(9, 5e-324), ["n is 9", "fewer than 1075"]),
        (lambda: checks.images(np.ma.masked_less(X.numpy(), 1)), ["masked", "filled"]),
        (lambda: checks.class_indices(np.zeros((2, 3)), 3), ["no probabilities"]),
        (lambda: checks.class_indices(np.eye(3) * np.nan, 3), ["no probabilities"]),
        (lambda: checks.class_indices(np.ones((2, 3)), 3), ["likeliest"]),
        (lambda: checks.class_indices(-np.eye(3), 3), ["no probabilities"]),
        (lambda: checks.count("n0", 0), ["n0 is 0", ">= 1"]),
        (lambda: checks.count("n0", 1.5), ["1.5", "whole"]),
        (lambda: checks.sample_count(9, 0.001), ["n is 9", "fewer than 10"]),
        (lambda: checks.images(X[0]), ["(3, 4, 4)", "x[None]"]),
        (lambda: checks.images(X, shape=(3, 5, 5)), ["(3, 4, 4)", "(3, 5, 5)"]),
        (lambda: checks.images(X.permute(0, 2, 3, 1), shape=(3, 4, 4)), ["(0, 3, 1, 2)"]),
        (lambda: checks.images((X * 255).byte()), ["uint8", "x / 255"]),
        (lambda: checks.images(X * 510), ["255", "divide by 255"]),
        (lambda: checks.images(X - 1), ["-0.5", "rescale"]),
        (lambda: checks.images(X / 0), ["infinite"]),
        (lambda: checks.images(X * float("nan")), ["NaN"]),
        (lambda: checks.images(X[:0]), ["no images"]),
        (lambda: checks.images("cat"), ["array of numbers"]),
        (lambda: checks.images(np.array([[object()]])), ["array of numbers"]),
        (lambda: checks.images(X * 510, slack=1.0), ["255"]),
        (lambda: checks.labels([0, 3], 3), ["label 3", "0 to 2"]),
        (lambda: checks.labels([0, -1]), ["label -1", "from 0"]),
        (lambda: checks.labels([0.0, 1.0]), ["float32", "integer"]),
        (lambda: checks.labels([[0, 1]]), ["(1, 2)"]),
        (lambda: checks.labels(np.array(3)), ["shape ()"]),
        (
            lambda: checks.eval_mode(nn.Sequential(nn.Dropout())),
            ["Sequential", "the top", "eval()"],
        ),
        (lambda: checks.eval_mode(nn.BatchNorm2d(3)), ["BatchNorm2d", "eval()"]),
        (
            lambda: checks.eval_mode(nn.Sequential(nn.Linear(2, 2)).eval().append(Functional())),
            ["Functional", "'1'"],
        ),
        (lambda: checks.indices([0, 5], 5), ["image 5", "0 to 4"]),
        (lambda: checks.indices(5, 10), ["indices is 5", "[5]"]),
        (lambda: checks.indices("12", 30), ["indices is '12'"]),
        (lambda: checks.indices(torch.tensor([0.5]), 5), ["0.5", "whole"]),
        (lambda: checks.indices([False, True], 5), ["index is False"]),
        (lambda: checks.eps(True), ["eps is True", "a number"]),
        (lambda: checks.radii(0.1), ["radii is 0.1", "[0.1]"]),
        (lambda: checks.radii("12"), ["radii is '12'"]),  # no radii of 1 and 2
        (lambda: checks.radii({0.1: 2}), ["radii is {0.1: 2}"]),
        (lambda: checks.radii(np.array(0.1)), ["sequence"]),
        (lambda: checks.images(X.to_sparse()), ["sparse", "to_dense()"]),
        (lambda: checks.images(X.to("meta")), ["meta"]),
        (lambda: checks.labels(torch.tensor([1, 2]).to_sparse()), ["sparse"]),
        (lambda: checks.indices([-1], 5), ["index is -1"]),
        (lambda: checks.indices(np.array([1, 2, 1]), 5), ["image 1", "twice"]),
        (lambda: checks.eval_mode(DropBlock2d(0.1, 3)), ["DropBlock2d"]),
        (lambda: checks.classifier(Functional(), X), ["Functional", "eval()"]),
        (lambda: checks.classifier(lambda x: x, X), ["(1, 3, 4, 4)"]),
        (lambda: checks.classifier(lambda x: flat(x - x.mean(0)), X), ["other images", "batch"]),
        (lambda: checks.classifier(lambda x: flat(x + torch.rand(1)), X), ["two answers"]),
        (lambda: checks.classifier(lambda x: flat(x)[:, : 2 * len(x)], X), ["2 logits", "4"]),
        (lambda: checks.classifier(lambda x: 1 / 0, X), ["ZeroDivisionError", "(3, 4, 4)"]),
        (lambda: checks.labels(["cat"]), ["class indices"]),
        (lambda: checks.logits(X, 2), ["(2, 3, 4, 4)", "(2, classes)"]),
        (lambda: checks.logits(X[:, 0, 0] * float("nan"), 2), ["NaN"]),
        (lambda: checks.logits(None, 2), ["NoneType"]),
    ],
)
def test_refusals(call, words):
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_what_is_fine_passes():
    assert checks.count("n", np.int64(5)) == 5
    assert checks.alpha(np.float32(0.25)) == 0.25
    assert checks.sample_count(10, 0.001) == 10
    assert torch.equal(checks.images(X.numpy()), X)
    read_only = X.numpy().copy()
    read_only.flags.writeable = False
    assert torch.equal(checks.images(read_only), X)  # without a warning
    assert checks.images(X.double()).dtype == torch.float64
    assert checks.images(X * 255, clip_values=(0, 255)).max() == 127.5
    assert checks.images(X + 0.5 + 1e-7).shape == X.shape
    assert checks.images(X + 1, slack=1.0).shape == X.shape
    low, high = np.zeros((3, 4, 4)), np.full((3, 4, 4), 0.6)
    assert checks.images(X, clip_values=(low, high)).shape == X.shape
    assert checks.labels(np.array([0, 2], np.uint8), 3).tolist() == [0, 2]
    checks.eval_mode(nn.Sequential(nn.Dropout(), nn.ReLU()).eval())
    checks.eval_mode(lambda x: x)
    assert checks.pixel_range((Decimal(0), torch.tensor(2))) == (0, 2)
    channels = (np.zeros((3, 1, 1)), np.ones((3, 1, 1)))
    assert [end.shape for end in checks.pixel_bounds(channels, (3, 4, 4))] == [(3, 1, 1)] * 2
    checks.unit_range("PGD", None)
    checks.unit_range("PGD", (0.0, np.ones(3)))
    for kind in ("u2", "u4", "i1"):
        assert checks.labels(np.array([0, 2], kind), 3).tolist() == [0, 2]


def test_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)


class WithBuffer(nn.Module):
    """Keeps a running mean in eval mode too, or counts its calls."""

    def __init__(self, step: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.step = step
        self.register_buffer("seen", torch.zeros(1, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += self.step
        return flat(x)


def test_a_running_mean_that_moves_in_eval_mode_is_refused():
    """It moves so little that two answers agree, and far in a run."""
    with pytest.raises(InputError, match="buffer 'seen'"):
        checks.classifier(WithBuffer(1e-9, torch.float32).eval(), X)
    assert checks.classifier(WithBuffer(1, torch.int64).eval(), X) == 48


def test_answers_in_shared_memory_are_compared_all_the_same():
    """CUDA graphs return each answer in the memory of the last."""
    memory = torch.zeros(1, 48)

    def shared(x):
        return memory.copy_(torch.randn(1, 48)) if len(x) == 1 else flat(x)

    with pytest.raises(InputError, match="two answers"):
        checks.classifier(shared, X)


def test_a_classifier_that_depends_on_the_size_of_its_batch_is_refused():
    def of_size(x):
        return (flat(x) * torch.arange(48)).roll(int(len(x) > 2), 1)

    with pytest.raises(InputError, match="size of its batch"):
        checks.classifier(of_size, torch.cat([X, X]))


@pytest.mark.parametrize(
    ("output", "word"),
    [
        (torch.eye(2, 3, dtype=torch.long), "int64"),
        (torch.eye(2, 3) > 0, "bool"),
        (torch.eye(2, 3) + 0j, "complex64"),
        (torch.eye(2, 3).to_sparse(), "sparse"),
        (torch.eye(2, 3, device="meta"), "meta"),
        (torch.full((2, 3), torch.inf), "infinite"),
        (torch.full((2, 3), -torch.inf), "infinite"),
    ],
)
def test_outputs_from_which_no_label_can_be_read_are_refused(output, word):
    with pytest.raises(InputError, match=word):
        checks.logits(output, 2)


def test_arrays_in_any_memory_order_are_images_and_labels():
    x = np.linspace(0, 1, 96, dtype=np.float32).reshape(X.shape)
    assert torch.equal(
        checks.images(np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1]), checks.images(x)
    )
    assert torch.equal(checks.images(x.astype(">f4")), checks.images(x))
    assert torch.equal(checks.images([*torch.from_numpy(x)]), checks.images(x))
    assert checks.labels([np.uint64(3)]).tolist() == [3]
    assert checks.class_indices(np.eye(3) > 0, 3).tolist() == [0, 1, 2]


def test_a_classifier_gives_its_number_of_classes():
    x = X.clone()
    assert checks.classifier(flat, x) == 48
    assert checks.classifier(lambda x: SimpleNamespace(logits=flat(x)), x) == 48
    assert checks.classifier(lambda x: flat(x).masked_fill(flat(x) > 0.5, -torch.inf), x) == 48
    assert checks.classifier(lambda x: flat(x + torch.rand(1)), x, random=True) == 48
    assert checks.classifier(lambda x: flat(x.sub_(0.5)), x) == 48
    assert torch.equal(x, X)  # it got copies


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounding_does_not_make_a_classifier_random(dtype):
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 200), nn.Linear(200, 10)).to(dtype).eval()
    assert checks.classifier(net, X.to(dtype)) == 10


def test_tensor_cores_are_noticed_where_the_new_setting_makes_them_count(monkeypatch):
    """Reading `allow_tf32` is an error in torch once `fp32_precision` has been set."""
    on_a_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    convolutions, products = (SimpleNamespace(fp32_precision="ieee") for _ in range(2))
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(conv=convolutions))
    monkeypatch.setattr(torch.backends.cuda, "matmul", products)
    single = torch.finfo(torch.float32).eps ** 0.5
    assert checks.near(X, on_a_gpu) == single
    for part in (convolutions, products):
        part.fp32_precision = "tf32"
        assert checks.near(X, on_a_gpu) == 2.0**-5
        part.fp32_precision = "ieee"


@pytest.mark.parametrize("value", ["no", "True", 1, None])
def test_a_word_is_no_flag(value):
    """It would count as True: random_start="no" began at a random point."""
    for build in (
        lambda: PGD(random_start=value),
        lambda: Adversarial(targeted=value),
        lambda: Validation([], keep_best=value),
        lambda: Anytime(labels=value),
        lambda: Adam(project=value),
    ):
        with pytest.raises(InputError, match=f"is {value!r}; give True or False"):
            build()


@pytest.mark.parametrize("value", ["0.5", "much", None, True, [1]])
def test_a_word_is_no_number(value):
    for build in (
        lambda: PGD(eps=value),
        lambda: DDIM(value),
        lambda: Guided(value),
        lambda: TrainingConfig(weight_decay=value),
        lambda: TrainingConfig(average=value),
        lambda: Adversarial(label_smoothing=value),
    ):
        with pytest.raises(InputError, match=re.escape(f"is {value!r}; give a number")):
            build()


NUMBERS = [np.float32(0.25), np.array(0.25), torch.tensor([0.25]), Fraction(1, 4), Decimal("0.25")]


@pytest.mark.parametrize("number", [*NUMBERS, torch.tensor(0.25, requires_grad=True)], ids=repr)
def test_a_number_of_another_library_becomes_a_plain_one(number):
    """What computes with it, or writes it to a log, need not know that library."""
    for kept in (
        PGD(number).eps,
        AutoAttack(number).eps,
        DiffAttack(path_weight=number).path_weight,
        Adversarial(label_smoothing=number).label_smoothing,
        TrainingConfig(lr=number).lr,
        Objective("mse", number).sigma,
        Objective("mse", (number, 0.5)).sigma[0],
        EDMLoss(drop=number).drop,
        DDIM(number).eta,
        Guided(number).scale,
        Adam(number).lr,
        Levels([number], iter([1])).sigmas[0],
        EDM(number).sigma_data,
        Budget(cost=number, cost_per_query=1).cost,
        Retry(backoff=number).backoff,
        vp_time(vp_sigma(number)),
    ):
        assert type(kept) is float
        assert kept == pytest.approx(0.25)
    assert type(PGD(steps=torch.tensor(3)).steps) is int
    assert EvalTransform(np.int64(8), (8, 8)).resize == 8


@pytest.mark.parametrize(
    "build",
    [
        lambda words, _: BlackBox(len, words),
        lambda words, _: MaiteModel(nn.Identity().eval(), "a", words),
        lambda words, _: MaiteDataset([], "a", words),
        lambda words, folder: ImageFolder(folder, words),
    ],
)
@pytest.mark.parametrize("words", ["cat", {"cat", "dog"}, {"cat": 1, "dog": 0}, [0, 1], [b"a"]])
def test_classes_are_words_in_an_order(build, words, tmp_path):
    """One word was a class for each letter, and a set gave labels in an order by chance."""
    (tmp_path / "cat").mkdir()
    with pytest.raises(InputError, match=r"classes is (\(|\{|'cat')"):
        build(words, tmp_path)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: load_data("digits", train="no"), "train is 'no'"),  # the training part
        (lambda: digits(train=0), "train is 0"),
        (lambda: merge("out", ["run"], partial="no"), "partial is 'no'"),
        (
            lambda: certify(SMOOTHER, DATA, FixedN(20), run="/nowhere", resume="no"),
            "resume is 'no'",
        ),
        (
            lambda: certify(SMOOTHER.base, DATA, FixedN(20), run="/nowhere"),
            "smoother is a function",
        ),
        (lambda: predict(SMOOTHER.base, DATA, run="/nowhere"), "smoother is a function"),
        (lambda: certify(SMOOTHER, iter(DATA), FixedN(20), run="/nowhere"), "data is a list_itera"),
        (lambda: evaluate(nn.Identity().eval(), iter(DATA), PGD(0.1)), "data is a list_iterator"),
        (lambda: evaluate(flat, DATA, PGD(0.1), workers=2), "workers is 2"),
        (lambda: Smoother(flat, sigma=0.1, workers=2), "workers is 2"),
        (lambda: certified_table({"a": Log("predict", None, ())}), "a is a log of predict"),
        (lambda: certified_table({}, 0.1), "radii is 0.1"),
        (lambda: load_data(None), "NoneType"),
        (lambda: BlackBox(len, ["a", "b"], {"x": 1}), "synonyms is"),
        (lambda: BlackBox(len, ["a", "b"], ["x"]), "synonyms is"),
        (lambda: BlackBox(len, ["a", "b"], budget=5), "budget is 5"),
        (lambda: BlackBox(len, ["a", "b"], retry=5), "retry is 5"),
        (lambda: Retry(transient=ValueError), "transient is"),
        (lambda: HttpClassifier("http://a.b", answer=0), "answer is 0"),
        (lambda: HttpClassifier("http://a.b", image_field=None), "image_field is None"),
        (lambda: HttpClassifier("http://a.b", headers=["A: b"]), "headers is a list"),
        (lambda: HttpClassifier("http://a.b", headers={"A": 1}), "header 'A'"),
        (lambda: HttpClassifier(None), "url is None"),
    ],
)
def test_words_for_flags_and_things_of_another_kind_are_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_one_run_may_be_given_by_its_path_alone(tmp_path):
    with Run(tmp_path, CERTIFY, {}) as run:
        run.append([CertifyRow(index=0, label=1, prediction=1, radius=0.5, seconds=0)])
    for path in (tmp_path, str(tmp_path)):
        assert [model.name for model in report(path).models] == [tmp_path.name]
        with pytest.raises(InputError, match=f"{tmp_path.name}.* shard"):
            merge(tmp_path / "out", path)


@pytest.mark.parametrize("value", ["1", True, None, 1j, float("nan")])
def test_what_is_no_number_is_refused_by_formulas_too(value):
    for call in (
        lambda: vp_time(value),
        lambda: noise_levels(3, p_mean=value),
        lambda: Levels([value], [1.0]),
    ):
        with pytest.raises(InputError, match=f"is {value}|is {value!r}"):
            call()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: AutoAttack(0.1, version="rand", parts=("apgd-ce",)), "eot=20"),
        (lambda: AutoAttack(0.1, parts="apgd-ce"), "a sequence"),
        (lambda: ArtAttack(0.1, kind="hopskipjump"), "did you mean HopSkipJump"),
        (lambda: ArtAttack(0.1, kind="SquareAttack", options={"max_iter": "9"}), "max_iter is '9'"),
    ],
)
def test_an_attack_that_cannot_be_meant_is_refused_where_it_is_made(build, words):
    with pytest.raises(InputError, match=words):
        build()


@pytest.mark.parametrize("value", [None, 3, "", b"runs"])
def test_a_path_is_a_path(value):
    with pytest.raises(InputError, match=f"run is {re.escape(repr(value))}"):
        checks.path("run", value)
    assert checks.path("run", "a/b") == checks.path("run", Path("a/b")) == Path("a/b")


@pytest.mark.parametrize("value", ["me", 3, {"a": object()}, {"a": float("nan")}, [("a", 1)]])
def test_what_a_header_holds_is_json(value):
    with pytest.raises(InputError, match="identity"):
        checks.json_values("identity", value)
    assert checks.json_values("identity", {"a": (1, None)}) == {"a": [1, None]}
    assert checks.json_values("identity", None) == {}


@pytest.mark.parametrize(
    "refused",
    [
        lambda: ImageFolder("no-such-folder"),
        lambda: report(None),
        lambda: report([3]),
        lambda: Run(None, CERTIFY, {}),
        lambda: verify(None),
        lambda: SMOOTHER.certify(torch.rand(1, 1, 8, 8), Anytime(100), earlier=[3]),
    ],
)
def test_what_no_path_log_or_certificate_is_ends_in_one_line(refused):
    with pytest.raises(InputError, match="no-such-folder|None|is 3|NoneType|earlier"):
        refused()
