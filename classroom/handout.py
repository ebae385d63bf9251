"""Write the students' folder: dit.py with the bodies of some units left to write, its tests, and TASKS.md.

    python classroom/handout.py OUT                                  # the core units; --core --extra: all
    python classroom/handout.py OUT --units attention,adaln_zero
    python classroom/handout.py OUT --extra --with-reference         # for self-study: the solution lies beside it
    python classroom/handout.py OUT --bugs 3 --seed 7                # "find the bug": three lines are wrong, no tests

In OUT, `pytest` runs the tests in the paper's order. A test that waits for another unit is skipped with its name.
"""
import ast
import pprint
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mutants import bugs
from units import ROOT, UNITS, add_units, blank, chosen_units, functions, in_order, mutate

import sample

CONFTEST = '''"""Skips a test that waits for a unit which it does not prove."""
import pytest

TESTS = UNITS


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except NotImplementedError as error:
        name, _, case = item.name.removeprefix("test_").partition("[")
        proofs = [words.partition("[") for words in TESTS.get(str(error), [name])]
        if not any(name.startswith(words) and case.startswith(which) for words, _, which in proofs):
            pytest.skip(f"waits for {error}")
        raise
'''
TASKS = """# Write dit.py

Read the paper with dit.py beside it. Each unit below is one function of dit.py, or a few, that
`raise NotImplementedError`. Its docstring, the shapes in the margin and the paper say what to write. Only these bodies
are graded: leave their parameters, and everything else, as it is. Helpers of your own are welcome.

    pip install {packages}
    pytest                       # red: the unit is next, or wrong; skipped: waits for the unit named
    pytest -k attention          # the tests with that word

Work from the top: a unit needs only those above it. Each unit is graded alone, with everything else right.

| unit | points | minutes | paper | functions in dit.py | tests |
|---|--:|--:|---|---|---|
{rows}
| {count} units | {points} | {minutes} | | | |
{hints}"""
BUGS = """# Find the bugs

{count} lines of dit.py are wrong, each in another function of these: {names}. Read the file beside the paper. Then hand
in test_mine.py: pytest tests that fail with this dit.py and pass with a right one, however it is written. A test
compares a function with something that shares no code with it: a formula by hand, torch.distributions, a special case.

    pip install {packages}
    pytest test_mine.py
"""


def tasks(units, packages):
    """The text of TASKS.md."""
    rows, chosen = [], [UNITS[unit] for unit in units]
    for name, unit in zip(units, chosen, strict=True):
        code = ", ".join(f"`{dotted}`" for dotted, _ in functions(name))
        rows.append(f"| {name} | {unit.points} | {unit.minutes} | {unit.paper} | {code} | "
                    f"{', '.join(unit.tests.split())} |")
    hints = [f"- **{name}**: {UNITS[name].hint}" for name in units if UNITS[name].hint]
    return TASKS.format(
        packages=packages, rows="\n".join(rows), count=len(units), points=sum(unit.points for unit in chosen),
        minutes=sum(unit.minutes for unit in chosen), hints="\n".join(["", *hints, ""] if hints else []))


def main(argv):
    parser = sample.Parser(prog="handout.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("out", help="a folder that does not exist yet")
    add_units(parser)
    parser.add_argument("--bugs", type=sample.between(int, 1, 11), help="wrong lines instead of units to write")
    parser.add_argument("--seed", type=int, default=0, help="which wrong lines")
    parser.add_argument("--with-reference", action="store_true", help="also the solution, as dit_reference.py")
    args = parser.parse_args(argv)
    units, out, source = in_order(chosen_units(args)), Path(args.out), (ROOT / "dit.py").read_text()
    dependencies = re.search(r"\ndependencies = (\[.*\])", (ROOT / "pyproject.toml").read_text())[1]
    packages = " ".join(re.split("[>=]", name)[0] for name in [*ast.literal_eval(dependencies), "pytest"])
    if out.exists():
        raise sample.UserError(f"{out} exists: name a new folder")

    out.mkdir(parents=True)
    names = ["train.py", "sample.py", "LICENSE"] + ["test_dit.py"] * (not args.bugs)
    for name in names:
        shutil.copy(ROOT / name, out)
    if args.bugs:
        for unit, old, new, _ in bugs(units, args.bugs, args.seed):
            source = mutate(source, unit, old, new)
        text = BUGS.format(count=args.bugs, packages=packages, names=", ".join(units))
    else:
        source, text = blank(source, units), tasks(units, packages)
        (out / "conftest.py").write_text(CONFTEST.replace("UNITS", pprint.pformat(
            {unit: UNITS[unit].tests.split() for unit in units}, width=120, sort_dicts=False)))
    (out / "dit.py").write_text(source)
    (out / "TASKS.md").write_text(text)
    if args.with_reference:
        shutil.copy(ROOT / "dit.py", out / "dit_reference.py")
    what = f"{args.bugs} bugs" if args.bugs else f"{len(units)} units to write"
    print(f"{out}: dit.py with {what}; begin with {out / 'TASKS.md'}")


if __name__ == "__main__":
    sample.run(main, less_memory="close other programs")
