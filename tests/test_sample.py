"""sample.py: loading, sampling, pictures, official weights, the VAE, sets for FID, and what is refused."""
import argparse
import functools
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import full_disk, official_state, refusal, tiny_dit
from PIL import Image

import sample
from dit import DiT, DiT_models, GaussianDiffusion


def sample_py(*argv):
    """`python sample.py argv`, on the CPU."""
    sample.main(shlex.split(" ".join(map(str, [*argv, "--device cpu"]))))

def pixels(path):
    return np.asarray(Image.open(path)).astype(int)

def same_weights(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# Loading and sampling -------------------------------------------------------------------------------------------------

def test_load_model_gives_the_averaged_weights_in_eval_mode(tiny_run):
    state, (model, info) = tiny_run.state, sample.load_model(tiny_run.checkpoint)
    assert not model.training and same_weights(model.state_dict(), state["ema"])
    assert not same_weights(state["model"], state["ema"])
    assert info["class_names"] == ["ant", "bee", "cat"] and info["space"] == "pixel" and info["config"]["seed"] == 0
    assert model.num_classes == 3 and info["step"] == 6 and info["model_args"] == state["model_args"]

@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_image_i_depends_on_its_class_the_seed_and_i_alone(tiny_run, sampler):
    model, _ = sample.load_model(tiny_run.checkpoint)

    def images(labels, indices, seed=0):
        return sample.to_uint8(sample.sample_images(model, labels, indices, seed=seed, steps=5, sampler=sampler)).int()

    together = images([0, 1, 2, 2], [0, 1, 2, 3])
    for i, label in enumerate([0, 1, 2, 2]):                                      # alone, within one grey level
        assert (images([label], [i])[0] - together[i]).abs().max() <= 1
    assert (together[2] != together[3]).any() and (images([0], [0], seed=1)[0] != together[0]).any()
    assert (images([1], [0])[0] != together[0]).any()

@pytest.mark.parametrize("channels,clips", [(1, True), (3, True), (4, False)])
def test_pixels_are_clipped_and_latents_are_not(channels, clips):
    model = DiT(input_size=4, patch_size=2, in_channels=channels, hidden_size=32, depth=1, num_heads=2)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    plain, clipped, free = (sample.sample_images(model, [0, 1], steps=5, clip_denoised=clip, sampler="ddim")
                            for clip in (None, True, False))
    assert free.abs().max() > 1 >= clipped.abs().max() and torch.equal(plain, clipped if clips else free)

@pytest.mark.parametrize("clip", [False, True])
def test_dpm_solver_ends_where_ddim_ends(clip):
    """Both follow one ODE: 25 steps of second order, 1,000 of first, with the exact denoiser of data N(0.6, 0.3^2)."""
    pytest.importorskip("diffusers")
    diffusion, noise, seen = GaussianDiffusion(), torch.randn(4, 3, 8, 8), []

    def denoiser(x, t):
        a = diffusion.alphas_cumprod[t][:, None, None, None]
        return torch.cat([(1 - a).sqrt() * (x - 0.6 * a.sqrt()) / (0.09 * a + 1 - a), torch.zeros_like(x)], 1)

    fine = diffusion.ddim_sample_loop(denoiser, noise, clip_denoised=clip)
    coarse = sample.dpm_solver_loop(denoiser, noise, 25, clip_denoised=clip, on_step=lambda i, *_: seen.append(i))
    assert (coarse - fine).abs().max() < 0.03 and seen == list(range(24, -1, -1))
    assert not clip or coarse.abs().max() <= 1

def test_to_uint8_is_adms_rounding():
    x, levels = torch.tensor([-1.2, -1.0, -0.999, 0.0, 0.9999, 1.0, 3.0]), torch.arange(256)
    assert sample.to_uint8(x).tolist() == [min(255, max(0, int(127.5 * v + 128))) for v in x.tolist()]
    assert torch.equal(sample.to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))   # undoes train.py's scaling

def test_classes_are_given_by_name_or_number():
    names = ["ant", "bee", "2", "dog"]
    assert sample.parse_classes("dog, 0,bee", names) == [3, 0, 1] and sample.parse_classes(None, names) == [0, 1, 2, 3]
    assert len(set(sample.parse_classes(None, [str(i) for i in range(1000)]))) == 10

