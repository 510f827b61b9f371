"""The diffusion classifier: Bayes' rule, exact gradients, and nothing that depends on chunks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from art_denoised import DiffusionClassifier
from art_denoised.checks import InputError
from art_denoised.data import digits
from art_denoised.demo import DigitsMLP, digits_diffusion
from art_denoised.diffusion import (
    EDM,
    DiffusionModel,
    LevelNoise,
    Levels,
    Native,
    noise_levels,
)

LEVELS = Levels((0.2, 0.5, 1.0), (3.0, 1.0, 0.5))


def small_model(dtype=torch.float64) -> DiffusionModel:
    """Untrained, but with an answer that depends on everything."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DigitsMLP(width=16, depth=1)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    return DiffusionModel(network, EDM(), classes=10, null_class=10).to(dtype).eval()


def images(n: int = 3, dtype=torch.float64) -> torch.Tensor:
    return torch.rand(n, 1, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))


def classifier(**options) -> DiffusionClassifier:
    return DiffusionClassifier(small_model(), **{"levels": LEVELS, "seed": 0, **options})


def test_logits_are_the_equation():
    """Against a literal loop, one image, level and class at a time."""
    dc, x = classifier(prior=[0.3] + [0.7 / 9] * 9, temperature=2.0), images()
    logits = dc(x)
    prior = np.log([0.3] + [0.7 / 9] * 9)
    for i, image in enumerate(x):
        for y in range(10):
            loss = 0.0
            for level, (sigma, weight) in enumerate(
                zip(LEVELS.sigmas, LEVELS.weights, strict=True)
            ):
                eps = LevelNoise(0)(x, [i], [level])
                noisy = image[None] + sigma / 2 * eps
                x_hat = dc.model(noisy, sigma / 2, torch.tensor([y]))
                loss += weight * float((2 * (x_hat - image)).square().sum().detach())
            assert float(logits[i, y].detach()) == pytest.approx(prior[y] - loss / 2, rel=1e-6)


def test_losses_of_all_levels_add_up_to_the_logits():
    dc, x = classifier(max_batch=7), images()
    losses = dc.level_losses(x)
    assert losses.shape == (3, 3, 10)
    torch.testing.assert_close(-losses.sum(1), dc(x))
    torch.testing.assert_close(dc.level_losses(x[2:])[0], losses[2])


@pytest.mark.parametrize("recompute", [True, False])
def test_gradients_agree_with_finite_differences(recompute):
    dc, x = classifier(recompute=recompute), images(2).requires_grad_()
    assert torch.autograd.gradcheck(dc, (x,), eps=1e-6, atol=1e-5, rtol=1e-4)


def test_the_gradient_path_gives_the_same_logits():
    dc, x = classifier(), images()
    with torch.no_grad():
        plain = dc(x)
    assert torch.equal(plain, dc(x.requires_grad_()).detach())


@pytest.mark.parametrize("max_batch", [1, 7, 10, 64])
def test_chunks_and_order_change_nothing(max_batch):
    x = images(4)
    whole, parts = classifier(), classifier(max_batch=max_batch)
    gradients = []
    for dc in (whole, parts):
        leaf = x.clone().requires_grad_()
        dc(leaf).log_softmax(1)[:, 3].sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(whole(x), parts(x))
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(whole(x.flip(0)).flip(0), whole(x))
    torch.testing.assert_close(whole(x[:1]), whole(x)[:1])


