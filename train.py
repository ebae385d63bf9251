"""Train a DiT.

    python train.py                                             # the built-in set of shapes: minutes on a laptop's CPU
    python train.py --preset cifar10                            # CIFAR-10, downloaded by torchvision
    python train.py --preset cifar10 --data FOLDER              # your pictures, one folder a class
    python train.py --preset cifar10 --block in-context         # another of the paper's four designs
    python train.py --preset imagenet256 --data FOLDER          # the paper's own: DiT-XL/2 on latents, encoded first
    python train.py --preset imagenet256 --data FOLDER --init DiT-XL/2-256      # from the official weights on
    python train.py --resume runs/shapes                        # go on where a run stopped
    torchrun --nproc_per_node=8 train.py --preset cifar10       # one process on each of 8 GPUs
    python train.py --preset cifar10 --device xla               # all chips of a TPU machine, or of a pod
    python train.py --preset imagenet256 --bench                # images/s, and what share of the device that is

A run's folder, runs/PRESET or --out, receives ckpt.pt, log.csv (step, loss, mse, vb, grad_norm, images_per_sec),
config.json and samples/*.png. Look at the pictures with sample.py.

Everything random in training is a function of (seed, step, example). A run on one process, on eight, on a TPU, or
resumed after a crash is therefore the same run, and a checkpoint needs no random state.
"""
import argparse
import colorsys
import contextlib
import copy
import csv
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock
from PIL import Image, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from dit import DESIGNS, Attention, DiT, DiT_models, GaussianDiffusion
from sample import (
    SCALE,
    VAE,
    Parser,
    UserError,
    decode,
    default_guidance,
    exit_on_sigterm,
    fit,
    forward_flops,
    grid_image,
    limits_told,
    load_checkpoint,
    load_vae,
    matrix_rate,
    parse_classes,
    peak_memory,
    pick_device,
    replacing,
    run,
    sample_images,
    speed,
    to_uint8,
    wait_for,
)

# ----------------------------------------------------------------------------------------------------------------------
# Settings: every field of Config is a flag


def flag(default, help):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class Config:
    # what to learn from
    preset: str = flag("shapes", "shapes, cifar10 or imagenet256: settings to start from; every other flag changes one")
    data: str = flag("shapes", "shapes (built in), cifar10 (downloaded), or a folder with one folder of images a class")
    image_size: int = flag(16, "side of the square images in pixels; others are scaled and cropped to it")
    vae: str = flag("", "train on latents of this VAE: a folder, or a name on the hub; nothing: on pixels")
    flip: bool = flag(True, "mirror half of the images (the paper's only augmentation)")
    cache: str = flag("runs/cache", "folder for prepared images")
    # the model (Table 1)
    model: str = flag("", "DiT-S/2 .. DiT-XL/8: sets the next four at once")
    patch_size: int = flag(4, "side p of a patch, in pixels or latents")
    hidden_size: int = flag(128, "width D")
    depth: int = flag(4, "number of blocks")
    num_heads: int = flag(4, "attention heads")
    block: str = flag("adaln-zero", f"the paper's design: {', '.join(DESIGNS)}")
    # optimization: the paper's Sec. 4 where a preset says nothing else
    steps: int = flag(400_000, "optimizer steps of the whole run")
    batch_size: int = flag(256, "images in one optimizer step, over all devices and --accum parts")
    accum: int = flag(1, "split each batch into so many parts, one after the other, to save memory")
    lr: float = flag(1e-4, "learning rate of AdamW (no weight decay)")
    lr_decay_steps: int = flag(0, "let the rate fall linearly to 0 over so many steps; 0 = constant, as in the paper")
    beta2: float = flag(0.999, "AdamW's second beta")
    init: str = flag("", "take the first weights from this checkpoint, a ckpt.pt or an official one")
    ema_decay: float = flag(0.9999, "decay of the averaged weights that are sampled from; warms up in short runs")
    label_drop: float = flag(0.1, "share of labels replaced by the null label, for guidance")
    seed: int = flag(0, "determines initial weights, order, flips, noise: all that is random")
    # the machine
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps, or xla for a TPU")
    dtype: str = flag("auto", "auto, fp32, bf16: auto is bf16 where the hardware multiplies in it")
    compile: bool | None = flag(None, "torch.compile the model; by default on CUDA only")
    grad_checkpoint: bool = flag(False, "recompute activations in the backward pass: less memory, a third more time")
    # what to leave behind
    out: str = flag("", "folder of the run; default runs/PRESET, or runs/FOLDER with --data FOLDER")
    log_every: int = flag(50, "steps between rows of log.csv; 0 = none")
    ckpt_every: int = flag(5000, "steps between checkpoints; 0 = the last alone")
    sample_every: int = flag(5000, "steps between sample grids; 0 = none")
    cfg_scale: float = flag(4.0, "guidance of the sample grids")
    resume: str = flag("", "folder of a run to go on with")
    bench: bool = flag(False, "time the steps (50) instead of training; with --data '' on made-up images")


PRESETS = {
    # 10 classes of 16x16 colour images, drawn by this file. fp32: its matrices are too small for bf16 to pay on a CPU.
    "shapes": dict(data="shapes", image_size=16, patch_size=4, hidden_size=128, depth=4, num_heads=4, flip=False,
                   steps=6000, batch_size=32, lr=4e-3, lr_decay_steps=6000, beta2=0.99, ema_decay=0.999, dtype="fp32",
                   log_every=100, ckpt_every=1000, sample_every=500, cfg_scale=2.0),
    # CIFAR-10 in pixel space with the paper's recipe; DiT-S/4 has the paper's 64 tokens of DiT-S/4 on latents.
    "cifar10": dict(data="cifar10", image_size=32, model="DiT-S/4", steps=100_000, batch_size=128, ema_decay=0.9995,
                    ckpt_every=1000, sample_every=1000, cfg_scale=3.0),
    # The paper's own: latents of 32x32x4; its tables have 400,000 steps, its best model 7,000,000.
    "imagenet256": dict(data="", image_size=256, vae=VAE, model="DiT-XL/2"),
}

# What --resume lets a flag change: all that does not make it another run. What --data and --vae hold is compared later.
MAY_CHANGE = {"data", "vae", "steps", "accum", "device", "dtype", "compile", "grad_checkpoint", "log_every",
              "ckpt_every", "sample_every", "cfg_scale", "cache"}

