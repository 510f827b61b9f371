"""The torch faces."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from scipy import stats
from torch import nn

from art_denoised import DenoisedClassifier, SmoothedClassifier
from art_denoised.checks import InputError
from art_denoised.denoisers import DnCNN, MemNet, OneShotDenoiser, UNetDenoiser
from art_denoised.diffusion import DiffusionModel, Native
from art_denoised.models import EvalTransform, PretrainedClassifier
from art_denoised.smoothing import Stage
from art_denoised.smoothing.noise import Gaussian, Stream, StreamKey


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    return net.to(dtype).eval()


X = torch.linspace(0, 1, 5 * 16).reshape(5, 1, 4, 4)


def smoothed(dtype: torch.dtype = torch.float32, **changes: object) -> SmoothedClassifier:
    options = {"sigma": 0.5, "samples": 20, "seed": 0, **changes}
    return SmoothedClassifier(network(dtype), **options)  # type: ignore[arg-type]


def test_is_the_log_of_the_mean_softmax():
    noise = Stream(Gaussian(1.0), StreamKey(0, 0, Stage.SMOOTHING), (1, 4, 4)).take(20)
    base = network()
    mean = torch.stack([base(X + 0.5 * eps).softmax(1) for eps in noise]).mean(0)
    assert torch.allclose(smoothed()(X), mean.log(), atol=1e-6)


@pytest.mark.parametrize("max_batch", [1, 7, 40, 1000])
def test_output_and_gradient_do_not_depend_on_batches(max_batch):
    """With recomputation in the backward pass and without."""
    reference = smoothed(torch.float64, max_batch=10**6)
    model = smoothed(torch.float64, max_batch=max_batch)
    x, z = (X.double().requires_grad_() for _ in range(2))
    assert torch.allclose(model(x), reference(z), atol=1e-12)
    model(x)[:, 0].sum().backward()
    reference(z)[:, 0].sum().backward()
    assert torch.allclose(x.grad, z.grad, atol=1e-12)
    assert torch.allclose(model(x[3:4]), reference(z)[3:4], atol=1e-12)


@pytest.mark.parametrize(
    ("images", "max_batch", "passes"),
    [(1, 7, [7, 7, 6]), (2, 7, [6] * 6 + [4]), (5, 4, [5] * 20), (2, 40, [40])],
)
def test_at_most_so_many_noisy_images_are_classified_at_once(images, max_batch, passes):
    """And once more in the backward pass, unless all of them fit."""
    model, seen = smoothed(max_batch=max_batch), []
    model.base.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    answer = model(X[:images].clone().requires_grad_())
    assert seen == passes
    answer.sum().backward()
    assert sorted(seen) == sorted(passes * (2 if len(passes) > 1 else 1))


def test_what_the_base_draws_is_the_same_in_both_passes():
    """A base that draws from the global generator: its gradient is that of the answer it gave."""

    class Dropping(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = nn.functional.dropout(x.flatten(1), training=True)
            return torch.stack([kept.sum(1), 0 * kept.sum(1)], 1)

    gradients = []
    for max_batch in (5, 1000):  # with recomputation and without
        torch.manual_seed(1)
        x = X[:1].clone().requires_grad_()
        SmoothedClassifier(Dropping(), sigma=0.1, samples=5, seed=0, max_batch=max_batch)(x)[
            0, 0
        ].backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("max_batch", [6, 1000])
def test_gradients_against_finite_differences(max_batch):
    model = smoothed(torch.float64, samples=5, max_batch=max_batch)
    assert torch.autograd.gradcheck(model, X[:2].double().requires_grad_())


def test_a_half_network_sees_the_images_that_a_certificate_samples():
    """Noise is added in single precision; images rounded before it would hide small attacks."""
    seen = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = smoothed(dtype, samples=2)
        model.base.register_forward_pre_hook(lambda _, x, dtype=dtype: seen.update({dtype: x[0]}))
        x = X.clone().requires_grad_()
        model(x).amax(1).sum().backward()
        assert x.grad.dtype == model(X).dtype == torch.float32
    assert torch.equal(seen[torch.bfloat16], seen[torch.float32].bfloat16())


def test_fresh_noise_differs_between_calls_and_images():
    model = smoothed(seed=None)
    same = X[:1].expand(2, -1, -1, -1)
    first, second = model(same), model(same)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_global_random_state_and_flags_are_untouched():
    for seed in (None, 0):
        model = smoothed(seed=seed, max_batch=8)
        model.training = True
        before = torch.get_rng_state()
        model(X.clone().requires_grad_()).sum().backward()
        assert torch.equal(before, torch.get_rng_state())
        assert model.training
        assert not model.base.training


def test_noise_is_there_in_eval_mode():
    assert not torch.allclose(smoothed().eval()(X), network()(X).log_softmax(1))


def test_tends_to_the_true_probability():
    """Two classes split by a steep half-space: P(class 0) = Phi(margin / sigma)."""

    class Steep(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            margin = 1e6 * x[:, 0, 0, 0]
            return torch.stack([margin, -margin], dim=1)

    x = torch.full((1, 1, 4, 4), 0.2)
    model = SmoothedClassifier(Steep(), sigma=0.5, samples=20_000, seed=0, max_batch=5000)
    true = stats.norm.cdf(0.2 / 0.5)
    # 5 standard errors; a false alarm has probability 6e-7.
    assert float(model(x).exp()[0, 0]) == pytest.approx(true, abs=5 * 0.5 / 20_000**0.5)


def test_copies_and_state_dict():
    model = smoothed()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), model(X))
    other = smoothed()
    nn.init.zeros_(other.base[1].weight)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))


def test_float64_images_suit_a_float32_model():
    assert smoothed()(X.double()).dtype == torch.float32


def test_denoised_classifier_tells_the_denoiser_sigma():
    told = []

    def denoiser(x: torch.Tensor, sigma: float) -> torch.Tensor:
        told.append(sigma)
        return x / 2

    base = DenoisedClassifier(network(), denoiser, sigma=0.25)
    assert torch.equal(base(X), network()(X / 2))
    assert told == [0.25]


@pytest.mark.parametrize(
    "change", [{"sigma": 0}, {"samples": 0}, {"seed": -1}, {"seed": 1.5}, {"max_batch": 0}]
)
def test_bad_values(change):
    with pytest.raises(InputError, match=next(iter(change))):
        smoothed(**change)


def tiny_unet() -> UNetDenoiser:
    channels = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16)}
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNetDenoiser.from_config(sample_size=8, **channels, **kinds, norm_num_groups=4)


@pytest.mark.parametrize(
    "module",
    [
        lambda x: smoothed()(x),
        lambda x: DenoisedClassifier(network(), lambda x, sigma: x, sigma=0.25)(x),
        lambda x: DnCNN(1, 2, 2).eval()(x),
        lambda x: MemNet(1, 2, 1, 1).eval()(x),
        lambda x: tiny_unet()(x, 0.25),
        lambda x: OneShotDenoiser(DiffusionModel(nn.Identity(), Native()))(x, 0.25),
    ],
)
def test_eight_bits_and_single_images_are_refused(module):
    """In place of noise that vanishes beside pixels from 0 to 255."""
    for x, words in (((X * 255).byte(), "uint8"), (X > 0.5, "bool"), (X[0], r"x\[None\]")):
        with pytest.raises(InputError, match=words):
            module(x)


def test_wrappers_take_the_mode_of_their_parts():
    for base, training in ((network(), False), (network().train(), True)):
        assert SmoothedClassifier(base, sigma=0.5).training is training
        assert DenoisedClassifier(base, lambda x, sigma: x, sigma=0.5).training is training


@pytest.mark.parametrize("seed", [None, 0])
def test_an_empty_batch_gives_no_rows(seed):
    assert smoothed(seed=seed)(X[:0]).shape == (0, 3)


class Wrapped(nn.Module):
    """Returns an object with logits, as networks of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.eval()

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.net(x))


