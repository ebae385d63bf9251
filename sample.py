"""Guided images from a checkpoint: a grid with one row a class, and on request the film of their denoising.

    python sample.py runs/shapes/ckpt.pt                                      # samples.png, 8 images of each class
    python sample.py runs/shapes/ckpt.pt --classes star,heart --cfg-scale 1   # classes by name or number; no guidance
    python sample.py runs/shapes/ckpt.pt --sampler ddim --steps 50 --seed 1   # faster; other noise
    python sample.py runs/shapes/ckpt.pt --gif film.gif                       # x_t beside the predicted x_0

All that concerns the model (sizes, classes, pixels) is in the checkpoint. Image i of a run depends on its class, --seed
and i alone, so that neither the number of images nor the batch size changes it.
"""
import argparse
import contextlib
import os
import signal
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dit import DiT, GaussianDiffusion

# ----------------------------------------------------------------------------------------------------------------------
# The command line's manners, shared with train.py


class UserError(Exception):
    """A mistake of the user's, to be told in one line that says what is wrong and what to do."""
    status = 2

    def __init__(self, message):
        super().__init__(" ".join(message.split()))                 # one line, whatever a library put into it


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are UserErrors, and which takes no abbreviated flags."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (--help lists what there is)")


def run(main):
    """main(), with a UserError as one line and its exit status in place of a traceback."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"{Path(sys.argv[0]).name}{rank}: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def exit_on_sigterm():
    """Have SIGTERM clean up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


@contextlib.contextmanager
def replacing(path, mode="wb", **kwargs):
    """A file to write that takes the name `path` when it is whole and on the disk; until then, what was there stays."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, mode, **kwargs) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def pick_device(name):
    """torch.device for auto (cuda, then mps, then cpu) or a device's name; UserError if this machine has it not."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    try:
        device = torch.device(name)
        found = available.get(device.type, False) and (device.index or 0) < max(1, torch.cuda.device_count())
    except RuntimeError:
        found = False
    if not found:
        there = ", ".join(kind for kind, there in available.items() if there)
        raise UserError(f"no device {name!r} here: take --device auto, or one of {there}")
    return device


# ----------------------------------------------------------------------------------------------------------------------
# Models


def load_checkpoint(path, mmap=False):
    """The dict that train.py saved, on the CPU. Nothing in the file is executed. UserError if it is no such file.

    mmap reads a tensor when it is used; without it every byte is read at once, and compared with its checksum.
    """
    try:
        if not mmap and zipfile.ZipFile(path).testzip():
            raise ValueError("a bit has flipped")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}: give the path of a ckpt.pt that train.py wrote") from None
    except Exception:                                               # the bytes decide what the unpickler raises
        raise UserError(f"{path} is not a checkpoint, or a damaged one: give a ckpt.pt that train.py wrote") from None
    kinds = dict(model=dict, ema=dict, opt=dict, step=int, config=dict, model_args=dict, class_names=list)
    found = checkpoint if isinstance(checkpoint, dict) else {}
    lacking = [name for name, kind in kinds.items() if not isinstance(found.get(name), kind)]
    if lacking:
        raise UserError(f"{path} is not a checkpoint of train.py: it lacks {', '.join(lacking)}")
    return checkpoint


def load_model(path_or_name, device="cpu"):
    """(model, info) of a checkpoint: its EMA weights, in eval mode, on `device`.

    info: dict(config, class_names (one a class), step, space), space being "pixel".
    """
    checkpoint = load_checkpoint(path_or_name)
    model = DiT(**checkpoint["model_args"])
    model.load_state_dict(checkpoint["ema"])
    info = dict(config=checkpoint["config"], class_names=checkpoint["class_names"], step=checkpoint["step"],
                space="pixel")
    return model.to(device).eval().requires_grad_(False), info


def default_guidance(config):
    """The guidance of a run's pictures unless asked otherwise; 1, which is none, if it trained no null class."""
    return config["cfg_scale"] if config["label_drop"] > 0 else 1.0


# ----------------------------------------------------------------------------------------------------------------------
# Images


class ImageNoise:
    """Standard normal noise like x, of which image i's part is its own stream, keyed by (seed, i)."""

    def __init__(self, seed, indices):
        self.streams = [np.random.default_rng((seed, i)) for i in indices]

    def __call__(self, x):
        noise = np.stack([stream.standard_normal(x.shape[1:], dtype=np.float32) for stream in self.streams])
        return torch.from_numpy(noise).to(x.device, x.dtype)


@torch.no_grad()
def sample_images(model, labels, indices=None, *, seed=0, cfg_scale=4.0, steps=250, sampler="ddpm", clip_denoised=True,
                  progress=None, on_step=None):
    """Images (N, C, H, W) in [-1, 1] for the labels (N,), one a label.

    Image k has the noise of (seed, indices[k]); indices are 0..N-1 unless given. progress, on_step: see p_sample_loop.
    """
    device = next(model.parameters()).device
    indices = range(len(labels)) if indices is None else indices
    diffusion = GaussianDiffusion().respaced(steps).to(device)
    loop = {"ddpm": diffusion.p_sample_loop, "ddim": diffusion.ddim_sample_loop}[sampler]
    randn = ImageNoise(seed, indices)
    side = model.grid_size * model.patch_size
    noise = randn(torch.empty(len(labels), model.in_channels, side, side, device=device))
    y = torch.as_tensor(labels, dtype=torch.long, device=device)
    return loop(model.forward_with_cfg, noise, clip_denoised=clip_denoised, randn=randn, progress=progress,
                on_step=on_step, y=y, cfg_scale=cfg_scale)


