"""Plant one-token errors in the mathematics, one at a time, and count those that the tests see.

    python tools/mutants.py [--rate SHARE] [--only TEXT] [--quick] [--jobs N] [--list]

A mutant is killed when a test fails or does not end. First run the tests that are named after the
module and the module's own examples, then the other tests of its room. What survives must stand in
tools/survivors.json with the reason why it changes nothing that a user could see.

The sample does not depend on the rest of the code: a mutant belongs to it by the hash of its file,
function and text.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import hashlib
import importlib
import importlib.machinery
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "art_denoised"
SURVIVORS = ROOT / "tools" / "survivors.json"
ROOMS = ("smoothing", "rdc", "diffusion", "networks", "attacks", "purification")
FILES = ("evaluation/masking.py", "evaluation/rows.py", "evaluation/attack_rows.py")
# Transport, not mathematics; their tests kill processes and would kill each other's.
TRANSPORT = (
    "blackbox",
    "cluster",
    "dispatch",
    "http",
    "queries",
    "replica",
    "worker",
    "workers",
)
SLOW_TESTS = ("test_workers.py", "test_cluster.py", "test_blackbox.py", "test_http.py")
# What the tests import, except the package itself: a fork imports that with its mutant.
PRELOAD = (
    "art.attacks.evasion",
    "art.estimators.classification",
    "diffusers",
    "foolbox",
    "hypothesis",
    "matplotlib",
    "mpmath",
    "multiprocess",
    "pytest",
    "safetensors.torch",
    "scipy.stats",
    "sklearn.datasets",
    "timm",
    "torchattacks",
    "torchvision",
)
SECONDS = 300  # a test run that takes longer does not end


def main() -> int:
    """Print the share of mutants that were killed; return 1 if one survived without a reason."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=0.1, help="share of all mutants (.1)")
    parser.add_argument("--only", default="", help="only mutants whose name contains this text")
    parser.add_argument(
        "--quick", action="store_true", help="only the tests that are named after the module"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--list", action="store_true", help="print the sample and stop")
    arguments = parser.parse_args()
    sample = [m for path in modules() for m in mutants(path, arguments.rate)]
    # By their numbers: the mutants of a smaller rate come first.
    sample = sorted((m for m in sample if arguments.only in m.name), key=lambda m: chance(m.name))
    print(f"{len(sample)} mutants", flush=True)
    if arguments.list:
        print("\n".join(f"{mutant.line:5} {mutant.name}" for mutant in sample))
        return 0
    for name in PRELOAD:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    tests = own_tests if arguments.quick else all_tests
    print("running the tests without a mutant ...", flush=True)
    broken = [name for name, code in run_all(untouched(sample, tests), arguments.jobs) if code]
    if broken:
        print("these tests fail without a mutant: " + ", ".join(sorted(broken)))
        return 1
    jobs = [(m.name, lambda m=m: run_tests(m, tests)) for m in sample]
    return judge(dict(run_all(jobs, arguments.jobs, say=True)))


def judge(codes: dict[str, int]) -> int:
    """Print what survived, and return 1 if a survivor has no reason."""
    reasons = json.loads(SURVIVORS.read_text())
    survived = [name for name, code in codes.items() if code == 0]
    unexplained = [name for name in survived if name not in reasons]
    for name in survived:
        print(f"survived: {name}\n    {reasons.get(name, 'NO REASON')}")
    killed = len(codes) - len(survived)
    print(f"{killed} of {len(codes)} killed: {killed / max(len(codes), 1):.1%}")
    print(f"{len(survived) - len(unexplained)} harmless, {len(unexplained)} without a reason")
    return int(bool(unexplained))


@dataclass(frozen=True)
class Mutant:
    """One planted error.

    Attributes:
        path: File of the package.
        name: File, function, and text before and after.
        line: Line of the change.
        source: The file's source with the error in it.
    """

    path: Path
    name: str
    line: int
    source: str


def modules() -> list[Path]:
    """Return the files whose mathematics is tested."""
    found = [path for room in ROOMS for path in sorted((PACKAGE / room).glob("[!_]*.py"))]
    return [p for p in found if p.stem not in TRANSPORT] + [PACKAGE / name for name in FILES]


def chance(name: str) -> float:
    """Return a number in [0, 1) that depends on a mutant's name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def mutants(path: Path, rate: float) -> Iterator[Mutant]:
    """Yield the mutants of one file that belong to a sample."""
    tree = ast.parse(path.read_text())
    seen: Counter[str] = Counter()
    for function, node, put in places(tree, ""):
        for changed in changes(node):
            name = f"{path.relative_to(PACKAGE)} {function}: {ast.unparse(node)} -> "
            name += ast.unparse(changed)
            seen[name] += 1
            name += f" #{seen[name]}" * (seen[name] > 1)
            if chance(name) < rate:
                put(changed)
                yield Mutant(path, name, node.lineno, ast.unparse(ast.fix_missing_locations(tree)))
                put(node)


Place = tuple[str, ast.expr, Callable[[ast.AST], None]]


def places(node: ast.AST, function: str) -> Iterator[Place]:
    """Yield each expression that could alter a result, its function, and what replaces it."""
    for field, child in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for index, item in enumerate(child) if isinstance(child, list) else [(None, child)]:
            if not isinstance(item, ast.AST) or isinstance(item, SKIPPED) or typing_only(item):
                continue
            name = function
            if isinstance(item, ast.FunctionDef | ast.ClassDef):
                name = f"{function}.{item.name}".lstrip(".")
            if isinstance(item, ast.expr):
                yield name, item, putter(node, field, index)
            yield from places(item, name)


def putter(parent: ast.AST, field: str, index: int | None) -> Callable[[ast.AST], None]:
    """Return a function that puts a node into a field of its parent."""

    def put(node: ast.AST) -> None:
        if index is None:
            setattr(parent, field, node)
        else:
            getattr(parent, field)[index] = node

    return put


SKIPPED = (ast.Raise, ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom)


def typing_only(node: ast.AST) -> bool:
    """Tell whether a statement is for type checkers alone."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
NAMES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "amin": "amax", "amax": "amin",
    "argmax": "argmin", "argmin": "argmax", "floor": "ceil", "ceil": "floor", "sum": "mean",
    "mean": "sum", "sin": "cos", "cos": "sin", "exp": "log", "log": "exp", "cumsum": "cumprod",
    "cumprod": "cumsum", "minimum": "maximum", "maximum": "minimum", "sqrt": "square",
    "ppf": "isf", "isf": "ppf", "cdf": "sf", "sf": "cdf", "_BETA1": "_BETA2", "_BETA2": "_BETA1",
}  # fmt: skip