def test_outputs_with_logits_are_unwrapped():
    base = DenoisedClassifier(Wrapped(), lambda x, sigma: x, sigma=0.5)
    assert torch.equal(base(X), network()(X))
    options = {"sigma": 0.5, "samples": 20, "seed": 0}
    assert torch.equal(SmoothedClassifier(Wrapped(), **options)(X), smoothed()(X))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
def test_fresh_noise_is_not_frozen_by_tracing():
    fresh = smoothed(seed=None)
    with pytest.raises(InputError, match="seed is None"):
        torch.jit.trace(fresh, X, check_trace=False)
    with pytest.raises(InputError, match="seed is None"):
        torch.export.export(fresh, (X,), strict=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_seed_survives_tracing_and_compilation():
    model = smoothed()
    exported = torch.export.export(model, (X,), strict=False).module()
    assert torch.allclose(exported(X), model(X), atol=1e-6)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(compiled(X), model(X), atol=1e-6)


def test_a_denoiser_of_another_size_is_before_a_resize():
    """As of a diffusion model with its own resolution (Carlini et al. 2023), with gradients."""
    classifier = PretrainedClassifier(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
        mean=[0.5],
        std=[0.5],
        transform=EvalTransform(resize=8, crop=(8, 8)),
    )
    x = X.clone().requires_grad_()
    model = DenoisedClassifier(classifier, lambda x, sigma: x / (1 + sigma**2), sigma=0.25)
    small = (x / (1 + 0.25**2)).detach()
    seen = nn.functional.interpolate(small, (8, 8), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), classifier(seen))
    model(x).sum().backward()
    assert (x.grad != 0).all()
    # Torch resizes no half precision on a CPU.
    half = model.to(torch.bfloat16)(x.detach().to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), model.float()(x), rtol=0.05, atol=0.05)
