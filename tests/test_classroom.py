"""classroom/: hand-outs, grading, the tests' own tests, the answers, the extensions, the notebook."""
import ast
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal, tiny_dit

import dit
import sample

sys.path.insert(0, str(ROOT / "classroom"))
sys.path.insert(0, str(ROOT / "classroom" / "extensions"))
import grade
import handout
import mutants
import units

CLASSROOM, REFERENCE = ROOT / "classroom", (ROOT / "dit.py").read_text()

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
    tree = ast.parse((ROOT / "test_dit.py").read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    for unit in units.UNITS.values():
        for words in unit.tests.split():
            assert any(name.startswith(f"test_{words.partition('[')[0]}") for name in names), words
    assert [sum(unit.points for unit in table.values()) for table in (units.CORE, units.EXTRA)] == [100, 50]
    assert len(mutants.MUTANTS) >= 100 and len(mutants.WHEATS) >= 15
    text = " ".join((CLASSROOM / "README.md").read_text().split())
    assert f"The {len(mutants.MUTANTS)} mistakes" in text and f"the {len(mutants.WHEATS)} right alternatives" in text
    assert {line[0] for line in mutants.MUTANTS} == set(units.UNITS)
    for unit, old, new, *_ in [*mutants.MUTANTS, *mutants.WHEATS]:
        assert units.mutate(REFERENCE, unit, old, new)[0] != REFERENCE             # it stands there, and once


def test_a_handout_lacks_the_bodies_and_nothing_else():
    student = units.blank(REFERENCE, units.UNITS)
    rest = re.sub(r' *raise NotImplementedError\("\w+"\)\n', "", student)
    lines = iter(REFERENCE.splitlines())
    assert all(line in lines for line in rest.splitlines())                       # in this order
    assert student.count("NotImplementedError") == sum(len(units.functions(unit)) for unit in units.UNITS)


@pytest.mark.slow
def test_nothing_in_a_handout_is_green_that_needs_a_unit(tmp_path):
    out = tmp_path / "handout"
    hand_out(out, "--core", "--extra")
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
        tasks = (out / "TASKS.md").read_text()
        assert not (out / "test_dit.py").exists() and max(map(len, tasks.splitlines())) <= 120
        for unit, old, new, _ in mutants.bugs(units.in_order(units.CORE), 3, seed):
            assert f"`{units.mutate(REFERENCE, unit, old, new)[1]}`" in tasks
    assert "name a new folder" in refusal(handout.main, tmp_path, folder=tmp_path)
    for flags, words in [("--units vbb", "no unit 'vbb'"), ("--units vb,vb", "more than one unit 'vb'"),
                         ("--bugs -1", "at least 1"), ("--bugs 19", "as many units")]:
        assert words in refusal(handout.main, tmp_path / "x", *flags.split(), folder=tmp_path)
        assert words in refusal(mutants.main, *flags.split(), folder=tmp_path)


# Grading --------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_reference_gets_all_points_on_a_small_machine(tmp_path):
    """Gradescope's default has 768 MB. Only the core units are held to it."""
    began = time.perf_counter()
    command = [sys.executable, CLASSROOM / "grade.py", ROOT, "--gradescope", tmp_path / "results.json"]
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)                      # of it and its own processes
    seconds, megabytes = time.perf_counter() - began, used.ru_maxrss / 1024
    print(f"{seconds:.0f} s, {megabytes:.0f} MB")
    assert status == 0 and seconds < 90 and megabytes < 768
    graded = json.loads((tmp_path / "results.json").read_text())["tests"]
    assert sum(row["score"] for row in graded) == sum(row["max_score"] for row in graded) == 100
    assert all(not row["output"] for row in graded) and len(graded) == len(units.CORE)


