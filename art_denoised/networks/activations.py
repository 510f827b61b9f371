"""Smooth activations, ReLU with a smooth backward pass, and the replacement of rectifiers.

Source: Xie et al., "Smooth Adversarial Training" (2020, arXiv 2006.14536). SiLU, GELU, ELU, CELU
and Mish are torch's own. ELU is smooth (C1) only at alpha = 1, CELU always. Rectifiers of a network
are counted, and replaced wherever they run.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain, count
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.networks import trial
from art_denoised.networks.trial import Call, Shape, Trial, TrialError, UntraceableError, own_graph

Step = Literal["attacker", "optimiser", "both"]
_LINEAR = 40.0  # beyond, exp(-t) is below the rounding of what it is added to
_REMEDY = "build it with the activation you want, or let it call nn.ReLU modules, once each"
Slot: TypeAlias = tuple[int, str]  # id of the module that holds a rectifier, and the attribute
_FUNCTIONS: dict[Any, type[nn.Module]] = {  # functions, and methods of tensors by name
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), nn.ReLU),
    F.relu6: nn.ReLU6,
}


class ParametricSoftplus(nn.Module):
    """(1 / alpha) log(1 + exp(alpha x)): ReLU with a rounded corner (section 4.1).

    Args:
        alpha: Sharpness of the corner, fixed. The paper uses 10.

    Raises:
        InputError: alpha is not positive and finite.

    Example:
        >>> ParametricSoftplus(10.0)(torch.tensor([-1e30, 0.0, 1e30]))
        tensor([0.0000e+00, 6.9315e-02, 1.0000e+30])
    """

    def __init__(self, alpha: float = 10.0) -> None:
        super().__init__()
        self.alpha = checks.positive("alpha", alpha)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations, in the shape and dtype of ``x``."""
        return F.softplus(x, beta=self.alpha, threshold=_LINEAR)

    def extra_repr(self) -> str:
        """Return the options that ``print`` shows."""
        return f"alpha={self.alpha}"


class SmoothReLU(nn.Module):
    """x - (1 / alpha) log(alpha x + 1) for x >= 0, and 0 below (section 5.1).

    alpha is the square of a learnt ``root``, as in the release, so it stays positive. Half
    precision is computed in float32.

    Args:
        alpha: Initial value of alpha. The release uses 400, a root of 20.
        learnable: Whether ``root`` is a parameter; otherwise it is a buffer.

    Raises:
        InputError: alpha is not positive and finite.

    Example:
        >>> SmoothReLU(alpha=1.0)(torch.tensor([-3.0, 0.0, 1.0])).detach()
        tensor([0.0000, 0.0000, 0.3069])
        >>> SmoothReLU().root
        Parameter containing:
        tensor(20., requires_grad=True)
    """

    root: Tensor

    def __init__(self, alpha: float = 400.0, *, learnable: bool = True) -> None:
        super().__init__()
        self.started = checks.positive("alpha", alpha)
        root = torch.tensor(math.sqrt(self.started))
        if learnable:
            self.root = nn.Parameter(root)
        else:
            self.register_buffer("root", root)

    def reset_parameters(self) -> None:
        """Set alpha to its initial value."""
        nn.init.constant_(self.root, math.sqrt(self.started))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations, in the shape and dtype of ``x``."""
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        alpha = self.root.to(wide.dtype).square()
        positive = wide.clamp_min(0)
        scaled = (alpha * positive).clamp_max(torch.finfo(wide.dtype).max)  # it may overflow
        return (positive - scaled.log1p() / alpha).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the options of the constructor, which training does not change."""
        return f"alpha={self.started}, learnable={isinstance(self.root, nn.Parameter)}"


