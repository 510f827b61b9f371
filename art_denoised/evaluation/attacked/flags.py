"""AutoAttack's own warnings about a model, in words."""

from __future__ import annotations

from art_denoised.evaluation.attacked.records import CheckRow

# What AutoAttack says; whether the figure stands (None: a check says so); and what it means.
_FLAGS = (
    (
        "randomized defense",
        False,
        "two calls differ, but this version takes gradients of one draw; use autoattack-rand or "
        "PGD with EOT, and read the accuracy on fresh noise",
    ),
    (
        "probability distribution",
        False,
        "the model returns probabilities, whose logarithm its losses take again; return logits or "
        "log-probabilities",
    ),
    (
        "zero gradient",
        None,
        "some images have no gradient at some step; the check 'zero gradients' says whether there "
        "are too many",
    ),
    (
        "Square Attack has decreased",
        None,
        "Square broke images that its gradient attacks missed; the check 'gradient-free attacks' "
        "sets a Square of its own against gradients alone and says whether there are too many",
    ),
    (
        "dynamic defense",
        True,
        "the forward pass takes gradients itself (likelihood maximization does); AutoAttack cannot "
        "tell whether its own gradients go through that, the checks here do",
    ),
)


def autoattack_flags(
    column: tuple[str, str, float], flags: tuple[str, ...], randomised: bool
) -> CheckRow:
    """Return AutoAttack's warnings about the model as a check, explained.

    It is passed only if no warning spoils the figure, nor leaves the matter to another check.

    Example:
        >>> column = ("autoattack", "exact", 0.1)
        >>> row = autoattack_flags(column, ("... dynamic defense! ...",), randomised=False)
        >>> row.passed, row.finding[:42]
        (True, 'dynamic defense: the forward pass takes gr')
    """
    attack, gradient, eps = column
    stands: set[bool | None] = set()
    words = []
    for flag in flags:
        known = next((entry for entry in _FLAGS if entry[0] in flag), None)
        if known is None:
            stands.add(None)
            words.append(flag)
            continue
        stands.add(known[1])
        words.append(f"{known[0]}: {known[2]}")
    return CheckRow(
        f"flags of {attack} ({gradient}, eps {eps:g})",
        False if False in stands else None if None in stands else True,
        "; ".join(dict.fromkeys(words)) or "none",
        {"flags": list(flags), "randomised": randomised},
    )