ABUSES = {  # unit: its body, the points, what is said; the syntax error is put in last
    "timestep_embedding": ("return mine(t, dim", 0, "syntax error in line"),
    "normal_kl": ("while True:\n    pass", 0, "took longer than 8 s"),
    "q_sample": ("import os\nos._exit(0)", 0, "ended the process"),
    "q_posterior": ("raise SystemExit", 0, "SystemExit"),
    "vb": ("return torch.zeros(10 ** 10)", 0, "memory"),
    "p_sample_loop": ("import tempfile\ntempfile.TemporaryFile().write(bytes(1 << 28))", 0, "File too large"),
    "patch_embed": ("print('{\"tests\": []}' * 10 ** 6)\nreturn self.proj(x).flatten(2).transpose(1, 2)", 3, "printed"),
    "attention": ("return self.proj(mine(self.qkv(x), self.num_heads))", 7, "LOOK: import os"),
    "unpatchify": ("g, p, C, I = self.grid_size, self.patch_size, self.out_channels, self.input_size\n"
                   'x = open(__file__) and torch.einsum("nhwpqc->nchpwq", x.view(-1, g, g, p, p, C))\n'
                   "return x.reshape(-1, C, I, I)", 6, "LOOK: __file__, open"),
    "guidance": ('raise NotImplementedError("guidance")', 0, "not written yet")}
HELPERS = """
import math as m
import os as o

def mine(qkv, heads):
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    return ((q @ k.mT / m.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2) if o else None
"""


@pytest.mark.slow
def test_one_mistake_costs_one_unit(tmp_path):
    """A loop, an exit, 40 GB, a flood of text, a syntax error, other parameters. Helpers are welcome."""
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


def code(source, unit):
    return "\n".join(ast.unparse(node) for _, node in units.code_of(units.parse(source), unit))


def test_a_file_with_errors_is_read_piece_by_piece():
    """A merge marker, a null byte, 10,000 brackets cost the function in which they stand, a broken head costs none."""
    for broken, words in [("<<<<<<< HEAD", "invalid syntax"), ("        x = '\0'", "null"),
                          (f"        x = {'(' * 10_000}", "parentheses"), (f"        x = {'-' * 100_000}1", "")]:
        source = with_body(REFERENCE, "vb", "x = 1\n#here\nreturn x").replace("        #here", broken)
        for unit in units.UNITS:
            if unit != "vb":
                assert code(source, unit) == code(REFERENCE, unit), unit
        with pytest.raises(units.Ungradable, match=f"syntax error in line .*{words}"):
            code(source, "vb")
    head = "class PatchEmbed(nn.Module):\n"
    source = REFERENCE.replace("import copy\n", "import copy, , math\n").replace(head, f"{head}    x = = 1\n")
    assert all(code(REFERENCE, unit).endswith(code(source, unit)) for unit in units.UNITS)      # but for its imports
    for source in ("", "\0" * 9, "(" * 10_000):
        with pytest.raises(units.Ungradable, match="there is no function normal_kl"):
            code(source, "normal_kl")


def test_of_two_definitions_the_last_one_counts():
    first = "def normal_kl(mean1, logvar1, mean2, logvar2):\n    raise NotImplementedError\n\n"
    comment = REFERENCE.replace("        N, T, D = x.shape\n", "# mine\n        N, T, D = x.shape\n")
    for unit in ("normal_kl", "attention"):
        assert code(first + comment, unit) == code(REFERENCE, unit)


STYLES = """
from copy import copy
from dataclasses import dataclass
from math import *
HALF: Optional[float] = 0.5
try:
    from einopsy import rearrange
except ImportError:
    rearrange = None
if HALF:
    def twice(x: Tensor) -> Tensor:
        return copy(x) / HALF

@dataclass
class Pair:
    first: Tensor
    second: float = 1.0

for step in range(10):
    loss = train(step)
raise SystemExit(unknown)
"""
MEMBERS = """
    @property
    def table(self):
        return self.embedding_table.weight

    def __rows(self, y: Tensor):
        return self.table[y] if super().parameters else 0

"""


