"""classroom/: hand-outs, grading, the tests' own tests, the answers, the extensions, the notebook."""
import ast
import json
import os
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT, refusal

CLASSROOM = ROOT / "classroom"
sys.path.insert(0, str(CLASSROOM))
import handout
import mutants
import units

REFERENCE = (ROOT / "dit.py").read_text()

def hand_out(*argv):
    handout.main(list(map(str, argv)))

def python(*argv, folder=ROOT, status=0):
    """What the command prints."""
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr

def with_body(source, unit, body):
    """dit.py with these statements for the unit's, which is a single function."""
    (dotted, _), = units.functions(unit)
    first, last = units.lines_of(source, dotted)
    lines = source.splitlines(keepends=True)
    indent = re.match(" *", lines[first])[0]
    lines[first:last] = [f"{indent}{line}\n" for line in body.split("\n")]
    return "".join(lines)

def scores(text):
    """{unit: (points, its notes)} of what grade.py prints."""
    rows = re.findall(r"^(?!total)(\w+) +([\d.]+) of \d+\n((?:    .*\n)*)", text, re.M)
    return {unit: (float(points), " ".join(notes.split())) for unit, points, notes in rows}


# Units and hand-outs --------------------------------------------------------------------------------------------------

def test_the_tables_name_what_exists():
    names = [node.name for node in ast.parse((ROOT / "test_dit.py").read_text()).body if isinstance(node, ast.FunctionDef)]
    for unit in units.UNITS.values():
        for words in unit.tests.split():
            assert any(name.startswith(f"test_{words.partition('[')[0]}") for name in names), words
    assert [sum(unit.points for unit in table.values()) for table in (units.CORE, units.EXTRA)] == [100, 50]
    assert len(mutants.MUTANTS) >= 100 and len(mutants.WHEATS) >= 15
    assert {line[0] for line in mutants.MUTANTS} == set(units.UNITS)
    for unit, old, new, *_ in [*mutants.MUTANTS, *mutants.WHEATS]:
        compile(units.mutate(REFERENCE, unit, old, new), "dit.py", "exec")        # it stands there once


def test_a_handout_lacks_the_bodies_and_nothing_else(tmp_path):
    """And no test in it is green that needs a unit."""
    out = tmp_path / "handout"
    hand_out(out, "--core", "--extra")
    student = (out / "dit.py").read_text()
    rest = re.sub(r' *raise NotImplementedError\("\w+"\)\n', "", student)
    lines = iter(REFERENCE.splitlines())
    assert all(line in lines for line in rest.splitlines())                       # in this order
    assert student.count("NotImplementedError") == sum(len(units.functions(unit)) for unit in units.UNITS)
    said = python("-m", "pytest", "-q", "-rA", "--tb=no", "-p", "no:cacheprovider", "test_dit.py", folder=out, status=1)
    passed = re.findall(r"^PASSED test_dit.py::(\S+)", said, re.M)
    assert passed and not [case for case in passed for unit in units.UNITS if units.tests(unit, [case])]
    assert "waits for tables" in said and "FAILED test_dit.py::test_normal_kl" in said


def test_other_handouts(tmp_path):
    hand_out(tmp_path / "one", "--units", "vb", "--with-reference")
    assert (tmp_path / "one" / "dit.py").read_text() == units.blank(REFERENCE, ["vb"])
    assert (tmp_path / "one" / "dit_reference.py").read_text() == REFERENCE
    for seed in (0, 1):
        out = tmp_path / f"bugs{seed}"
        hand_out(out, "--bugs", 3, "--seed", seed)
        pairs = zip(REFERENCE.splitlines(), (out / "dit.py").read_text().splitlines(), strict=True)
        assert sum(a != b for a, b in pairs) == 3
        assert not (out / "test_dit.py").exists() and "3 lines" in (out / "TASKS.md").read_text()
    assert "name a new folder" in refusal(handout.main, tmp_path, folder=tmp_path)
    assert "no unit 'vbb'" in refusal(handout.main, tmp_path / "x", "--units", "vbb", folder=tmp_path)


