"""Measure checkpoints, all on the same images, timesteps and noise: losses, likelihood, samples.

    python studies/measure.py runs/shapes                       # two minutes on one core
    python studies/measure.py runs/a runs/b --samples 0         # also the second's difference to the first
    python studies/measure.py runs/cifar10 --data test          # held-out pictures, one folder per class
    torchrun --nproc_per_node=8 studies/measure.py runs/cifar10 --data test --images 10000 --samples 5000

What each number is good for: docs/measuring.md.
"""
import copy
import csv
import dataclasses
import os
import sys
from pathlib import Path

import judge
import numpy as np
import torch
import torch.distributed as dist

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
    return judge.real_shapes(range(20_000, 20_000 + n), size)


def draws(i, shape):
    """The timesteps (4,), one in each quarter of 0..999, and the noise (4, C, H, W) of image i, for any model."""
    rng = np.random.default_rng((i, 1))                         # numpy pads short keys with zeros
    t = 250 * np.arange(QUARTERS) + rng.integers(250, size=QUARTERS)
    return torch.from_numpy(t), torch.from_numpy(rng.standard_normal((QUARTERS, *shape), dtype=np.float32))


@torch.no_grad()
def validation_losses(model, images, labels, numbers=None, batch_size=64, null=True):
    """{"mse", "vb", "null": (n, 4)} of the images x_0 in [-1, 1], one column for each quarter of the timesteps.

    numbers: of the images, for draws; 0 to n - 1 by default. null: eps-mse with the null label in place of the image's
    own.
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
            found.append(diffusion.training_losses(model, x, t, noise, y=torch.full_like(y, model.num_classes))["mse"])
        columns.append(torch.stack(found).view(len(found), -1, QUARTERS).double().cpu())
    return dict(zip(("mse", "vb", "null"), torch.cat(columns, dim=1), strict=False))


def summary(losses):
    """The means of validation_losses, as the files of reference values and of the studies have them."""
    quarters = {f"mse_q{k}": mse.item() for k, mse in enumerate(losses["mse"].mean(0), start=1)}
    return dict(mse=losses["mse"].mean().item(), vb=losses["vb"].mean().item(), **quarters,
                label_use=(losses["null"] - losses["mse"]).mean().item())


def bound_draws(i):
    """Timesteps (32,) of image i from q(t) = ln((t + 1) / t) / ln 1000, t = 1 to 999, in strata; and 1 / (32 q)."""
    u = (np.arange(DRAWS) + np.random.default_rng((i, 2)).random(DRAWS)) / DRAWS
    t = torch.from_numpy(1000 ** u).long().clamp(1, 999)        # q sums to ln(t + 1) / ln 1000
    return t, np.log(1000) / torch.log1p(1 / t) / DRAWS


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
        x, y, some = (all_of[first:first + batch_size] for all_of in (images, labels, numbers))
        randn = sample.ImageNoise(10 ** 9, some)                # not the noise that samples start from
        total = exactly.bits_per_dim(model, x, randn, y=y)["total"]
        t, weights = (torch.stack(column, dim=1).to(x.device) for column in zip(*map(bound_draws, some), strict=True))
        for t, weight in zip(t, weights, strict=True) if not exact else []:
            x_t = diffusion.q_sample(x, t, randn(x))
            out = diffusion._call(model, x_t, t, dict(y=y))
            total = total + weight * diffusion._vb_terms_bpd(out, x, x_t, t, clip_denoised=True)
        totals.append(total.double().cpu())
    return torch.cat(totals)


def gathered(rt, part, n):
    """The n rows of all processes; this one has the rows rt.share(n)."""
    whole = part.new_zeros(n, *part.shape[1:])
    whole[rt.share(n)] = part
    if rt.world > 1:
        dist.all_reduce(whole)
    return whole


class HeldOut:
    """Images for a checkpoint that it was not trained on: of the built-in set, or a folder's in a fixed order."""

    def __init__(self, path, info, data, rt):
        self.latent, size = info["space"] == "latent", info["model_args"]["input_size"]
        self.cfg = train.Config(data=os.path.abspath(data or "shapes"), image_size=8 * size if self.latent else size,
                                vae=info["config"]["vae"] if self.latent else "")
        self.built_in = not data
        if self.built_in and info["config"].get("data") != "shapes":
            raise UserError(f"{path} was not trained on the built-in set: give --data FOLDER, with held-out pictures "
                            "in one folder per class")
        if self.built_in:
            labels = [i % len(train.SHAPES) for i in range(10 ** 6)]
            self.source = train.Source([], [], list(train.SHAPES), labels, lambda i: train.draw_shape(i, size))
            self.order = np.arange(20_000, 10 ** 6)
        else:
            self.source = train.open_folder(self.cfg)
            self.order = np.random.default_rng(0).permutation(len(self.source.labels))
        theirs, ours = (list(map(train.nfc, names)) for names in (self.source.class_names, info["class_names"]))
        imagenet = len(theirs) == len(ours) and (theirs[0], ours[0]) == ("n01440764", "tench")
        if theirs != ours and not imagenet:
            raise UserError(f"--data {data} has the classes {', '.join(theirs[:5])} ({len(theirs)}), {path} has "
                            f"{', '.join(ours[:5])} ({len(ours)}): give pictures of the same classes")
        self.codec = train.Latents(self.cfg, rt) if self.latent else train.Pixels()

    def pictures(self, numbers):
        """(uint8 (n, 3, I, I), classes (n,)) of these images, counted from 0."""
        indices = [self.order[i] for i in numbers]
        images = np.stack([self.source.load(i) for i in indices]).transpose(0, 3, 1, 2).copy()
        return torch.from_numpy(images), torch.tensor([self.source.labels[i] for i in indices])

    def encode(self, images):
        """x_0 of uint8 images: pixels in [-1, 1], or the mean of the VAE's posterior."""
        if self.latent:
            moments = torch.from_numpy(self.codec.encode(images.permute(0, 2, 3, 1).numpy()))
            return train.SCALE * moments[:, 0, :4].float()
        return images / 127.5 - 1


