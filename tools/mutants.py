"""Plant one-token errors in the mathematics, one at a time, and count those that the tests see.

    python tools/mutants.py [--rate SHARE] [--only TEXT] [--quick] [--jobs N] [--results FILE]

First each test of the rooms runs alone, and the lines that it runs are noted. An error is then
planted in a fork of this process, which has imported everything, and the tests that run its line
follow, the fastest first. If they pass, the module's own tests follow once more, on a package that
is imported with the error. It is killed when a test fails or does not end; it has survived once 90
processor seconds of tests have passed. What survives must stand
in tools/survivors.json with the reason why it changes nothing that a user could see.

The sample does not depend on the rest of the code: a mutant belongs to it by the hash of its file,
function and text.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import gc
import hashlib
import importlib
import importlib.machinery
import inspect
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest
from hypothesis import Phase, settings

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "art_denoised"
SURVIVORS = ROOT / "tools" / "survivors.json"
ROOMS = ("smoothing", "rdc", "diffusion", "networks", "attacks", "purification")
FILES = ("evaluation/masking.py", "evaluation/logs.py", "evaluation/attack_rows.py")
# Transport, not mathematics; their tests kill processes and would kill each other's.
TRANSPORT = ("cluster", "dispatch", "http", "queries", "worker", "workers")
SLOW_TESTS = ("test_workers.py", "test_cluster.py", "test_queries_blackbox.py", "test_http.py")
# Plain assertions: modules that this process has imported cannot be rewritten. No output is
# captured, since forks are silent; hypothesis does not look for the smallest failure.
PYTEST = (
    *("-q", "-s", "--assert=plain", "--hypothesis-profile=mutants"),
    *("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:faulthandler"),
)
SECONDS = 300  # of waiting, after which a test does not end
ENOUGH = 90  # processor seconds of tests that pass, after which a mutant has survived
FEW = 30  # tests of a module without tests of its own that run when all is imported again
MEMORY = 8 << 30  # bytes that the tests of one mutant may take


def main() -> int:
    """Print the share of mutants that were killed; return 1 if one survived without a reason."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=0.25, help="share of all mutants (.25)")
    parser.add_argument("--only", default="", help="only mutants whose name contains this text")
    parser.add_argument(
        "--quick", action="store_true", help="only the tests that are named after the module"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument(
        "--results",
        type=Path,
        help="file of JSON lines that a run extends; what it says was killed is not run again",
    )
    parser.add_argument("--list", action="store_true", help="print the sample and stop")
    options = parser.parse_args()
    sample = [m for path in modules() for m in mutants(path, options.rate, options.only)]
    # By their numbers: the mutants of a smaller rate come first.
    sample = sorted(sample, key=lambda m: chance(m.name))
    print(f"{len(sample)} mutants", flush=True)
    if options.list:
        print("\n".join(f"{mutant.lines.start:5} {mutant.name}" for mutant in sample))
        return 0
    settings.register_profile(
        "mutants", derandomize=True, deadline=None, phases=(Phase.explicit, Phase.generate)
    )
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    tests = own_tests if options.quick else room_tests
    hunt = Hunt(sample, tests, options.jobs, killed(options.results), options.results)
    files = sorted({str(file) for path in {m.path for m in sample} for file in tests(path)})
    failed = pytest.main([*PYTEST, *files], plugins=[hunt])
    if hunt.broken:
        print("these tests fail without a mutant: " + ", ".join(sorted(hunt.broken)))
    return judge(hunt.killers) or int(bool(failed or hunt.broken))


def killed(results: Path | None) -> dict[str, str | None]:
    """Return the mutants that an earlier run killed, and the tests that did."""
    lines = results.read_text().splitlines() if results and results.exists() else []
    known = {line["mutant"]: line["killer"] for line in map(json.loads, lines)}
    return {name: killer for name, killer in known.items() if killer}


def judge(killers: dict[str, str | None]) -> int:
    """Print what survived, and return 1 if a survivor has no reason."""
    reasons = json.loads(SURVIVORS.read_text())
    survived = [name for name, killer in killers.items() if not killer]
    unexplained = [name for name in survived if name not in reasons]
    for name in survived:
        print(f"survived: {name}\n    {reasons.get(name, 'NO REASON')}")
    killed = len(killers) - len(survived)
    print(f"{killed} of {len(killers)} killed: {killed / max(len(killers), 1):.1%}")
    print(f"{len(survived) - len(unexplained)} harmless, {len(unexplained)} without a reason")
    return int(bool(unexplained))


@dataclass(frozen=True)
class Mutant:
    """One planted error.

    Attributes:
        path: File of the package.
        name: File, function, and text before and after.
        lines: Lines of the changed expression.
        code: The compiled file with the error in it.
    """

    path: Path
    name: str
    lines: range
    code: CodeType


def modules() -> list[Path]:
    """Return the files whose mathematics is tested."""
    found = [path for room in ROOMS for path in sorted((PACKAGE / room).glob("[!_]*.py"))]
    return [p for p in found if p.stem not in TRANSPORT] + [PACKAGE / name for name in FILES]


def chance(name: str) -> float:
    """Return a number in [0, 1) that depends on a mutant's name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def mutants(path: Path, rate: float, only: str) -> Iterator[Mutant]:
    """Yield the mutants of one file that belong to a sample."""
    tree = ast.parse(path.read_text())
    seen: Counter[str] = Counter()
    for function, node, put in places(tree, ""):
        for changed in changes(node):
            name = f"{path.relative_to(PACKAGE)} {function}: {ast.unparse(node)} -> "
            name += ast.unparse(changed)
            seen[name] += 1
            name += f" #{seen[name]}" * (seen[name] > 1)
            if chance(name) < rate and only in name:
                put(changed)
                code = compile(ast.fix_missing_locations(tree), str(path), "exec")
                yield Mutant(path, name, range(node.lineno, node.end_lineno + 1), code)
                put(node)


Place = tuple[str, ast.expr, Callable[[ast.AST], None]]


def places(node: ast.AST, function: str) -> Iterator[Place]:
    """Yield each expression that could alter a result, its function, and what replaces it."""
    for field, child in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for index, item in enumerate(child) if isinstance(child, list) else [(None, child)]:
            if not isinstance(item, ast.AST) or isinstance(item, SKIPPED) or without_result(item):
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


def without_result(node: ast.AST) -> bool:
    """Tell whether code is for type checkers alone, or guards what is right by construction."""
    if isinstance(node, ast.keyword):
        return node.arg == "strict"  # of zip
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


def own_tests(path: Path) -> list[Path]:
    """Return a module, for its examples, and the tests that are named after it."""
    return [path, *(file for file in _room(path) if path.stem.rstrip("s") in file.stem)]


def room_tests(path: Path) -> list[Path]:
    """Return a module and the tests of its room."""
    return [path, *_room(path)]


def _room(path: Path) -> list[Path]:
    files = sorted((ROOT / "tests" / path.parent.name).glob("test_*.py"))
    return [file for file in files if file.name not in SLOW_TESTS]


class Hunt:
    """A plugin of pytest that runs the collected tests for each mutant, in place of once.

    Attributes:
        broken: Tests that fail without a mutant.
        killers: The test that saw each mutant, or None.
        once: Files whose tests fail when all is imported again, so that they run in forks alone.
    """

    def __init__(
        self,
        sample: list[Mutant],
        tests: Callable[[Path], list[Path]],
        jobs: int,
        killers: dict[str, str | None],
        results: Path | None,
    ) -> None:
        self.sample, self.tests, self.jobs, self.results = sample, tests, jobs, results
        self.broken: list[str] = []
        self.once: set[Path] = set()
        self.killers = {m.name: killers[m.name] for m in sample if m.name in killers}
        self.failed = ""

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Note the lines and seconds of each test, and then run those that can see a mutant."""
        from art_denoised.data import digits

        for path in {m.path for m in self.sample}:
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        paths = {str(m.path) for m in self.sample}
        live = functions(paths)
        digits(train=True)  # read from text once, and not in each fork
        gc.collect()
        gc.freeze()  # a collection in a fork would copy all that it shares with this process
        print(f"running {len(session.items)} tests without a mutant ...", flush=True)
        trials = [(item.nodeid, partial(self._trace, item, paths)) for item in session.items]
        trials = dict(forked(trials, self.jobs))
        self.broken = [name for name, trial in trials.items() if not trial or not trial["passed"]]
        for name in self.broken:  # they would kill every mutant
            print(f"left out, since it fails without a mutant: {name}", flush=True)
            del trials[name]
        for name in sorted({name for trial in trials.values() for name in trial["modules"]}):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        gc.freeze()
        passing = [item for item in session.items if item.nodeid in trials]
        items = sorted(passing, key=lambda item: trials[item.nodeid]["seconds"])

        def job(mutant: Mutant) -> tuple[str, Job]:
            files = self.tests(mutant.path)
            return mutant.name, partial(self._run, mutant, items, files, live, trials)

        waiting = [mutant for mutant in self.sample if mutant.name not in self.killers]
        whole = {mutant.path: untouched(mutant) for mutant in waiting}
        checks = forked(map(job, whole.values()), self.jobs)
        alone = {mutant.name: path for path, mutant in whole.items()}
        for name in (name for name, run in checks if not run or run["killer"]):
            print(f"its tests fail when all is imported again: {name}", flush=True)
            self.broken.append(name)
            self.once.add(alone[name])
        runs = [job(mutant) for mutant in waiting]
        for done, (name, run) in enumerate(forked(runs, self.jobs), 1):
            killer = run["killer"] if run else "does not end"
            self.killers[name] = killer
            print(f"{done}/{len(runs)} {'killed  ' if killer else 'SURVIVED'} {name}", flush=True)
            if self.results:
                with self.results.open("a") as file:
                    print(json.dumps({"mutant": name, "killer": killer}), file=file)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember a test that failed."""
        if report.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Remember a file that cannot be imported."""
        if report.failed:
            self.failed = report.nodeid

    def _trace(self, item: pytest.Item, paths: set[str]) -> dict[str, Any]:
        lines: dict[str, set[int]] = defaultdict(set)

        def enter(frame: FrameType, event: str, value: object) -> Callable[..., object] | None:
            # What runs while a module is imported does not belong to the test that imports it.
            code = frame.f_code
            if code.co_filename not in paths or not code.co_flags & inspect.CO_OPTIMIZED:
                return None
            seen = lines[code.co_filename]

            def step(frame: FrameType, event: str, value: object) -> Callable[..., object]:
                seen.add(frame.f_lineno)
                return step

            return step

        start, known = time.process_time(), set(sys.modules)
        sys.settrace(enter)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        sys.settrace(None)
        seconds = time.process_time() - start
        return {
            "passed": not self.failed,
            "seconds": seconds,
            "lines": {path: sorted(seen) for path, seen in lines.items()},
            "modules": [name for name in set(sys.modules) - known if name.split(".")[0] != "tests"],
        }

    def _run(
        self,
        mutant: Mutant,
        items: list[pytest.Item],
        files: list[Path],
        live: dict[str, dict[Key, list[FunctionType]]],
        trials: dict[str, dict[str, Any]],
    ) -> dict[str, Any]:
        """Return the test that sees a mutant. It is called in a process of its own."""
        own = [item for item in items if item.path in own_tests(mutant.path)]
        items = watchers(mutant, items, trials, files)
        planted = swaps(mutant, live[str(mutant.path)])
        for function, code in planted:
            function.__code__ = code
        for item, following in zip(items, [*items[1:], None], strict=True) if planted else ():
            if time.process_time() > ENOUGH:
                break
            # A loop without end burns time; a test that waits is ended by the alarm.
            signal.alarm(SECONDS)
            signal.setitimer(signal.ITIMER_PROF, 5 + 5 * trials[item.nodeid]["seconds"])
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                return {"killer": self.failed}
        signal.setitimer(signal.ITIMER_PROF, 0)
        if mutant.path in self.once:
            return {"killer": None}
        # Constants, and parameters of tests, were computed without the error. And AutoAttack's own
        # trace function hides lines from ours.
        return {"killer": self._run_anew(mutant, own or items[:FEW])}

    def _run_anew(self, mutant: Mutant, items: list[pytest.Item]) -> str | None:
        """Return the file of tests that sees a mutant when all is imported again with it."""
        for name in list(sys.modules):
            if name.split(".")[0] in ("art_denoised", "tests"):
                del sys.modules[name]
        plant(mutant)
        chosen = Chosen({item.nodeid for item in items})
        for file in dict.fromkeys(str(item.path) for item in items):
            signal.alarm(SECONDS)
            if pytest.main([*PYTEST, "-x", file], plugins=[chosen]) not in (0, 5):
                return file
        return None


@dataclass(frozen=True)
class Chosen:
    """A plugin of pytest that keeps chosen tests."""

    names: set[str]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Drop the others."""
        items[:] = [item for item in items if item.nodeid in self.names]


def watchers(
    mutant: Mutant,
    items: list[pytest.Item],
    trials: dict[str, dict[str, Any]],
    files: list[Path],
) -> list[pytest.Item]:
    """Return the tests that run a mutant's lines, or else others of its file."""
    near = [item for item in items if item.path in files]
    lines = {item.nodeid: trials[item.nodeid]["lines"].get(str(mutant.path), ()) for item in near}
    direct = [item for item in near if set(mutant.lines) & set(lines[item.nodeid])]
    return direct or [item for item in near if lines[item.nodeid]]


CACHED = type(cache(len))
Key = tuple[str, int]  # qualified name of a function, and its line


def functions(paths: set[str]) -> dict[str, dict[Key, list[FunctionType]]]:
    """Return the functions of files that exist in this process, and forget what they cached."""
    found: dict[str, dict[Key, list[FunctionType]]] = {path: defaultdict(list) for path in paths}
    gc.unfreeze()  # the tests freeze what they imported, and it would not be among the objects
    for item in gc.get_objects():
        if type(item) is CACHED and item.__module__.startswith("art_denoised"):
            item.cache_clear()
        if type(item) is FunctionType and item.__code__.co_filename in found:
            found[item.__code__.co_filename][key(item.__code__)].append(item)
    return found


def key(code: CodeType) -> Key:
    """Return what tells the functions of a file apart."""
    return code.co_qualname, code.co_firstlineno


def swaps(
    mutant: Mutant, live: dict[Key, list[FunctionType]]
) -> list[tuple[FunctionType, CodeType]]:
    """Return the functions of this process that a mutant changes, with their new code.

    There are none where the error lies outside of functions: such code ran on import.
    """
    found = [(one, code) for code in codes(mutant.code) for one in live.get(key(code), ())]
    return [(function, code) for function, code in found if function.__code__ != code]


def untouched(mutant: Mutant) -> Mutant:
    """Return what tests must let pass when the package is imported again."""
    code = compile(mutant.path.read_text(), str(mutant.path), "exec")
    return replace(mutant, name=f"{mutant.path.name}, imported again", code=code)


def codes(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of each function of a module or class."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if inner.co_flags & inspect.CO_OPTIMIZED:
                yield inner
            yield from codes(inner)


def plant(mutant: Mutant) -> None:
    """Let a mutant's code stand for its file in this process, which is yet to import it."""
    loader = importlib.machinery.SourceFileLoader
    original = loader.get_code

    def get_code(self: importlib.machinery.SourceFileLoader, name: str) -> object:
        return mutant.code if Path(self.path) == mutant.path else original(self, name)

    loader.get_code = get_code


Job = Callable[[], dict[str, Any]]


def forked(jobs: Iterable[tuple[str, Job]], processes: int) -> Iterator[tuple[str, dict | None]]:
    """Yield the name and answer of each job or None, each in a fork of this process."""
    waiting, running = iter(jobs), {}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder)
        while True:
            for name, job in islice(waiting, processes - len(running)):
                running[fork(job, answer)] = name
            if not running:
                return
            pid, _ = os.wait()
            if pid in running:
                file = answer / str(pid)
                yield running.pop(pid), json.loads(file.read_text()) if file.exists() else None


def fork(job: Job, folder: Path) -> int:
    """Start a job in a silent process, and return the process: it names the file of the answer."""
    if pid := os.fork():
        return pid
    os.setpgid(0, 0)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    try:
        answer = json.dumps(job())
        (folder / str(os.getpid())).write_text(answer)
    finally:
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
