"""Measure checkpoints, all on the same images, timesteps and noise: losses, likelihood, samples.

    python studies/measure.py runs/shapes                       # losses, likelihood, samples
    python studies/measure.py runs/a runs/b --samples 0         # also the second's difference to the first
    python studies/measure.py runs/cifar10 --data test          # held-out pictures, one folder per class
    torchrun --nproc_per_node=8 studies/measure.py runs/cifar10 --data test --images 10000 --samples 5000

What each number is good for: docs/measuring.md.
"""
import copy
import csv
import dataclasses
import functools
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from judge import ImageNet, Judge, real_shapes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sample
import train
from dit import GaussianDiffusion
from sample import UserError, between

QUARTERS, DRAWS = 4, 32                         # timesteps of an image, for the losses and for the bound
REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "reference"
REFERENCE_IMAGES = 512                          # that the values there are of


def unseen_shapes(n, size=16):
    """(uint8 (n, 3, size, size), classes (n,)) of the built-in set. A run trains on images 0 to 19,999."""
    return real_shapes(range(20_000, 20_000 + n), size)


def draws(i, shape):
    """The timesteps (4,), one in each quarter of 0..999, and the noise (4, C, H, W) of image i, for any model."""
    rng = np.random.default_rng((i, 1))                         # numpy pads short keys with zeros
    t = 250 * np.arange(QUARTERS) + rng.integers(250, size=QUARTERS)
    return torch.from_numpy(t), torch.from_numpy(rng.standard_normal((QUARTERS, *shape), dtype=np.float32))


@torch.no_grad()
def validation_losses(model, images, labels, numbers=None, batch_size=64, null=True):
    """{"mse", "vb", "null": (n, 4)} of the images x_0 in [-1, 1], one column for each quarter of the timesteps.

    numbers: which image this is, for draws; by default 0 to n - 1. null: also eps-mse with the null label.
    """
    diffusion, columns = GaussianDiffusion().to(images.device), []
    numbers = range(len(images)) if numbers is None else numbers
    for first in range(0, len(images), batch_size):
        x, y = images[first:first + batch_size], labels[first:first + batch_size]
        t, noise = zip(*(draws(i, x.shape[1:]) for i in numbers[first:first + batch_size]), strict=True)
        x, y = x.repeat_interleave(QUARTERS, dim=0), y.repeat_interleave(QUARTERS)
        t, noise = torch.cat(t).to(x.device), torch.cat(noise).to(x.device)
        terms = diffusion.training_losses(model, x, t, noise, y=y)
        found = [terms["mse"], terms["vb"]]
        if null:
            y = torch.full_like(y, model.num_classes)
            found.append(diffusion.training_losses(model, x, t, noise, y=y)["mse"])
        columns.append(torch.stack(found).view(len(found), -1, QUARTERS).cpu().double())
    return dict(zip(("mse", "vb", "null"), torch.cat(columns, dim=1), strict=False))


def summary(losses):
    """The means of validation_losses, as the files of reference values and of the studies have them."""
    quarters = {f"mse_q{k}": mse.item() for k, mse in enumerate(losses["mse"].mean(0), start=1)}
    return dict(
        mse=losses["mse"].mean().item(),
        vb=losses["vb"].mean().item(),
        **quarters,
        label_use=(losses["null"] - losses["mse"]).mean().item(),
    )


def bound_draws(i):
    """Timesteps (32,) of image i from q(t) = ln((t + 1) / t) / ln 1000, t = 1 to 999, in strata; and 1 / (32 q)."""
    u = (np.arange(DRAWS) + np.random.default_rng((i, 2)).random(DRAWS)) / DRAWS
    t = torch.from_numpy(1000 ** u).long().clamp(1, 999)        # q sums to ln(t + 1) / ln 1000
    return t, math.log(1000) / torch.log1p(1 / t) / DRAWS


@torch.no_grad()
def bits_per_dim(model, images, labels, numbers=None, batch_size=64, exact=False):
    """(n,): GaussianDiffusion.bits_per_dim of pixels x_0 in [-1, 1], by 33 passes an image instead of 1000; unbiased.

    The prior and the term at t = 0 are exact, the others are drawn. exact: all 1000 passes.
    """
    diffusion, totals = GaussianDiffusion().to(images.device), []
    numbers = range(len(images)) if numbers is None else numbers
    exactly = copy.copy(diffusion)
    exactly.num_timesteps = 1000 if exact else 1
    for first in range(0, len(images), batch_size):
        x, y, some = (every[first:first + batch_size] for every in (images, labels, numbers))
        randn = sample.ImageNoise(10 ** 9, some)                # not the noise that samples start from
        total = exactly.bits_per_dim(model, x, randn, y=y)["total"]
        timesteps, weights = zip(*map(bound_draws, some), strict=True)
        for k in range(0 if exact else DRAWS):
            t = torch.stack([one[k] for one in timesteps]).to(x.device)
            weight = torch.stack([one[k] for one in weights]).to(x.device)
            x_t = diffusion.q_sample(x, t, randn(x))
            out = diffusion._call(model, x_t, t, dict(y=y))
            total = total + weight * diffusion._vb_terms_bpd(out, x, x_t, t, clip_denoised=True)
        totals.append(total.cpu().double())
    return torch.cat(totals)


