"""Networks made faster: the result is certified and deployed, and saved with how it was made."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import RLock
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save as to_bytes
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.networks import trial
from art_denoised.networks.trial import Shape, Trial, UntraceableError, own_graph
from art_denoised.runs.journal import write_whole

HalfType = Literal["bfloat16", "float16"]
_SHAPES = 32  # for which a process compiles
_FROZEN = (torch.float32, torch.bfloat16, torch.float16)
_BATCHES = (1, 8)  # images of a trial: code may do something else with one image
Pair = tuple[str, str]  # names of a convolution and of the batch norm after it


@dataclass(frozen=True)
class Optimization:
    """How a network was optimized, as its files note it.

    Attributes:
        folded: Names of the convolutions and of the batch norms that were folded into them.
        dtype: Type that the weights were converted to; None: they were not.
        compiled: Whether it was compiled.
    """

    folded: tuple[Pair, ...] = ()
    dtype: HalfType | None = None
    compiled: bool = False


def optimize(
    base: nn.Module,
    *,
    dtype: torch.dtype | str | None = None,
    fold: bool = True,
    compile: bool = False,
    input_shape: Shape = (3, 64, 64),
) -> nn.Module:
    """Return a copy of a network that computes the same in less time, up to rounding.

    Certify the copy, and deploy the copy: a certificate is about one function, to the last bit.
    A batch norm is folded into the convolution before it where torch.fx can trace the module that
    calls both and every module around that one, and none of them uses either layer otherwise. It is
    left where code branches on values or on the size of a batch, unless the code is a wrapper of
    this package. Traces hold for attributes as they are: set flags of a network before. Weights of
    convolutions are stored channels-last.

    Args:
        base: Network in eval mode.
        dtype: torch.bfloat16 or torch.float16, or the name of one: weights are converted, and the
            network takes images of this type.
        fold: Whether batch norms are folded.
        compile: Whether its forward is compiled for each shape of a batch, by `torch.compile`. On a
            CPU nothing of it may change after its first call: what changed is refused then.
        input_shape: Channels, height and width of an image that the network takes. Copies are run
            on noise, to check that the result computes the same.

    Returns:
        The copy, whose ``optimized`` is an `Optimization`.

    Raises:
        InputError: The network is in training mode, cannot be copied, or computes something else
            once it is optimized; or the type is not one of the two.

    Example:
        >>> from torchvision.models import resnet18
        >>> fast = optimize(resnet18().eval())
        >>> len(fast.optimized.folded), sum(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
        (20, 0)
    """
    half: Any = None if dtype is None else checks.float_name(dtype, get_args(HalfType))
    fold, compile = checks.flag("fold", fold), checks.flag("compile", compile)
    checks.eval_mode(base)
    trial.refuse_unreadable(base)
    earlier = getattr(base, "optimized", Optimization())
    before = [Trial(base, input_shape, images=images) for images in _BATCHES if fold]
    pairs = tuple(_pairs(base, before)) if fold else ()
    network = _folded(base, pairs)
    network.optimized = Optimization(  # type: ignore[assignment]
        (*earlier.folded, *pairs), half or earlier.dtype, compile or earlier.compiled
    )
    if pairs:
        for images, trial_before in zip(_BATCHES, before, strict=True):
            _check_same(base, trial_before, Trial(network, input_shape, images=images))
    network = _laid_out(network, half)
    if half is not None:
        Trial(network, input_shape)  # it can compute in this type
    if compile:
        _compile(network)
    return network


def save_optimized(network: nn.Module, path: Path | str) -> None:
    """Write the weights of an optimized network with a note of how it was optimized.

    `load_trained`, and so ``--weights``, makes exactly this network of the one that was optimized.

    Args:
        network: Result of `optimize`.
        path: File to write, .safetensors.

    Raises:
        InputError: The network was not optimized, the path has another suffix, or it cannot be
            written.

    Example:
        >>> import tempfile
        >>> from art_denoised.demo import digits_network
        >>> from art_denoised.networks import load_trained
        >>> fast = optimize(digits_network().eval(), dtype="bfloat16", input_shape=(1, 8, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_optimized(fast, f"{folder}/fast.safetensors")
        ...     served = load_trained(digits_network(), f"{folder}/fast.safetensors")
        >>> x = torch.rand(2, 1, 8, 8).bfloat16()
        >>> torch.equal(served(x), fast(x))
        True
    """
    if not isinstance(how := getattr(network, "optimized", None), Optimization):
        raise InputError(f"the {type(network).__name__} was not optimized; give what optimize made")
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"the file is {path}; give one that ends in .safetensors")
    note = json.dumps({"optimized": asdict(how)})
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    write_whole(path, to_bytes(state, {"art_denoised": note}))


def as_optimized(network: nn.Module, how: Optimization) -> nn.Module:
    """Return a copy of a network with the structure and type of an optimized one, for its weights.

    Raises:
        InputError: The network has no such convolutions and batch norms.
    """
    held = dict(network.named_modules())
    for pair in how.folded:
        kinds = [type(held.get(name)) for name in pair]
        if kinds != [nn.Conv2d, nn.BatchNorm2d]:
            raise InputError(
                f"the {type(network).__name__} has no {pair[0]} with {pair[1]} after it; give the "
                "network that was optimized"
            )
    network = _folded(network.eval(), how.folded)
    network.optimized = how  # type: ignore[assignment]
    network = _laid_out(network, how.dtype)
    if how.compiled:
        _compile(network)
    return network


def _compile(network: nn.Module) -> None:
    """Compile the forward of a network for each shape of a batch.

    By default torch compiles for eight shapes, shared by all modules of a process, and computes all
    further ones without its compiler: another function, to the last bit. Here they fail.

    On a CPU the weights become constants wherever no gradient is asked for, in the layout that its
    convolutions are fastest in. So they must not change any more, nor may hooks be added inside.
    """
    compiled: Any = torch.compile(network.forward, dynamic=False)
    lock, frozen = RLock(), list[_Frozen]()

    def answer(*args: Any, **kwargs: Any) -> Any:
        freezing = not torch.is_grad_enabled() and _can_be_frozen(network)
        if freezing and not frozen:
            frozen.append(_Frozen(network))
        elif freezing and not frozen[0].is_still():
            raise InputError(
                f"the {type(network).__name__} changed after it was compiled; optimize it once more"
            )
        with (
            torch._dynamo.config.patch(cache_size_limit=_SHAPES, fail_on_cache_limit_hit=True),
            torch._inductor.config.patch(freezing=freezing),
        ):
            try:
                return compiled(*args, **kwargs)
            except Exception as error:
                if not type(error).__name__.endswith("LimitHit"):  # has two names in torch
                    raise
                raise InputError(
                    f"networks of this process were compiled for {_SHAPES} shapes; use one batch "
                    "size, or no compiler"
                ) from error

    def call(*args: Any, **kwargs: Any) -> Any:
        if not (network._forward_hooks or network._forward_pre_hooks):
            return answer(*args, **kwargs)
        # Hooks of the whole come and go, and each would be compiled: only its forward is.
        with lock:
            network.__dict__["forward"] = answer
            try:
                return network._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
            finally:
                del network.__dict__["forward"]

    network._compiled_call_impl = call


class _Frozen:
    """What a compiled network was made of, to tell whether it is still made of that.

    Values may change where tensors do not count it, through ``.data`` and NumPy, so that their sums
    are compared, too. Only values that are written there and keep their sum, such as a permutation,
    are not seen.
    """

    def __init__(self, network: nn.Module) -> None:
        self._parts = [*network.modules()]
        held = [one for part in self._parts for one in vars(part).values()]
        inside = [more for one in held if isinstance(one, (list, tuple)) for more in one]
        self._others = [one for one in (*held, *inside) if isinstance(one, torch.Tensor)]
        self._known = self._now()

    def is_still(self) -> bool:
        """Whether nothing has changed."""
        (places, sums), (before, those) = self._now(), self._known
        return places == before and torch.equal(sums, those)

    def _now(self) -> tuple[list[Any], torch.Tensor]:
        stores = (store for part in self._parts for store in (part._parameters, part._buffers))
        tensors = [one for store in stores for one in store.values() if one is not None]
        tensors += self._others
        places: list[Any] = [(t.data_ptr(), t.is_inference() or t._version) for t in tensors]
        for part in self._parts:
            places += map(id, part._modules.values())
        for part in self._parts[1:]:
            places.append((len(part._forward_hooks), len(part._forward_pre_hooks)))
        sums = torch.stack([t.detach().sum().float() for t in tensors])
        return places, sums.nan_to_num()  # NaN is not equal to NaN


def _can_be_frozen(network: nn.Module) -> bool:
    """Whether the compiler can make constants of the weights, which it cannot in double."""
    first = next(network.parameters(), None)
    return first is not None and first.device.type == "cpu" and first.dtype in _FROZEN


def _laid_out(network: nn.Module, dtype: HalfType | None) -> nn.Module:
    """Return a network with channels-last weights, of another type if one is given."""
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network if dtype is None else network.to(getattr(torch, dtype))


def _folded(base: nn.Module, pairs: Sequence[Pair]) -> nn.Module:
    """Return a copy in which these batch norms are part of their convolutions."""
    network = trial.copied(base)
    held: dict[str, Any] = dict(network.named_modules())
    for conv, norm in pairs:
        fused = _fused(held[conv], held[norm])
        for name, module in ((conv, fused), (norm, nn.Identity())):
            network.set_submodule(name, module.eval())
    return network


def _fused(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Return a convolution with its batch norm; half precision is rounded once, at the end."""
    dtype = conv.weight.dtype
    if dtype in (torch.bfloat16, torch.float16):
        conv, norm = conv.float(), norm.float()
    return fuse_conv_bn_eval(conv, norm).to(dtype)


def _pairs(base: nn.Module, tried: Sequence[Trial]) -> Iterator[Pair]:
    """Yield convolutions whose output goes to one batch norm alone, in the order of their names."""
    names = Counter(id(m) for _, m in base.named_modules(remove_duplicate=False))
    graphs = {name: _graph(m) for name, m in base.named_modules() if any(m.children())}
    for owner, graph in graphs.items():
        for conv, norm in _adjacent(base.get_submodule(owner), graph) if graph else ():
            pair = (_join(owner, conv), _join(owner, norm))
            parts = [base.get_submodule(name) for name in pair]
            if (
                all(names[id(m)] == 1 and not _is_watched(m) for m in parts)
                and all(_callers(trial, name) == [owner] for trial in tried for name in pair)
                and all(_is_used_by(owner, name, base, graphs) for name in pair)
            ):
                yield pair


def _graph(module: nn.Module) -> fx.Graph | None:
    try:
        return own_graph(module, training=False)
    except UntraceableError:
        return None


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}".lstrip(".")


def _callers(tried: Trial, name: str) -> list[str | None]:
    """Return the names of the modules that called a module, one for each call."""
    return [call.caller.name if call.caller else None for call in tried.calls if call.name == name]


def _is_used_by(owner: str, name: str, base: nn.Module, graphs: dict[str, fx.Graph | None]) -> bool:
    """Whether the owner uses a layer once, and the code of no module around the owner can use it.

    Batches of other sizes may take other branches of code that cannot be traced, so it might.
    """
    parts = owner.split(".") if owner else []
    for outer in (".".join(parts[:depth]) for depth in range(len(parts) + 1)):
        graph = graphs[outer]
        if graph is None:
            if _calls_parts_whole(base.get_submodule(outer)):
                continue
            return False
        layer = name.removeprefix(f"{outer}.") if outer else name
        uses = [n for n in graph.nodes if n.op in ("call_module", "get_attr")]
        if sum(f"{n.target}.".startswith(f"{layer}.") for n in uses) != (outer == owner):
            return False
    return True


def _calls_parts_whole(module: nn.Module) -> bool:
    """Whether it has no forward, as a ModuleList, or is a wrapper of this package."""
    kind = type(module)
    return kind.forward is nn.Module.forward or kind.__module__.startswith("art_denoised.")


def _adjacent(module: nn.Module, graph: fx.Graph) -> Iterator[Pair]:
    """Yield calls of a batch norm on what a convolution returned, in a module's own forward."""
    held = dict(module.named_modules())
    for node in graph.nodes:
        first = node.args[0] if node.args else None
        if (
            _calls(node, nn.BatchNorm2d, held)
            and isinstance(first, fx.Node)
            and _calls(first, nn.Conv2d, held)
            and len(first.users) == 1
            and held[str(node.target)].running_mean is not None
        ):
            yield str(first.target), str(node.target)


def _calls(node: fx.Node, kind: type[nn.Module], held: dict[str, nn.Module]) -> bool:
    """Whether a node calls a module of exactly this class, whose arithmetic is known."""
    return node.op == "call_module" and type(held.get(str(node.target))) is kind


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks see what a module takes or returns."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _check_same(base: nn.Module, before: Trial, after: Trial) -> None:
    if not trial.near(before.result, after.result):
        raise InputError(
            f"the {type(base).__name__} computes something else once batch norms are folded, "
            "because it is random or other code uses its layers; pass fold=False"
        )
