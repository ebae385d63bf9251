"""Are the tests any good? They have to fail on every known mistake, and to pass every right alternative.

    python classroom/mutants.py                                # test_dit.py on all of them: a table
    python classroom/mutants.py --units vb,guidance
    python classroom/mutants.py --tests test_mine.py --bugs 3 --seed 7       # a student's tests, see handout.py --bugs

mutants.md has the mistakes, wheats.py right alternatives: in this unit, this text becomes that one. Each is put into
dit.py in a process of its own, and the unit's tests run.
"""
import random
import re
import sys
import textwrap
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from grade import in_a_process, run_tests, with_tests
from units import REFERENCE, ROOT, UNITS, Ungradable, add_units, chosen_units, code_of, graft, in_order, mutate, parse
from units import tests as tests_of
from wheats import WHEATS

import sample

ROW = re.compile(r"\| (\w+) \| `(.+)` \| `?(.*?)`? \| (.+) \|")
MUTANTS = ROW.findall((ROOT / "classroom" / "mutants.md").read_text(encoding="utf-8"))


def add_bugs(parser):
    parser.add_argument("--bugs", type=sample.between(int, 1), help="this many mistakes, each in another unit")
    parser.add_argument("--seed", type=int, default=0, help="which mistakes")


def bugs(units, count, seed):
    """`count` mutants, each of another one of the units."""
    if count > len(units):
        raise sample.UserError(f"{count} bugs need as many units: there are only {', '.join(units)}")
    rng = random.Random(seed)
    return [rng.choice([mutant for mutant in MUTANTS if mutant[0] == unit]) for unit in rng.sample(units, count)]


def verdict(source, unit, items):
    """What the first test says that fails with the unit of this dit.py; "" if all pass."""
    def work():
        graft(code_of(parse(source), unit), unit)
        return run_tests(items, stop=True)

    try:
        found, _ = in_a_process(work, limit=120)
        return next((f"{name}: {message}" for name, message in found.items() if message), "")
    except Ungradable as error:
        return str(error)


def main(argv):
    parser = sample.Parser(prog="mutants.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add_units(parser)
    add_bugs(parser)
    parser.add_argument("--tests", help="a student's tests, to be judged instead of test_dit.py")
    args = parser.parse_args(argv)
    units = chosen_units(args) if args.units or args.core or args.extra or args.bugs else list(UNITS)
    mistakes = bugs(in_order(units), args.bugs, args.seed) if args.bugs else MUTANTS
    unchanged = [(units[0], "", "")] if args.tests else []
    lines = [line for line in [*mistakes, *unchanged, *WHEATS] if line[0] in units]
    wrong = []

    def work(items):
        for unit, old, new, *seen in lines:
            began = time.perf_counter()
            source, function = mutate(REFERENCE, unit, old, new) if old else (REFERENCE, "dit.py")
            failed = verdict(source, unit, [items[case] for case in (items if args.tests else tests_of(unit, items))])
            wrong.extend([unit] * (bool(failed) != bool(seen)))
            word = ("killed" if failed else "SURVIVES") if seen else ("REJECTED" if failed else "accepted")
            change = f"{old.strip()} -> {new.strip() or 'nothing'}" if old else "as it is"
            print(textwrap.fill(f"{word:9}{time.perf_counter() - began:5.1f} s  {function}: {change}" + "".join(
                f"  ({place})" for place in seen), 120, subsequent_indent=" " * 18), flush=True)
            if failed and (args.tests or not seen):
                print(textwrap.fill(failed, 120, initial_indent=" " * 18, subsequent_indent=" " * 18, max_lines=2))
        print(f"{len(lines) - len(wrong)} of {len(lines)} judged rightly")

    with_tests(args.tests or ROOT / "test_dit.py", work)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    sample.run(main, less_memory="judge fewer units")
