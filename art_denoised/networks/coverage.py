"""Which activations a network calls, and from where."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from art_denoised.networks import tracing


@dataclass(frozen=True, slots=True)
class ActivationCount:
    """How often one kind of activation is called; see `ActivationReport`."""

    kind: str
    modules: int
    calls: int
    functional: int


@dataclass(frozen=True, slots=True)
class ActivationReport:
    """Which activations a model calls, and from where.

    Attributes:
        counts: For each kind: the modules called, the places in the code that call them, and the
            places that call a function instead.
        untraced: Modules whose forward cannot be traced, and so may call activations unseen.
    """

    counts: tuple[ActivationCount, ...]
    untraced: tuple[str, ...] = ()

    def __getitem__(self, kind: str) -> ActivationCount:
        """Return the count of a kind such as "ReLU"; zeros if there is none."""
        found = [count for count in self.counts if count.kind == kind]
        return found[0] if found else ActivationCount(kind, 0, 0, 0)

    def __str__(self) -> str:
        lines = [f"{'activation':<20}{'modules':>9}{'calls of them':>15}{'functional calls':>18}"]
        for c in self.counts:
            lines.append(f"{c.kind:<20}{c.modules:>9}{c.calls:>15}{c.functional:>18}")
        if self.untraced:
            lines.append(f"not traced: {', '.join(self.untraced)}")
        return "\n".join(lines)


def activation_report(model: nn.Module) -> ActivationReport:
    """Count the activations of a model by its code, whether or not it is in training mode.

    A place in the code of a module counts once for each such module of the model, however often
    that module is called.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet50
        >>> with torch.device("meta"):
        ...     print(activation_report(resnet50()))
        activation            modules  calls of them  functional calls
        ReLU                       17             49                 0
    """
    modules: dict[str, set[int]] = {}
    calls, functional = Counter[str](), Counter[str]()
    untraced = []
    for name, module, graphs, _ in tracing.traced(model):
        if graphs is None:
            untraced.append(name or type(module).__name__)
            continue
        found = tracing.activation_calls(module, graphs)
        paths = Counter(id(call.graph) for call in found)
        for call in found:
            modules.setdefault(call.kind, set())
            if id(call.graph) != paths.most_common(1)[0][0]:
                continue  # two paths: the one with more calls counts
            if call.slot is None:
                functional[call.kind] += 1
            else:
                calls[call.kind] += 1
                modules[call.kind].add(id(getattr(*call.slot)))
    counts = [ActivationCount(k, len(ids), calls[k], functional[k]) for k, ids in modules.items()]
    return ActivationReport(tuple(sorted(counts, key=lambda c: c.kind)), tuple(untraced))
