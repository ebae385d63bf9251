"""studies/: what the studies change in a model is what they say, their runs are train.py's, and their scripts run."""
import csv
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal
from PIL import Image

import train
from dit import AdaLNBlock, DiT

sys.path.insert(0, str(ROOT / "studies"))
import averages  # noqa: E402
import lab  # noqa: E402
import plot  # noqa: E402
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


def test_a_claim_needs_all_seeds_and_twice_their_range(capsys):
    def rows(*losses):
        return [dict(seed=seed, lr=1.0, step=1, mse=loss) for seed, loss in enumerate(losses)]

    groups = {("a",): rows(1.0, 1.1), ("b",): rows(1.3, 1.4), ("c",): rows(1.1, 1.4), ("d",): rows(1.2, 1.21)}
    lab.report("title", groups, errors={"seed=0,lr=1.0,step=1,mse=1.0": np.array([0.5, 1.5])} | {
        f"seed={seed},lr=1.0,step=1,mse={loss}": np.array([loss] * 2)
        for seed, loss in [(1, 1.1), (0, 1.3), (1, 1.4)]})
    said = capsys.readouterr().out                              # over two images the gap is 0.3 +- 0.25 in the mean
    assert "a is better than b by 0.30000 +- 0.25000, 22%" in said and said.count("better") == 1


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


@pytest.mark.slow
@pytest.mark.parametrize("script,last", [("designs", 4), ("zero_start", 5), ("averages", 4), ("sizes", 6)])
def test_a_study_runs_and_is_not_repeated(script, last, tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, ROOT / "studies" / f"{script}.py", "--steps", "2", "--seeds", "1", "--images", "4"]
    first = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    with open(tmp_path / "docs" / "studies" / f"{script}.csv") as file:
        rows = list(csv.DictReader(file))
    kinds = last * (len(lab.RATES) if script in ("designs", "zero_start") else 1)
    assert len(rows) == kinds and {row["step"] for row in rows} == {"2"}
    again = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert again.stdout == first.stdout and "preparing" in first.stderr and "preparing" not in again.stderr
