"""Grade a student's dit.py, unit by unit. One mistake costs one unit.

    python classroom/grade.py SUBMISSION                             # dit.py, or a folder that contains it
    python classroom/grade.py SUBMISSION --extra                     # the extra units; or --units vb,guidance
    python classroom/grade.py SUBMISSION --gradescope results.json
    python classroom/grade.py SUBMISSION --forbid scaled_dot_product_attention,einsum

Each unit is tested by test_dit.py in a process of its own, where the student's functions take the place of the unit in
this folder's dit.py. So everything else is right, and whatever the code does, it does to its own unit. Only functions
of units are graded; helpers, imports and new methods come along, other changes are left out. For Linux and macOS.

Nothing stops code that looks up the reference: a unit that uses names such as `open` or `importlib` is marked with
LOOK, for a person.
"""
import ast
import contextlib
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from units import ROOT, UNITS, Ungradable, add_units, chosen_units, find, functions, graft, tests

import dit
import sample

MEMORY = 3 << 30                                                    # bytes that a process may allocate
LOOK = {"open", "exec", "eval", "compile", "globals", "vars", "inspect", "importlib", "__import__", "__file__", "sys",
        "os", "io", "gc", "pathlib", "subprocess", "ctypes", "runpy", "linecache"}


# Tests, each run in a process of its own ------------------------------------------------------------------------------

def with_tests(path, work):
    """work({name: test case}) with the tests of a file: they are collected once, and every process inherits them."""
    class Work:
        def pytest_runtestloop(self, session):
            session.config.option.tbstyle = "short"                 # the long one prints all arguments
            work({item.name: item for item in session.items})
            return True

    return pytest.main(["-c", os.devnull, f"--rootdir={ROOT}", "-p", "no:terminal", "-p", "no:cacheprovider", "-s",
                        str(path)], plugins=[Work()])


def run_tests(items, stop=False):
    """[(name, "" or what went wrong in one line)] of test cases; with `stop`, up to the first that fails."""
    found, failed = {}, []

    class Listen:
        def pytest_runtest_logreport(self, report):
            if not report.passed:
                failed.append(report)

    plugin = Listen()
    items[0].config.pluginmanager.register(plugin)
    for k, item in enumerate(items):
        failed.clear()
        last = k == len(items) - 1
        item.ihook.pytest_runtest_protocol(item=item, nextitem=None if last else items[k + 1])
        found[item.name] = in_one_line(failed[0]) if failed else ""
        if failed and stop:
            break
    items[0].config.pluginmanager.unregister(plugin)
    return list(found.items())


def in_one_line(report):
    """What a failed test says, and the line of the student's file if it was raised there."""
    crash = getattr(report.longrepr, "reprcrash", None)
    message = " ".join((crash.message if crash else str(report.longrepr)).split())[:300]
    where = f" (line {crash.lineno})" if crash and not crash.path.endswith("test_dit.py") else ""
    return f"{message}{where}"


