"""Trial runs: what a network does with images of noise, and whether two results are the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from art_denoised.networks.trial import Trial, first_difference, near, same

X = torch.tensor([1.0, -2.0])


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 2.0**-23), (torch.float16, 2.0**-10)])
def test_results_are_near_up_to_the_root_of_the_rounding_of_the_largest_number(dtype, eps):
    x, bound = X.to(dtype), 2 * eps**0.5
    assert near(x, x + 0.98 * bound)
    assert not near(x, x + torch.tensor([0, 1.02 * bound], dtype=dtype))
    assert near(0 * x, 0 * x)


@pytest.mark.parametrize("alike", [near, same])
def test_results_of_another_shape_dtype_or_structure_are_not_alike(alike):
    for one, other in (
        (X, X.expand(2, 2)),
        (X, X.double()),
        (X, [X]),
        ((X, X), (X, 2 * X)),
        ({"a": X}, {"b": X}),
        (X.long(), X.long() + 1),
        (X, 1.0),
        (X.to("meta"), X.expand(2, 2).to("meta")),
    ):
        assert not alike(one, other)
        assert not alike(other, one)
    for one in (X, X.long(), {"a": (X, 1, None)}, X.to("meta")):
        assert alike(one, copy.deepcopy(one))


def test_the_same_is_equal_to_the_last_bit_also_where_it_is_no_number():
    assert not same(X, X.nextafter(2 * X))
    assert same(X * torch.nan, X * torch.nan)


@pytest.mark.parametrize("changed", ["0", "2", ""])
def test_the_first_module_that_makes_something_else_is_named(changed):
    one = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 2))
    other = copy.deepcopy(one)
    for number in ("0", "2"):
        if changed and changed <= number:
            nn.init.zeros_(other.get_submodule(number).weight)
            nn.init.ones_(other.get_submodule(number).bias)
    trials = [Trial(model, (2,), values=True) for model in (one, other)]
    assert first_difference(*trials) == changed


class InPlace(nn.Module):
    """Changes what a part of it was given and what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(2, 2)

    def forward(self, x):
        y = self.part(x)
        x.zero_()
        return y.zero_()


@pytest.mark.parametrize("values", [True, False])
def test_values_are_kept_as_they_were_at_the_time_if_they_are_wanted(values):
    call = Trial(InPlace(), (2,), **({"values": True} if values else {})).calls[0]
    assert call.name == "part"
    assert [bool(t.any()) for t in (call.args[0], call.output)] == [values, values]


@pytest.mark.parametrize("images", [1, 3])
def test_one_image_is_tried_by_default(images):
    tried = Trial(nn.Identity(), (3, 2, 2), **({} if images == 1 else {"images": images}))
    assert tried.result.shape == (images, 3, 2, 2)