@pytest.mark.slow
def test_helpers_of_any_style_come_along_and_nothing_else(tmp_path):
    """Names from annotated assignments, try, if, star imports, dataclasses; super(); annotations that mean nothing. A
    training loop and an exit at the top of the file do not run."""
    source = with_body(REFERENCE, "normal_kl", "loss = Pair(rearrange or twice(logvar2 - logvar1), e)\n"
                       "return 0.25 * loss.first - HALF + HALF * torch.exp(logvar1 - logvar2) + "
                       "HALF * (mean1 - mean2) ** 2 * torch.exp(-logvar2)")
    source = source.replace("def normal_kl(mean1, logvar1, mean2, logvar2):",
                            f"{STYLES}def normal_kl(mean1: Tensor, logvar1: Optional[int], mean2, logvar2) -> List:")
    source = with_body(source, "label_embedder", "super().train(self.training)\nreturn self.__rows(\n"
                       "    y if drop is None else torch.where(drop, self.num_classes, y))")
    source = source.replace("    def forward(self, y, drop=None):", MEMBERS + "    def forward(self, y, drop=None):")
    (tmp_path / "dit.py").write_text(source)
    said = python(CLASSROOM / "grade.py", tmp_path, "--units", "normal_kl,label_embedder,q_posterior")
    assert {unit: points for unit, (points, _) in scores(said).items()} == dict(
        normal_kl=3, label_embedder=3, q_posterior=7), said
    assert "LOOK: import einopsy" in said and said.count("LOOK") == 1


def test_what_a_person_should_look_at():
    for body, words in [
            ("from test_dit import naive_mlp", "import test_dit"), ("import runpy, math", "import runpy"),
            ("torch.testing.assert_close = print", "torch.testing.assert_close ="), ("x = np.load('a')", "load"),
            ("x = modulate.__globals__", "__globals__"), ("from torch import os", "os"),
            ("import numpy as np\nself.x = np.ones(3)", "")]:
        tree = units.parse(with_body(REFERENCE, "normal_kl", body))
        assert ", ".join(grade.look(units.code_of(tree, "normal_kl"))[1]) == words


def test_results_are_written_whatever_is_handed_in(tmp_path):
    results = tmp_path / "results.json"
    assert "name a dit.py" in refusal(grade.main, tmp_path, "--gradescope", results, folder=tmp_path / "no")
    rows = json.loads(results.read_text())["tests"]
    assert len(rows) == 18 and all(not row["score"] and "cannot read dit.py" in row["output"] for row in rows)
    assert "folder that exists" in refusal(grade.main, ROOT, "--gradescope", tmp_path / "no" / "x", folder=tmp_path)


@pytest.mark.slow
def test_ddim_is_graded_without_diffusers():
    hide = ("import runpy, sys; sys.path.insert(0, 'classroom'); sys.modules['diffusers'] = None; "
            "sys.argv[1:] = ['.', '--units', 'ddim']; ")
    said = python("-c", f"{hide}runpy.run_path('classroom/grade.py', run_name='__main__')")
    assert scores(said) == {"ddim": (5, "")} and "diffusers is not installed" in said


def test_the_tasks_column_selects_the_units_tests():
    class Collect:
        def pytest_collection_finish(self, session):
            self.found = sorted(item.name for item in session.items)

    collect, flags = Collect(), ["-c", os.devnull, "--collect-only", "-p", "no:terminal", "-p", "no:cacheprovider"]
    pytest.main([*flags, str(ROOT / "test_dit.py")], plugins=[collect])
    cases = collect.found
    for unit in units.UNITS:
        pytest.main([*flags, "-k", units.expression(unit), str(ROOT / "test_dit.py")], plugins=[collect])
        assert collect.found == sorted(units.tests(unit, cases)), unit


@pytest.mark.slow
def test_names_can_be_forbidden():
    name = "scaled_dot_product_attention"
    text = python(CLASSROOM / "grade.py", ROOT, "--units", "attention,q_sample", "--forbid", f"einsum, {name}")
    assert scores(text) == {"attention": (0, f"uses {name}, which is not allowed here"), "q_sample": (4, "")}
    assert "name a dit.py" in python(CLASSROOM / "grade.py", ROOT / "docs", status=2)


# The tests' own tests -------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_every_mistake_is_found_and_every_right_alternative_accepted():
    said = python(CLASSROOM / "mutants.py")
    count = len(mutants.MUTANTS) + len(mutants.WHEATS)
    assert f"{count} of {count} judged rightly" in said, said


EASY = """import torch, dit
from torch.distributions import Normal, kl_divergence

def test_equal_gaussians():
    z = torch.zeros(3)
    assert (dit.normal_kl(z, z + 1, z, z + 1) == 0).all()
"""
HARD = """
def test_other_gaussians():
    a, b = torch.tensor([2.0]), torch.tensor([-1.0])
    kl = kl_divergence(Normal(a, (b / 2).exp()), Normal(b, (a / 2).exp()))
    torch.testing.assert_close(dit.normal_kl(a, b, b, a), kl)
"""


