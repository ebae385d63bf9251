"""train.py's data: shapes, crops, preparation in parts, latents, and what each process draws."""
import math
import shutil
import threading
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LATENT, full_disk
from PIL import Image

import sample
import train


def test_shapes_depend_on_their_number_alone_and_all_differ():
    images = [train.draw_shape(i, 16) for i in range(200)]
    assert all(np.array_equal(image, train.draw_shape(i, 16)) for i, image in enumerate(images))
    assert len({image.tobytes() for image in images}) == 200 and len(train.SHAPES) == 10
    assert images[0].shape == (16, 16, 3) and images[0].dtype == np.uint8

def test_center_crop_keeps_the_middle_enlarges_and_makes_rgb():
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, 10:50] = 200                                                        # the middle square
    cropped, small = (train.center_crop(image, 10) for image in (Image.fromarray(pixels), Image.new("L", (5, 7), 90)))
    assert cropped.shape == (10, 10, 3) and (abs(cropped.astype(int) - 200) <= 2)[:, 1:-1].all()
    assert small.shape == (10, 10, 3) and (small == 90).all()


# Preparation in parts -------------------------------------------------------------------------------------------------

@pytest.fixture
def cfg(pictures, tmp_path, monkeypatch):
    """24 pictures in 12 parts of two."""
    monkeypatch.setattr(train, "IMAGES_PER_PART", 2)
    return train.Config(data=str(pictures), image_size=6, cache=str(tmp_path / "cache"), device="cpu")

def prepare(cfg, source=None, rank=0, world=1):
    """The images and labels of prepare_data, in process `rank` of `world`."""
    rt = train.Runtime(cfg)
    rt.rank, rt.world = rank, world
    codec = train.Latents(cfg, rt) if cfg.vae else train.Pixels()
    images, labels = train.prepare_data(cfg, rt, source or train.open_source(cfg), codec)
    return [images[i].copy() for i in range(len(images))], labels

def watched(cfg, before_load=lambda i: None):
    """(source, the images it has loaded after the 20 that are part of the key). before_load may interfere."""
    source, loads, sampled = train.open_source(cfg), [], iter(range(20))

    def load(i):
        if next(sampled, None) is None:
            loads.append(int(i))
            before_load(i)
        return source.load(i)

    return source._replace(load=load), loads

def parts(cfg):
    """The only data set in the cache: its files by name, as bytes."""
    [folder] = Path(cfg.cache).iterdir()
    return {path.name: path.read_bytes() for path in folder.iterdir()}

def names(*starts):
    return [f"{start:07d}.npy" for start in starts]

