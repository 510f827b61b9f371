"""The attacks of torchattacks."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import io
from dataclasses import dataclass
from typing import Any

from torch import nn

from art_denoised import checks
from art_denoised.attacks.suites import INSTALL, ClassAttack, Outcome, as_module
from art_denoised.checks import InputError
from art_denoised.types import Images, Labels, Logits

_LINF = (
    "BIM", "DIFGSM", "EOTPGD", "FFGSM", "FGSM", "Jitter", "MIFGSM", "NIFGSM", "PGD", "PGDRS",
    "PIFGSM", "PIFGSMPP", "RFGSM", "SINIFGSM", "SPSA", "TIFGSM", "TPGD", "UPGD", "VMIFGSM",
    "VNIFGSM",
)  # fmt: skip


@dataclass(frozen=True)
class TorchAttack(ClassAttack):
    """Any attack of torchattacks, by the name of its class.

    ``eps``, ``norm``, ``seed`` and ``n_classes`` are handed on where the class takes them. Classes
    without ``eps`` look for the nearest adversarial (CW, DeepFool): an example outside the ball is
    a failure, and the image itself is returned.

    Some losses of torchattacks (CW, the margin of UPGD) have no gradient where all outputs are
    negative, as log-probabilities are. So the attack sees outputs shifted by a constant per image,
    such that the lowest is at least 1: no prediction, softmax or margin changes.

    Attributes:
        kind: Name of the class.
        options: Other arguments of the class.

    Raises:
        InputError: torchattacks is not installed, the norm is not the one of the class, an option
            repeats an argument, or a value is out of range.

    Example:
        >>> import torch
        >>> from art_denoised.demo import digits_classifier
        >>> attack = TorchAttack(0.2, kind="PGD", options={"alpha": 0.05, "steps": 5})
        >>> x = torch.rand(2, 1, 8, 8)
        >>> attack(digits_classifier(), x, torch.tensor([3, 8])).shape
        torch.Size([2, 1, 8, 8])
    """

    library = "torchattacks"
    fixed_norms = dict.fromkeys(_LINF, "linf") | dict.fromkeys(("PGDL2", "PGDRSL2"), "l2")
    blind = ("Square", "OnePixel", "Pixle", "SPSA")

    kind: str = "PGD"

    def __post_init__(self) -> None:
        super().__post_init__()
        if importlib.util.find_spec("torchattacks") is None:
            raise InputError(f"this attack needs torchattacks; {INSTALL}")

    @property
    def mixed(self) -> bool:
        """Whether it is AutoAttack with Square in it."""
        return self.kind == "AutoAttack" and self.options.get("version") != "rand"

    def run(self, model: Any, x: Images, y: Labels) -> Outcome:
        """Attack.

        Raises:
            InputError: torchattacks has no such attack, or an option is wrong.
        """
        module, known = as_module(model), _attack_class(self.kind)
        arguments = self.arguments(
            known,
            eps=self.eps,
            max_epsilon=self.eps,  # PIFGSM's name for it
            norm={"linf": "Linf", "l2": "L2"}[self.norm],
            seed=self.seed,
            n_classes=checks.class_count(module, x),
        )
        with contextlib.redirect_stdout(io.StringIO()):
            attack = known(_Shifted(module), **arguments)
            attack.set_device(x.device)
            return self.outcome(known, x, attack(x, y).detach())


class _Shifted(nn.Module):
    """A model whose outputs are raised to at least 1, by one constant per image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, x: Images) -> Logits:
        output = self.model(x)
        least = output.detach().masked_fill(output.isinf(), 0).amin(1, keepdim=True)
        shifted: Logits = output + (1 - least).clamp_min(0)
        return shifted


def _attack_class(kind: str) -> Any:
    try:
        import torchattacks
    except ImportError:
        raise InputError(f"this attack needs torchattacks; {INSTALL}") from None
    names = {
        name.lower(): name
        for name, one in vars(torchattacks).items()
        if inspect.isclass(one) and issubclass(one, torchattacks.attack.Attack)
    }
    if kind in names.values():
        return getattr(torchattacks, kind)
    close = difflib.get_close_matches(kind.lower(), names)
    hint = f"did you mean {names[close[0]]}?" if close else "give for example PGD, APGD or Square"
    raise InputError(f"torchattacks has no attack {kind!r}; {hint}")
