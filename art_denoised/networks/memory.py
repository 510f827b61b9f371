"""What a traced forward changes in place, and what else would see the change."""

from __future__ import annotations

import operator

from torch import fx, nn

from art_denoised.networks.tracing import UPDATES, Call

# Methods of tensors, and functions of the same names, that may return the memory they were given.
# fmt: off
_VIEWS = frozenset((
    "flatten", "unflatten", "view", "view_as", "reshape", "reshape_as", "ravel", "transpose",
    "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "squeeze", "unsqueeze", "expand",
    "expand_as", "broadcast_to", "t", "adjoint", "chunk", "tensor_split", "split", "hsplit",
    "vsplit", "dsplit", "unbind", "select", "narrow", "diagonal", "unfold", "as_strided",
    "detach", "real", "imag", "contiguous", "to", "type", "type_as", "float", "half", "double",
    "bfloat16", "cpu", "cuda", "requires_grad_", "dropout", "dropout1d", "dropout2d",
    "dropout3d", "alpha_dropout", "getitem", "iadd", "isub", "imul", "itruediv", "ifloordiv",
    "ipow", "imod",
))
# fmt: on
_ATTRIBUTES = ("T", "mT", "H", "mH", "data", "real", "imag")
_PASSING = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)


def later_users(call: Call) -> list[fx.Node]:
    """Return who uses the input after a call in place: they see what the activation made of it."""
    if not _in_place(call):
        return []
    (x,) = call.node.all_input_nodes
    return [user for user in x.users if user in _after(call.node)]


def is_seen_elsewhere(owner: nn.Module, call: Call) -> bool:
    """Whether a call in place changes what is used after it by another name, a view say."""
    if not _in_place(call):
        return False
    (x,) = call.node.all_input_nodes
    return any(
        user in _after(call.node) for node in _others(owner, call.node) - {x} for user in node.users
    )


def replace_updates(owner: nn.Module, graph: fx.Graph) -> bool:
    """Make ``x += y`` an addition, and so on; return whether none was seen by another name."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in UPDATES:
            continue
        after = _after(node)
        if any(user in after for other in _others(owner, node) for user in other.users):
            return False
    for node in graph.nodes:
        if node.op == "call_function" and node.target in UPDATES:
            node.target = UPDATES[node.target]
    return True


def _others(owner: nn.Module, changed: fx.Node) -> set[fx.Node]:
    """Return what has the memory of the first input of a node that changes it, and was before."""
    x = changed.all_input_nodes[0]
    source: dict[fx.Node, fx.Node] = {}  # by node: the first that has its memory
    for node in changed.graph.nodes:
        if node is changed:
            break
        inputs = node.all_input_nodes
        source[node] = source[inputs[0]] if inputs and _may_alias(owner, node) else node
    return {node for node in source if source[node] is source[x]}


def _in_place(call: Call) -> bool:
    if call.slot is not None:
        return bool(getattr(getattr(*call.slot), "inplace", False))
    return bool(call.node.kwargs.get("inplace")) or _name(call.node).endswith("_")


def _after(node: fx.Node) -> set[fx.Node]:
    nodes = list(node.graph.nodes)
    return set(nodes[nodes.index(node) + 1 :])


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _may_alias(owner: nn.Module, node: fx.Node) -> bool:
    """Whether what a node returns may have the memory of its first input."""
    if node.op == "call_module":
        return _passes(owner.get_submodule(str(node.target)))
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target is getattr:
        return node.args[1] in _ATTRIBUTES
    if node.target is operator.getitem:  # a module's several outputs are taken to be apart
        return node.all_input_nodes[0].op != "call_module" or not isinstance(node.args[1], int)
    return _name(node) in _VIEWS or _name(node).endswith("_") or bool(node.kwargs.get("inplace"))


def _passes(module: nn.Module) -> bool:
    if type(module) is nn.Sequential:
        return all(map(_passes, module))
    return isinstance(module, _PASSING) or bool(getattr(module, "inplace", False))