RANGES = {  # name: (at least, less than)
    "image_size": (1, 4097), "patch_size": (1, math.inf), "hidden_size": (4, math.inf), "depth": (1, math.inf),
    "num_heads": (1, math.inf), "steps": (1, math.inf), "batch_size": (1, math.inf), "accum": (1, math.inf),
    "lr": (0, math.inf), "lr_decay_steps": (0, math.inf), "beta2": (0, 1), "ema_decay": (0, 1), "label_drop": (0, 1),
    "seed": (0, 2 ** 63), "log_every": (0, math.inf), "ckpt_every": (0, math.inf), "sample_every": (0, math.inf),
    "cfg_scale": (-1000, 1000)}


def model_args(cfg, num_classes):
    """The arguments of DiT for this run."""
    side, channels = (cfg.image_size // 8, 4) if cfg.vae else (cfg.image_size, 3)
    return dict(input_size=side, patch_size=cfg.patch_size, in_channels=channels, hidden_size=cfg.hidden_size,
                depth=cfg.depth, num_heads=cfg.num_heads, num_classes=num_classes, block=cfg.block)


def check(cfg):
    """UserError for the first setting that cannot be meant, before anything is read, made or written."""
    for name, (low, high) in RANGES.items():
        if not low <= getattr(cfg, name) < high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)} should be at least {low}"
                            + (f" and less than {high}" if high < math.inf else ""))
    if cfg.dtype not in ("auto", "fp32", "bf16"):
        raise UserError(f"--dtype {cfg.dtype} is unknown: choose auto, fp32 or bf16")
    if cfg.vae and cfg.image_size % 8:
        raise UserError(f"--image-size {cfg.image_size} is not divisible by 8, by which the VAE makes images smaller")
    if not cfg.data and not cfg.bench:
        raise UserError("name your images: --data FOLDER, with one folder of them a class")
    try:
        with torch.device("meta"):
            DiT(**model_args(cfg, num_classes=1) | dict(depth=1))
    except ValueError as error:
        raise UserError(str(error)) from None
    there = next(path for path in [Path(cfg.out), *Path(cfg.out).absolute().parents] if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"cannot write into {cfg.out}: name another folder by --out")


def parse_args(argv):
    """Config from the command line: defaults < preset < --model < explicit flags; on --resume, the checkpoint's."""
    parser = Parser(prog="train.py", description=__doc__.split("\n")[0])
    for field in dataclasses.fields(Config):
        yes_or_no = field.type in (bool, bool | None)
        plain = PRESETS["shapes"].get(field.name, field.default)
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=field.metadata["help"] + ("" if plain in ("", None) else f" (shapes: {plain})"),
                            **(dict(action=argparse.BooleanOptionalAction) if yes_or_no else dict(type=field.type)))
    flags = vars(parser.parse_args(argv))
    if flags.get("data") not in (None, "", "shapes", "cifar10"):
        flags["data"] = os.path.abspath(flags["data"])             # to be found again from any folder
    if os.path.exists(flags.get("vae", "")):
        flags["vae"] = os.path.abspath(flags["vae"])
    if "resume" in flags:
        if flags.get("bench"):
            raise UserError("--bench starts anew: give the run's flags in place of --resume")
        return resumed_config(flags)
    preset = flags.get("preset", "shapes")
    if preset not in PRESETS:
        raise UserError(f"no preset {preset!r}: choose from {', '.join(PRESETS)}")
    chosen = PRESETS[preset] | (dict(steps=50) if flags.get("bench") else {})
    model = flags.get("model", chosen.get("model", ""))
    if model:
        if model not in DiT_models:
            raise UserError(f"no model {model!r}: choose from {', '.join(DiT_models)}")
        chosen.update(DiT_models[model].keywords)
    cfg = Config(**{**chosen, **flags})
    if model and any(getattr(cfg, name) != size for name, size in DiT_models[model].keywords.items()):
        cfg.model = ""                                              # an explicit size makes it another model
    cfg.out = cfg.out or f"runs/{preset if cfg.data == PRESETS[preset]['data'] else Path(cfg.data).name}"
    check(cfg)
    if (Path(cfg.out) / "ckpt.pt").exists() and not cfg.bench:
        raise UserError(f"{cfg.out} holds a run already: go on by --resume {cfg.out}, or name another folder by --out")
    return cfg


def resumed_config(flags):
    """The Config of the run in the folder flags["resume"], with those flags that may change."""
    folder = flags.pop("resume")
    if os.path.isfile(folder):
        folder = os.path.dirname(folder) or "."                     # its ckpt.pt was named
    saved = load_checkpoint(Path(folder) / "ckpt.pt", check=False)  # only its settings are looked at here
    config = dataclasses.asdict(Config())                           # an older version's may lack a field, or have more
    config = {name: saved["config"].get(name, default) for name, default in config.items()}
    may_change = MAY_CHANGE - ({"vae"} if not flags.get("vae") or not config["vae"] else set())     # pixels, or latents
    different = [f"--{name.replace('_', '-')} {value} (the run has {config[name]})" for name, value in flags.items()
                 if name not in may_change and value != config[name]]
    if different:
        raise UserError(f"{folder} is another run than {', '.join(different)}: leave that out, or start anew by --out")
    cfg = Config(**{**config, **flags, "out": folder, "resume": folder})
    check(cfg)
    if cfg.steps <= saved["step"]:
        raise UserError(f"{folder} has done {saved['step']} steps already: ask for more by --steps")
    return cfg


# ----------------------------------------------------------------------------------------------------------------------
# Data: from any source to two arrays, labels (n,) and images (n, ...): pixels, or the moments of their latents


class Source(NamedTuple):
    """A data set before its preparation."""
    identity: list              # which images these are, wherever they lie: a run is resumed on the same ones only
    version: list               # whether a file was touched since
    class_names: list
    labels: list
    load: Callable              # i -> uint8 (I, I, 3)