class SplitReLU(nn.Module):
    """ReLU in the forward pass; in the backward pass the derivative of a smooth function.

    The study of section 3: better gradients for the attacker, the optimiser or both, without a
    change of the function. A step belongs to the attacker inside ``with attacking(model):``, and
    outside of it to the optimiser in training mode. In eval mode it has the gradient of ReLU, so
    attacks that evaluate networks can be compared. Copies are never `attacking`.

    Args:
        smooth: Function whose derivative is taken. The default, as in the paper, is
            `ParametricSoftplus` (10).
        smooth_in: "attacker", "optimiser" or "both": steps that take the smooth derivative.

    Raises:
        InputError: Another ``smooth_in``, or a smooth function with parameters. These would not
            learn, because the forward pass does not depend on them.

    Example:
        >>> split = SplitReLU(smooth_in="attacker")
        >>> x = torch.tensor([-0.1, 0.1], requires_grad=True)
        >>> torch.autograd.grad(split(x).sum(), x)[0]
        tensor([0., 1.])
        >>> with attacking(split):
        ...     torch.autograd.grad(split(x).sum(), x)[0]
        tensor([0.2689, 0.7311])
    """

    def __init__(self, smooth: nn.Module | None = None, *, smooth_in: Step = "both") -> None:
        super().__init__()
        checks.choice("smooth_in", smooth_in, get_args(Step))
        self.smooth = ParametricSoftplus() if smooth is None else smooth
        if any(p.requires_grad for p in self.smooth.parameters()):
            raise InputError(
                f"{type(smooth).__name__} learns, and the forward pass of SplitReLU does not "
                "depend on it; give one without parameters, such as SmoothReLU(learnable=False)"
            )
        self.smooth_in = smooth_in
        self.attacking = False

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(x), with the gradient of the current step."""
        step = "attacker" if self.attacking else "optimiser" if self.training else "evaluation"
        smooth = self.smooth_in == step or (self.smooth_in == "both" and step != "evaluation")
        if not (smooth and torch.is_grad_enabled()):
            return F.relu(x)
        s = self.smooth(x)
        # s + (relu(x) - s).detach() in another order, which adds an exact 0 in the forward pass.
        return F.relu(x).detach() + (s - s.detach())

    def extra_repr(self) -> str:
        """Return the options that ``print`` shows."""
        return f"smooth_in={self.smooth_in!r}"

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: `attacking` would never end for one made inside it."""
        return {**self.__dict__, "attacking": False}


@contextmanager
def attacking(model: nn.Module) -> Iterator[None]:
    """Mark the steps inside as the attacker's, for every `SplitReLU` of the model.

    Threads that share a model share the mark. A program made by `torch.export` keeps the step that
    it was exported in.

    Example:
        >>> model = nn.Sequential(SplitReLU())
        >>> with attacking(model):
        ...     model[0].attacking
        True
        >>> model[0].attacking
        False
    """
    before = [(m, m.attacking) for m in model.modules() if isinstance(m, SplitReLU)]
    try:
        for module, _ in before:
            module.attacking = True
        yield
    finally:
        for module, was in before:
            module.attacking = was


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "celu": nn.CELU,
    "mish": nn.Mish,
    "softplus": ParametricSoftplus,
    "smoothrelu": SmoothReLU,
}


def count_rectifiers(model: nn.Module, input_shape: Shape = (3, 64, 64)) -> dict[str, int]:
    """Count the calls of ReLU and ReLU6 in one forward pass, in the mode that the model is in.

    A copy of the model is run on two images of noise. On the meta device this is free.

    Args:
        model: Any network.
        input_shape: Shape of an image that the model takes.

    Returns:
        Number of calls by the name of the module that makes them; "" is the model itself.

    Raises:
        InputError: The model cannot take such images.

    Example:
        >>> from torchvision.models import densenet121
        >>> with torch.device("meta"):
        ...     counts = count_rectifiers(densenet121())
        >>> sum(counts.values()), counts[""]  # 120 modules, and one functional call
        (121, 1)
    """
    return dict(Trial(model, input_shape, images=2, training=model.training).rectifiers)


def smooth_activations(
    model: nn.Module, activation: str | nn.Module, *, input_shape: Shape = (3, 64, 64)
) -> nn.Module:
    """Return a copy of the model with every ReLU and ReLU6 replaced, wherever it is called.

    Each call gets an activation of its own. ReLU modules are replaced where they are. A module that
    calls one of them twice, or calls a function such as ``F.relu``, gets a new forward (torch.fx):
    its class becomes a subclass, ``SmoothedBottleneck``, and its weights keep their keys. A block
    that is called twice shares its activations as it shares its weights.

    Copies of the model are run on noise in both modes, before and after. The outputs must be the
    same while the calls are still ReLU, and `count_rectifiers` must find no ReLU elsewhere, so a
    call that was not found is an error.

    Args:
        model: Any network. Its mode, statistics and the global random states are not changed.
        activation: "silu", "gelu", "elu", "celu", "mish", "softplus" (`ParametricSoftplus`),
            "smoothrelu" (`SmoothReLU`), or a module that is copied for every call.
        input_shape: Shape of an image that the model takes.

    Raises:
        InputError: An unknown activation, ELU that is not smooth (alpha other than 1), a model
            without ReLU or that cannot take such an image, or calls of ReLU that cannot be
            replaced, with the name of their module.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet50
        >>> with torch.device("meta"):
        ...     model = smooth_activations(resnet50(), "silu")
        >>> sum(isinstance(module, nn.SiLU) for module in model.modules())  # 17 ReLU, 49 calls
        49
    """
    new = _activation(activation)
    trial.refuse_unreadable(model)
    trials = [partial(Trial, input_shape=input_shape, images=2, training=t) for t in (False, True)]
    before = [tried(model) for tried in trials]
    changed, reasons = _with_modules(model, [call for seen in before for call in seen.calls])
    learns = any(True for _ in new.parameters())
    for tried, seen in zip(trials, before, strict=True):
        try:
            after = tried(changed)
        except TrialError as error:
            raise _cannot(changed, error.module, f"cannot be rewritten ({error.why})") from error
        _check_rectifiers(changed, after, reasons, learns=learns)
        if not trial.same(seen.result, after.result):
            name = trial.first_difference(tried(model, values=True), tried(changed, values=True))
            raise _cannot(changed, name, "no longer computes the same with calls of nn.ReLU")
    return _replaced(changed, new)