def in_a_process(work, limit):
    """(what work() returned in a forked process, what it printed last); Ungradable if there is no result."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)

    def child():
        os.setsid()
        with contextlib.suppress(ValueError, OSError):              # macOS knows no RLIMIT_DATA
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        with tempfile.TemporaryFile() as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            torch.set_num_threads(1)
            try:
                result = work()
            except Ungradable as error:
                result = error
            sys.stdout.flush()
            file.seek(max(0, file.seek(0, 2) - 500))
            theirs.send((result, file.read().decode(errors="replace")))

    process = fork.Process(target=child)
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit):
            raise Ungradable(f"took longer than {limit:g} s")
        result, said = ours.recv()
    except EOFError:
        raise Ungradable("ended the process, or ran out of memory") from None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    if isinstance(result, Ungradable):
        raise result
    return result, said


# A submission ---------------------------------------------------------------------------------------------------------

def read(path):
    """(path of dit.py, its syntax tree, {line: what is wrong}): a function with a syntax error is left out alone."""
    path = Path(path) / "dit.py" if Path(path).is_dir() else Path(path)
    try:
        lines, broken = path.read_text(encoding="utf-8").splitlines(keepends=True), {}
    except (OSError, UnicodeDecodeError) as error:
        raise sample.UserError(f"cannot read {path} ({error}): name a dit.py, or a folder that contains one") from None
    try:
        return path, ast.parse("".join(lines)), broken
    except SyntaxError:
        pass
    starts = [i for i, line in enumerate(lines) if re.match(r"(    )?def \w+", line)]
    for i in starts:
        indent = re.match(" *", lines[i])[0]
        end = next((j for j in range(i + 1, len(lines)) if lines[j].strip() and not lines[j].startswith(indent + " ")
                    and not lines[j].startswith(indent + ")")), len(lines))
        try:
            ast.parse(textwrap.dedent("".join(lines[i:end])))
        except SyntaxError as error:
            broken[i + 1] = f"syntax error in line {i + (error.lineno or 1)}: {error.msg}"
            name = re.match(r" *def (\w+)", lines[i])[1]
            lines[i:end] = [f"{indent}def {name}(): pass\n"] + ["\n"] * (end - i - 1)
    try:
        return path, ast.parse("".join(lines)), broken
    except SyntaxError as error:
        raise sample.UserError(f"{path}, line {error.lineno}: {error.msg}. Run `python {path}` first") from None


def names_in(tree, unit, module=dit):
    """All names in the student's functions for a unit, and in those that are the student's own."""
    nodes = [find(tree, dotted) for dotted, _ in functions(unit)]
    nodes += [node for node in tree.body if not hasattr(module, getattr(node, "name", "torch"))]
    found = set()
    for node in (inner for outer in nodes if outer for inner in ast.walk(outer)):
        found |= {getattr(node, field, None) for field in ("id", "attr")}
    return found


def grade_unit(unit, submission, items, forbidden, limit):
    """(points, notes) of a unit."""
    path, tree, broken = submission
    total, cases = UNITS[unit].points, tests(unit, items)

    def work():
        graft(dit, tree, unit, str(path))
        return run_tests([items[case] for case in cases])

    try:
        for dotted, _ in functions(unit):
            node = find(tree, dotted)
            if node and node.lineno in broken:
                raise Ungradable(broken[node.lineno])
        names = names_in(tree, unit)
        if used := sorted(names & set(forbidden)):
            raise Ungradable(f"uses {', '.join(used)}, which is not allowed here")
        found, said = in_a_process(work, limit)
    except Ungradable as error:
        return 0, [str(error)]
    wrong = [f"{name}: {message}" for name, message in found if message]
    if all("NotImplementedError" in message for _, message in found):
        wrong = ["not written yet"]
    look = [f"LOOK: uses {', '.join(sorted(names & LOOK))}"] if names & LOOK else []
    printed = [f"printed: {' '.join(said.split())[-200:]}"] if said.strip() else []
    return round(total * (len(found) - sum(bool(m) for _, m in found)) / len(cases), 2), wrong + look + printed


def write_gradescope(path, graded):
    """results.json: one test for each unit, also those that wait."""
    rows = [dict(name=f"{unit} ({UNITS[unit].paper})", score=points, max_score=UNITS[unit].points,
                 output="\n".join(notes), visibility="visible") for unit, (points, notes) in graded.items()]
    Path(f"{path}.part").write_text(json.dumps(dict(tests=rows), indent=1))
    os.replace(f"{path}.part", path)


def main(argv):
    parser = sample.Parser(prog="grade.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("submission", help="a student's dit.py, or its folder")
    add_units(parser)
    parser.add_argument("--gradescope", help="write Gradescope's results.json here, anew after each unit")
    parser.add_argument("--limit", type=float, default=30, help="seconds a unit may take (default: 30)")
    parser.add_argument("--forbid", default="", help="names that the units may not use, separated by commas")
    args = parser.parse_args(argv)
    units, submission = chosen_units(args), read(args.submission)
    graded = dict.fromkeys(units, (0, ["not graded yet"]))

    def work(items):
        for unit in units:
            points, notes = graded[unit] = grade_unit(unit, submission, items, args.forbid.split(","), args.limit)
            print("\n    ".join([f"{unit:22}{points:6g} of {UNITS[unit].points}", *notes]), flush=True)
            if args.gradescope:
                write_gradescope(args.gradescope, graded)
        print(f"{'total':22}{sum(points for points, _ in graded.values()):6g} of {sum(UNITS[u].points for u in units)}")

    with_tests(ROOT / "test_dit.py", work)


if __name__ == "__main__":
    sample.run(main, less_memory="grade fewer units")
