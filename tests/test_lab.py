"""studies/: what the studies change in a model is what they say, their runs are train.py's, and their scripts run."""
import csv
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal
from PIL import Image

import sample
import train
from dit import AdaLNBlock, DiT

sys.path.insert(0, str(ROOT / "studies"))
import averages  # noqa: E402
import judge  # noqa: E402
import lab  # noqa: E402
import plot  # noqa: E402
import samples  # noqa: E402
import zero_start  # noqa: E402


class Just:
    """A Training that has a model and nothing else."""
    def __init__(self, block):
        torch.manual_seed(0)
        self.model = DiT(input_size=8, patch_size=4, in_channels=3, hidden_size=32, depth=2, num_heads=4, block=block)


@pytest.mark.parametrize("block", ["in-context", "cross-attention", "adaln"])
def test_branches_that_start_at_zero_leave_the_tokens_as_they_are(block):
    training = Just(block)
    x, c = training.model.condition(torch.randn(2, 4, 32), torch.randn(2, 32), torch.randn(2, 32))
    assert not torch.equal(training.model.blocks[1](x, c), x)
    zeros = zero_weights(training.model)
    zero_start.alter(training, None, dict(block=block, start=zero_start.BRANCHES))
    assert torch.equal(training.model.blocks[1](x, c), x)
    branches = ["attn.proj", "mlp.fc2"] + ["cross_attn.proj"] * (block == "cross-attention")
    expected = {f"blocks.{k}.{branch}.weight" for k in (0, 1) for branch in branches}
    assert zero_weights(training.model) - zeros == expected


def zero_weights(model):
    return {name for name, parameter in model.named_parameters() if not parameter.any()}


def test_gates_at_one_are_plain_adaln_whose_modulation_starts_at_zero():
    x, c = torch.randn(2, 4, 32), torch.randn(2, 32)
    gated, plain = Just("adaln-zero"), Just("adaln")
    zero_start.alter(gated, None, dict(block="adaln-zero", start=zero_start.GATES))
    zero_start.alter(plain, None, dict(block="adaln", start=zero_start.MODULATION))
    weights = {name: value for name, value in gated.model.blocks[0].state_dict().items() if "adaLN" not in name}
    plain.model.blocks[0].load_state_dict(weights, strict=False)
    assert isinstance(plain.model.blocks[0], AdaLNBlock)
    torch.testing.assert_close(gated.model.blocks[0](x, c), plain.model.blocks[0](x, c))


def checkpoint(run, alter=None, **about):
    """What lab.train_run leaves of a run with the tests' flags."""
    settings = vars(train.parse_args(run.argv()[1]))
    validation = torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long)
    lab.train_run(about, settings, alter, run.folder / "study.pt", validation)
    return torch.load(run.folder / "study.pt")


def test_a_run_is_the_run_of_train_py(run):
    """Its averaged weights are those of train.py with the same settings, to the bit."""
    ours, theirs = checkpoint(run, block="adaln", seed=1), run("--block adaln --seed 1").state
    assert all(torch.equal(ours["ema"][name], value) for name, value in theirs["ema"].items())
    assert ours["model_args"] == theirs["model_args"] and ours["step"] == theirs["step"] == 6


def test_the_averages_by_hand(run):
    """After one step, of a weight that starts at zero: 1 - decay of the new weight. The warm-up's decay is 2 / 11."""
    weight = {}
    for average, decay in [("none", 0.0), ("warm-up", 0.75), ("constant", 0.75)]:
        ema = checkpoint(run, averages.alter, average=average, ema_decay=decay, steps=1)["ema"]
        weight[average] = ema["final_layer.linear.weight"]
    torch.testing.assert_close(weight["constant"], 0.25 * weight["none"])
    torch.testing.assert_close(weight["warm-up"], 9 / 11 * weight["none"])

    def start_at_one(training, runtime, run):
        torch.nn.init.ones_(training.model.final_layer.linear.bias)

    bias = checkpoint(run, start_at_one, steps=1)["ema"]["final_layer.linear.bias"]
    assert (bias - 1).abs().max() < 0.01                            # the average starts where the weights do


