"""Time the denoising operations beside the naive form of each and the best known ones.

    python benchmarks/networks.py [--repeats 9] [--json FILE] [--tiny]

One thread and CPU time of the process, so that other programs disturb little; forms of one
operation take turns. Memory is the rise of the resident set, after free memory has been handed back
to the system (Linux). Ratios are of medians, to the fastest other form. All forms of an operation
are checked to return the same values first.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from record import Record, options, rise, turns
from torch import Tensor
from torch.nn import functional as F

from art_denoised import networks as ours

Form = Callable[..., Tensor]
SIZES = ((8, 256, 28, 28), (64, 64, 16, 16))
# Devillard's network for the median of nine (after Paeth).
COMPARATORS = (
    *((1, 2), (4, 5), (7, 8), (0, 1), (3, 4), (6, 7), (1, 2), (4, 5), (7, 8), (0, 3)),
    *((5, 8), (4, 7), (3, 6), (1, 4), (2, 5), (4, 7), (4, 2), (6, 4), (4, 2)),
)


def gaussian_einsum(x: Tensor, theta: Tensor, phi: Tensor) -> Tensor:
    """Compute a five-dimensional einsum, as the release does."""
    n, d, h, w = theta.shape
    f = torch.einsum("niab,nicd->nabcd", theta, phi).reshape(n, h * w, h * w) / d**0.5
    return torch.einsum("nabcd,nicd->niab", f.softmax(-1).reshape(n, h, w, h, w), x)


def gaussian_bmm(x: Tensor, theta: Tensor, phi: Tensor) -> Tensor:
    t, p, g = (a.flatten(2) for a in (theta, phi, x))
    f = torch.softmax(t.transpose(1, 2) @ p / t.shape[1] ** 0.5, -1)
    return (g @ f.transpose(1, 2)).reshape(x.shape)


def gaussian_sdpa(x: Tensor, theta: Tensor, phi: Tensor) -> Tensor:
    q, k, v = (a.flatten(2).transpose(1, 2)[:, None] for a in (theta, phi, x))
    return F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)


def dot_pairs(x: Tensor, theta: Tensor, phi: Tensor) -> Tensor:
    t, p, g = (a.flatten(2) for a in (theta, phi, x))
    return (g @ (t.transpose(1, 2) @ p / t.shape[2]).transpose(1, 2)).reshape(x.shape)


def dot_channels(x: Tensor, theta: Tensor, phi: Tensor) -> Tensor:
    t, p, g = (a.flatten(2) for a in (theta, phi, x))
    return (g @ p.transpose(1, 2) @ t / t.shape[2]).reshape(x.shape)


def bilateral_unfold(x: Tensor, theta: Tensor, phi: Tensor) -> Tensor:
    n, _, h, w = x.shape
    keys, values = (F.unfold(a, 3, padding=1).view(n, -1, 9, h * w) for a in (phi, x))
    inside = F.unfold(x.new_ones(1, 1, h, w), 3, padding=1)
    f = (theta.flatten(2)[:, :, None] * keys).sum(1) / theta.shape[1] ** 0.5
    f = f.masked_fill(inside == 0, -torch.inf).softmax(1)
    return (f[:, None] * values).sum(2).reshape(x.shape)


def bilateral_views(x: Tensor, theta: Tensor, phi: Tensor) -> Tensor:
    h, w = x.shape[2:]
    inside, keys, values = (F.pad(a, [1] * 4) for a in (x.new_ones(1, 1, h, w), phi, x))
    places = [(..., slice(i, i + h), slice(j, j + w)) for i in range(3) for j in range(3)]
    f = torch.stack([(theta * keys[place]).sum(1) for place in places], 1)
    outside = torch.cat([inside[place] for place in places], 1) == 0
    f = (f / theta.shape[1] ** 0.5).masked_fill(outside, -torch.inf).softmax(1)
    y = f[:, :1] * values[places[0]]
    for k, place in enumerate(places[1:], 1):
        y = torch.addcmul(y, f[:, k : k + 1], values[place])
    return y


def mean_unfold(x: Tensor) -> Tensor:
    inside = F.unfold(x.new_ones(1, 1, *x.shape[2:]), 3, padding=1).sum(1)
    windows = F.unfold(x, 3, padding=1).view(*x.shape[:2], 9, -1)
    return (windows.sum(2) / inside).reshape(x.shape)


def mean_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def median_unfold(x: Tensor) -> Tensor:
    windows = F.unfold(F.pad(x, [1] * 4, mode="replicate"), 3).view(*x.shape[:2], 9, -1)
    return windows.median(2).values.reshape(x.shape)


def median_comparators(x: Tensor) -> Tensor:
    h, w = x.shape[2:]
    padded = F.pad(x, [1] * 4, mode="replicate")
    p = [padded[..., i : i + h, j : j + w] for i in range(3) for j in range(3)]
    for a, b in COMPARATORS:
        p[a], p[b] = torch.minimum(p[a], p[b]), torch.maximum(p[a], p[b])
    return p[4]


# The first is the naive form, the last is ours. True: embeddings of half the channels.
FORMS: dict[str, tuple[bool | None, dict[str, Form]]] = {
    "gaussian": (
        True,
        {
            "einsum (naive)": gaussian_einsum,
            "batched products": gaussian_bmm,
            "fused attention": gaussian_sdpa,
            "ours": ours.non_local_gaussian,
        },
    ),
    "gaussian, no embeddings": (
        False,
        {
            "einsum (naive)": gaussian_einsum,
            "batched products": gaussian_bmm,
            "fused attention": gaussian_sdpa,
            "ours": ours.non_local_gaussian,
        },
    ),
    "dot product": (
        True,
        {
            "pairs of positions (naive)": dot_pairs,
            "channels first": dot_channels,
            "ours": ours.non_local_dot_product,
        },
    ),
    "bilateral gaussian": (
        True,
        {
            "unfold (naive)": bilateral_unfold,
            "shifted views": bilateral_views,
            "ours": ours.bilateral_gaussian,
        },
    ),
    "mean": (
        None,
        {"unfold (naive)": mean_unfold, "pooling": mean_pool, "ours": ours.local_mean},
    ),
    "median": (
        None,
        {
            "unfold and sort (naive)": median_unfold,
            "19 comparators": median_comparators,
            "ours": ours.local_median,
        },
    ),
}


def inputs(size: tuple[int, ...], embedding: bool | None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    n, c, h, w = size
    x = torch.randn(size, generator=generator).clamp_min(0)  # rectified, as in a network
    if embedding is None:
        return [x]
    if not embedding:
        return [x, x, x]
    return [x, *(torch.randn(n, c // 2, h, w, generator=generator) / 4 for _ in range(2))]


def forward(form: Form, tensors: list[Tensor]) -> None:
    with torch.no_grad():
        form(*tensors)


def both(form: Form, tensors: list[Tensor]) -> None:
    # Where theta and phi are x itself, gradients meet again in x.
    leaves = {id(t): t.detach().requires_grad_() for t in tensors}
    y = form(*(leaves[id(t)] for t in tensors))
    torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))


def measure(forms: dict[str, Form], tensors: list[Tensor], repeats: int) -> list[dict[str, Any]]:
    """Return the figures of each form."""
    tasks = {
        (name, way.__name__): partial(way, form, tensors)
        for name, form in forms.items()
        for way in (forward, both)
    }
    held = {key: (task(), rise(task))[1] for key, task in tasks.items()}
    taken = turns(tasks, repeats, time.process_time)
    middle = {key: statistics.median(seconds) for key, seconds in taken.items()}
    return [
        {
            f"{way}_{figure}": value
            for way in ("forward", "both")
            for figure, value in (
                ("ms", 1000 * middle[name, way]),
                ("spread_ms", 1000 * (max(taken[name, way]) - min(taken[name, way]))),
                ("MiB", held[name, way]),
                (
                    "x_other_best",
                    middle[name, way] / min(middle[f, way] for f in forms if f != name),
                ),
            )
        }
        for name in forms
    ]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    sizes, repeats = (((1, 8, 8, 8),), 1) if arguments.tiny else (SIZES, arguments.repeats)
    torch.set_num_threads(1)
    gc.freeze()  # modules are no garbage, and looking through them takes longer than small forms
    record = Record("networks", arguments.json)
    for n, c, height, width in sizes:
        for operation, (embedding, forms) in FORMS.items():
            tensors = inputs((n, c, height, width), embedding)
            expected = forms["ours"](*tensors)
            for form in forms.values():
                torch.testing.assert_close(form(*tensors), expected, rtol=1e-3, atol=1e-4)
            del expected
            rows = measure(forms, tensors, repeats)
            for name, figures in zip(forms, rows, strict=True):
                record.add(f"N={n}, C={c}, {height}x{width}", f"{operation}: {name}", **figures)


if __name__ == "__main__":
    main()
