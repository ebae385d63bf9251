"""Write the students' folder: dit.py with the bodies of some units left to write, its tests, and TASKS.md.

    python classroom/handout.py OUT                                  # the core units; --core --extra: all
    python classroom/handout.py OUT --units attention,adaln_zero --with-reference            # the solution beside it
    python classroom/handout.py OUT --bugs 3 --seed 7                # "find the bug": three lines are wrong, no tests

In OUT, `pytest` runs the tests in the paper's order. A test that waits for another unit is skipped with its name.
"""
import pprint
import shutil
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mutants import add_bugs, bugs
from units import REFERENCE, ROOT, UNITS, add_units, blank, chosen_units, expression, functions, in_order, mutate

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


def table(units):
    """The table of TASKS.md: a row for each unit, and the hints below it."""
    rows = []
    for name in units:
        unit, code = UNITS[name], ", ".join(f"`{dotted}`" for dotted, _ in functions(name))
        rows.append(f"| {name} | {unit.points} | {unit.minutes} | {unit.paper} | {code} | `{expression(name)}` |")
    points, minutes = (sum(getattr(UNITS[name], what) for name in units) for what in ("points", "minutes"))
    rows.append(f"| {len(units)} units | {points} | {minutes} | | | |\n")
    return "\n".join(rows + [f"- **{name}**: {UNITS[name].hint}" for name in units if UNITS[name].hint])


def main(argv):
    parser = sample.Parser(prog="handout.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("out", help="a folder that does not exist yet")
    add_units(parser)
    add_bugs(parser)
    parser.add_argument("--with-reference", action="store_true", help="also the solution, as dit_reference.py")
    args = parser.parse_args(argv)
    units, out, source, wrong = in_order(chosen_units(args)), Path(args.out), REFERENCE, []
    for unit, old, new, _ in bugs(units, args.bugs or 0, args.seed):
        source, function = mutate(source, unit, old, new)
        wrong.append(f"`{function}`")
    if out.exists():
        raise sample.UserError(f"{out} exists: name a new folder")

    out.mkdir(parents=True)
    for name in ["train.py", "sample.py", "LICENSE"] + ["test_dit.py"] * (not args.bugs):
        shutil.copy(ROOT / name, out)
    if not args.bugs:
        source, proofs = blank(source, units), {unit: UNITS[unit].tests.split() for unit in units}
        (out / "conftest.py").write_text(CONFTEST.replace("UNITS", pprint.pformat(proofs, width=120, sort_dicts=False)))
    template = (ROOT / "classroom" / ("BUGS.md" if args.bugs else "TASKS.md")).read_text()
    wrong = textwrap.fill(f"Each of these functions of dit.py has one wrong line: {', '.join(wrong)}.", 120)
    (out / "TASKS.md").write_text(template.format(
        functions=wrong, table=table(units), example=expression(units[0])))
    (out / "dit.py").write_text(source)
    if args.with_reference:
        shutil.copy(ROOT / "dit.py", out / "dit_reference.py")
    print(f"{out}: a dit.py with {args.bugs or len(units)} {'bugs' if args.bugs else 'units to write'}, and TASKS.md")


if __name__ == "__main__":
    sample.run(main, less_memory="close other programs")