SHAPES = {                      # name -> whether (x, y) is inside; y points up, the shape fills [-1, 1]^2
    "circle":    lambda x, y: np.hypot(x, y) < 0.85,
    "ring":      lambda x, y: abs(np.hypot(x, y) - 0.7) < 0.22,
    "moon":      lambda x, y: (np.hypot(x, y) < 0.95) & (np.hypot(x - 0.5, y) > 0.8),
    "heart":     lambda x, y: x ** 2 + (1.1 * y + 0.15 - 0.75 * np.sqrt(abs(x))) ** 2 < 0.72,
    "star":      lambda x, y: sum(x * np.sin(a) + y * np.cos(a) < 0.35 for a in 2 * np.pi / 5 * np.arange(5)) >= 4,
    "triangle":  lambda x, y: (y > -0.7) & (y < 0.95 - 1.8 * abs(x)),
    "square":    lambda x, y: np.maximum(abs(x), abs(y)) < 0.75,
    "cross":     lambda x, y: (np.minimum(abs(x), abs(y)) < 0.27) & (np.maximum(abs(x), abs(y)) < 0.95),
    "arrow":     lambda x, y: ((abs(x) < 0.25) & (abs(y) < 0.95)) | ((y > 0) & (abs(x) < 0.95 - y)),
    "hourglass": lambda x, y: (abs(x) < abs(y) + 0.05) & (abs(y) < 0.85),
}


def draw_shape(i, size):
    """Image i of the built-in set, uint8 (size, size, 3): shape i % 10 of random place, size, tilt and two colours."""
    rng = np.random.default_rng(i)
    scale = rng.uniform(0.75, 0.95)
    cx, cy = rng.uniform(-0.6, 0.6, size=2) * (1 - scale)
    tilt = rng.uniform(-0.12, 0.12)
    hue = rng.random()
    paper = colorsys.hsv_to_rgb(hue, rng.uniform(0.3, 0.9), rng.uniform(0.1, 0.35))
    ink = colorsys.hsv_to_rgb((hue + rng.uniform(0.2, 0.8)) % 1, rng.uniform(0.3, 0.9), rng.uniform(0.8, 1.0))
    fine = (np.arange(4 * size) + 0.5) / (2 * size) - 1             # each pixel is the mean of 4 x 4 points
    x, y = np.meshgrid((fine - cx) / scale, (-fine - cy) / scale)
    x, y = x * np.cos(tilt) - y * np.sin(tilt), x * np.sin(tilt) + y * np.cos(tilt)
    inside = list(SHAPES.values())[i % len(SHAPES)](x, y)
    cover = inside.reshape(size, 4, size, 4).mean(axis=(1, 3))[..., None]
    return (255 * (cover * np.array(ink) + (1 - cover) * np.array(paper))).round().astype(np.uint8)