class Counting(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.rows, self.largest = inner, 0, 0

    def forward(self, x, c_noise, y):
        self.rows += len(x)
        self.largest = max(self.largest, len(x))
        return self.inner(x, c_noise, y)


def test_a_batch_of_the_network_has_512_images_by_default():
    dc = classifier(levels=Levels((0.5,), (1.0,)))
    dc.model.network = counting = Counting(dc.model.network)
    dc(images(52))
    assert (counting.rows, counting.largest) == (520, 512)


def test_classes_without_gradient_are_not_evaluated_again():
    dc = classifier(max_batch=8)
    dc.model.network = counting = Counting(dc.model.network)
    x = images(3).requires_grad_()
    logits = dc(x)
    assert counting.rows == dc.nfe(3) == 90
    (logits[:, 1] - logits[:, 4]).sum().backward()
    assert counting.rows == 90 + 3 * 3 * 2
    assert counting.largest == 8


@pytest.mark.parametrize("seed", [0, None])
def test_gradients_taken_along_cost_no_evaluations_in_the_backward_pass(seed):
    dc = classifier(max_batch=7, recompute=False, seed=seed)
    dc.model.network = counting = Counting(dc.model.network)
    x = images(3).requires_grad_()
    logits = dc(x)
    logits.log_softmax(1)[:, 3].sum().backward()
    assert (counting.rows, counting.largest) == (90, 7)
    if seed is not None:
        other = images(3).requires_grad_()
        expected = classifier()(other)
        expected.log_softmax(1)[:, 3].sum().backward()
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(x.grad, other.grad)


@pytest.mark.parametrize("recompute", [True, False])
def test_weights_get_no_gradient_and_flags_stay(recompute):
    dc, x = classifier(recompute=recompute), images().requires_grad_()
    dc(x).sum().backward()
    assert all(p.grad is None and p.requires_grad for p in dc.parameters())
    assert not dc.model.training


def test_in_training_mode_weights_get_gradients_too():
    """The same function, and the gradient of one weight against central differences."""
    dc, x = classifier(temperature=2.0), images()
    weight = next(dc.model.parameters())
    loss = dc.train()(x).logsumexp(1).sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(dc(x), dc.eval()(x))
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            weight.view(-1)[3] += step
            values.append(float(dc(x).logsumexp(1).sum()))
    assert float(gradient.view(-1)[3]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


@pytest.mark.parametrize("recompute", [True, False])
def test_second_derivatives_are_refused_not_wrong(recompute):
    x = images().requires_grad_()
    loss = classifier(recompute=recompute)(x).sum()
    with pytest.raises(InputError, match="create_graph"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_fixed_noise_is_a_function_and_fresh_noise_is_not():
    x = images(1).expand(2, -1, -1, -1)
    fixed, fresh = classifier(seed=3), classifier(seed=None)
    assert torch.equal(fixed(x), fixed(x))
    assert torch.equal(fixed(x)[0], fixed(x)[1])
    assert not torch.equal(fixed(x), classifier(seed=4)(x))
    assert not torch.equal(fresh(x), fresh(x))
    logits = fresh(x)
    assert not torch.equal(logits[0], logits[1])  # copies for EOT see independent noise


def test_fresh_noise_is_that_of_the_forward_pass_in_its_gradient():
    """The backward pass evaluates the network at the very images that the forward pass made."""

    class Recording(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.seen = inner, []

        def forward(self, x, c_noise, y):
            self.seen.append(x.detach())
            return self.inner(x, c_noise, y)

    dc = classifier(seed=None, max_batch=7)
    dc.model.network = recording = Recording(dc.model.network)
    logits = dc(images(2).requires_grad_())
    forward = torch.cat(recording.seen)
    recording.seen.clear()
    logits.logsumexp(1).sum().backward()
    torch.testing.assert_close(torch.cat(recording.seen), forward)


def test_the_global_random_state_is_untouched():
    before = torch.get_rng_state()
    for seed in (None, 0):
        x = images().requires_grad_()
        classifier(seed=seed)(x).sum().backward()
    assert torch.equal(before, torch.get_rng_state())


def test_digits_are_classified():
    """98.5% of 500 held-out digits, with 32 levels."""
    x, y = map(list, zip(*digits(train=False), strict=True))
    with torch.no_grad():
        predicted = DiffusionClassifier(digits_diffusion(), seed=0)(torch.stack(x)).argmax(1)
    assert (predicted == torch.tensor(y)).float().mean() >= 0.985


def test_temperature_makes_probabilities_of_likelihoods():
    x, y = map(list, zip(*digits(train=False), strict=True))
    x, y = torch.stack(x[:200]), torch.tensor(y[:200])
    dc = DiffusionClassifier(digits_diffusion(), levels=noise_levels(4), seed=0)

    def cross_entropy() -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(dc(x), y))

    losses = {}
    for temperature in (0.01, 1000.0):
        dc.temperature = temperature
        losses[temperature] = cross_entropy()
    fitted = dc.fit_temperature(x, y)
    assert dc.fit_temperature(x, y) == fitted  # not in units of the one before
    assert 0.01 < fitted < 1000
    assert cross_entropy() < min(losses.values())
    logits = fitted * dc(x)
    grid = [10 ** (k / 20) for k in range(-60, 81)]
    expected = min(grid, key=lambda t: float(nn.functional.cross_entropy(logits / t, y)))
    assert math.log10(fitted) == pytest.approx(math.log10(expected), abs=1e-4)
    right = dc(x).argmax(1) == y
    with pytest.raises(InputError, match="correctly by far"):
        dc.fit_temperature(x[right], y[right])
    assert dc.temperature == fitted


def test_temperatures_lie_on_a_grid_from_a_thousandth_to_ten_thousand_without_its_ends():
    """Losses that are 10^(1/20) as large fit at the next number: a twentieth of a power of ten."""
    x = images(12)
    y = torch.where(torch.arange(12) % 2 == 0, classifier()(x).argmax(1), torch.arange(12) % 10)

    def fitted(shift: int) -> float:
        weights = tuple(weight * 10 ** (shift / 20) for weight in LEVELS.weights)
        return classifier(levels=Levels(LEVELS.sigmas, weights)).fit_temperature(x, y)

    place = round(20 * math.log10(fitted(0)))
    for end, inner in ((-60, -59), (80, 79)):
        assert fitted(inner - place) == pytest.approx(10 ** (inner / 20), rel=1e-5)
        with pytest.raises(InputError, match="no temperature fits"):
            fitted(end - place)


def test_the_prior_is_no_part_of_what_the_temperature_divides():
    """Whatever the temperature before; the expected one is that of the grid, in float64."""
    prior, x = [0.82] + [0.02] * 9, images(12)
    y = torch.where(torch.arange(12) % 2 == 0, classifier()(x).argmax(1), torch.arange(12) % 10)
    likelihood = -classifier().level_losses(x).sum(1)

    def loss(temperature: float) -> float:
        logits = torch.tensor(prior).double().log() + likelihood / temperature
        return float(nn.functional.cross_entropy(logits, y))

    expected = min((10 ** (k / 20) for k in range(-60, 81)), key=loss)
    dc = classifier(prior=prior, temperature=30.0)
    assert dc.fit_temperature(x, y) == pytest.approx(expected, rel=1e-5)


def test_bfloat16_is_near():
    x = images(2, torch.float32)
    exact = DiffusionClassifier(small_model(torch.float32), levels=LEVELS, seed=0)
    rough = DiffusionClassifier(small_model(torch.float32), levels=LEVELS, seed=0, bf16=True)
    torch.testing.assert_close(rough(x), exact(x), rtol=0.05, atol=0.5)
    assert not torch.equal(rough(x), exact(x))


class Nan(nn.Module):
    def forward(self, x, c_noise, y):
        return x * float("nan")


def test_an_empty_batch_has_no_logits():
    dc = classifier()
    for x in (torch.rand(0, 1, 8, 8), torch.rand(0, 1, 8, 8).requires_grad_()):
        assert dc(x).shape == (0, 10)


@pytest.mark.parametrize("seed", [0, None])
def test_it_runs_compiled(seed):
    """Streams of numpy and caches cannot be traced: they break the graph and not the call."""
    dc = classifier(seed=seed)
    compiled, x = torch.compile(dc, backend="eager"), images(2)
    leaf = x.clone().requires_grad_()
    logits = compiled(leaf)
    logits.logsumexp(1).sum().backward()
    assert torch.isfinite(leaf.grad).all()
    if seed is not None:
        torch.testing.assert_close(compiled(x), dc(x))


def test_bad_input():
    with pytest.raises(InputError, match="knows no classes"):
        DiffusionClassifier(DiffusionModel(DigitsMLP(), EDM()))
    for sigma in (100.0, 1e-4):
        with pytest.raises(InputError, match=r"trained on 0\.002 to 80"):
            classifier(levels=Levels((0.5, sigma), (1.0, 1.0)))
    with pytest.raises(InputError, match="9 numbers for 10"):
        classifier(prior=[1 / 9] * 9)
    with pytest.raises(InputError, match="NaN"):
        DiffusionClassifier(DiffusionModel(Nan(), Native(), classes=10), levels=LEVELS)(images())
    for gradient in (False, True):  # taken along, the output is looked at too
        dc = DiffusionClassifier(
            DiffusionModel(Nan(), Native(), classes=10), levels=LEVELS, recompute=False
        )
        with pytest.raises(InputError, match="NaN"):
            dc(images().requires_grad_(gradient))
    for wrong, words in ((2 * images() - 1, "rescale"), (255 * images(), "divide by 255")):
        with pytest.warns(UserWarning, match=words):
            classifier()(wrong)
    for bad in ({"temperature": 0}, {"max_batch": 0}, {"seed": -1}):
        with pytest.raises(InputError):
            classifier(**bad)
    with pytest.raises(InputError, match="divide by 255"):
        classifier().fit_temperature(255 * images(), torch.tensor([1, 2, 3]))


def test_levels_at_the_ends_of_the_training_are_taken_and_none_beyond():
    """Up to a millionth, for what was rounded."""
    model = DiffusionModel(nn.Identity(), EDM(sigma_min=0.1, sigma_max=0.5), classes=2)
    for within in ((0.1, 0.5), (0.1 * (1 - 0.9e-6), 0.5 * (1 + 0.9e-6))):
        assert DiffusionClassifier(model, levels=Levels(within, (1.0, 1.0))).nfe() == 4
    for beyond in (0.1 * (1 - 1.1e-6), 0.5 * (1 + 1.1e-6)):
        with pytest.raises(InputError, match=r"trained on 0\.1 to 0\.5"):
            DiffusionClassifier(model, levels=Levels((beyond,), (1.0,)))


def test_labels_that_determine_no_temperature_are_refused():
    """The lowest fits best where all are right, and the highest where none are."""
    dc, x = classifier(), images(6)
    for wrong in (dc(x).argmax(1), dc(x).argmin(1)):
        with pytest.raises(InputError, match="no temperature fits these 6 images"):
            dc.fit_temperature(x, wrong)
    assert dc.temperature == 1.0