class HeldOut:
    """Images that a checkpoint was not trained on: of the built-in set, or a folder's in a fixed random order."""

    def __init__(self, path, info, data, rt):
        size, config = info["model_args"]["input_size"], info["config"]
        self.built_in, self.latent = data is None, info["space"] == "latent"
        cfg = train.Config(
            data=os.path.abspath(data or "."),
            image_size=8 * size if self.latent else size,
            vae=config["vae"] if self.latent else "",
        )
        if data:
            self.source = train.open_folder(cfg)
            self.order = np.random.default_rng(0).permutation(len(self.source.labels))
        elif config.get("data") == "shapes":
            labels = [i % 10 for i in range(200_000)]
            draw_one = functools.partial(train.draw_shape, size=size)
            self.source = train.Source([], [], list(train.SHAPES), labels, draw_one)
            self.order = np.arange(20_000, 200_000)
        else:
            raise UserError(f"{path} was not trained on the built-in set: give --data FOLDER, with held-out pictures "
                            "in one folder per class")

        theirs = list(map(train.nfc, self.source.class_names))
        ours = list(map(train.nfc, info["class_names"]))
        imagenet = len(theirs) == len(ours) and (theirs[0], ours[0]) == ("n01440764", "tench")
        if theirs != ours and not imagenet:
            raise UserError(f"--data {data} has {len(theirs)} classes ({', '.join(theirs[:3])}), {path} has "
                            f"{len(ours)} ({', '.join(ours[:3])}): give pictures of the same classes")
        self.codec = train.Latents(cfg, rt) if self.latent else train.Pixels()

    def labels(self, n):
        """The classes (n,) of the first n images. If there are fewer, they are repeated."""
        indices = np.resize(self.order, n)
        return torch.tensor([self.source.labels[i] for i in indices])

    def pictures(self, numbers):
        """uint8 (n, 3, I, I): these images, counted from 0."""
        images = np.stack([self.source.load(self.order[i]) for i in numbers])
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def encode(self, images):
        """x_0 of uint8 images: pixels in [-1, 1], or the mean of the VAE's posterior."""
        if not self.latent:
            return images / 127.5 - 1
        moments = torch.from_numpy(self.codec.encode(images.permute(0, 2, 3, 1).numpy()))
        return train.SCALE * moments[:, 0, :4].float()


def gathered(rt, part, n):
    """The n rows of all processes. This one computed rt.share(n)."""
    whole = part.new_zeros(n, *part.shape[1:])
    whole[rt.share(n)] = part
    if rt.world > 1:
        dist.all_reduce(whole)
    return whole


def error(values):
    """The standard error of the mean."""
    return (values.std() / len(values) ** 0.5).item()


def with_error(values):
    return f"{values.mean():.5f} +- {error(values):.5f}"


# Reference values -----------------------------------------------------------------------------------------------------

def verdict(info, losses):
    """Whether mse and vb of the first 512 unseen shapes lie where three seeds of the preset do, in words."""
    config, step = info["config"], info["step"]
    preset = dataclasses.asdict(train.Config(**train.PRESETS["shapes"]))
    fixed = preset.keys() - train.MAY_CHANGE - {"preset", "block", "seed", "out", "resume"}
    different = [
        f"--{name.replace('_', '-')} {config.get(name)}"
        for name in preset
        if name in fixed and config.get(name) != preset[name]
    ]
    if different:
        return f"none for {', '.join(different)}: it is of the preset"
    if len(losses["mse"]) != REFERENCE_IMAGES:
        return f"none: it is of {REFERENCE_IMAGES} images"
    path = REFERENCE / "shapes.csv"
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    rows = [row for row in rows if row["block"] == config["block"]]
    steps = sorted({int(row["step"]) for row in rows})
    if step not in steps:
        return f"none for step {step} of {config['block']}: it is of {', '.join(map(str, steps)) or 'no step'}"

    rows = [row for row in rows if int(row["step"]) == step]
    if len(rows) != 3:
        return f"none: {path} has {len(rows)} seeds of step {step}, not 3"
    said = []
    for name in ("mse", "vb"):
        seeds = [float(row[name]) for row in rows]
        margin = 5 * np.std(seeds, ddof=1)                          # Student's t: holds 19 of 20 other seeds
        low, high = np.mean(seeds) - margin, np.mean(seeds) + margin
        inside = low <= losses[name].mean() <= high
        said.append(f"{name} is {'inside' if inside else 'OUTSIDE'} {low:.5f} to {high:.5f}")
    return f"{', '.join(said)}: where 19 of 20 seeds of the preset would be, by three"


# The measurements -----------------------------------------------------------------------------------------------------