def verdict(info, losses, folder=REFERENCE):
    """Whether mse and vb of the first 512 unseen shapes lie where the seeds of the checkpoint's preset do, in words."""
    config, ours, images = info["config"], summary(losses), len(losses["mse"])
    path = Path(folder) / f"{config['preset']}.csv"
    cfg = train.Config(**train.PRESETS[config["preset"]])
    free = train.MAY_CHANGE | {"preset", "block", "seed", "out", "resume"}
    different = [f"--{name.replace('_', '-')} {config.get(name)}" for name, value in dataclasses.asdict(cfg).items()
                 if name not in free and config.get(name) != value]
    if different:
        return f"no reference for {', '.join(different)}"
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    rows = [row for row in rows if (row["block"], int(row["step"])) == (config["block"], info["step"])]
    if not rows or images < REFERENCE_IMAGES:
        return f"no reference for step {info['step']} of {config['block']}, {images} images"
    said = []
    for name in ("mse", "vb"):
        values, errors = ([float(row[column]) for row in rows] for column in (name, f"{name}_error"))
        low, high = min(values) - 3 * max(errors), max(values) + 3 * max(errors)
        said.append(f"{name} {'inside' if low <= ours[name] <= high else 'OUTSIDE'} {low:.5f} to {high:.5f}")
    return f"{'; '.join(said)} ({len(rows)} seeds of the preset)"


def draw(model, labels, rt, codec, cfg_scale, steps):
    """uint8 samples (n, 3, I, I) with these labels, of all processes."""
    mine, parts = range(len(labels))[rt.share(len(labels))], []
    for k in range(0, len(mine), 100):
        some = mine[k:k + 100]
        x = sample.sample_images(model, labels[some], some, cfg_scale=cfg_scale, steps=steps, sampler="ddim")
        parts.append(sample.to_uint8(codec.decode(x)))
    return gathered(rt, torch.cat(parts), len(labels))


def with_error(values):
    return f"{values.mean():.5f} +- {values.std() / len(values) ** 0.5:.5f}"