def test_a_folder_becomes_images_and_labels(cfg):
    images, labels = prepare(cfg)
    assert len(images) == 24 and images[5].shape == (3, 6, 6) and images[5].dtype == np.uint8
    assert labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8 and sorted(parts(cfg)) == names(*range(0, 24, 2))
    greys = [int(image[0, 3, 3]) - (60 * (i // 8) + 5 * (i % 8)) for i, image in enumerate(images)]
    assert max(map(abs, greys)) <= 2                                              # each its own grey in the middle

def test_prepared_images_are_found_again(cfg):
    before, (source, loads) = prepare(cfg)[0], watched(cfg)
    assert np.array_equal(prepare(cfg, source)[0], before) and not loads

def test_other_code_another_size_or_a_touched_file_make_new_parts(cfg):
    before, source = prepare(cfg)[0], train.open_source(cfg)
    inverted = source._replace(load=lambda i: 255 - source.load(i))               # as if center_crop had changed
    assert np.array_equal(prepare(cfg, inverted)[0], 255 - np.array(before))
    touched, loads = watched(cfg)
    prepare(cfg, touched._replace(mtimes=[time + (i == 1) for i, time in enumerate(source.mtimes)]))
    cfg.image_size = 4
    assert len(loads) == 24 and prepare(cfg)[0][0].shape == (3, 4, 4) and len(list(Path(cfg.cache).iterdir())) == 4

def test_an_interrupted_preparation_keeps_its_finished_parts(cfg):
    def interrupt(i):
        if i == 16:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        prepare(cfg, watched(cfg, interrupt)[0])
    assert sorted(parts(cfg)) == names(*range(0, 16, 2))
    source, loads = watched(cfg)
    images, _ = prepare(cfg, source)
    assert sorted(loads) == list(range(16, 24))
    assert all(np.array_equal(images[i], source.load(i).transpose(2, 0, 1)) for i in range(24))

def test_processes_share_the_parts_and_wait_for_no_other(cfg):
    """One is held up in its first part until the other has finished all: this part alone is made twice."""
    prepare(cfg)
    whole, held, go_on = parts(cfg), threading.Event(), threading.Event()
    shutil.rmtree(cfg.cache)

    def hold(i):
        held.set()
        assert go_on.wait(timeout=60)
    (slow, slow_loads), (fast, fast_loads) = watched(cfg, hold), watched(cfg)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(prepare, cfg, slow, 0, 2)
        try:
            assert held.wait(timeout=60) and len(prepare(cfg, fast, 1, 2)[0]) == 24
        finally:
            go_on.set()
        assert len(first.result()[0]) == 24 and parts(cfg) == whole
    firsts = [min(fast_loads[k:k + 2]) for k in range(0, 24, 2)]                  # its share; the rest from the end
    assert firsts == [2, 6, 10, 14, 18, 22, 20, 16, 12, 8, 4, 0] and sorted(slow_loads) == [0, 1]

def test_a_damaged_part_is_named_and_made_again_once_removed(cfg):
    before, [folder] = prepare(cfg)[0], Path(cfg.cache).iterdir()
    path = folder / "0000004.npy"
    whole = path.read_bytes()
    for damaged in (whole[:100], whole[:-1], b""):
        path.write_bytes(damaged)
        with pytest.raises(sample.UserError, match=f"{path} is damaged .*: remove it"):
            prepare(cfg)
    path.unlink()
    assert np.array_equal(prepare(cfg)[0], before)

def test_a_part_appears_whole_or_not_at_all(cfg, monkeypatch):
    """Half a part that a killed process has left does not matter."""
    before, [folder] = prepare(cfg)[0], Path(cfg.cache).iterdir()
    path = folder / "0000004.npy"
    path.rename(f"{path}.0123abcd.part")
    with monkeypatch.context() as disk, pytest.raises(sample.UserError, match=f"cannot write {path} .disk full"):
        disk.setattr(np, "save", full_disk)
        prepare(cfg)
    assert not path.exists() and np.array_equal(prepare(cfg)[0], before)

def test_a_large_data_set_has_at_most_200_parts(cfg, monkeypatch):
    """Each part is an open file."""
    assert train.MOST_PARTS == 200
    monkeypatch.setattr(train, "MOST_PARTS", 3)
    assert len(prepare(cfg)[0]) == 24 and sorted(parts(cfg)) == names(0, 8, 16)

@pytest.mark.parametrize("online", [True, False])
def test_cifar10_comes_from_torchvision_or_ends_in_one_line(online, cfg, monkeypatch):
    import torchvision

    def cifar10(root, download):
        if not online:
            raise urllib.error.URLError("no\nnetwork")
        return SimpleNamespace(data=data, targets=[1, 0, 1, 0], classes=["a", "b"])

    data = np.random.default_rng(0).integers(256, size=(4, 32, 32, 3), dtype=np.uint8)
    cfg.data, cfg.image_size = "cifar10", 32
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", cifar10)
    if online:
        images, labels = prepare(cfg)
        assert np.array_equal(images, data.transpose(0, 3, 1, 2)) and labels.tolist() == [1, 0, 1, 0]
    else:
        with pytest.raises(sample.UserError, match="--data"):
            train.open_source(cfg)


# Latents --------------------------------------------------------------------------------------------------------------

def test_latents_are_the_posterior_of_an_image_and_of_its_mirror(cfg, vae_folder):
    """Means and deviations are diffusers', of one image at a time, rounded to float16."""
    from diffusers import AutoencoderKL

    cfg.image_size, cfg.vae = 32, str(vae_folder)
    source, vae, (moments, _) = train.open_source(cfg), AutoencoderKL.from_pretrained(vae_folder).eval(), prepare(cfg)
    assert len(moments) == 24 and moments[0].shape == (2, 8, 4, 4) and moments[0].dtype == np.float16
    for i in (0, 9, 23):
        image = torch.from_numpy(source.load(i).copy()).permute(2, 0, 1)[None] / 255 * 2 - 1
        for view, ours in zip((image, image.flip(-1)), moments[i].astype(np.float32), strict=True):
            with torch.no_grad():
                posterior = vae.encode(view).latent_dist
            expected = torch.cat([posterior.mean, (posterior.logvar / 2).exp()], dim=1)[0].numpy()
            np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-5)
    assert np.abs(moments[0][0, :, :, ::-1].astype(float) - moments[0][1]).max() > 0.01     # not the mirrored latent

def test_a_broken_image_is_reported_before_any_is_encoded(cfg, vae_folder, monkeypatch):
    def broken(i):
        if i == 23:
            raise sample.UserError("cannot read the image 23")
    cfg.image_size, cfg.vae = 32, str(vae_folder)
    monkeypatch.setattr(train.Latents, "encode", None)
    with pytest.raises(sample.UserError, match="image 23"):
        prepare(cfg, watched(cfg, broken)[0])

@pytest.fixture(scope="module")
def other_vae(vae_folder, tmp_path_factory):
    """The same VAE, but for the weights of one layer."""
    from diffusers import AutoencoderKL

    vae, folder = AutoencoderKL.from_pretrained(vae_folder), tmp_path_factory.mktemp("vae") / "other"
    torch.nn.init.normal_(vae.encoder.conv_in.weight)
    vae.save_pretrained(folder)
    return folder

def test_another_vae_or_size_makes_other_latents(cfg, vae_folder, other_vae):
    for cfg.vae, cfg.image_size in [(vae_folder, 32), (other_vae, 32), (vae_folder, 48)]:
        prepare(cfg)
    assert len(list(Path(cfg.cache).iterdir())) == 3

def test_a_run_on_latents_is_resumed_with_its_vae_only(run, vae_folder, other_vae, tmp_path):
    """The VAE may have moved."""
    begun = run(LATENT, vae_folder, "--steps 2")
    config, sizes = begun.state["config"], begun.state["model_args"]
    assert config["scale"] == 0.18215 and (sizes["in_channels"], sizes["input_size"]) == (4, 4)
    assert "another --vae" in run("--steps 4 --vae", other_vae, resume=begun, status=2).text
    assert "the run has" in run("--steps 4 --vae ''", resume=begun, status=2).text             # pixels
    run("--steps 4 --vae", shutil.copytree(vae_folder, tmp_path / "moved"), resume=begun)
    assert begun.state["step"] == 4 and len(list(run.cache.iterdir())) == 1

def test_a_run_on_latents_ends_in_pictures(run, vae_folder, tmp_path):
    """Its grid and sample.py's show the VAE's images of the latents, eight times as large and then enlarged to 64."""
    latent = run(LATENT, vae_folder, "--steps 2 --sample-every 2")
    sample.main(f"{latent.out} --classes bee --per-class 2 --steps 3 --device cpu --out {tmp_path}/x.png".split())
    assert latent.picture(2).shape[:2] == (3 * 68 + 4, 8 * 68 + 4) and Image.open(tmp_path / "x.png").size == (140, 72)
    model, info = sample.load_model(latent.checkpoint)
    latents = sample.sample_images(model, [0, 1, 2], [0, 8, 16], steps=25, sampler="ddim", clip_denoised=False)
    images = sample.to_uint8(sample.decode(sample.load_vae(vae_folder), latents, 0.18215))
    difference = latent.picture(2)[:, :68 + 4] - np.asarray(sample.grid_image(images, 1))
    assert np.abs(difference).max() <= 1 and info["space"] == "latent"


# What is drawn --------------------------------------------------------------------------------------------------------

def draw_latents(mean, std, step):
    """(x, noise) of a step on 64 images. `mean` and `std`: (64, 2), of the posterior of an image and of its mirror."""
    moments = np.stack([mean, std], axis=2)[..., None, None].repeat(4, 2).repeat(4, 3).repeat(4, 4)
    cfg = train.Config(batch_size=64, vae="vae", seed=3)
    x, _, _, noise, _ = train.draw_batch(cfg, moments.astype(np.float16), np.arange(64), step)
    return x / 0.18215, noise

def test_latents_are_those_of_the_image_or_of_its_mirror():
    """Without a deviation a latent is the mean: here the image's number, and a half more for its mirror image."""
    mean = np.arange(64)[:, None] + np.array([0, 0.5])
    values = [draw_latents(mean, np.zeros((64, 2)), step)[0].round(decimals=3) for step in (1, 2)]
    assert values[0].shape == (64, 4, 4, 4) and values[0].dtype == torch.float32
    assert all((x == x[:, :1, :1, :1]).all() for x in values)
    first, second = (x[:, 0, 0, 0].sort().values for x in values)
    assert torch.equal(first.floor(), torch.arange(64.0)) and torch.equal(second.floor(), torch.arange(64.0))
    assert 16 < (first % 1 == 0.5).sum() < 48 and not torch.equal(first, second)

def test_latents_are_drawn_afresh_from_their_posterior():
    """With mean 0 and deviation 1 they are standard normal, new at each step, and independent of the loss's noise."""
    draws = [draw for step in range(1, 21) for draw in draw_latents(np.zeros((64, 2)), np.ones((64, 2)), step)]
    draws = torch.stack(draws).flatten(1).double()                                # 40 rows of 4096 numbers
    correlation = draws @ draws.T / draws.shape[1] - torch.eye(len(draws))
    assert correlation.abs().max() < 5 * math.sqrt(2 / draws.shape[1])            # five sigmas, also of the variances
    assert draw_latents(np.zeros((64, 2)), np.full((64, 2), 3.0), 1)[0].std().item() == pytest.approx(3, rel=0.1)

def test_a_process_draws_its_share_alone(monkeypatch):
    """Examples 4..7 of a batch of 12: one generator each, keyed by seed, step and example."""
    images, keys, default_rng = np.zeros((30, 3, 4, 4), np.uint8), [], np.random.default_rng
    cfg = train.Config(batch_size=12, seed=7)
    train.draw_batch(cfg, images, np.arange(30), 5)                               # the order of the images is kept
    monkeypatch.setattr(np.random, "default_rng", lambda key: keys.append(key) or default_rng(key))
    assert len(train.draw_batch(cfg, images, np.arange(30), 5, slice(4, 8))[0]) == 4
    assert keys == [(7, 5, i) for i in range(4, 8)]

def test_batches_are_drawn_one_step_ahead(monkeypatch):
    """While the loop is at step k, k + 1 is drawn already. An error there is raised where its batch is asked for."""
    cfg = train.Config(batch_size=4, steps=5, image_size=8, device="cpu", dtype="fp32")
    data = np.random.default_rng(0).integers(256, size=(6, 3, 8, 8), dtype=np.uint8), np.arange(6)
    drawn, whole = {step: threading.Event() for step in range(1, 8)}, train.draw_batch

    def draw_batch(cfg, images, labels, step, share):
        drawn[step].set()
        if step == 5:
            raise OSError("the disk is gone")
        return whole(cfg, images, labels, step, share)

    monkeypatch.setattr(train, "draw_batch", draw_batch)
    steps = train.batches(cfg, train.Runtime(cfg), *data, 2)
    number, batch = next(steps)
    assert number == 3 and not drawn[1].is_set() and drawn[4].wait(timeout=60) and not drawn[5].is_set()
    assert all(map(torch.equal, batch, whole(cfg, *data, 3))) and next(steps)[0] == 4
    with pytest.raises(OSError, match="the disk is gone"):
        next(steps)

def test_unconditional_training_is_one_class(run, pictures, tmp_path):
    shutil.copytree(pictures / "bee", tmp_path / "data" / "mine")
    one = run("--label-drop 0 --sample-every 6 --data", tmp_path / "data")
    assert one.state["class_names"] == ["mine"] and one.picture(6).shape == (68 + 4, 8 * 68 + 4, 3)