def draw_cats_and_ants(tiny_run, folder):
    """(the grid, its film) of 3 images each."""
    sample_py(tiny_run.out, "--classes cat,0 --per-class 3 --steps 6 --out", folder / "x.png --gif", folder / "x.gif")
    return pixels(folder / "x.png"), Image.open(folder / "x.gif")

def test_a_grid_has_one_row_for_each_class(tiny_run, tmp_path, capsys):
    grid, _ = draw_cats_and_ants(tiny_run, tmp_path)
    images = sample.sample_images(sample.load_model(tiny_run.out)[0], [2, 2, 2, 0, 0, 0], steps=6, cfg_scale=2.0)
    assert grid.shape == (2 * 68 + 4, 3 * 68 + 4, 3) and "cat, ant" in capsys.readouterr().out      # 4 between images
    for k, image in enumerate(sample.to_uint8(images)):
        cell = grid[4 + 68 * (k // 3):, 4 + 68 * (k % 3):][:64:8, :64:8]          # each of 8 pixels is 8 wide
        assert np.abs(cell - image.permute(1, 2, 0).numpy()).max() <= 1

def test_a_film_ends_in_the_grid_on_both_sides(tiny_run, tmp_path):
    (grid, film), half, sides = draw_cats_and_ants(tiny_run, tmp_path), 3 * 68 + 4, []
    assert film.n_frames == 6 and film.size == (2 * half, 2 * 68 + 4)
    for k in (0, 5):                                                              # noise, a guess; the grid twice
        film.seek(k)
        sides += [np.asarray(film.convert("RGB").crop((x, 0, x + half, 140))).astype(int) for x in (0, half)]
    assert np.abs(sides[3] - grid).mean() < 20 < np.abs(sides[0] - sides[1]).mean()         # a GIF has 256 colours

def test_bf16_pictures_differ_by_few_grey_levels(tiny_run, tmp_path):
    for dtype in ("fp32", "bf16"):
        sample_py(tiny_run.out, "--steps 20 --dtype", dtype, "--out", tmp_path / f"{dtype}.png")
    assert 0 < np.abs(pixels(tmp_path / "fp32.png") - pixels(tmp_path / "bf16.png")).mean() < 3


# Official weights -----------------------------------------------------------------------------------------------------

def training_file(state, **args):
    """What the official train.py saves: it also holds an argparse.Namespace."""
    return dict(model={}, ema=state, opt={}, args=argparse.Namespace(**args))

@pytest.mark.parametrize("name,args", [("DiT-XL-2-256x256.pt", None), ("x.pt", dict(data_path="/data/imagenet/train"))])
def test_official_weights_are_loaded_as_they_are(name, args, tmp_path):
    """The published file is a state dict. ImageNet's names are given to what was trained on ImageNet."""
    state = official_state(num_classes=1000)
    torch.save(state if args is None else training_file(state, **args), tmp_path / name)
    model, info = sample.load_model(tmp_path / name)
    assert same_weights(model.state_dict(), state) and model.blocks[0].attn.num_heads == 6
    assert info["space"] == "latent" and info["config"]["scale"] == 0.18215 and "assumed" not in info["config"]
    assert info["class_names"][207] == "golden retriever" and info["class_names"][360] == "otter"

@pytest.mark.parametrize("args", [None, dict(num_classes=1000, data_path="/data/places")])
def test_a_thousand_classes_need_not_be_imagenets(args, tmp_path):
    state = official_state(num_classes=1000)
    torch.save(state if args is None else training_file(state, **args), tmp_path / "x.pt")
    assert sample.load_model(tmp_path / "x.pt")[1]["class_names"] == list(map(str, range(1000)))

@pytest.mark.parametrize("args,rows,classes,null", [
    (dict(num_classes=10), 11, 10, True), (dict(num_classes=10), 10, 10, False), (dict(num_classes=1), 1, 1, False),
    (None, 11, 10, True), (None, 1, 1, False), (None, 1000, 1000, False), (dict(lr=1e-4), 4, 3, True)])
def test_a_label_table_without_a_null_row_has_no_guidance(args, rows, classes, null, tmp_path):
    """What the file says counts. Weights alone say nothing: what is assumed is a part of the config, and printed."""
    state = official_state(num_classes=rows - 1)
    torch.save(state if args is None else training_file(state, **args), tmp_path / "x.pt")
    model, info = sample.load_model(tmp_path / "x.pt")
    assert model.num_classes == len(info["class_names"]) == classes and (info["config"]["label_drop"] > 0) == null
    assert torch.equal(model.y_embedder.embedding_table.weight[:rows], state["y_embedder.embedding_table.weight"])
    assert sample.default_guidance(info["config"], info["class_names"]) == (4.0 if null else 1.0)
    assert ("null label" in info["config"].get("assumed", "")) == (null and args is None)

@pytest.mark.parametrize("args,sizes,name,words", [
    (dict(model="SiT-S/2", path_type="Linear", prediction="velocity"), {}, "x.pt", "is a SiT"),
    (None, {}, "SiT-XL-2-256x256.pt", "is a SiT"), (None, {}, "sit_b.pt", "is a SiT"),
    *((dict(num_classes=odd), {}, "x.pt", "classes, .* 6 rows") for odd in (7, 5.0, "5", None)),
    (None, dict(in_channels=16), "x.pt", "16 channels"), (None, dict(in_channels=2), "x.pt", "2 channels"),
    (None, dict(hidden_size=256, num_heads=8), "x.pt", "--num-heads")])
def test_what_official_weights_do_not_say_is_not_guessed(args, sizes, name, words, tmp_path):
    state = official_state(**sizes)
    torch.save(state if args is None else training_file(state, **args), tmp_path / name)
    with pytest.raises(sample.UserError, match=words):
        sample.load_model(tmp_path / name)

@pytest.mark.parametrize("width", [256, 384])
def test_heads_may_be_said(width, tmp_path):
    """For widths that are not in Table 1 they have to be; for others Table 1 is the default."""
    state = official_state(hidden_size=width, num_heads=8)
    torch.save(state, tmp_path / "x.pt")
    model, _ = sample.load_model(tmp_path / "x.pt", num_heads=8)
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([10, 900]), torch.tensor([0, 1])
    ours = tiny_dit(input_size=4, in_channels=4, hidden_size=width, depth=1, num_heads=8)
    ours.load_state_dict(state)
    assert torch.equal(model(x, t, y), ours(x, t, y))

@pytest.mark.parametrize("vae", ["ema", "mse"])
def test_the_decoder_is_the_one_the_official_training_names(vae, tmp_path):
    torch.save(training_file(official_state(), vae=vae), tmp_path / "x.pt")
    assert sample.load_model(tmp_path / "x.pt")[1]["config"]["vae"] == f"stabilityai/sd-vae-ft-{vae}"

@pytest.mark.parametrize("name", DiT_models)
def test_sizes_of_official_weights_follow_from_their_shapes(name):
    """Without memory: the model that is rebuilt has the names and shapes it came from. DiT-XL/2 is as published."""
    other = dict(input_size=64, num_classes=10, learn_sigma=name != "DiT-B/4")
    with torch.device("meta"):
        state = DiT_models[name](**{} if name == "DiT-XL/2" else other).state_dict()
        again = DiT(**sample.official_checkpoint("x.pt", state)["model_args"])
    shapes = [{key: tensor.shape for key, tensor in weights.items()} for weights in (state, again.state_dict())]
    assert shapes[0] == shapes[1] and (name != "DiT-XL/2" or len(state) == 292)
    assert again.blocks[0].attn.num_heads == DiT_models[name].keywords["num_heads"]

@pytest.mark.parametrize("change,words", [
    (dict(extra=torch.zeros(1)), "do not fit .*extra"),
    ({"blocks.0.attn.proj.bias": None}, "do not fit .*blocks.0.attn.proj.bias"),
    ({f"blocks.{i}.mlp.fc{k}.weight": None for i in range(9) for k in (1, 2)}, "do not fit .*blocks.0.mlp.fc1.weight"),
    ({"t_embedder.mlp.0.bias": torch.zeros(3)}, r"do not fit .*t_embedder.mlp.0.bias.*\[3\].*\[384\]"),
    ({"t_embedder.mlp.0.bias": [1.0]}, "do not fit .*t_embedder.mlp.0.bias"),
    (dict(pos_embed=None), "neither .* nor an official one .*pos_embed"), (dict(pos_embed=3), "nor an official one"),
    ({7: 8}, "nor an official one"), (dict(pos_embed=torch.zeros(4)), "nor an official one"),
    ({"x_embedder.proj.weight": torch.zeros(768, 4, 2, 2)}, "do not fit")])
def test_weights_that_do_not_fit_are_named(change, words, tmp_path):
    state = official_state(depth=9) | change
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "x.pt")
    with pytest.raises(sample.UserError, match=words) as error:
        sample.load_model(tmp_path / "x.pt")
    assert len(str(error.value)) < 400 + len(str(tmp_path))

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's folder. The official 256 file is at a URL on this machine."""
    torch.save(official_state(), tmp_path / "256.pt")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setitem(sample.OFFICIAL, "DiT-XL/2-256", (tmp_path / "256.pt").as_uri())
    return tmp_path / "hub" / "checkpoints"

def test_official_weights_are_downloaded_once(hub, tmp_path, monkeypatch):
    """The second time nothing is downloaded, and nothing locked: the folder may be read-only."""
    model, info = sample.load_model("DiT-XL/2-256")
    assert model.num_classes == 5 and len(info["class_names"]) == 5
    (tmp_path / "256.pt").unlink()
    monkeypatch.setattr(sample, "FileLock", None)
    sample.load_model("DiT-XL/2-256")
    assert [path.name for path in hub.iterdir() if path.suffix != ".lock"] == ["256.pt"]

@pytest.mark.parametrize("url", ["file:///no/512.pt", "http://127.0.0.1:1/512.pt"])
def test_a_download_that_fails_is_one_line_and_leaves_no_file(url, hub, monkeypatch):
    monkeypatch.setitem(sample.OFFICIAL, "DiT-XL/2-512", url)
    with pytest.raises(sample.UserError, match=f"cannot download {url} .*other means"):
        sample.load_model("DiT-XL/2-512")
    assert not [path for path in hub.iterdir() if path.suffix != ".lock"]

def test_half_a_download_is_not_taken_for_the_file(hub, tmp_path):
    whole = (tmp_path / "256.pt").read_bytes()
    for content in (whole[:-1000], whole):
        (tmp_path / "256.pt").write_bytes(content)
        if content != whole:
            with pytest.raises(sample.UserError, match="broke off"):
                sample.load_model("DiT-XL/2-256")
    sample.load_model("DiT-XL/2-256")


# The VAE --------------------------------------------------------------------------------------------------------------

def test_decoding_takes_the_scale_off(vae_folder):
    """The picture of the latents times 0.18215 is the VAE's of the latents, also of more than it decodes at once."""
    from diffusers import AutoencoderKL

    z, reference = torch.randn(9, 4, 4, 4), AutoencoderKL.from_pretrained(vae_folder).eval()
    with torch.no_grad():
        expected = torch.cat([reference.decode(z[k:k + 1]).sample for k in range(9)])
    ours = sample.decode(sample.load_vae(vae_folder), 0.18215 * z, 0.18215)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert expected.shape == (9, 3, 32, 32) and sample.SCALE == 0.18215

@pytest.mark.parametrize("name", ["stabilityai/sd-vae-ft-mse", "CompVis/stable-diffusion-v1-4/vae"])
def test_a_vae_comes_from_the_hub_by_its_name(name, vae_folder, tmp_path, monkeypatch):
    """The hub's cache is filled by hand, because there is no network."""
    owner, repository, *folder = name.split("/")
    cache = tmp_path / f"models--{owner}--{repository}"
    shutil.copytree(vae_folder, cache / "snapshots" / ("a" * 40) / "/".join(folder))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert same_weights(sample.load_vae(name).state_dict(), sample.load_vae(vae_folder).state_dict())

@pytest.fixture
def official(tmp_path):
    torch.save(official_state(num_classes=10), tmp_path / "official.pt")
    return tmp_path / "official.pt"

@pytest.mark.parametrize("channels", [None, 3])
def test_latents_are_guided_in_the_channels_asked_for_and_decoded(channels, official, vae_folder, tmp_path):
    path, flags = tmp_path / "x.png", f"--cfg-channels {channels}" if channels else ""
    sample_py(official, "--classes 3,7 --per-class 2 --sampler dpm++ --steps 4 --vae", vae_folder, flags, "--out", path,
              "--gif", tmp_path / "x.gif")
    (model, _), difference = sample.load_model(official), {}
    for guided in (None, 3):
        latents = sample.sample_images(model, [3, 3, 7, 7], steps=4, sampler="dpm++", cfg_channels=guided)
        images = sample.to_uint8(sample.decode(sample.load_vae(vae_folder), latents, sample.SCALE))
        difference[guided] = np.abs(pixels(path) - np.asarray(sample.grid_image(images, 2))).max()
    assert difference.pop(channels) <= 1 < difference.popitem()[1] and Image.open(tmp_path / "x.gif").n_frames == 4

def renamed_vae(vae_folder, folder, rename):
    """A copy of the VAE whose weights have the names that rename(name) gives; "" leaves one out."""
    import safetensors.torch as files

    path = shutil.copytree(vae_folder, folder) / "diffusion_pytorch_model.safetensors"
    weights = {rename(name): tensor for name, tensor in files.load_file(path).items()}
    files.save_file({name: tensor for name, tensor in weights.items() if name}, path, metadata={"format": "pt"})
    return folder

def test_a_vae_with_the_names_of_2022_is_loaded_whole(vae_folder, tmp_path):
    then = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    old = renamed_vae(vae_folder, tmp_path / "old", lambda name: re.sub(
        r"to_(q|k|v|out\.0)\.", lambda now: then[now[0]], name))
    assert same_weights(sample.load_vae(old).state_dict(), sample.load_vae(vae_folder).state_dict())

def test_a_vae_that_lacks_weights_is_refused(vae_folder, tmp_path):
    """diffusers only warns, and fills the gap with random weights."""
    with pytest.raises(sample.UserError, match="quant_conv"):
        sample.load_vae(renamed_vae(vae_folder, tmp_path / "gap", lambda name: "" if "quant_conv" in name else name))


# Sets for FID ---------------------------------------------------------------------------------------------------------

SET = "--num-samples 11 --batch-size 3 --steps 4 --cfg-scale 2 --device cpu --out"
NAMES = ["ant", "bee", "cat"]

@pytest.fixture(scope="module")
def whole_set(tiny_run, tmp_path_factory):
    """A set of 11 images, made by one process."""
    out, threads = tmp_path_factory.mktemp("sets") / "whole", torch.get_num_threads()
    sample_py(tiny_run.checkpoint, SET, out)
    torch.set_num_threads(threads)
    return out

def contents(out):
    """The files of a set but for its lock, as bytes."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}

def set_labels(num_samples=11, seed=0, labels=None, names=NAMES):
    return sample.set_labels(argparse.Namespace(labels=labels, seed=seed, num_samples=num_samples), names)

def test_images_of_a_set_are_those_of_sample_images(whole_set, tiny_run):
    model, _ = sample.load_model(tiny_run.checkpoint)
    images = sample.to_uint8(sample.sample_images(model, set_labels(), steps=4, cfg_scale=2.0)).permute(0, 2, 3, 1)
    ours = np.array([pixels(path) for path in sorted(whole_set.glob("*.png"))])
    assert np.abs(ours - images.numpy()).max() <= 1

def test_samples_npz_is_what_numpy_would_save(whole_set):
    array = np.load(whole_set / "samples.npz")["arr_0"]
    assert array.shape == (11, 8, 8, 3) and array.dtype == np.uint8
    assert np.array_equal(array, [pixels(whole_set / f"{i:06d}.png") for i in range(11)])

def test_labels_txt_names_the_class_of_every_image(whole_set):
    expected = "".join(f"{label}\t{NAMES[label]}\n" for label in set_labels())
    assert (whole_set / "labels.txt").read_text() == expected

def test_two_processes_make_the_same_set(whole_set, tiny_run, run):
    """They share the batches."""
    patch = """draw, write = it.sample_images, sys.stdout.write
it.sample_images = lambda *args, **kwargs: (write(f"a batch of {os.environ['RANK']}\\n"), draw(*args, **kwargs))[1]"""
    said = run.sample(tiny_run.checkpoint, SET, run.folder / "two", processes=2, patch=patch)
    assert contents(run.folder / "two") == contents(whole_set)
    assert said.count("a batch of 0") == said.count("a batch of 1") == 2 and said.count("samples.npz") == 1

def test_a_set_on_a_cpu_is_drawn_in_one_thread(tiny_run, tmp_path):
    """torchrun's processes have one each, and another number adds in another order."""
    torch.set_num_threads(2)
    sample_py(tiny_run.checkpoint, SET, tmp_path, "--num-samples 1 --steps 1")
    assert torch.get_num_threads() == 1

def test_a_set_that_was_stopped_is_completed(whole_set, tiny_run, tmp_path, monkeypatch):
    """Only the batch with missing images is drawn. Half-written files are removed."""
    stopped, drawn, draw = shutil.copytree(whole_set, tmp_path / "set"), [], sample.sample_images
    for name in ("000001.png", "000002.png", "samples.npz"):
        (stopped / name).unlink()
    (stopped / "000001.png.0123abcd.part").write_bytes(b"half")
    monkeypatch.setattr(sample, "sample_images", lambda *args, **kwargs: drawn.append(args[2]) or draw(*args, **kwargs))
    sample_py(tiny_run.checkpoint, SET, stopped)
    assert contents(stopped) == contents(whole_set) and [list(indices) for indices in drawn] == [[0, 1, 2]]

@pytest.mark.parametrize("flags,words", [
    ("--seed 1", "seed 0"), ("--dtype bf16", "dtype fp32"), ("--compile", "compile False"), ("--steps 3", "steps 4"),
    ("--cfg-scale 3", "cfg_scale 2"), ("--sampler ddim", "sampler ddpm"), ("--labels LABELS", "labels")])
def test_a_set_never_mixes_two_settings(flags, words, whole_set, tiny_run, tmp_path):
    (tmp_path / "LABELS").write_text("cat\n" * 11)
    before, flags = contents(whole_set), flags.replace("LABELS", str(tmp_path / "LABELS"))
    said = refusal(sample.main, tiny_run.checkpoint, SET, whole_set, flags, folder=whole_set)
    assert f"another set, with {words}" in said and contents(whole_set) == before

def test_a_set_never_mixes_two_checkpoints(whole_set, tiny_run, tmp_path):
    state = tiny_run.state
    state["ema"]["x_embedder.proj.bias"] += 1e-3                                  # trained longer under the same name
    torch.save(state, tmp_path / "ckpt.pt")
    assert "another set, with weights" in refusal(sample.main, tmp_path / "ckpt.pt", SET, whole_set, folder=whole_set)

def test_a_set_never_mixes_two_vaes_and_prints_what_a_table_needs(official, vae_folder, tmp_path, capsys):
    flags = official, SET, tmp_path / "set", "--num-samples 1 --steps 2 --sampler ddim --cfg-scale 1.5 --vae"
    sample_py(*flags, vae_folder)
    said, other = capsys.readouterr().out, shutil.copytree(vae_folder, tmp_path / "other")
    assert all(words in said for words in ("ddim", "2 steps", "guidance 1.5", str(vae_folder)))
    assert "official.pt holds weights alone: taken for a DiT that predicts the noise, with 10 classes" in said
    assert Image.open(tmp_path / "set" / "000000.png").size == (32, 32)
    assert f"another set, with vae {vae_folder}" in refusal(sample.main, *flags, other, folder=tmp_path / "set")

def test_a_folder_with_other_pictures_receives_no_set(tiny_run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "000000.png")
    before = contents(tmp_path)
    with pytest.raises(sample.UserError, match="choose another folder with --out"):
        sample_py(tiny_run.checkpoint, SET, tmp_path)
    assert contents(tmp_path) == before

@pytest.mark.parametrize("broken", [0, 8])
def test_a_picture_that_cannot_be_written_ends_the_set(broken, tiny_run, tmp_path, monkeypatch):
    """In the first or the last batch: the reason is printed, and the set does not look whole."""
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda part, path: (
        full_disk if Path(path).name == f"{broken:06d}.png" else replace)(part, path))
    with pytest.raises(sample.UserError, match="disk full"):
        sample_py(tiny_run.checkpoint, SET, tmp_path, "--num-samples 9 --steps 2")
    assert not (tmp_path / "samples.npz").exists() and not list(tmp_path.glob("*.part"))