# Grading --------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_reference_gets_all_points_on_a_small_machine(tmp_path):
    """Gradescope's default has 768 MB. Only the core units are held to it."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, CLASSROOM / "grade.py", ROOT, "--gradescope", tmp_path / "results.json"])
    _, status, used = os.wait4(process.pid, 0)                      # of it and its own processes
    seconds, megabytes = time.perf_counter() - began, used.ru_maxrss / 1024
    print(f"{seconds:.0f} s, {megabytes:.0f} MB")
    assert status == 0 and seconds < 90 and megabytes < 768
    graded = json.loads((tmp_path / "results.json").read_text())["tests"]
    assert sum(row["score"] for row in graded) == 100 and [row["score"] for row in graded] == [row["max_score"] for row in graded]
    assert all(not row["output"] for row in graded) and len(graded) == len(units.CORE)


ABUSES = {  # unit: its body, the points, what is said; the syntax error is put in last
    "timestep_embedding": ("return mine(t, dim", 0, "syntax error in line"),
    "normal_kl": ("while True:\n    pass", 0, "took longer than 8 s"),
    "q_sample": ("import os\nos._exit(0)", 0, "ended the process"),
    "q_posterior": ("raise SystemExit", 0, "SystemExit"),
    "vb": ("return torch.zeros(10 ** 10)", 0, "memory"),
    "patch_embed": ("print('{\"tests\": []}' * 10 ** 6)\nreturn self.proj(x).flatten(2).transpose(1, 2)", 3, "printed"),
    "attention": ("return self.proj(mine(self.qkv(x), self.num_heads))", 7, ""),
    "unpatchify": ('return open(__file__) and torch.einsum("nhwpqc->nchpwq", x.view(-1, self.grid_size, self.grid_size, '
                   "self.patch_size, self.patch_size, self.out_channels)).reshape(-1, self.out_channels, self.input_size, "
                   "self.input_size)", 6, "LOOK: uses __file__, open"),
    "guidance": ('raise NotImplementedError("guidance")', 0, "not written yet")}
HELPERS = """
import math as m

def mine(qkv, heads):
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    return ((q @ k.mT / m.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)
"""


@pytest.mark.slow
def test_one_mistake_costs_one_unit(tmp_path):
    """Whatever it is: a loop, an exit, 40 GB, a flood of text, a syntax error, other parameters. Helpers are welcome."""
    source = REFERENCE
    for unit, (body, *_) in reversed(ABUSES.items()):
        source = with_body(source, unit, body)
    source = source.replace("def get_2d_sincos_pos_embed(dim, grid_size)", "def get_2d_sincos_pos_embed(dim, side)")
    source = source.replace("\ndef normal_kl", f"{HELPERS}\n\ndef normal_kl")
    (tmp_path / "dit.py").write_text(source)
    graded = scores(python(CLASSROOM / "grade.py", tmp_path, "--limit", 8))
    for unit in units.CORE:
        _, points, words = ABUSES.get(unit, ("", units.CORE[unit].points, ""))
        if unit == "pos_embed":
            points, words = 0, "parameters of get_2d_sincos_pos_embed have to stay (dim, grid_size), not (dim, side)"
        assert graded[unit][0] == points and words in graded[unit][1], (unit, graded[unit])
        assert words or not graded[unit][1]


def test_names_can_be_forbidden():
    text = python(CLASSROOM / "grade.py", ROOT, "--units", "attention,q_sample", "--forbid", "scaled_dot_product_attention")
    assert scores(text) == {"attention": (0, "uses scaled_dot_product_attention, which is not allowed here"),
                            "q_sample": (4, "")}
    assert "name a dit.py" in python(CLASSROOM / "grade.py", ROOT / "docs", status=2)


# The tests' own tests -------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_every_mistake_is_found_and_every_right_alternative_accepted():
    said = python(CLASSROOM / "mutants.py")
    count = len(mutants.MUTANTS) + len(mutants.WHEATS)
    assert f"{count} of {count} judged rightly" in said, said


def test_a_students_test_is_judged_by_mistakes_and_alternatives(tmp_path):
    mine = tmp_path / "test_mine.py"
    mine.write_text("import torch, dit\ndef test_kl():\n    z = torch.zeros(3)\n    assert (dit.normal_kl(z, z + 1, z, z + 1) == 0)"
                    ".all()\n")
    said = python(CLASSROOM / "mutants.py", "--tests", mine, "--units", "normal_kl", status=1)
    assert "accepted" in said and "SURVIVES" in said and "killed" not in said
    mine.write_text(mine.read_text() + "    a, b = torch.tensor([2.0]), torch.tensor([-1.0])\n    kl = torch.distributions.kl_divergence"
                    "(torch.distributions.Normal(a, (b / 2).exp()), torch.distributions.Normal(b, (a / 2).exp()))\n"
                    "    torch.testing.assert_close(dit.normal_kl(a, b, b, a), kl)\n")
    said = python(CLASSROOM / "mutants.py", "--tests", mine, "--units", "normal_kl")
    assert "accepted" in said and "killed" in said