def test_the_best_rate_and_the_common_one_are_repeated(monkeypatch):
    asked, best = [], dict(a=4e-3, b=lab.COMMON)

    def study(name, runs, args):
        asked.append([(run["block"], run["lr"], run["seed"]) for run in runs])
        return [run | dict(step=step, mse=abs(run["lr"] - best[run["block"]]) / step)
                for run in runs for step in (1, 2)]

    monkeypatch.setattr(lab, "study", study)
    at_best, common, _ = lab.sweep("x", [dict(block="a"), dict(block="b")], SimpleNamespace(steps=2, seeds=2))
    assert sorted(asked[1]) == [("a", lab.COMMON, 1), ("a", 4e-3, 1), ("b", lab.COMMON, 1)]
    assert {(row["lr"], row["mse"]) for row in at_best["a",]} == {(4e-3, 0)} and len(common["a",]) == 4


def test_a_table_keeps_what_it_is_given(tmp_path):
    rows = [dict(start="gamma, beta at 0", lr=1e-05, seed=2, mse=float("inf")),
            dict(start="none", lr=0.1, seed=3, mse=0.1)]
    lab.Table(tmp_path / "t.csv").add(rows, dict(start="other"))
    assert lab.Table(tmp_path / "t.csv").rows == rows
    lab.Table(tmp_path / "t.csv").add([rows[0] | dict(mse=1.5)], dict(seed=2))
    assert [row["mse"] for row in lab.Table(tmp_path / "t.csv").rows] == [0.1, 1.5]


def test_two_tables_of_one_file_lose_no_rows(tmp_path):
    one, other = (lab.Table(tmp_path / "t.csv") for _ in range(2))
    one.add([dict(seed=0, mse=1.0)], dict(seed=0))
    other.add([dict(seed=1, mse=2.0)], dict(seed=1))
    assert [row["mse"] for row in lab.Table(tmp_path / "t.csv").rows] == [1.0, 2.0]