def test_labels_of_a_set_are_uniform_and_depend_on_seed_and_i():
    labels = set_labels(3000)
    assert sum((labels.count(c) - 1000) ** 2 / 1000 for c in range(3)) < 13.8      # chi squared, 2 degrees: 1 in 1000
    assert set_labels(10) == labels[:10] != labels[100:110] and set_labels(3000, seed=1) != labels

def test_labels_of_a_file_are_one_class_a_line(tmp_path):
    (tmp_path / "labels.txt").write_text("cat\n0\nbee\n")
    of_file = functools.partial(set_labels, labels=tmp_path / "labels.txt")
    assert of_file(3) == [2, 0, 1] and of_file(3, names=["0,1", "cat", "bee"]) == [1, 0, 2]
    for number, words in [(5, "has 4 lines: it needs 5"), (4, "no class ''")]:
        with pytest.raises(sample.UserError, match=words):
            of_file(number)

@pytest.mark.slow
def test_compiled_sets_are_eager_ones_within_a_grey_level(tiny_run, tmp_path):
    """Two programs are compiled: for batches of four at all timesteps, and for the last batch of three."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for flags in ("--no-compile", "--compile"):
        sample_py(tiny_run.checkpoint, SET, tmp_path / flags, "--batch-size 4 --steps 5", flags)
    eager, compiled = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("--no-compile", "--compile"))
    assert np.abs(compiled.astype(int) - eager).max() <= 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


# Mistakes -------------------------------------------------------------------------------------------------------------

class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))

@pytest.fixture(scope="module")
def world(tiny_run, tmp_path_factory):
    """A folder with everything that the mistakes below name."""
    AutoencoderKL = pytest.importorskip("diffusers").AutoencoderKL
    world, state, good = tmp_path_factory.mktemp("world"), tiny_run.state, tiny_run.checkpoint.read_bytes()
    (world / "EMPTY").mkdir()
    state["config"]["label_drop"] = 0.0
    AutoencoderKL(block_out_channels=(8, 8, 8), down_block_types=["DownEncoderBlock2D"] * 3, norm_num_groups=4,
                  up_block_types=["UpDecoderBlock2D"] * 3, latent_channels=3).save_pretrained(world / "OTHER-VAE")
    half, flipped = good[:len(good) // 2], bytearray(good)
    flipped[len(half)] ^= 4
    for name, content in dict(run=good, text=b"hello", empty=b"", half=half, flipped=flipped).items():
        (world / f"{name}.pt").write_bytes(content)
    for name, content in dict(other={"weights": torch.zeros(3)}, types=dict.fromkeys(state, 1), latent=official_state(),
                              malicious={"model": Malicious()}, no_null=state).items():
        torch.save(content, world / f"{name}.pt")
    return world

SETS = "run.pt --num-samples 2 --cfg-scale 1"
REFUSED = [
    ("run.pt --classes zebra", "ant, bee, cat"), ("run.pt --classes 3", "0..2"), ("run.pt --classes=-1", "-1"),
    ("run.pt --steps 1001", "--steps"), ("run.pt --steps 0", "--steps"), ("run.pt --sampler euler", "ddpm"),
    ("run.pt --per-class 0", "--per-class"), ("run.pt --seed -1", "--seed"), ("run.pt --cfg-scale nan", "--cfg-scale"),
    ("run.pt --batch-size 0", "--batch-size"), ("run.pt --frames 2", "--frames"), ("run.pt --dtype fp16", "bf16"),
    ("run.pt --device tpu", "--device auto"), ("run.pt --vae x", "makes pixels"), ("run.pt --bench", "--bench"),
    ("run.pt --out x.txt", ".png"), ("run.pt --out no/x.png", "no/x.png"), ("run.pt --gif x.mp4", ".gif"),
    ("run.pt --out text.pt/x.png", "text.pt/x.png"), ("run.pt --out EMPTY", "EMPTY"),
    ("run.pt --gif x.gif --batch-size 9", "--batch-size"), ("run.pt --labels run.pt", "--num-samples"),
    (f"{SETS} --num-samples 0", "--num-samples"), ("run.pt --num-samples 2", "--cfg-scale"),
    (f"{SETS} --gif x", "--gif"), (f"{SETS} --classes 1", "--labels"), (f"{SETS} --labels no.txt", "no.txt"),
    ("latent.pt --vae EMPTY", "AutoencoderKL"), ("latent.pt --vae OTHER-VAE", "3 channels of 1/4 of the size"),
    ("latent.pt --vae no/such/vae", "no VAE 'no/such/vae'"), ("run.pt --num-heads 2", "has 4 heads"),
    ("latent.pt --cfg-channels 5", "1 to 4"), ("latent.pt --cfg-channels 0", "--cfg-channels"),
    ("no_null.pt --cfg-scale 2", "--cfg-scale 1"), ("no_null.pt --cfg-scale 0", "label dropout"),
    *((f"{name}.pt", f"{name}.pt") for name in "missing text empty half flipped other types malicious".split())]

@pytest.mark.parametrize("flags,words", REFUSED)
def test_a_mistake_is_one_line_and_nothing_is_written(flags, words, world, monkeypatch):
    """Nor is anything in a file executed."""
    monkeypatch.chdir(world)
    assert words in refusal(sample.main, "--device cpu --steps 1", flags)

def test_torchrun_is_for_sets(world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setenv("RANK", "0")
    assert "--num-samples" in refusal(sample.main, "run.pt")

def test_without_a_null_label_there_is_no_guidance(world, tmp_path):
    sample_py(world / "no_null.pt", "--steps 2 --out", tmp_path / "x.png")
    sample_py(world / "no_null.pt", "--steps 2 --cfg-scale 1 --out", tmp_path / "y.png")
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()


# Helpers that train.py shares -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("disk full")])  # torch turns one into the other
def test_a_file_is_replaced_only_by_a_whole_one(error, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(sample.UserError, match=f"cannot write {path} .*disk full"):
        with sample.atomic_write(path) as file:
            file.write(b"half")
            raise error
    assert contents(tmp_path) == {"file": b"before"}
    with sample.atomic_write(path) as file:
        file.write(b"after")
    assert contents(tmp_path) == {"file": b"after"}
    with pytest.raises(sample.UserError, match="cannot write"), sample.atomic_write(path / "in a file"):
        pass

def test_each_process_of_torchrun_takes_a_gpu_of_its_own(monkeypatch):
    """And on CUDA alone, float32 matrices are multiplied in TF32."""
    tf32 = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: argparse.Namespace(device=torch.device(device)))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", tf32.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [str(sample.pick_device(name)) for name in ("auto", "cuda", "cuda:1")] == ["cuda:3", "cuda:3", "cuda:1"]
    assert str(sample.pick_device("cpu")) == "cpu" and tf32 == ["high"] * 3

@pytest.mark.parametrize("error,status,words", [
    (MemoryError(), 2, "use less"), (RuntimeError("out of memory"), 2, "use less"), (RuntimeError("bug"), None, ""),
    (RuntimeError("can't allocate memory"), 2, "use less"), (RuntimeError("RESOURCE_EXHAUSTED: hbm"), 2, "use less"),
    (type("NoCompiler", (RuntimeError,), dict(__module__="torch._inductor.exc"))("no c++"), 2, "--no-compile"),
    (sample.UserError("two\nlines", status=3), 3, ": two lines"), (KeyboardInterrupt(), 130, "")])
def test_an_error_that_the_user_can_fix_is_one_line(error, status, words, capsys):
    """A bug keeps its traceback."""
    def main(argv):
        raise error

    with pytest.raises(SystemExit if status else RuntimeError) as end:
        sample.run(main, less_memory="use less")
    said = capsys.readouterr().err
    assert getattr(end.value, "code", None) == status and words in said and said.count("\n") == (words != "")
