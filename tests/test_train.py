"""train.py's runs: what they leave, resume, --init, precision and devices, refusals; and dit.py as a library."""
import argparse
import inspect
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import DESIGNS, ROOT, full_disk, official_state, refusal, tiny_dit
from PIL import Image

import dit
import sample
import train
from dit import DiT, GaussianDiffusion

# What a run leaves, and resume ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("block", DESIGNS)
def test_a_resumed_run_is_the_same_run_to_the_bit(block, run):
    """6 steps are 3 steps and 3 more: weights, average, moments and log, with accumulation and flips."""
    whole = run("--accum 2 --flip --block", block)
    parts = run("--accum 2 --flip --steps 3 --block", block)
    shutil.rmtree(run.cache)
    assert run("--steps 6", resume=parts).equals(whole) and whole.state["config"]["block"] == block

def test_a_checkpoint_carries_what_rebuilds_its_model(tiny_run):
    state = tiny_run.state
    assert set(state) == {"model", "ema", "opt", "step", "config", "model_args", "class_names"} and state["step"] == 6
    assert {path.name for path in tiny_run.out.iterdir()} == {"ckpt.pt", "config.json", "log.csv", ".lock"}
    DiT(**state["model_args"]).load_state_dict(state["model"])

def test_resuming_cuts_the_rows_after_the_checkpoint(tmp_path):
    cfg, log = train.Config(out=str(tmp_path)), tmp_path / "log.csv"
    folder = train.Folder(cfg, 0)
    for step in range(1, 6):
        folder.log(step, 0.1, 1 / 3, 0.0, 1.0, 2.0)
    whole = log.read_bytes().splitlines()
    log.write_bytes(log.read_bytes() + b"1\n\xff\xfe\x00,1,1,1,1,1\n\n1")        # half of row 10, and worse
    train.Folder(cfg, 3)
    assert whole[0] == b"step,loss,mse,vb,grad_norm,images_per_sec" and b"0.3333333333333333" in whole[1]
    assert log.read_bytes().splitlines() == whole[:4]

def test_half_written_files_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / "samples").mkdir()
    for name in ("ckpt.pt", "log.csv", "samples/0000001.png"):
        (tmp_path / f"{name}.0123abcd.part").write_bytes(b"half")
    train.Folder(train.Config(out=str(tmp_path)), 0)
    assert not list(tmp_path.rglob("*.part"))

def test_a_checkpoint_is_replaced_only_by_a_whole_one(tmp_path, monkeypatch):
    folder = train.Folder(train.Config(out=str(tmp_path)), 0)
    folder.save({"step": 1})
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(sample.UserError, match="cannot write .*ckpt.pt .disk full"):
        folder.save({"step": 2})
    assert torch.load(tmp_path / "ckpt.pt") == {"step": 1} and not list(tmp_path.glob("*.part"))

def test_the_checkpoint_is_saved_before_the_picture_is_drawn(run, monkeypatch):
    """So a picture that fails costs no step."""
    monkeypatch.setattr(train, "sample_grid", full_disk)
    with pytest.raises(OSError, match="disk full"):
        run("--sample-every 3 --ckpt-every 3")
    assert torch.load(run.folder / "run1" / "ckpt.pt")["step"] == 3

def test_pictures_have_one_row_for_each_class(run):
    drawn = run("--sample-every 4")
    assert sorted(path.name for path in (drawn.out / "samples").iterdir()) == ["0000004.png", "0000006.png"]
    assert drawn.picture(6).shape == (3 * 68 + 4, 8 * 68 + 4, 3)

@pytest.mark.parametrize("batch_size,accum,part", [(8, 1, 4), (20, 2, 5), (1, 1, 1), (256, 1, 24)])
def test_a_picture_drawn_in_small_parts_is_the_same(batch_size, accum, part, tiny_run, monkeypatch):
    """Guidance doubles the batch: no part holds more than a training step does."""
    cfg, sizes, draw = train.Config(batch_size=batch_size, accum=accum, device="cpu"), [], sample.sample_images
    model, labels = sample.load_model(tiny_run.checkpoint)[0], np.repeat([0, 1, 2], 8)
    expected = sample.grid_image(sample.to_uint8(draw(model, labels, steps=25, sampler="ddim", cfg_scale=4.0)), 8)
    monkeypatch.setattr(sample, "sample_images", lambda model, labels, *args, **kwargs: sizes.append(
        len(labels)) or draw(model, labels, *args, **kwargs))
    grid = train.sample_grid(cfg, train.Runtime(cfg), model, train.Pixels(), ["ant", "bee", "cat"])
    assert np.abs(np.asarray(grid).astype(int) - expected).max() <= 1 and max(sizes) == part and sum(sizes) == 24