def center_crop(image, size):
    """A PIL image as uint8 (size, size, 3), by ADM's rule: halved by box filters, then bicubic, then its middle."""
    if image.mode[0] in "IF":
        raise ValueError(f"pixels of mode {image.mode}, not of 8 bits")
    image = ImageOps.exif_transpose(image).convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def open_source(cfg):
    """The Source that --data names; UserError if there is none."""
    if cfg.data == "shapes":
        labels = [i % len(SHAPES) for i in range(20_000)]
        return Source(["shapes", len(labels)], [], list(SHAPES), labels, lambda i: draw_shape(i, cfg.image_size))
    import torchvision.datasets  # which takes a second that shapes need not wait

    if cfg.data == "cifar10":
        try:
            Path(cfg.cache).mkdir(parents=True, exist_ok=True)
            with FileLock(Path(cfg.cache) / "cifar10.lock"):
                data = torchvision.datasets.CIFAR10(Path(cfg.cache) / "cifar10", download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot get CIFAR-10 ({error}): name a folder of images by --data") from None
        return Source(["cifar10", len(data.targets)], [], data.classes, data.targets,
                      lambda i: center_crop(Image.fromarray(data.data[i]), cfg.image_size))
    try:
        samples = torchvision.datasets.ImageFolder(cfg.data)
        paths = [path for path, _ in samples.samples]
        stats = [os.stat(path) for path in paths]
    except (OSError, RuntimeError) as error:
        raise UserError(f"no images in --data {cfg.data} ({error}): it should hold one folder a class") from None

    def load(i):
        try:
            return center_crop(Image.open(paths[i]), cfg.image_size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"cannot read the image {paths[i]} ({error}): repair or remove it") from None

    identity = [(os.path.relpath(path, cfg.data).replace(os.sep, "/"), stat.st_size)
                for path, stat in zip(paths, stats, strict=True)]
    return Source(identity, [stat.st_mtime_ns for stat in stats], samples.classes, samples.targets, load)


def digest(*values):
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


class Pixels:
    """What a run on pixels keeps of its images: uint8 (3, I, I) each."""

    def __init__(self, cfg):
        self.shape, self.dtype, self.slow = (3, cfg.image_size, cfg.image_size), np.uint8, False
        self.identity, self.constants = [], {}

    def encode(self, images):                                       # uint8 (k, I, I, 3)
        return images.transpose(0, 3, 1, 2)                         # uint8 (k, 3, I, I)

    def decode(self, x):
        return x


class Latents:
    """What a run on latents keeps of its images: mean and standard deviation of the VAE's posterior (Sec. 3.1), of the
    image and of its mirror image: float16 (2, 2 C, I/8, I/8) each. The mirrored latent is not the mirror's latent."""

    def __init__(self, cfg, rt):
        self.name, self.vae = cfg.vae, load_vae(cfg.vae, rt.own_device)
        side = cfg.image_size // 8
        self.shape, self.dtype, self.slow = (2, 8, side, side), np.float16, True
        self.constants = dict(scale=SCALE)
        weights = hashlib.sha256()
        for tensor in self.vae.state_dict().values():
            weights.update(tensor.cpu().numpy().tobytes())
        self.identity = [SCALE, weights.hexdigest()]                # another VAE makes another cache

    @torch.no_grad()
    def encode(self, images):                                       # uint8 (k, I, I, 3)
        moments = []
        for some in np.array_split(images, -(-len(images) // 8)):
            x = torch.from_numpy(some.transpose(0, 3, 1, 2).copy()).to(self.vae.device) / 127.5 - 1
            both = [self.vae.encode(view).latent_dist for view in (x, x.flip(3))]
            moments.append(torch.stack([torch.cat([p.mean, p.std], dim=1) for p in both], dim=1).cpu())
        moments = torch.cat(moments).half()                         # (k, 2, 2C, I/8, I/8)
        if not moments.isfinite().all():
            raise UserError(f"the VAE {self.name} makes latents that are no numbers: take another by --vae")
        return moments.numpy()

    def spread(self, images):
        """The standard deviation of what the model is to learn, about 1 as its noise."""
        mean, std = np.split(images[::-(-len(images) // 100), 0].astype(np.float32), 2, axis=1)
        return SCALE * np.sqrt(mean.var() + (std ** 2).mean())

    def decode(self, x):
        return decode(self.vae, x, SCALE)


PART = 256                      # images that one process prepares at a time


def prepare_data(cfg, rt, source, space):
    """(images, labels), memory-mapped: made on the first call for this source and space, found again afterwards.

    Processes that come at the same time share the work by parts; what a killed one has left undone, others do, or the
    next run. labels.npy is written last: a folder that has none is not whole.
    """
    n = len(source.labels)
    some = np.linspace(0, n - 1, 20).astype(int)
    probe = [source.load(i).tobytes() for i in some]                # another code makes other arrays
    key = digest(source.identity, source.version, source.labels, probe, space.identity, PART)
    folder = Path(cfg.cache) / f"{Path(cfg.data).name}-{cfg.image_size}-{key}"
    try:
        if not (folder / "labels.npy").exists():
            write_images(cfg, rt, source, space, folder)
            with FileLock(f"{folder}.lock"):
                if not (folder / "labels.npy").exists():
                    with replacing(folder / "settings.json", "w") as file:
                        json.dump(dict(data=cfg.data, image_size=cfg.image_size, vae=cfg.vae, **space.constants), file)
                    with replacing(folder / "labels.npy") as file:
                        np.save(file, np.array(source.labels))
                    for mark in [*folder.glob("*.done"), *folder.glob("*.lock")]:
                        mark.unlink()
        return np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "labels.npy")
    except (OSError, NotImplementedError) as error:
        raise UserError(f"cannot write into {cfg.cache} ({error}): make room, or name another by --cache") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{folder} is damaged ({error}): remove it, and it will be made again") from None


def write_images(cfg, rt, source, space, folder):
    """images.npy: first this process's share of the parts, then what the others have not done."""
    n, dtype = len(source.labels), np.dtype(space.dtype)
    size = math.prod(space.shape) * dtype.itemsize
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "images.npy").exists():
            for mark in folder.glob("*.done"):
                mark.unlink()                                       # of a file that somebody has removed
            with replacing(folder / "images.npy") as file:          # not mapped: a full disk would kill, not raise
                np.lib.format.write_array_header_1_0(
                    file, dict(descr=dtype.str, fortran_order=False, shape=(n, *space.shape)))
                file.truncate(file.tell() + n * size)

    def done(start):
        return (folder / f"{start}.done").exists() or (folder / "labels.npy").exists()

    def load(start):
        return np.stack(list(pool.map(source.load, range(start, min(start + PART, n)))))

    def write(start):
        with FileLock(folder / f"{start}.lock"):
            if not done(start):
                images = space.encode(load(start))
                with open(folder / "images.npy", "r+b") as file:
                    file.seek((start - n) * size, os.SEEK_END)
                    file.write(images.tobytes())
                    file.flush()
                    os.fsync(file.fileno())
                (folder / f"{start}.done").touch()

    share = range(rt.rank * PART, n, rt.world * PART)
    with ThreadPoolExecutor(os.cpu_count()) as pool:                # decoding lets go of Python's lock
        if space.slow:                                              # a broken image is told now, not in hours
            for start in tqdm(share, desc=f"looking at {cfg.data}", unit="part", disable=rt.rank > 0):
                done(start) or load(start)
        with tqdm(total=n, desc=f"preparing {cfg.data}", unit="image", disable=rt.rank > 0) as bar:
            for start in [*share, *(start for start in range(0, n, PART) if start not in share)]:
                done(start) or write(start)
                bar.update(min(PART, n - start))


# What a stream of random numbers is for. From 1, because numpy's seeding takes (a, b, 0) for (a, b).
ORDER, FLIP, TIME, NOISE, DROP, POSTERIOR = range(1, 7)


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch, ORDER)).permutation(n)


def draw_batch(cfg, images, labels, step, share=slice(None)):
    """(x, y, t, noise, drop) of a step as CPU tensors: a function of (seed, step) and the data.

    x: uint8 pixels, or float32 latents drawn from their posterior. All is drawn for the global batch, so that it does
    not depend on who asks; `share` is the part that is returned.
    """
    def rng(purpose):
        return np.random.default_rng((cfg.seed, step, purpose))

    position = (step - 1) * cfg.batch_size + np.arange(cfg.batch_size)
    epoch, place = np.divmod(position, len(labels))
    index = np.array([permutation(len(labels), cfg.seed, e)[p] for e, p in zip(epoch.tolist(), place, strict=True)])
    flip = (rng(FLIP).random(cfg.batch_size) < 0.5) & cfg.flip
    t = rng(TIME).integers(1000, size=cfg.batch_size)
    shape = (cfg.batch_size, 4 if cfg.vae else 3, *images.shape[-2:])
    noise = rng(NOISE).standard_normal(shape, dtype=np.float32)
    drop = rng(DROP).random(cfg.batch_size) < cfg.label_drop
    index, flip = index[share], flip[share]
    if cfg.vae:
        mean, std = np.split(images[index, flip.astype(int)].astype(np.float32), 2, axis=1)
        x = SCALE * (mean + std * rng(POSTERIOR).standard_normal(shape, dtype=np.float32)[share])
    else:
        x = images[index]
        x = np.where(flip[:, None, None, None], x[..., ::-1], x)
    return tuple(map(torch.from_numpy, (x, labels[index], t[share], noise[share], drop[share])))


# ----------------------------------------------------------------------------------------------------------------------
# Devices and processes: the only place that knows what the loop runs on


class Runtime:
    """One process on one device: rank 0 of 1. Its two subclasses give the loop more of both, under the same names.

    A batch is divided over `shares` devices. This process loads part `rank` of `world` of it; on its machine it is
    process number local_rank. `patient` is the group in which processes wait for one another as long as it takes;
    own_device is for what a process does without the others.
    """
    rank, world, local_rank, shares, patient = 0, 1, 0, 1, None
    launcher = "python"
    checkpoint = staticmethod(functools.partial(checkpoint, use_reentrant=False))

    def __init__(self, cfg):
        self.device = self.own_device = self.open_device(cfg.device)
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": self.natural_dtype()}[cfg.dtype]
        self.compile = self.device.type == "cuda" if cfg.compile is None else cfg.compile
        self.grad_checkpoint = cfg.grad_checkpoint
        self.kind, self.stop = self.device.type, False
        if cfg.batch_size % (self.shares * cfg.accum):
            raise UserError(f"--batch-size {cfg.batch_size} is not divisible by {self.shares} devices times --accum "
                            f"{cfg.accum}: take a multiple of {self.shares * cfg.accum}")

    def close(self):
        """Nothing to take leave of."""

    def open_device(self, name):
        return pick_device(name)

    def natural_dtype(self):
        """bfloat16 where the hardware multiplies in it, else float32."""
        has_bf16 = {"cuda": lambda: torch.cuda.get_device_capability(self.device) >= (8, 0),
                    "cpu": lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()}
        return torch.bfloat16 if has_bf16.get(self.device.type, lambda: False)() else torch.float32

    # what is trained

    def formulas(self):
        """What serves the device better than a module's own forward: {its class: function (module, x)}."""
        return {Attention: attention} if self.device.type == "cpu" and self.dtype == torch.bfloat16 else {}

    def prepare(self, model):
        """The model to train with: checkpointed and compiled as asked. It shares the parameters of `model`."""
        formulas = self.formulas()
        for module in model.modules():
            if type(module) in formulas:
                module.forward = functools.partial(formulas[type(module)], module)
        if self.grad_checkpoint:
            for block in model.blocks:
                block.forward = functools.partial(self.checkpoint, block.forward)
        model = self.parallel(model)
        return torch.compile(model) if self.compile else model

    def parallel(self, model):
        """The model that exchanges its gradients with the other processes'."""
        return model

    def optimizer(self, parameters, **kwargs):
        return torch.optim.AdamW(parameters, fused=True, **kwargs)

    def average(self, ema, parameters, decay):
        """ema = decay ema + (1 - decay) parameters."""
        get_ema_multi_avg_fn(decay)(list(ema), parameters, None)

    # a step

    def share(self, n):
        """The part of a batch of n that this process loads."""
        return slice(self.rank * n // self.world, (self.rank + 1) * n // self.world)

    def pin(self, tensors):
        """CPU tensors that the device fetches while the program goes on."""
        if self.device.type != "cuda":
            return tensors
        with torch.cuda.device(self.device):                        # each thread has its own, at first number 0
            return [tensor.pin_memory() for tensor in tensors]

    def put(self, tensors):
        pinned = self.device.type == "cuda"                         # other memory may be gone before it is copied
        return [tensor.to(self.device, non_blocking=pinned) for tensor in tensors]

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def accumulating(self, last):
        """The context of one of --accum parts: the gradients of the processes need to meet in the last one only."""
        return contextlib.nullcontext()

    def finish_step(self):
        """The end of what may be computed as one."""

    def wait(self):
        """Return when the device has nothing left to do."""
        wait_for(self.device)

    # agreement

    def mean(self, numbers):
        """The mean over all processes, as a list."""
        return numbers.tolist()

    def maximum(self, number, group=None):
        """The largest of all processes' whole numbers."""
        number = torch.tensor(int(number))
        if self.world > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=group)
        return number.item()

    def any(self, flag):
        """Whether `flag` is true in any process."""
        return bool(self.maximum(flag))

    def same(self, *values):
        """Whether all processes have the same values."""
        number = int(digest(*values)[:15], 16)
        return self.maximum(number) == -self.maximum(-number)

    def meet(self):
        """Wait for all processes: for days, if it must be, where an exchange between devices would give up."""
        self.maximum(0, self.patient)

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    @contextlib.contextmanager
    def catching_signals(self):
        """Inside, Ctrl-C or SIGTERM sets .stop, so that the loop can finish its step and save."""
        def handler(number, frame):
            if self.stop and number == signal.SIGINT and self.world == 1:     # launchers may pass on a signal twice
                raise KeyboardInterrupt
            self.stop = True

        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number in before:
                signal.signal(number, before[number])


class TorchrunRuntime(Runtime):
    """One process a device, started by torchrun on one or several machines. DDP averages the gradients."""

    variables = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]

    def __init__(self, cfg):
        if missing := [name for name in self.variables if name not in os.environ]:
            raise UserError(f"the environment looks like torchrun's, but lacks {', '.join(missing)}: start by "
                            f"torchrun, or unset {', '.join(self.variables)}")
        self.rank, self.world, self.local_rank, self.here = (int(os.environ[name]) for name in self.variables)
        self.shares, self.launcher = self.world, f"torchrun --nproc_per_node={self.here}"
        super().__init__(cfg)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        self.patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))

    def close(self):
        self.meet()
        dist.destroy_process_group()

    def open_device(self, name):
        if name not in ("auto", "cuda", "cpu"):
            raise UserError(f"--device {name} is one device: under torchrun take auto, cuda or cpu")
        if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        if 0 < torch.cuda.device_count() < self.here:
            raise UserError(f"this machine has {torch.cuda.device_count()} GPUs: let torchrun start one process for "
                            f"each, by --nproc_per_node={torch.cuda.device_count()}")
        return pick_device(f"cuda:{self.local_rank}")

    def parallel(self, model):
        self.ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        return self.ddp

    def accumulating(self, last):
        return contextlib.nullcontext() if last else self.ddp.no_sync()

    def mean(self, numbers):
        numbers = numbers.cpu()
        dist.all_reduce(numbers)
        return (numbers / self.world).tolist()


