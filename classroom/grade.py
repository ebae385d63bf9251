"""Grade a student's dit.py, unit by unit. One mistake costs one unit.

    python classroom/grade.py SUBMISSION                             # dit.py, or a folder that contains it
    python classroom/grade.py SUBMISSION --extra --gradescope results.json        # or --units vb,guidance
    python classroom/grade.py SUBMISSION --forbid scaled_dot_product_attention,einsum

Each unit is tested by test_dit.py in a process of its own, where the student's functions take the place of the unit in
this folder's dit.py. So everything else is right, and whatever the code does, it does to its own unit. Helpers, imports
and new methods that the unit uses come along; all else is left out. For Linux and macOS.

The code runs with your rights, and could read the reference: grade in a container. A unit that imports a module which
dit.py would not need, uses a name such as `open`, or changes other objects is marked LOOK, for a person.
"""
import ast
import contextlib
import importlib.util
import json
import linecache
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
from units import ROOT, UNITS, Ungradable, add_units, chosen_units, code_of, graft, parse, tests

import sample

YOURS = "your dit.py"                                               # the student's functions, in tracebacks
HARMLESS = "copy dataclasses einops functools itertools math numpy torch typing".split()         # to import
LOOK = """open exec eval compile globals locals vars getattr setattr delattr sys os io gc inspect importlib builtins
    load loadtxt genfromtxt fromfile memmap""".split()


# Tests, and processes of their own ------------------------------------------------------------------------------------

def with_tests(path, work):
    """work({name: test case}) with the tests of a file: they are collected once, and every process inherits them."""
    class Work:
        def pytest_runtestloop(self, session):
            session.config.option.tbstyle = "short"                 # the long one prints all arguments
            without = "diffusers" if importlib.util.find_spec("diffusers") is None else "\n"
            items = {item.nodeid.partition("::")[2]: item for item in session.items if without not in item.name}
            if len(items) < len(session.items):
                print("diffusers is not installed: the tests that compare with it are left out")
            work(items)
            return True

    flags = ["-c", os.devnull, f"--rootdir={ROOT}", "-p", "no:terminal", "-p", "no:cacheprovider", "-s"]
    if pytest.main([*flags, str(path)], plugins=[Work()]):
        raise sample.UserError(f"the tests of {path} cannot be run: try `pytest {path}`")


def run_tests(items, stop=False):
    """{name: "" or what went wrong, in one line} of test cases; with `stop`, up to the first that fails."""
    found = {}

    class Listen:
        def pytest_runtest_logreport(self, report):
            if not report.passed and not found[name]:
                crash, trace = (getattr(report.longrepr, part, None) for part in ("reprcrash", "reprtraceback"))
                message = crash.message.partition("\n +")[0] if crash else str(report.longrepr)
                places = [entry.reprfileloc for entry in getattr(trace, "reprentries", []) if entry.reprfileloc]
                lines = [f" ({YOURS}, line {place.lineno})" for place in places if place.path.endswith(YOURS)]
                found[name] = " ".join(message.split())[:300] + "".join(lines[-1:])

    items[0].config.pluginmanager.register(Listen())
    for item, following in zip(items, [*items[1:], None], strict=True):
        name = item.nodeid.partition("::")[2]
        found[name] = ""
        item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
        if stop and found[name]:
            break
    return found


def in_one_line(error):
    kind = "" if isinstance(error, Ungradable) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:300]