def changes(node: ast.expr) -> Iterator[ast.expr]:
    """Yield the expressions that one changed token makes of an expression."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in COMPARE:
            yield altered(node, ops=[COMPARE[type(op)]()])
        case ast.BinOp(op=op) if type(op) in ARITHMETIC and not isinstance(
            node.left, ast.JoinedStr
        ):
            yield altered(node, op=ARITHMETIC[type(op)]())
        case ast.BoolOp(op=op):
            yield altered(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield altered(node, value=not value)
        case ast.Constant(value=int(value)):
            yield altered(node, value=value + 1)
        case ast.Constant(value=float(value)):
            yield altered(node, value=value * 2 if value else 1.0)
        case ast.Name(id=name, ctx=ast.Load()) if name in NAMES:
            yield altered(node, id=NAMES[name])
        case ast.Attribute(attr=name, ctx=ast.Load()) if name in NAMES:
            yield altered(node, attr=NAMES[name])
        case ast.Call(func=ast.Attribute(attr="detach", value=value)):
            yield value


def altered(node: ast.expr, **fields: object) -> ast.expr:
    """Return a copy of a node with other fields."""
    made = copy.copy(node)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


Tests = Callable[[Path], list[list[str]]]


def own_tests(path: Path) -> list[list[str]]:
    """Return the examples of a module and the tests named after it, in one list to run."""
    return [[str(path), *(str(file) for file in _room(path) if path.stem.rstrip("s") in file.stem)]]


def all_tests(path: Path) -> list[list[str]]:
    """Return the same, and then the other tests of its room."""
    (own,) = own_tests(path)
    others = [str(file) for file in _room(path) if str(file) not in own]
    return [own, others] if others else [own]


def _room(path: Path) -> list[Path]:
    files = sorted((ROOT / "tests" / path.parent.name).glob("test_*.py"))
    return [file for file in files if file.name not in SLOW_TESTS]


def untouched(sample: list[Mutant], tests: Tests) -> list[tuple[str, Callable[[], int]]]:
    """Return a job for each file of tests that the sample needs, without a mutant."""
    files = sorted({file for mutant in sample for part in tests(mutant.path) for file in part})
    return [(file, lambda file=file: 0 if pytest_code([file]) in (0, 5) else 1) for file in files]


def run_tests(mutant: Mutant, tests: Tests) -> int:
    """Return 0 if no test sees the mutant. It is called in a process of its own."""
    plant(mutant)
    return next((code for files in tests(mutant.path) if (code := pytest_code(files))), 0)


def plant(mutant: Mutant) -> None:
    """Let the mutant's source stand for its file in this process, which has not imported it."""
    loader = importlib.machinery.SourceFileLoader
    original = loader.get_code

    def get_code(self: importlib.machinery.SourceFileLoader, name: str) -> object:
        if Path(self.path) == mutant.path:
            return compile(mutant.source, self.path, "exec")
        return original(self, name)

    loader.get_code = get_code


def pytest_code(files: list[str]) -> int:
    """Return the exit code of pytest."""
    import pytest

    # Plain assertions: modules that the parent has imported cannot be rewritten.
    options = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return int(pytest.main([*options, *files]))


def run_all(
    jobs: list[tuple[str, Callable[[], int]]], processes: int, say: bool = False
) -> Iterator[tuple[str, int]]:
    """Yield the name and exit code of each job, each in a fork of this process."""
    waiting, running, done = list(reversed(jobs)), {}, 0
    while waiting or running:
        while waiting and len(running) < processes:
            name, job = waiting.pop()
            running[fork(job)] = name
        pid, status = os.wait()
        if pid not in running:
            continue
        name, done = running.pop(pid), done + 1
        code = os.waitstatus_to_exitcode(status)
        if say:
            print(f"{done}/{len(jobs)} {'killed  ' if code else 'SURVIVED'} {name}", flush=True)
        yield name, code


def fork(job: Callable[[], int]) -> int:
    """Start a job in a silent process of its own, and return the process."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    code = 1
    try:
        code = job()
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