class XLARuntime(Runtime):
    """One process a machine for all its TPU chips. The program is that of the global batch; torch_xla's SPMD divides
    the batch over the chips of all machines, and the compiler adds the exchange."""

    def __init__(self, cfg):
        if "RANK" in os.environ:                                    # its processes would all believe to be rank 0 of 1
            raise UserError("--device xla drives all chips of a machine from one process: start it without torchrun")
        if cfg.compile:
            raise UserError("--device xla compiles by itself: take --no-compile")
        try:
            import torch_xla
            import torch_xla.backends
            import torch_xla.distributed.spmd as spmd
            import torch_xla.runtime as xr
            import torch_xla.utils.checkpoint
            from torch_xla.core.xla_model import send_cpu_data_to_device, wait_device_ops
        except ImportError as error:
            raise UserError(f"--device xla needs torch_xla ({error}): pip install -e '.[tpu]', or take --device auto"
                            ) from None
        try:
            xr.use_spmd()                                           # before anything touches a device
            self.mesh, self.shares = spmd.get_1d_mesh("data"), xr.global_runtime_device_count()
        except RuntimeError as error:
            raise UserError(f"torch_xla finds no device ({str(error)[:200]}): see to PJRT_DEVICE") from None
        self.rank, self.world, self.on_tpu = xr.process_index(), xr.process_count(), xr.device_type() == "TPU"
        self.torch_xla, self.spmd, self.send = torch_xla, spmd, send_cpu_data_to_device
        self.wait_device_ops = wait_device_ops
        self.checkpoint = torch_xla.utils.checkpoint.checkpoint     # torch's own cannot run there
        super().__init__(cfg)
        self.kind = f"xla ({xr.device_type()})"
        if self.on_tpu and self.dtype == torch.float32:
            torch_xla.backends.set_mat_mul_precision("highest")     # it would multiply in bfloat16 otherwise
        if self.world > 1:
            self.own_device = torch.device("cpu")                   # on the other, all machines run the same programs
            import torch_xla.distributed.xla_backend  # noqa: F401  (which registers xla://)

            dist.init_process_group("gloo", init_method="xla://")
            self.patient = dist.new_group(timeout=datetime.timedelta(days=7))

    def open_device(self, name):
        return self.torch_xla.device()

    def natural_dtype(self):
        return torch.bfloat16 if self.on_tpu else torch.float32

    def formulas(self):
        return {nn.LayerNorm: layer_norm}

    # What changes from step to step is a tensor of one axis there. A plain number that happens to equal another one in
    # the step is merged with it, and that is another program to compile: at step 8, 1 - decay and the loss's 0.5.

    def optimizer(self, parameters, **kwargs):
        return torch.optim.AdamW(parameters, capturable=True, **kwargs)

    @torch.no_grad()
    def average(self, ema, parameters, decay):
        weight = torch.tensor([1 - decay]).to(self.device)
        for averaged, parameter in zip(ema, parameters, strict=True):
            averaged.lerp_(parameter, weight)

    def put(self, tensors):
        return [self.send(tensor, self.device, self.spmd.ShardingSpec(
            self.mesh, ("data",) + (None,) * (tensor.dim() - 1), minibatch=True))[0] for tensor in tensors]

    def finish_step(self):
        self.torch_xla.sync()

    def wait(self):
        self.torch_xla.sync()
        self.wait_device_ops()