def in_a_process(work, limit):
    """(what work() returned in a forked process, what it printed last); Ungradable if it returned nothing."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)

    def child():
        os.setsid()
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 27, 1 << 27))             # bytes, of each file
        with contextlib.suppress(ValueError, OSError):              # macOS has no such limit
            resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))
        with tempfile.TemporaryFile() as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            try:
                result = dict(result=work())
            except BaseException as error:
                result = dict(error=in_one_line(error))
            with contextlib.suppress(OSError):                      # the file is full
                sys.stdout.flush()
            file.seek(max(0, file.seek(0, 2) - 200))
            theirs.send_bytes(json.dumps(result | dict(said=file.read().decode(errors="replace"))).encode())

    process = fork.Process(target=child)
    process.start()
    theirs.close()
    try:
        answer = json.loads(ours.recv_bytes()) if ours.poll(limit) else dict(error=f"took longer than {limit:g} s")
    except (EOFError, OSError, ValueError):
        answer = dict(error="ended the process, or ran out of memory")
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    if "error" in answer:
        raise Ungradable(answer["error"])
    return answer["result"], answer["said"]


# A submission ---------------------------------------------------------------------------------------------------------

def look(code):
    """(all names in a unit's code, those at which a person should look): imports, ways to files and to the interpreter,
    changes of other objects."""
    names, suspicious = set(), set()
    for node in (node for _, statement in code for node in ast.walk(statement)):
        words = {getattr(node, field, None) for field in ("id", "attr", "name")} - {None}
        if isinstance(node, ast.Import | ast.ImportFrom):
            words = {getattr(node, "module", None) or alias.name for alias in node.names}
            suspicious |= {f"import {word}" for word in words if word.partition(".")[0] not in HARMLESS}
        names |= words
        suspicious |= {word for word in words if word in LOOK or re.fullmatch("__(?!init__).*__", word)}
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            suspicious.add(f"{ast.unparse(node)} =")
    return names, [word for word in sorted(suspicious)
                   if not word.startswith("self.") and f"import {word}" not in suspicious]


def grade_unit(unit, tree, items, forbidden, limit):
    """(points, [what there is to say]) of a unit."""
    cases = tests(unit, items)

    def work():
        graft(code, unit, YOURS)
        return run_tests([items[case] for case in cases])

    try:
        code = code_of(tree, unit)
        names, suspicious = look(code)
        if used := sorted(names & set(forbidden)):
            raise Ungradable(f"uses {', '.join(used)}, which is not allowed here")
        found, said = in_a_process(work, limit)
    except (Ungradable, RecursionError) as error:
        return 0, [in_one_line(error)]
    notes = [f"{name}: {message}" for name, message in found.items() if message]
    points = round(UNITS[unit].points * (1 - len(notes) / len(cases)), 2)
    if all("NotImplementedError" in message for message in found.values()):
        notes = ["not written yet"]
    if notes and "imports" in tree.broken:
        notes.append(f"the file's imports are left out, syntax error in {tree.broken['imports']}")
    notes += [f"LOOK: {', '.join(suspicious)}"] if suspicious else []
    return points, notes + ([f"printed: {' '.join(said.split())}"] if said.strip() else [])


def write_gradescope(path, graded):
    """results.json: one test for each unit, also for those that are still to come."""
    if not path:
        return
    rows = [dict(name=f"{unit} ({UNITS[unit].paper})", score=points, max_score=UNITS[unit].points,
                 output="\n".join(notes), visibility="visible") for unit, (points, notes) in graded.items()]
    with sample.explaining(f"cannot write {path}", "name a file in a folder that exists", OSError):
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
    path, forbidden = Path(args.submission), args.forbid.replace(" ", "").split(",")
    path = path / "dit.py" if path.is_dir() else path
    graded = {unit: (0, ["not graded yet"]) for unit in chosen_units(args)}
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        tree = parse(text)
        linecache.cache[YOURS] = len(text), None, text.splitlines(keepends=True), YOURS
    except OSError as error:
        graded = dict.fromkeys(graded, (0, [f"cannot read {path.name}: {error.strerror}"]))
        write_gradescope(args.gradescope, graded)
        raise sample.UserError(f"cannot read {path} ({error.strerror}): name a dit.py, or its folder") from None
    write_gradescope(args.gradescope, graded)

    def work(items):
        for unit in graded:
            points, notes = graded[unit] = grade_unit(unit, tree, items, forbidden, args.limit)
            print(f"{unit:22}{points:6g} of {UNITS[unit].points}")
            for note in notes:
                print(textwrap.fill(note, 120, initial_indent="    ", subsequent_indent=" " * 8), flush=True)
            write_gradescope(args.gradescope, graded)
        total, most = sum(points for points, _ in graded.values()), sum(UNITS[unit].points for unit in graded)
        print(f"total{'':17}{total:6g} of {most}")

    with_tests(ROOT / "test_dit.py", work)


if __name__ == "__main__":
    sample.run(main, less_memory="grade fewer units")