def to_uint8(images):
    """[-1, 1] -> 0..255 by ADM's rounding: clamp(127.5 x + 128) cut to an integer."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8).cpu()


def grid_image(images, columns):
    """A PIL picture of uint8 images (N, 3, H, W), `columns` a row; small ones are enlarged, pixel by pixel."""
    from torchvision.utils import make_grid  # a second of importing that --help need not wait

    enlarge = max(1, 64 // images.shape[-1])
    images = images.repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
    return Image.fromarray(make_grid(images, nrow=columns, padding=4, pad_value=255).permute(1, 2, 0).numpy())


class Film:
    """on_step for sample_images: collects x_t beside the predicted x_0, to be saved as an animation."""

    def __init__(self, columns, steps, frames=60):
        self.columns, self.frames = columns, []
        self.shown = {round(i) for i in np.linspace(0, steps - 1, min(steps, frames))}

    def __call__(self, i, x_t, pred_xstart):
        if i in self.shown:
            pair = [np.asarray(grid_image(to_uint8(x), self.columns)) for x in (x_t, pred_xstart)]
            self.frames.append(Image.fromarray(np.concatenate(pair, axis=1)))

    def save(self, path, milliseconds=60, hold=2000):
        durations = [milliseconds] * (len(self.frames) - 1) + [hold]
        self.frames[0].save(path, save_all=True, append_images=self.frames[1:], duration=durations, loop=0)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def parse_classes(text, class_names):
    """Class numbers from "3,5" or "star,heart"; all classes, or ten spread over them, from None."""
    if text is None:
        return np.linspace(0, len(class_names) - 1, min(10, len(class_names))).round().astype(int).tolist()
    numbers = []
    for word in text.split(","):
        word = word.strip()
        if word in class_names:
            numbers.append(class_names.index(word))
        elif word.isdecimal() and int(word) < len(class_names):
            numbers.append(int(word))
        else:
            names = ", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else "")
            raise UserError(f"no class {word!r}: choose from 0..{len(class_names) - 1} or {names}")
    return numbers


def parse_args(argv):
    parser = Parser(prog="sample.py", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="a ckpt.pt that train.py wrote")
    parser.add_argument("--classes", help="names or numbers, separated by commas; default: all, ten at the most")
    parser.add_argument("--per-class", type=int, default=8, help="images of each class, in a row (default: 8)")
    parser.add_argument("--cfg-scale", type=float, help="1.0 = no guidance, 0.0 = unconditional (default: the run's)")
    parser.add_argument("--steps", type=int, default=250, help="of the 1000 timesteps (default: 250)")
    parser.add_argument("--sampler", choices=["ddpm", "ddim"], default="ddpm", help="ddim is good in fewer steps")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images (default: 0)")
    parser.add_argument("--batch-size", type=int, default=128, help="images that are denoised together (default: 128)")
    parser.add_argument("--out", default="samples.png", help="the picture to write (default: samples.png)")
    parser.add_argument("--gif", help="an animation to write as well: x_t beside the predicted x_0")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    args = parser.parse_args(argv)
    for name, low, high in [("per_class", 1, 1000), ("steps", 1, 1000), ("batch_size", 1, 10**5), ("seed", 0, 2**63)]:
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} is out of range: {low} to {high}")
    if args.cfg_scale is not None and not np.isfinite(args.cfg_scale):
        raise UserError(f"--cfg-scale {args.cfg_scale} is no number to guide with: 1.0 is no guidance, 4.0 is strong")
    for path, kinds in [(args.out, (".png", ".jpg")), (args.gif, (".gif",))]:
        if path is not None and (not path.endswith(kinds) or Path(path).is_dir()):
            raise UserError(f"{path} should be a file that ends in {' or '.join(kinds)}")
        if path is not None and not (Path(path).parent.is_dir() and os.access(Path(path).parent, os.W_OK)):
            raise UserError(f"no folder {Path(path).parent} to write {path} into: make it first")
    return args


def main(argv):
    args = parse_args(argv)
    exit_on_sigterm()
    model, info = load_model(args.checkpoint, pick_device(args.device))
    if args.cfg_scale is None:
        args.cfg_scale = default_guidance(info["config"])
    if args.cfg_scale != 1 and info["config"]["label_drop"] == 0:
        raise UserError("this checkpoint was trained without label dropout, so it has no null class to guide against: "
                        "take --cfg-scale 1")
    classes = parse_classes(args.classes, info["class_names"])
    labels = [c for c in classes for _ in range(args.per_class)]
    film = Film(args.per_class, args.steps) if args.gif else None
    if film and len(labels) > args.batch_size:
        raise UserError(f"--gif shows one batch: ask for fewer than {len(labels)} images or a --batch-size of as many")
    images = []
    with tqdm(total=len(labels) * args.steps, desc="sampling", unit="step", unit_scale=True) as bar:
        def on_step(i, x_t, pred_xstart):
            bar.update(len(x_t))
            if film:
                film(i, x_t, pred_xstart)

        for start in range(0, len(labels), args.batch_size):
            batch = labels[start:start + args.batch_size]
            images.append(to_uint8(sample_images(
                model, batch, range(start, start + len(batch)), seed=args.seed, cfg_scale=args.cfg_scale,
                steps=args.steps, sampler=args.sampler, on_step=on_step)))
    grid_image(torch.cat(images), args.per_class).save(args.out)
    if film:
        film.save(args.gif)
    print(f"{args.out}: {len(labels)} images, a row each of {', '.join(info['class_names'][c] for c in classes)}; "
          f"{args.sampler}, {args.steps} steps, guidance {args.cfg_scale:g}, seed {args.seed} (--seed for others)"
          + (f"; {args.gif}: x_t and the predicted x_0" if film else ""))


if __name__ == "__main__":
    run(main)