def attention(module, x):                                           # (N, T, D)
    """dit.Attention by its formula. On CPUs the backward pass of torch's own is several times slower in bfloat16."""
    N, T, D = x.shape
    qkv = module.qkv(x).view(N, T, 3, module.num_heads, -1)         # (N, T, 3, h, D/h)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # (N, h, T, D/h) each
    weights = (q / q.shape[-1] ** 0.5 @ k.transpose(2, 3)).softmax(-1)          # (N, h, T, T)
    x = weights @ v                                                 # (N, h, T, D/h)
    return module.proj(x.transpose(1, 2).reshape(N, T, D))          # (N, T, D)


def layer_norm(norm, x):
    """nn.LayerNorm by its formula. torch_xla's own merges batch and tokens: all chips would gather the whole batch."""
    variance, mean = torch.var_mean(x.float(), dim=-1, correction=0, keepdim=True)
    x = (x - mean) * torch.rsqrt(variance + norm.eps)
    return x if norm.weight is None else x * norm.weight + norm.bias


def open_runtime(cfg):
    """The Runtime that --device and the environment ask for."""
    if cfg.device == "xla":
        return XLARuntime(cfg)
    return TorchrunRuntime(cfg) if os.environ.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"} else Runtime(cfg)


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def to_cpu(state):
    """A state dict with all its tensors on the CPU."""
    if isinstance(state, dict):
        return {key: to_cpu(value) for key, value in state.items()}
    if isinstance(state, list):
        return [to_cpu(value) for value in state]
    return state.detach().cpu() if torch.is_tensor(state) else state