def _activation(activation: str | nn.Module) -> nn.Module:
    known = f"{', '.join(ACTIVATIONS)}, or a module such as ParametricSoftplus(10.)"
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise InputError(f"activation is {activation!r}; give one of {known}")
        return ACTIVATIONS[activation]()
    if not isinstance(activation, nn.Module):
        raise InputError(f"activation is {activation!r}, not a module; give one of {known}")
    if isinstance(activation, nn.ELU) and activation.alpha != 1:
        raise InputError(
            f"ELU with alpha {activation.alpha:g} has a kink at 0; "
            f"give nn.CELU({activation.alpha:g}), which is smooth, or nn.ELU()"
        )
    return activation


def _check_rectifiers(
    model: nn.Module, seen: Trial, reasons: Mapping[str, str], *, learns: bool
) -> None:
    """Check that rectifiers ran in modules of their own only, and were not shared if they learn."""
    for name, number in seen.rectifiers.items():
        module = model.get_submodule(name)
        # nn.Hardtanh(0, 6) computes ReLU6, but is another activation by name, and is left.
        if not _kind(module) and type(module) is not nn.Hardtanh:
            why = reasons.get(name, "they are inside a function or another method")
            raise _cannot(model, name, f"runs {number} ReLU that cannot be replaced ({why})")
    calls = Counter((id(call.caller), call.name) for call in seen.calls)
    for (_, name), times in calls.items() if learns else ():
        if times > 1 and _kind(model.get_submodule(name)):
            holder = name.rpartition(".")[0]
            why = reasons.get(holder, "its caller cannot be rewritten")
            raise _cannot(model, holder, f"calls {name} more than once ({why})")


def _cannot(model: nn.Module, name: str, why: str) -> InputError:
    kind = type(model.get_submodule(name)).__name__.removeprefix("Smoothed")
    return InputError(f"{name or 'the model'} ({kind}) {why}; {_REMEDY}")


def _replaced(model: nn.Module, new: nn.Module) -> nn.Module:
    """Put a copy of the activation into every slot of a model, in place."""
    found = list(_slots(model))
    if not found:
        raise InputError(
            f"{type(model).__name__} calls no ReLU or ReLU6, which is what is replaced; "
            "give a network that does"
        )
    first = next(model.parameters(), None)
    new = copy.deepcopy(new).to(None if first is None else first.device)
    for holder, attribute, old in found:
        setattr(holder, attribute, copy.deepcopy(new).train(old.training))
    return model


def _with_modules(model: nn.Module, calls: Collection[Call]) -> tuple[nn.Module, dict[str, str]]:
    """Return a copy in which each call of a rectifier calls an nn.ReLU or nn.ReLU6 of its own.

    These do not work in place. Where code cannot be traced, calls stay as they were, and the reason
    is returned by the name of the module.
    """
    model, reasons = copy.deepcopy(model), {}
    in_place = _unshare(model)
    # A slot belongs to its first call. nn.Sequential calls each of its slots once.
    taken = {(id(h), a) for h, a, _ in _slots(model) if type(h).forward is nn.Sequential.forward}
    for name, module in list(model.named_modules()):
        if is_from_torch(module) or type(module).forward is nn.Sequential.forward:
            continue
        given = {_given(module, call) for call in calls if call.name == name}
        try:
            if len(given) > 1:
                raise UntraceableError("its calls give different arguments")
            graph = own_graph(module, frozenset().union(*given))
        except UntraceableError as error:
            reasons[name] = str(error)
            continue
        if _rewrite(module, graph, taken, in_place):
            _set_graph(module, graph)
    return model, reasons