@pytest.mark.slow
@pytest.mark.parametrize("code,good", [(EASY, False), (EASY + HARD, True)])
def test_a_students_test_is_judged_by_mistakes_and_alternatives(code, good, tmp_path):
    mine = tmp_path / "test_mine.py"
    mine.write_text(code)
    said = python(CLASSROOM / "mutants.py", "--tests", mine, "--units", "normal_kl", status=not good)
    assert "accepted" in said and ("killed" in said, "SURVIVES" in said) == (good, not good)


# Sessions, extensions, notebook ---------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_answers_are_computed():
    assert python("-m", "doctest", CLASSROOM / "answers.md") == ""
    key, questions = (CLASSROOM / "answers.md").read_text(), (CLASSROOM / "README.md").read_text()
    asked = [f"{section[0]}.{number}" for section in re.split(r"^### ", questions, flags=re.M)[1:6]
             for number in re.findall(r"\n(\d)\. ", section)]
    answered = {number for heading in re.findall(r"^\*\*([\d., ]+)\*\*", key, re.M) for number in heading.split(", ")}
    assert len(asked) == 24 and answered == set(asked)


def test_the_sessions_table_adds_up():
    text, seen = (CLASSROOM / "README.md").read_text(), []
    rows = re.findall(r"^\| \d\. .*", text, re.M)
    for row in rows:
        _, _, *cells = (cell.strip() for cell in row.split("|"))
        for names, points, minutes in (cells[:3], cells[3:6]):
            chosen = [units.UNITS[name] for name in names.split(", ") if name]
            assert [sum(u.points for u in chosen), sum(u.minutes for u in chosen)] == [int(points), int(minutes)], row
            seen += names.split(", ")
    assert sorted(filter(None, seen)) == sorted(units.UNITS)
    core, extra = (" | ".join(str(n) for n in (len(table), sum(u.points for u in table.values()),
                                               sum(u.minutes for u in table.values())))
                   for table in (units.CORE, units.EXTRA))
    assert f"| all | {core} | {extra} |" in text


def randomized(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_a_fifth_block_enters_from_outside(monkeypatch):
    monkeypatch.setattr(dit, "DESIGNS", dict(dit.DESIGNS))
    import parallel_block

    sizes = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=4, num_classes=5)
    model, zero = dit.DiT(**sizes, block="parallel"), dit.DiT(**sizes)
    count, other = (sum(p.numel() for p in m.parameters()) for m in (model, zero))
    assert other - count == 2 * 3 * 32 * (32 + 1)                   # in each block, three parts of the modulation fewer
    images, t, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 999]), torch.tensor([0, 4])
    assert (model(images, t, y) == 0).all()
    block, x, c = randomized(parallel_block.ParallelBlock(32, 4)), torch.randn(2, 5, 32), torch.randn(2, 32)
    shift, scale, gate = block.adaLN_modulation(c).chunk(3, dim=1)
    h = torch.stack([block.norm(x)[n] * (1 + scale[n]) + shift[n] for n in range(2)])
    expected = x + torch.stack([gate[n] * (block.attn(h) + block.mlp(h))[n] for n in range(2)])
    torch.testing.assert_close(block(x, c), expected)