def main(argv):
    flags = sample.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = flags.add_argument
    add("checkpoints", nargs="+", metavar="CKPT", help="of train.py or official; the others are compared with the first")
    add("--data", help="held-out pictures, one folder per class (a run on the built-in set needs none)")
    add("--images", type=between(int, 20), default=REFERENCE_IMAGES, help="for losses and likelihood (512)")
    add("--exact", action="store_true", help="the likelihood by all 1000 timesteps, which takes 30 times as long")
    add("--samples", type=between(int, 0), default=500, help="to draw with and without guidance; 0: none (500)")
    add("--steps", type=between(int, 1, 1001), default=25, help="of ddim (25)")
    add("--cfg-scale", type=float, help="guidance of the samples (default: the run's)")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    args = flags.parse_args(argv)
    rt = train.Runtime(train.Config(device=args.device, dtype="fp32", batch_size=int(os.environ.get("WORLD_SIZE", 1))))

    # the models, and the images that all of them get
    models = [sample.load_model(path, rt.device) for path in args.checkpoints]
    first, info = args.checkpoints[0], models[0][1]
    for path, (_, other) in zip(args.checkpoints, models, strict=True):
        if takes(other) != takes(info):
            raise UserError(f"{path} takes other images or classes than {first}: measure it by itself")
    held_out = HeldOut(first, info, args.data, rt)
    n, half = min(args.images, len(held_out.order)), min(args.samples, len(held_out.order) // 2)
    if min(n, half) < 20 * bool(args.samples):
        raise UserError(f"{n} held-out pictures are too few: give at least 40, or 20 with --samples 0")
    numbers = range(n)[rt.share(n)]
    x, y = held_out.pictures(numbers)
    x, y = held_out.encode(x).to(rt.device), y.to(rt.device)

    # what judges samples, with the value of real images
    if args.samples and rt.rank == 0:
        the_judge = judge.Judge(x.shape[2]) if held_out.built_in else judge.ImageNet(rt.device)
        reference, (real, real_labels) = held_out.pictures(range(half))[0], held_out.pictures(range(half, 2 * half))
        print(f"{half} real images: {described(the_judge.score(real, real_labels, reference), the_judge)}", flush=True)
    labels = torch.tensor([held_out.source.labels[held_out.order[i % len(held_out.order)]] for i in range(args.samples)])

    firsts = {}
    for path, (model, info) in zip(args.checkpoints, models, strict=True):
        null = info["config"]["label_drop"] > 0
        losses = validation_losses(model, x, y, numbers, null=null)
        losses = {name: gathered(rt, values, n) for name, values in losses.items()}
        found = {"eps-mse": losses["mse"].mean(1), "vb": losses["vb"].mean(1)}
        if null:
            found["label use"] = (losses["null"] - losses["mse"]).mean(1)
        if not held_out.latent:
            found["bits/dim"] = gathered(rt, bits_per_dim(model, x, y, numbers, exact=args.exact), n)
        rt.say(f"\n{path}, step {info['step']}: {n} images")
        for name, values in found.items():
            difference = f"; minus {first}'s: {with_error(values - firsts[name])}" if name in firsts else ""
            rt.say(f"  {name:12}{with_error(values)}{difference}")
        rt.say("  by quarter  " + " ".join(f"{mse:.5f}" for mse in losses["mse"].mean(0)))
        if not null:
            rt.say("  label use   cannot be measured: trained without label dropout, so without a null label")
        if held_out.built_in and null:
            rt.say(f"  reference   {verdict(info, losses)}")
        firsts = firsts or found

        guidance = info["config"]["cfg_scale"] if args.cfg_scale is None else args.cfg_scale
        for scale in dict.fromkeys([1.0, guidance] if null else [1.0]) if args.samples else []:
            images = draw(model, labels, rt, held_out.codec, scale, args.steps)
            if rt.rank == 0:
                score = described(the_judge.score(images, labels, reference), the_judge)
                print(f"  guidance {scale:<3g}{len(images)} samples: {score}", flush=True)
    rt.close()


def takes(info):
    """What the model of a checkpoint takes."""
    return [info["model_args"][name] for name in ("input_size", "in_channels")], info["class_names"], \
        info["config"].get("vae")


def described(score, judge):
    """A score in words."""
    words = "{kid:.2f} +- {kid_error:.2f} KID x 1000 in the features of " + judge.name
    if "recognized" in score:
        words = "{recognized:.3f} recognized ({low:.3f} to {high:.3f}), " + words + ", {nearest:.1f} grey levels to a copy"
    return words.format(**score)


if __name__ == "__main__":
    sample.run(main, less_memory="measure fewer images at once: --images")