class Folder:
    """The folder of a run that starts, or goes on, after `step`: config.json, log.csv, ckpt.pt, samples.

    Every file is replaced at once and only by a whole one. log.csv has a row a logged step, numbers exact; rows after
    `step`, of a run that was cut off, are cut off too, and so are its pictures.
    """
    columns = ["step", "loss", "mse", "vb", "grad_norm", "images_per_sec"]

    def __init__(self, cfg, step):
        self.out = Path(cfg.out)
        try:
            (self.out / "samples").mkdir(parents=True, exist_ok=True)
            for picture in (self.out / "samples").glob("[0-9]" * 6 + ".png*"):
                if int(picture.name[:6]) > step:
                    picture.unlink()
            with replacing(self.out / "config.json", "w") as file:
                file.write(json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")
            log = self.out / "log.csv"
            lines = log.read_text(errors="replace").splitlines()[1:] if step and log.exists() else []
            rows = [line.split(",") for line in lines]              # of which a killed run may have left but a part
            with replacing(log, "w", newline="") as file:
                csv.writer(file).writerows([self.columns] + [row for row in rows if len(row) == len(
                    self.columns) and row[0].isdecimal() and int(row[0]) <= step])
            self.log = open(log, "a", newline="")
        except OSError as error:
            raise UserError(f"cannot write into {self.out} ({error.strerror}): name another folder by --out") from None

    def row(self, *values):
        """A row of log.csv."""
        try:
            csv.writer(self.log).writerow(map(repr, values))
            self.log.flush()
        except OSError as error:
            raise self.broken("log.csv", error) from None

    def save(self, state):
        """ckpt.pt, and with it the rows before it."""
        try:
            os.fsync(self.log.fileno())
            with replacing(self.out / "ckpt.pt") as file:
                torch.save(state, file)
        except (OSError, RuntimeError) as error:                    # torch wraps some of the former in the latter
            raise self.broken("ckpt.pt", error) from None

    def picture(self, step, image):
        try:
            with replacing(self.out / "samples" / f"{step:06d}.png") as file:
                image.save(file, format="png")
        except OSError as error:
            raise self.broken("a picture", error) from None

    def broken(self, what, error):
        return UserError(f"cannot write {what} into {self.out} ({error}). Make room; {what_is_left(self.out)}")


class NoFolder:
    """The Folder of the processes that leave nothing."""

    def row(self, *values):
        pass

    def save(self, state):
        pass

    def picture(self, step, image):
        pass


def what_is_left(out):
    """How to go on after a run has broken off."""
    if (Path(out) / "ckpt.pt").exists():
        return f"the last checkpoint is as it was: go on by --resume {shlex.quote(str(out))}"
    return "no checkpoint had been written: start again"


def sample_grid(cfg, rt, ema, space, class_names):
    """A picture of guided samples, a row a class, the same noise every time.

    All processes make it, though one writes it: so none waits long, and the machines of a pod run the same programs.
    """
    labels = [c for c in parse_classes(None, class_names) for _ in range(8)]
    images = sample_images(ema, labels, steps=25, sampler="ddim", cfg_scale=default_guidance(dataclasses.asdict(cfg)),
                           clip_denoised=not cfg.vae, on_step=lambda *_: rt.finish_step())
    return grid_image(to_uint8(space.decode(images)), 8)


# ----------------------------------------------------------------------------------------------------------------------
# The loop (Sec. 4, Training)


class Diverged(UserError):
    """The loss is no number any more."""
    status = 3


class Deserted(UserError):
    """Another process of the run has ended."""
    status = 1


def announce(cfg, rt, model, source, space, images):
    """What will be run, in a line; and what may surprise."""
    n, classes = len(images), len(source.class_names)
    devices = f"{rt.shares} x {rt.kind}" if rt.shares > 1 else rt.kind
    rt.say(f"{cfg.model or 'DiT'} {cfg.block}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; "
           f"{n} images, {classes} classes, {cfg.steps * cfg.batch_size / n:.1f} epochs; {devices}, "
           f"{str(rt.dtype).removeprefix('torch.')}; {cfg.out}")
    if 0 < cfg.lr_decay_steps < cfg.steps:
        rt.say(f"note: after step {cfg.lr_decay_steps} (--lr-decay-steps) the learning rate is 0: nothing is learned")
    if cfg.vae and not 0.5 < (spread := space.spread(images)) < 2:
        rt.say(f"note: the latents' standard deviation is {spread:.2f}, far from 1: is --vae Stable Diffusion's?")


def farewell(out):
    """What is there now, and what to try next."""
    command = f"  python sample.py {shlex.quote(out + '/ckpt.pt')}"
    return (f"done: {out}/ckpt.pt, {out}/log.csv, {out}/samples. Look at more:\n"
            f"{command}\n{command} --classes 0 --cfg-scale 1 --gif film.gif")


def progress_bar(rt, steps, start):
    return tqdm(total=steps, initial=start, unit="step", mininterval=0.5 if sys.stderr.isatty() else 15,
                disable=rt.rank > 0)


def open_data(cfg, rt, run):
    """(source, space) of --data and --vae; `run`: the state of the run to go on with, if any. UserError if it was
    trained on other images."""
    source, space = open_source(cfg), Latents(cfg, rt) if cfg.vae else Pixels(cfg)
    if run and run["config"].get("data_digest") not in (None, data_digest(source, space)):
        vae = f", or --vae {cfg.vae} is not the VAE," if cfg.vae else ""
        raise UserError(f"--data {cfg.data} does not hold the images{vae} that {cfg.out} was trained on: bring them "
                        "back, or start anew by --out")
    return source, space


def data_digest(source, space):
    return digest(source.identity, source.class_names, *space.identity)


class Training:
    """What a step changes: the weights, their average (EMA), and AdamW's moments."""

    def __init__(self, cfg, rt, num_classes):
        torch.manual_seed(cfg.seed)
        self.original = DiT(**model_args(cfg, num_classes))
        self.ema = copy.deepcopy(self.original).to(rt.device).requires_grad_(False)
        self.model = rt.prepare(self.original.to(rt.device))        # what is called; its weights are the original's
        self.opt = rt.optimizer(self.original.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=0)

    def start_from(self, path):
        """Take the averaged weights of a checkpoint; another number of classes takes a new label table."""
        table, state = "y_embedder.embedding_table.weight", load_checkpoint(path)["ema"]
        own = self.original.state_dict()[table]
        other = table in state and len(state[table]) != len(own)
        fit(path, self.original, state | ({table: own} if other else {}), whose="the flags describe (see --model)")
        self.ema.load_state_dict(self.original.state_dict())
        return "all but the label table" if other else "all weights"

    def state(self):
        return dict(model=self.original.state_dict(), ema=self.ema.state_dict(), opt=self.opt.state_dict())

    def load(self, state):
        self.original.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        moments = dict(state=state["opt"]["state"], param_groups=self.opt.state_dict()["param_groups"])
        self.opt.load_state_dict(moments)                           # a group's settings are the device's and cfg's


def train_step(cfg, rt, training, diffusion, batch, step):
    """One optimizer step on this process's share of the batch and one of the averaged weights.

    (loss, mse, vb, grad_norm), on the device: the first three are means over the share, the last is the global one.
    """
    opt, parameters = training.opt, list(training.original.parameters())
    totals = 0
    for k, part in enumerate(zip(*(tensor.chunk(cfg.accum) for tensor in batch), strict=True), start=1):
        x, y, t, noise, drop = rt.put(part)
        with rt.accumulating(last=k == cfg.accum):
            with rt.autocast():
                x_start = x / 127.5 - 1 if x.dtype == torch.uint8 else x
                losses = diffusion.training_losses(training.model, x_start, t, noise, y=y, drop=drop)
            means = torch.stack([losses[name].mean() for name in ("loss", "mse", "vb")]) / cfg.accum
            means[0].backward()
        totals = totals + means.detach()
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    for group in opt.param_groups:
        group["lr"] = cfg.lr * max(0.0, 1 - (step - 1) / cfg.lr_decay_steps) if cfg.lr_decay_steps else cfg.lr
    opt.step()
    opt.zero_grad()
    decay = min(cfg.ema_decay, (1 + step) / (10 + step))            # early on, the average forgets the initialisation
    rt.average(training.ema.parameters(), parameters, decay)
    return torch.cat([totals, grad_norm[None]])


def batches(cfg, rt, images, labels, start):
    """(step, batch) of each step after `start`, drawn by a thread while the device is at the step before."""
    def draw(step):
        return rt.pin(draw_batch(cfg, images, labels, step, rt.share(cfg.batch_size)))

    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(draw, start + 1)
        for step in range(start + 1, cfg.steps + 1):
            batch = ahead.result()
            if step < cfg.steps:
                ahead = thread.submit(draw, step + 1)
            yield step, batch


def train(cfg, rt):
    """The run that cfg describes, from its start or its checkpoint, until its last step or a signal."""
    saved = load_checkpoint(Path(cfg.out) / "ckpt.pt", check=rt.local_rank == 0) if cfg.resume else None
    source, space = open_data(cfg, rt, saved)
    training, diffusion, start = Training(cfg, rt, len(source.class_names)), GaussianDiffusion().to(rt.device), 0
    if saved:
        training.load(saved)
        start = saved["step"]
        del saved
    elif cfg.init:
        rt.say(f"{training.start_from(cfg.init)} taken from {cfg.init}")
    images, labels = prepare_data(cfg, rt, source, space)
    rt.meet()                                                       # which may take some machines longer
    places = dict(data="", vae="", cache="", resume="")             # which may differ, if what is there does not
    if not rt.same(start, data_digest(source, space), rt.dtype, dataclasses.asdict(cfg) | places):
        raise UserError("the processes do not have the same flags, data, precision or checkpoint: start all by the "
                        "same command line, with --out on a disk that all of them see")
    folder = Folder(cfg, start) if rt.rank == 0 else NoFolder()
    announce(cfg, rt, training.original, source, space, images)

    finite = torch.ones((), dtype=torch.bool, device=rt.device)
    logged, clock = start, time.perf_counter()
    with rt.catching_signals(), progress_bar(rt, cfg.steps, start) as bar:
        for step, batch in batches(cfg, rt, images, labels, start):
            numbers = train_step(cfg, rt, training, diffusion, batch, step)
            finite &= numbers.isfinite().all()                      # a gradient may overflow before the loss does
            rt.finish_step()
            bar.update()
            stop, last = rt.any(rt.stop), step == cfg.steps
            log_due, sample_due, save_due = (every > 0 and (last or step % every == 0)
                                             for every in (cfg.log_every, cfg.sample_every, cfg.ckpt_every))
            if not (log_due or sample_due or save_due or last or stop):
                continue                                            # without waiting for the device
            if rt.any(not finite):
                raise Diverged(f"loss or gradient is no number at step {step} or shortly before; no file was touched"
                               f" since. Start anew with a lower --lr than {cfg.lr}, or with --dtype fp32")
            now = time.perf_counter()
            if log_due:
                numbers, rate = rt.mean(numbers), (step - logged) * cfg.batch_size / (now - clock)
                folder.row(step, *numbers, rate)
                bar.set_postfix_str(f"loss {numbers[0]:.4f}, {rate:.0f} images/s", refresh=False)
                logged, clock = step, now
            if sample_due and (last or not stop):                   # before the save: after a crash both are made again
                folder.picture(step, sample_grid(cfg, rt, training.ema, space, source.class_names))
            if save_due or last or stop:
                config = dict(dataclasses.asdict(cfg), data_digest=data_digest(source, space), **space.constants)
                folder.save(to_cpu(dict(training.state(), step=step, config=config, class_names=source.class_names,
                                        model_args=model_args(cfg, len(source.class_names)))))
                rt.meet()                                           # the one who writes may take long
            if stop and not last:
                rt.say(f"stopped and saved at step {step}; go on with: {rt.launcher} train.py --resume "
                       f"{shlex.quote(cfg.out)}")
                return
            clock += time.perf_counter() - now                      # pictures and checkpoints are not training
    rt.say(farewell(cfg.out))


# ----------------------------------------------------------------------------------------------------------------------
# --bench


def made_up(cfg):
    """(images, labels) of random latents or pixels, of 1000 classes, in the form that the loop takes them."""
    rng, side = np.random.default_rng(0), model_args(cfg, 1000)["input_size"]
    labels = rng.integers(1000, size=64)
    if cfg.vae:
        return rng.random((64, 2, 8, side, side), dtype=np.float32).astype(np.float16), labels
    return rng.integers(256, size=(64, 3, side, side), dtype=np.uint8), labels


def bench(cfg, rt, warm=3):
    """Time cfg.steps steps of the loop, after some to get warm, and say what share of the device's matrix rate that is.
    The flops of a step are those of three forward passes (Sec. 5, Figure 9); what is recomputed does not count."""
    if cfg.data:
        source, space = open_data(cfg, rt, None)
        images, labels = prepare_data(cfg, rt, source, space)
        rt.meet()
        classes = len(source.class_names)
    else:
        (images, labels), classes = made_up(cfg), 1000
    training, diffusion = Training(cfg, rt, classes), GaussianDiffusion().to(rt.device)
    rt.say(f"{cfg.model or 'DiT'} {cfg.block}, {cfg.image_size} pixels{' as latents' * bool(cfg.vae)}; batch "
           f"{cfg.batch_size}{f' in {cfg.accum} parts' * (cfg.accum > 1)}; {rt.shares} x {rt.kind}, "
           f"{str(rt.dtype).removeprefix('torch.')}{', compiled' * rt.compile}{', checkpointing' * rt.grad_checkpoint}")
    times = []
    longer = dataclasses.replace(cfg, steps=warm + cfg.steps)
    began = time.perf_counter()
    for step, batch in batches(longer, rt, images, labels, 0):
        train_step(cfg, rt, training, diffusion, batch, step)
        rt.finish_step()
        rt.any(rt.stop)
        rt.wait()                                                   # the loop itself waits when it logs only
        now = time.perf_counter()
        times.append(now - began)
        began = now
    peak, flops = peak_memory(rt.device), 3 * cfg.batch_size * forward_flops(model_args(cfg, classes)) / rt.shares
    rt.say(speed(cfg.batch_size, times[warm:], flops, peak, matrix_rate(rt.device, rt.dtype, rt.wait)))


def main(argv):
    cfg = parse_args(argv)
    rt = open_runtime(cfg)
    exit_on_sigterm()                                               # only now: no handler can run while that waits
    try:
        with limits_told("raise --accum, or take --grad-checkpoint or a smaller --batch-size"):
            (bench if cfg.bench else train)(cfg, rt)
            rt.close()
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise Deserted(f"another process of this run has ended, and its message says why; {what_is_left(cfg.out)}"
                           ) from None
        raise


if __name__ == "__main__":
    run(main)