def is_from_torch(module: nn.Module) -> bool:
    """Whether the class of a module comes with torch."""
    return type(module).__module__.startswith(("torch.nn.", "torch.ao."))


def _given(module: nn.Module, call: Call) -> frozenset[str]:
    """Return the arguments that have a default and got another value in a call."""
    signature = inspect.signature(module.forward)
    given = signature.bind(*call.args, **call.kwargs).arguments
    defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}
    return frozenset(n for n in defaults if n in given and given[n] is not defaults[n])


def _unshare(model: nn.Module) -> set[Slot]:
    """Put a fresh rectifier into every slot; return the slots whose rectifier worked in place."""
    in_place = set()
    for holder, attribute, old in list(_slots(model)):
        if getattr(old, "inplace", False):
            in_place.add((id(holder), attribute))
        kind = _kind(old) or nn.ReLU
        setattr(holder, attribute, kind().train(old.training))
    for module in list(model.modules()):
        for attribute, value in list(vars(module).items()):
            kinds = [k for f, k in _FUNCTIONS.items() if f is value and callable(f)]
            if kinds:  # such as self.act = F.relu
                delattr(module, attribute)
                setattr(module, attribute, kinds[0]().train(module.training))
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # its fused kernel would not call the activation
    return in_place


def _rewrite(
    module: nn.Module, graph: fx.Graph, taken: set[Slot], in_place: Collection[Slot]
) -> bool:
    """Give each call of a rectifier in a graph a module of its own; return whether it changed.

    Slots that are called here are added to those ``taken``.
    """
    changed = False
    for node in list(graph.nodes):
        slot, kind = _called(module, node)
        if kind is None:
            continue
        x = node.all_input_nodes[0]
        users = _later_users(node, x) if slot in in_place or _works_in_place(node) else []
        call = node
        if slot is None or slot in taken:
            attribute = _free_name(module, "relu" if slot is None else slot[1])
            setattr(module, attribute, kind().train(module.training))
            with graph.inserting_after(node):
                call = graph.create_node("call_module", attribute, (x,))
            node.replace_all_uses_with(call)
            graph.erase_node(node)
        else:
            taken.add(slot)
        for user in users:  # they saw what the activation made of its input
            user.replace_input_with(x, call)
        changed = changed or call is not node or bool(users)
    return changed


def _called(module: nn.Module, node: fx.Node) -> tuple[Slot | None, type[nn.Module] | None]:
    """Return the slot and the kind of rectifier that a node calls, each None if there is none."""
    if node.op == "call_module":
        holder, _, attribute = str(node.target).rpartition(".")
        parent = module.get_submodule(holder)
        return (id(parent), attribute), _kind(getattr(parent, attribute))
    if node.op in ("call_function", "call_method"):
        return None, _FUNCTIONS.get(node.target)
    return None, None


def _works_in_place(node: fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    return name.endswith("_") or bool(node.kwargs.get("inplace"))


def _later_users(node: fx.Node, x: fx.Node) -> list[fx.Node]:
    nodes = list(node.graph.nodes)
    return [user for user in x.users if nodes.index(user) > nodes.index(node)]


def _free_name(module: nn.Module, base: str) -> str:
    names = chain([base], (f"{base}_{number}" for number in count(1)))
    return next(name for name in names if not hasattr(module, name))


def _set_graph(module: nn.Module, graph: fx.Graph) -> None:
    """Make a graph the forward of a module: its class becomes a subclass with that forward."""
    if isinstance(module, fx.GraphModule):
        module.graph = graph
        return
    kind = type(module)
    name = kind.__name__ if kind.__name__.startswith("Smoothed") else f"Smoothed{kind.__name__}"
    forward = type(fx.GraphModule(module, graph)).forward
    module.__class__ = type(name, (kind,), {"forward": forward, "__module__": kind.__module__})


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """Return nn.ReLU or nn.ReLU6 if a module computes it, or None: a subclass may do otherwise."""
    for kind in (nn.ReLU6, nn.ReLU):
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return kind
    return None


def _slots(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield each place that holds a rectifier: the holder, the attribute and the rectifier."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and _kind(module):
            holder, _, attribute = name.rpartition(".")
            yield model.get_submodule(holder), attribute, module