@pytest.mark.parametrize("what", [0, 3])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(what, run, monkeypatch):
    """Even if the next step is finite: it is noticed at the next save, exit status 3, and no file has changed."""
    original, calls = train.train_step, []

    def poisoned(*args):
        calls.append(original(*args))
        calls[-1][what] = math.nan if len(calls) == 5 else calls[-1][what]
        return calls[-1]
    monkeypatch.setattr(train, "train_step", poisoned)
    stopped = run("--log-every 0", status=3)
    assert "not finite" in stopped.text and len(calls) == 6 and stopped.state["step"] == 3

def test_a_run_continues_only_with_the_images_it_began_with(run, pictures, tmp_path):
    mine = shutil.copytree(pictures, tmp_path / "mine")
    begun, moved = run("--steps 3 --data", mine), mine.rename(tmp_path / "moved")
    assert str(mine) in run("--steps 6", resume=begun, status=2).text
    run("--steps 4 --data", moved, resume=begun)
    (moved / "ant").rename(moved / "zebra")
    assert "other images" in run("--steps 6", resume=begun, status=2).text and begun.state["step"] == 4

def test_a_run_of_an_older_version_is_not_resumed(tiny_run, tmp_path):
    state = tiny_run.state
    assert state["config"].pop("format") == 2
    torch.save(state, tmp_path / "ckpt.pt")
    assert "an older version" in refusal(train.main, "--resume", tmp_path, "--steps 9", folder=tmp_path)