def test_what_is_missing_is_made_again(tmp_path, monkeypatch):
    """A run's errors, if their file is gone; a checkpoint, if it is needed and only one of other --steps is there."""
    done = []

    def side_by_side(work, jobs, processes, name):
        for run, _, _, path, _ in jobs:
            done.append(run["seed"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            yield (run,), ([run | dict(step=args.steps, mse=len(done))], np.zeros(4, dtype=np.float32))

    monkeypatch.setattr(lab, "side_by_side", side_by_side)
    monkeypatch.setattr(lab.plot, "axes", lambda columns: None)
    args = SimpleNamespace(docs=tmp_path, out=tmp_path, steps=3, images=4, processes=1)
    runs = [dict(lr=1.0, seed=seed) for seed in range(2)]
    assert [row["mse"] for row in lab.study("x", runs, args)] == [1, 2]
    assert lab.study("x", runs, args) and done == [0, 1]
    (tmp_path / "x.npz").unlink()
    assert [row["mse"] for row in lab.study("x", runs, args)] == [3, 4]
    lab.checkpoint("x", runs[1], args).rename(lab.checkpoint("x", runs[1], SimpleNamespace(out=tmp_path, steps=2)))
    assert [row["mse"] for row in lab.study("x", runs, args, keep=True)] == [3, 4] and done == [0, 1, 0, 1, 1]


def test_rows_of_other_settings_are_not_mixed(tmp_path):
    lab.Table(tmp_path / "x.csv").add([dict(lr=1.0, step=3, steps=3, images=8, data="shapes")], {})
    args = SimpleNamespace(docs=tmp_path, out=tmp_path, steps=3, images=16, processes=1)
    with pytest.raises(train.UserError, match="name another --docs"):
        lab.study("x", [dict(lr=1.0)], args)


def test_a_claim_needs_all_seeds_and_twice_their_range(capsys):
    def rows(*losses):
        return [dict(seed=seed, lr=1.0, step=1, mse=loss) for seed, loss in enumerate(losses)]

    groups = {("a",): rows(1.0, 1.1, 1.05), ("b",): rows(1.3, 1.4, 1.35), ("c",): rows(1.1, 1.4, 1.2),
              ("d",): rows(1.15, 1.24, 1.2)}
    errors = {lab.key(row): np.array([row["mse"]] * 2) for rows in groups.values() for row in rows}
    errors["seed=0,lr=1.0,step=1,mse=1.0"] += [-0.6, 0.6]       # so the gap's mean over the seeds is 0.5 and 0.1
    lab.report("title", groups, errors=errors)
    said = capsys.readouterr().out
    assert "a is better than b by 0.30000 +- 0.20000, 22%" in said
    assert said.count("better") == 1
    lab.report("title", {kind: rows[:2] for kind, rows in groups.items()})
    assert "better" not in capsys.readouterr().out                  # two seeds are too few


def test_logs_are_smoothed_and_paired(run, tmp_path, capsys):
    assert np.allclose(plot.smooth(np.arange(100.0)), np.arange(100))             # a line stays a line, to its ends
    noise = np.random.default_rng(0).standard_normal(3000)
    assert plot.smooth(noise)[100:-100].std() == pytest.approx(201 ** -0.5, rel=0.3)
    one, other, unlike = (run(f"--seed {seed} --block {block}").out for seed, block in
                          [(0, "adaln"), (0, "adaln-zero"), (1, "adaln")])
    assert plot.paired([one, other]) and not plot.paired([one, unlike])
    pytest.importorskip("matplotlib")
    plot.main([*map(str, (one, other, unlike)), "--out", str(tmp_path / "plot.png")])
    assert Image.open(tmp_path / "plot.png").width > 1000                         # two halves: losses and differences
    assert "has no speed: it has step, loss" in refusal(plot.main, one, "--column speed")
    assert "is no run" in refusal(plot.main, tmp_path)


def test_samples_are_scored_and_drawn(tmp_path, monkeypatch):
    """The judge here only sees that the images are those of sample.py; parts of 250 do not change them."""
    pytest.importorskip("matplotlib")
    seen = []

    class Judge:
        def score(self, images, labels):
            seen.append(images)
            return dict(recognized=0.5, low=0.4, high=0.7, kid=-1.0, kid_error=2.0)

    monkeypatch.setattr(samples, "trained_judge", Judge)
    about = dict(model="W/8", mmacs=2.0, sampler="ddim", steps=2, cfg_scale=1.5)
    row = samples.score(about, ROOT / "docs" / "shapes.pt", 260)
    model, _ = sample.load_model(ROOT / "docs" / "shapes.pt")
    whole = sample.sample_images(model, torch.arange(260) % 10, steps=2, sampler="ddim", cfg_scale=1.5)
    assert (seen[0].int() - sample.to_uint8(whole).int()).abs().max() <= 1
    assert row["kid"] == -1 and row["steps"] == 2
    np.testing.assert_allclose(samples.errors([row], "recognized"), [[0.1], [0.2]])
    low, high = judge.wilson(500, 500)
    assert (samples.errors([dict(recognized=1.0, low=low, high=high)], "recognized") >= 0).all()
    for draw in (samples.draw_steps, samples.draw_guidance):
        draw([row, row | dict(steps=4, cfg_scale=2.0)], tmp_path / "x.png")
        assert Image.open(tmp_path / "x.png").width > 1000


def test_a_process_that_was_killed_ends_a_study_in_one_line():
    with pytest.raises(train.UserError, match="use --processes 1"):
        list(lab.side_by_side(os._exit, [(9,)], 1, "x"))


@pytest.fixture(scope="module")
def rows_so_far(tmp_path_factory):
    return tmp_path_factory.mktemp("studies")


@pytest.mark.slow
@pytest.mark.parametrize("script,last", [("designs", 4), ("zero_start", 5), ("averages", 4), ("sizes", 6),
                                         ("reference", 1)])
def test_a_study_runs_and_is_not_repeated(script, last, rows_so_far, tmp_path):
    """In one folder, because zero_start.py needs the rows of designs.py."""
    pytest.importorskip("matplotlib")
    command = [sys.executable, ROOT / "studies" / f"{script}.py", "--steps", "2", "--seeds", "1", "--images", "4",
               "--docs", rows_so_far]
    first = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    with open(rows_so_far / f"{'shapes' if script == 'reference' else script}.csv") as file:
        rows = list(csv.DictReader(file))
    kinds = last * (len(lab.RATES) if script in ("designs", "zero_start") else 1)
    assert len(rows) == kinds and {row["step"] for row in rows} == {"2"}
    again = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert again.stdout == first.stdout and "preparing" in first.stderr and "preparing" not in again.stderr