def report_losses(args, rt, path, model, info, images, first):
    """Print what is measured on held-out images; return it for each image. first: what this returned before."""
    held_out, n, x, y = images
    numbers = range(n)[rt.share(n)]
    null = info["config"]["label_drop"] > 0
    losses = validation_losses(model, x, y, numbers, null=null)
    losses = {name: gathered(rt, values, n) for name, values in losses.items()}
    found = {"eps-mse": losses["mse"].mean(1), "vb": losses["vb"].mean(1)}
    if null:
        found["label use"] = (losses["null"] - losses["mse"]).mean(1)
    if not held_out.latent:
        found["bits/dim"] = gathered(rt, bits_per_dim(model, x, y, numbers, exact=args.exact), n)

    rt.say(f"{path}, step {info['step']}, {n} held-out images")
    for name, values in found.items():
        paired = f"; minus the first's {with_error(values - first[name])}" if name in first else ""
        rt.say(f"  {name:12}{with_error(values)}{paired}")
    rt.say(f"  {'by quarter':12}" + " ".join(f"{mse:.5f}" for mse in losses["mse"].mean(0)))
    if not null:
        rt.say("  label use   none: trained without label dropout, so it has no null label")
    if held_out.built_in:
        rt.say(f"  reference   {verdict(info, losses)}")
    return found


def draw(args, rt, model, labels, codec, cfg_scale):
    """uint8 samples (n, 3, I, I) with these labels, from all processes."""
    mine = range(len(labels))[rt.share(len(labels))]
    parts = []
    for k in range(0, len(mine), 100):
        some = mine[k:k + 100]
        how = dict(cfg_scale=cfg_scale, steps=args.steps, sampler="ddim")
        x = sample.sample_images(model, labels[some], some, **how)
        parts.append(sample.to_uint8(codec.decode(x)))
    return gathered(rt, torch.cat(parts), len(labels))


def in_words(score):
    recognized = "{recognized:.3f} recognized ({low:.3f} to {high:.3f}), {nearest:.1f} grey levels to a copy, "
    return (recognized * ("recognized" in score) + "KID x 1000 {kid:.2f} +- {kid_error:.2f}").format(**score)


def takes(info):
    """What a model is given."""
    sizes = info["model_args"]
    return sizes["input_size"], sizes["in_channels"], info["class_names"], info["config"].get("vae")


def parse_args(argv):
    flags = sample.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = flags.add_argument
    add("checkpoints", nargs="+", metavar="CKPT", help="of train.py, or official; all are compared with the first")
    add("--data", help="held-out pictures, one folder per class (a run on the built-in set needs none)")
    add("--images", type=between(int, 20), default=REFERENCE_IMAGES, help="for losses and likelihood (512)")
    add("--exact", action="store_true", help="bits/dim from all 1000 timesteps: 30 times as long")
    add("--samples", type=between(int, 0), default=500, help="to draw with and without guidance; 0: none (500)")
    add("--steps", type=between(int, 1, 1001), default=25, help="of ddim (25)")
    add("--cfg-scale", type=between(float, -1000, 1000), help="guidance of the samples (default: the run's)")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    return flags.parse_args(argv)


def main(argv):
    args = parse_args(argv)
    world = int(os.environ.get("WORLD_SIZE", 1))
    rt = train.Runtime(train.Config(device=args.device, dtype="fp32", batch_size=world))
    models = {path: sample.load_model(path, rt.device) for path in args.checkpoints}
    first = args.checkpoints[0]
    first_info = models[first][1]
    for path, (_, info) in models.items():
        if takes(info) != takes(first_info):
            raise UserError(f"{path} takes other images or classes than {first}: measure it by itself")
    held_out = HeldOut(first, first_info, args.data, rt)
    n = min(args.images, len(held_out.order))
    half = min(args.samples, len(held_out.order) // 2)
    if n < 20 or 0 < args.samples and half < 20:
        raise UserError("too few images: KID takes 20 samples and 40 held-out pictures, the losses (--samples 0) 20")

    # what judges samples, and its value of real images
    labels = held_out.labels(args.samples)
    if args.samples and rt.rank == 0:
        judge = Judge(first_info["model_args"]["input_size"]) if held_out.built_in else ImageNet(rt.device)
        reference = held_out.pictures(range(half))
        real = held_out.pictures(range(half, 2 * half))
        real_labels = held_out.labels(2 * half)[half:]
        print(f"KID in the features of {judge.name}")
        print(f"  {half} real images: {in_words(judge.score(real, real_labels, reference))}", flush=True)

    share = range(n)[rt.share(n)]
    x = held_out.encode(held_out.pictures(share)).to(rt.device)
    y = held_out.labels(n)[share].to(rt.device)
    before = {}
    for path in args.checkpoints:
        model, info = models[path]
        found = report_losses(args, rt, path, model, info, (held_out, n, x, y), before)
        before = before or found
        guidance = sample.default_guidance(info["config"], info["class_names"])
        if args.cfg_scale is not None and info["config"]["label_drop"] > 0:
            guidance = args.cfg_scale
        for scale in dict.fromkeys([1.0, guidance]) if args.samples else []:
            images = draw(args, rt, model, labels, held_out.codec, scale)
            if rt.rank == 0:
                said = in_words(judge.score(images, labels, reference))
                print(f"  {len(images)} samples, guidance {scale:g}: {said}", flush=True)
    rt.close()


if __name__ == "__main__":
    sample.run(main, less_memory="measure fewer --images and --samples")