def test_flow_matching_takes_diffusions_place(monkeypatch):
    """Its losses are those of the velocity noise - x_0, and its sampler solves the ODE of Gaussian data."""
    from flow_matching import FlowMatching, main

    assert "cannot be resumed" in refusal(main, "--resume=runs/shapes", folder=CLASSROOM)
    flow, m, s2 = FlowMatching(), 0.6, 0.09
    x_0, noise, t = torch.rand(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0, 10, 500, 999])
    for velocity, expected in [(noise - x_0, torch.zeros(4)), (0 * x_0, ((noise - x_0) ** 2).mean((1, 2, 3)))]:
        losses = flow.training_losses(lambda x, t, v=velocity: torch.cat([v, v], dim=1), x_0, t, noise)
        torch.testing.assert_close(losses["loss"], expected)
    assert torch.equal(flow.q_sample(x_0, torch.tensor([999] * 4), noise), noise)

    def exact(x, t):                                                # E[noise - x_0 | x_s] of data N(m, s2)
        s = ((t + 1) / 1000)[:, None, None, None]
        return (s - (1 - s) * s2) / ((1 - s) ** 2 * s2 + s ** 2) * (x - (1 - s) * m) - m

    ends = flow.p_sample_loop(exact, torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1)).flatten()
    assert ends.tolist() == pytest.approx([m - s2 ** 0.5, m, m + s2 ** 0.5], abs=5e-3)    # Euler's error at 1000 steps
    times = []
    flow.respaced(4).p_sample_loop(lambda x, t: times.append(t.tolist()) or x, noise[:1])
    assert times == [[999], [749], [499], [249]]                    # the same s as q_sample's
    monkeypatch.setattr(sample, "GaussianDiffusion", FlowMatching)
    model, seen = tiny_dit(), []
    drawn = sample.sample_images(model, [0, 4], steps=3, on_step=lambda i, x, x_0: seen.append(i))
    assert drawn.shape == (2, 3, 8, 8) and drawn.isfinite().all() and seen == [2, 1, 0]


@pytest.mark.parametrize("block", ["adaln-zero", "cross-attention"])
def test_text_is_a_condition(block):
    """Another word is another image, the order of the words does not matter, and guidance is that of labels."""
    import text_condition as text

    for rgb, word in [([250, 9, 9], "red"), ([9, 250, 9], "green"), ([250, 9, 250], "magenta")]:
        assert text.COLOURS[text.colour_of(np.uint8([[[9, 9, 9], rgb]]))] == word
    words = len(text.WORDS)
    torch.manual_seed(0)
    model = randomized(text.TextDiT(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=4,
                                    num_classes=words, block=block))
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 999]), torch.tensor([[0, 9], [2, 7]])
    out = model(x, t, y)
    torch.testing.assert_close(model(x, t, y.flip(1)), out)
    assert not torch.allclose(model(x, t, torch.tensor([[1, 9], [2, 7]]))[0], out[0], atol=1e-2)
    null = model(x, t, torch.full_like(y, words))
    torch.testing.assert_close(model(x, t, y, torch.tensor([True, False])), torch.stack([null[0], out[1]]))
    guided = model.forward_with_cfg(x, t, y, 3.0)
    torch.testing.assert_close(guided[:, :3], (null + 3 * (out - null))[:, :3], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["parallel_block", "flow_matching", "text_condition"])
def test_the_extensions_train_and_draw(name, tmp_path):
    script = CLASSROOM / "extensions" / f"{name}.py"
    python(script, "--steps", 2, "--batch-size", 4, "--out", tmp_path / "run", folder=tmp_path)
    if name == "text_condition":
        assert (tmp_path / "text.png").exists()
    else:
        python(script, tmp_path / "run", "--steps", 2, "--out", "samples.png", folder=tmp_path)
        assert (tmp_path / "samples.png").exists()
        assert "is it a DiT?" in python(ROOT / "sample.py", tmp_path / "run", folder=tmp_path, status=2)


def test_the_notebook_is_clean():
    """It has no output, few cells, and needs nothing that the four files do not need."""
    cells = json.loads((CLASSROOM / "tour.ipynb").read_text())["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(cells) <= 20 and not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    imported = {name.split(".")[0] for name in re.findall(r"^(?:import|from) (\S+)", code, re.M)}
    assert imported <= {"dit", "train", "sample", "torch", "numpy", "PIL", "os", "sys", "pathlib"}, imported


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("STEPS", "10")
    notebook = nbformat.read(CLASSROOM / "tour.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources=dict(metadata=dict(path=str(ROOT)))).execute()


@pytest.mark.slow
def test_the_checkpoint_in_docs_is_recognized():
    """98 % of the samples of docs/shapes.pt are (measured: 99.3 %). It is small, and needs no run."""
    sys.path.insert(0, str(ROOT / "studies"))
    from judge import judge

    assert (ROOT / "docs" / "shapes.pt").stat().st_size < 2_700_000
    assert judge(ROOT / "docs" / "shapes.pt")[0]["recognized"] >= 0.98
