"""Every refusal: one line that names the value and the remedy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

from art_denoised import checks
from art_denoised.checks import InputError

X = torch.full((2, 3, 4, 4), 0.5)


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
        (lambda: checks.eval_mode(nn.Sequential(nn.Dropout())), ["Dropout", "'0'", "eval()"]),
        (lambda: checks.eval_mode(nn.BatchNorm2d(3)), ["BatchNorm2d", "eval()"]),
        (
            lambda: checks.eval_mode(nn.InstanceNorm2d(3, track_running_stats=True)),
            ["InstanceNorm"],
        ),
        (lambda: checks.eval_mode(nn.RReLU()), ["RReLU"]),
        (lambda: checks.indices([0, 5], 5), ["image 5", "0 to 4"]),
        (lambda: checks.indices([-1], 5), ["index is -1"]),
        (lambda: checks.indices(np.array([1, 2, 1]), 5), ["image 1", "twice"]),
        (lambda: checks.eval_mode(nn.LSTM(2, 2, 2, dropout=0.1)), ["LSTM"]),
        (lambda: checks.eval_mode(nn.MultiheadAttention(2, 2, dropout=0.1)), ["Multihead"]),
        (lambda: checks.eval_mode(StochasticDepth(0.1, "row")), ["StochasticDepth"]),
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
    assert checks.images(X.double()).dtype == torch.float64
    assert checks.images(X * 255, clip_values=(0, 255)).max() == 127.5
    assert checks.images(X + 0.5 + 1e-7).shape == X.shape
    assert checks.images(X + 1, slack=1.0).shape == X.shape
    low, high = np.zeros((3, 4, 4)), np.full((3, 4, 4), 0.6)
    assert checks.images(X, clip_values=(low, high)).shape == X.shape
    assert checks.labels(np.array([0, 2], np.uint8), 3).tolist() == [0, 2]
    checks.eval_mode(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    checks.eval_mode(nn.Dropout().eval())
    checks.eval_mode(lambda x: x)
    checks.eval_mode(
        nn.Sequential(nn.InstanceNorm2d(3), nn.LSTM(2, 2), StochasticDepth(0.1, "row").eval())
    )
    for kind in ("u2", "u4", "i1"):
        assert checks.labels(np.array([0, 2], kind), 3).tolist() == [0, 2]


def test_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)