def test_a_damaged_checkpoint_is_not_resumed(tiny_run, tmp_path):
    whole = tiny_run.checkpoint.read_bytes()
    for content in (whole[:-1000], whole[:len(whole) // 2] + b"flipped" + whole[len(whole) // 2 + 7:]):
        (tmp_path / "ckpt.pt").write_bytes(content)
        assert "damaged" in refusal(train.main, "--resume", tmp_path, "--steps 9 --device cpu", folder=tmp_path)

@pytest.mark.parametrize("flags,words", [
    ("--resume RUN --block adaln", "--block adaln (the run has adaln-zero)"), ("--out RUN", "already holds a run"),
    ("--resume RUN/ckpt.pt --lr 1", "--lr 1.0"), ("--resume RUN --steps 6", "has done 6 steps"),
    ("--resume RUN --data shapes", "--data shapes")])
def test_a_run_keeps_its_settings_and_its_folder(flags, words, tiny_run):
    before = tiny_run.checkpoint.read_bytes()
    assert words in refusal(train.main, "--steps 9", flags.replace("RUN", str(tiny_run.out)), folder=tiny_run.out)
    assert tiny_run.checkpoint.read_bytes() == before


# --init ---------------------------------------------------------------------------------------------------------------

TABLE = "y_embedder.embedding_table.weight"

@pytest.mark.parametrize("source", ["run", "other names", "more classes", "official", "official training"])
def test_a_run_starts_from_the_averaged_weights_of_another(source, run, tiny_run, tmp_path):
    """At a rate of 0 it ends with them. Other classes take a new label table. To resume, the file is not needed."""
    flags, state, path, said = "", tiny_run.state, tmp_path / "init.pt", "all weights"
    if source.startswith("official"):
        flags = "--hidden-size 384 --depth 1 --num-heads 6"
        state = dict(model={}, opt={}, args=argparse.Namespace(model="DiT-S/2"),
                     ema=official_state(input_size=8, in_channels=3, num_classes=3))
    if source == "other names":
        state["class_names"] = ["bee", "ant", "cat"]
    if source == "more classes":
        state["class_names"], state["model_args"]["num_classes"] = list("abcdefg"), 7
        state["ema"][TABLE] = torch.randn(8, 32)
    torch.save(state["ema"] if source == "official" else state, path)
    begun = run(flags, "--lr 0 --steps 1 --init", path)
    ours, theirs = begun.state, state["ema"]
    if source != "run":                                                           # official files do not name classes
        del theirs[TABLE]
        said = "all weights but the label table"
        assert len(ours["ema"][TABLE]) == 4 and 0.01 < ours["ema"][TABLE].std() < 0.03
    assert all(torch.equal(ours[key][name], weight) for key in ("ema", "model") for name, weight in theirs.items())
    assert f"{said} taken from {path}" in begun.text
    path.unlink()
    run("--steps 2", resume=begun)

@pytest.mark.parametrize("flags,words", [
    ("--hidden-size 48", "hidden_size 32, not 48"), ("--num-heads 8", "num_heads 4, not 8"),
    ("--block adaln", "block adaln-zero, not adaln")])
def test_init_from_another_model_says_what_differs(flags, words, run, tiny_run):
    """With other heads, all shapes fit, and yet it is another function."""
    assert words in run(flags, "--init", tiny_run.checkpoint, status=2).text and not list(run.folder.iterdir())

@pytest.mark.parametrize("names,kept", [(["n01440764", *map(str, range(998)), "n15075141"], True),
                                        (list(map(str, range(1000))), False)])
def test_imagenets_official_label_table_is_kept_for_imagenet_alone(names, kept, tmp_path):
    """The folders of ImageNet are named by their wnids, from tench to toilet paper."""
    sizes = dict(hidden_size=384, depth=1, num_heads=6, num_classes=1000)
    state, path = official_state(**sizes), tmp_path / "DiT-XL-2-256x256.pt"
    torch.save(state, path)
    cfg = train.Config(image_size=32, vae="vae", patch_size=2, device="cpu", **{k: sizes[k] for k in list(sizes)[:3]})
    training = train.Training(cfg, train.Runtime(cfg), 1000)
    training.start_from(path, dict(model_args=train.model_args(cfg, 1000), class_names=names))
    assert torch.equal(training.ema.state_dict()[TABLE], state[TABLE]) == kept


# Precision, compilation, devices --------------------------------------------------------------------------------------

def gradient_of_a_step(block, device="cpu", **settings):
    """(loss, gradient) of the first of two steps on random weights, and what was compiled anew for the second."""
    cfg = train.Config(**dict(batch_size=4, label_drop=0.5, device=device, dtype="fp32", image_size=8, patch_size=2,
                              hidden_size=32, depth=2, num_heads=4, lr=0.0, block=block, compile=False) | settings)
    rt, gradients, losses = train.Runtime(cfg), [], []
    images = np.random.default_rng(0).integers(256, size=(12, 3, 8, 8), dtype=np.uint8)
    training, diffusion = train.Training(cfg, rt, 5), GaussianDiffusion().to(rt.device)
    training.model.load_state_dict({name: w / 2 if name != "pos_embed" else w                  # a loss of about 1
                                    for name, w in tiny_dit(block).state_dict().items()})
    training.opt.register_step_pre_hook(lambda *_: gradients.append(torch.cat(
        [p.grad.flatten().cpu() for p in training.model.parameters()])))
    for step in (1, 2):
        torch._dynamo.utils.counters.clear()
        batch = train.draw_batch(cfg, images, np.arange(12) % 5, step)
        losses.append(train.train_step(cfg, rt, training, diffusion, batch, step)[0])
    assert losses[0].dtype == torch.float32
    return losses[0].item(), gradients[0], sum(torch._dynamo.utils.counters["frames"].values())

def distance(a, b):
    return ((a - b).norm() / b.norm()).item()

@pytest.mark.parametrize("block", DESIGNS)
def test_bf16_steps_are_float32_steps_within_rounding(block, monkeypatch):
    """The loss within 1e-2, the gradient within 2 %, some five roundings of 2^-8. Each block uses train.attention."""
    exact, gradient, _ = gradient_of_a_step(block)
    calls, whole = [], train.attention
    monkeypatch.setattr(train, "attention", lambda module, x: calls.append(1) or whole(module, x))
    rough, rough_gradient, _ = gradient_of_a_step(block, dtype="bf16")
    assert rough == pytest.approx(exact, abs=1e-2) and rough != exact and len(calls) == 4
    assert 1e-4 < distance(rough_gradient, gradient) < 0.02

@pytest.mark.slow
@pytest.mark.parametrize("block", DESIGNS)
def test_compiled_steps_are_eager_steps_and_compile_once(block):
    """The gradient to 1e-5 in float32, where sums have another order, and within 2 % in bfloat16."""
    exact, gradient, _ = gradient_of_a_step(block)
    for dtype, loss_tolerance, tolerance in [("fp32", 1e-5, 1e-5), ("bf16", 1e-2, 0.02)]:
        torch._dynamo.reset()
        loss, compiled, frames = gradient_of_a_step(block, dtype=dtype, compile=True)
        assert loss == pytest.approx(exact, abs=loss_tolerance) and frames == 0
        assert distance(compiled, gradient) < tolerance

@pytest.mark.parametrize("block", DESIGNS)
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_every_device_trains_and_samples_as_the_cpu(device, block):
    """One step and one guided sample. TF32 on CUDA rounds to 2^-11; a wrong kernel is further away."""
    if not getattr(torch, device).is_available():
        pytest.skip(f"no {device} here")
    (loss, gradient, _), (expected, on_cpu, _) = gradient_of_a_step(block, device), gradient_of_a_step(block)
    assert loss == pytest.approx(expected, rel=2e-3) and distance(gradient, on_cpu) < 1e-2
    images = [sample.sample_images(tiny_dit(block).to(place), [0, 4], steps=5).cpu() for place in (device, "cpu")]
    assert distance(*images) < 2e-2

def test_grad_checkpoint_computes_blocks_twice_and_changes_no_bit(run, monkeypatch):
    original, calls = dit.AdaLNZeroBlock.forward, []
    monkeypatch.setattr(dit.AdaLNZeroBlock, "forward", lambda *args: calls.append(0) or original(*args))
    plain, once = run(), len(calls)
    checkpointed = run("--grad-checkpoint")
    assert len(calls) - once == 2 * once == 2 * 6 * 2 and checkpointed.equals(plain)


# Mistakes -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with everything that the mistakes below name."""
    world = tmp_path_factory.mktemp("world")
    for name in ("EMPTY", "BROKEN", "DEEP"):
        (world / name / "dog").mkdir(parents=True)
    (world / "BROKEN" / "dog" / "bad.png").write_bytes(b"no picture")
    Image.new("I;16", (20, 20)).save(world / "DEEP" / "dog" / "deep.png")         # it would be clipped to white
    return world

REFUSED = [
    ("--stepps 3", "--stepps"), ("--step 3", "--step"), ("--bench", "--bench"), ("--preset mnist", "shapes, cifar10"),
    ("--dtype fp16", "bf16"), ("--block adaln-one", "adaln-zero"), ("--model DiT-M/2", "DiT-S/2"), ("--lr nan", "--lr"),
    ("--steps 0", "--steps: 0 should be at least 1"), ("--steps many", "--steps"), ("--lr -1", "--lr"),
    ("--beta2 1", "less than 1"), ("--label-drop 1", "--label-drop"), ("--ema-decay 2", "--ema-decay"),
    ("--cfg-scale inf", "--cfg-scale"), ("--seed 18446744073709551616", "--seed"), ("--accum 3", "--accum 3"),
    ("--patch-size 3", "patch size 3"), ("--hidden-size 30", "hidden size 30"), ("--num-heads 5", "5 heads"),
    ("--image-size 0", "--image-size"), ("--device tpu", "--device auto"), ("--device cpu:x", "cpu:x"),
    ("--device cuda:99", "cuda:99"), ("--data no/such/folder", "no/such/folder"), ("--data EMPTY", "EMPTY"),
    ("--data BROKEN", "dog/bad.png"), ("--data DEEP", "deep.png"), ("--preset imagenet256", "--data FOLDER"),
    ("--vae VAE --image-size 36", "divisible by 8"), ("--vae no/such/vae --image-size 32", "no VAE 'no/such/vae'"),
    ("--init no/such.pt", "no checkpoint no/such.pt"), ("--init BROKEN/dog/bad.png", "not a checkpoint"),
    ("--resume no/such/run", "no/such/run"), ("--cache BROKEN/dog/bad.png", "bad.png"),
    ("--out BROKEN/dog/bad.png", "--out")]

@pytest.mark.parametrize("flags,words", REFUSED)
def test_a_mistake_is_one_line_and_nothing_is_written(flags, words, world, monkeypatch):
    monkeypatch.chdir(world)
    if "no/such/vae" in flags:
        pytest.importorskip("diffusers")
    assert words in refusal(train.main, "--device cpu --steps 1", flags)


# dit.py as a library --------------------------------------------------------------------------------------------------

def test_dit_imports_torch_numpy_and_the_standard_library_only():
    imported = re.findall(r"^ *(?:import|from) (\w+)", inspect.getsource(dit), re.MULTILINE)
    assert set(imported) - set(sys.stdlib_module_names) == {"torch", "numpy"}

def test_nothing_is_imported_that_can_wait():
    """dit.py loads only what torch has loaded. --help and the first step on shapes wait for no other large library."""
    code = """import sys, torch, numpy
before = set(sys.modules)
import dit
print(*{name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
import train
print(*{'torchvision', 'diffusers', 'torch._inductor', 'torch_xla'} & set(sys.modules))"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out == "dit\n\n"

def test_to_moves_a_copy_of_the_tables():
    diffusion = GaussianDiffusion().respaced(10)
    moved = diffusion.to("meta")
    assert moved.betas.is_meta and moved.timestep_map.is_meta and not diffusion.betas.is_meta
    assert moved.betas.dtype == torch.float32

def test_learn_sigma_false_predicts_eps_alone_from_loss_to_sample():
    model, x, t, y = tiny_dit(learn_sigma=False), torch.randn(2, 3, 8, 8), torch.tensor([0, 999]), torch.tensor([0, 4])
    assert (GaussianDiffusion().training_losses(model, x, t, y=y)["vb"] == 0).all() and model(x, t, y).shape == x.shape
    assert sample.sample_images(model, y, steps=3).shape == x.shape

def test_an_unknown_design_is_refused():
    with pytest.raises(ValueError, match="adaln-zero"):
        DiT(block="adaln-one")

def test_space_timesteps_sum_the_stride_as_adm_does():
    """At every length. A product of the stride rounds differently at 283 of them, first at 21."""
    for n in range(2, 1001):
        expected, position = [], 0.0
        for _ in range(n):
            expected.append(round(position))
            position += 999 / (n - 1)
        assert dit.space_timesteps(1000, n) == expected

@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_samplers_show_each_state_and_the_x0_predicted_from_it(loop):
    start, states, wrapped, draws = torch.randn(2, 3, 4, 4), [], [], []
    getattr(GaussianDiffusion().respaced(10), loop)(
        lambda x, t: torch.zeros(2, 6, 4, 4), start, on_step=lambda *state: states.append(state),
        randn=lambda x: draws.append(x.shape) or torch.randn_like(x),
        progress=lambda steps: (wrapped.append(i) or i for i in steps))
    assert [i for i, _, _ in states] == wrapped == list(range(9, -1, -1)) and draws == [(2, 3, 4, 4)] * 10
    expected = start / GaussianDiffusion().alphas_cumprod[-1].sqrt()              # for eps = 0
    assert torch.equal(states[0][1], start) and torch.allclose(states[0][2], expected, rtol=1e-5, atol=1e-5)

GOLDEN = {                      # eps[0, 0, 0, :2], v[1, 2, 7, 7] and mean square, in float64
    "in-context": (0.454647904, 0.033529559, -0.098851289, 0.227851025),
    "cross-attention": (0.261169705, -0.197926529, -0.332878179, 0.219882274),
    "adaln": (-0.127861076, 0.458805705, -0.128616197, 0.148526889),
    "adaln-zero": (0.112485214, 0.557405030, 0.018044891, 0.776139122)}

@pytest.mark.parametrize("block", DESIGNS)
def test_float32_outputs_stay_what_they_are(block):
    """Weights that are trained today mean the same tomorrow. Weights and image are sines; the numbers were written
    down once, by the code that test_dit.py's naive blocks prove."""
    model = tiny_dit(block)
    for k, p in enumerate(model.parameters()):
        p.data = (0.2 * torch.sin(k + torch.arange(p.numel(), dtype=torch.float64)).view(p.shape)).float()
    x = torch.sin(3 * torch.arange(2 * 3 * 8 * 8, dtype=torch.float64)).view(2, 3, 8, 8).float()
    out = model(x, torch.tensor([0, 999]), torch.tensor([1, 5]))
    numbers = [*out[0, 0, 0, :2].tolist(), out[1, 5, 7, 7].item(), (out ** 2).mean().item()]
    assert numbers == pytest.approx(GOLDEN[block], rel=1e-5, abs=1e-6)
