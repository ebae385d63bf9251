"""Train a DiT.

    python train.py                                             # the built-in set of shapes: minutes on a laptop's CPU
    python train.py --preset cifar10                            # CIFAR-10, downloaded by torchvision
    python train.py --preset cifar10 --data FOLDER              # your pictures, one folder a class
    python train.py --preset cifar10 --block in-context         # another of the paper's four designs
    python train.py --resume runs/shapes                        # go on where a run stopped

A run's folder, runs/PRESET or --out, receives ckpt.pt, log.csv (step, loss, mse, vb, grad_norm, images_per_sec),
config.json and samples/*.png. Look at the pictures with sample.py.

Everything random in training is a function of (seed, step, example). A resumed run is therefore the same run, and a
checkpoint needs no random state.
"""
import argparse
import colorsys
import contextlib
import copy
import csv
import dataclasses
import functools
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint as checkpointed
from tqdm import tqdm

from dit import DESIGNS, DiT, DiT_models, GaussianDiffusion
from sample import (
    Parser,
    UserError,
    default_guidance,
    grid_image,
    load_checkpoint,
    parse_classes,
    pick_device,
    run,
    sample_images,
    to_uint8,
)

# ----------------------------------------------------------------------------------------------------------------------
# Settings: every field of Config is a flag


def flag(default, help):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class Config:
    # what to learn from
    preset: str = flag("shapes", "shapes or cifar10: the settings to start from; every other flag changes one")
    data: str = flag("shapes", "shapes (built in), cifar10 (downloaded), or a folder with one folder of images a class")
    image_size: int = flag(16, "side of the square images in pixels; others are scaled and cropped to it")
    flip: bool = flag(True, "mirror half of the images (the paper's only augmentation)")
    cache: str = flag("runs/cache", "folder for prepared images")
    # the model (Table 1)
    model: str = flag("", "DiT-S/2 .. DiT-XL/8: sets the next four at once")
    patch_size: int = flag(4, "side p of a patch, in pixels")
    hidden_size: int = flag(128, "width D")
    depth: int = flag(4, "number of blocks")
    num_heads: int = flag(4, "attention heads")
    block: str = flag("adaln-zero", f"the paper's design: {', '.join(DESIGNS)}")
    # optimization: the paper's Sec. 4 where a preset says nothing else
    steps: int = flag(400_000, "optimizer steps of the whole run")
    batch_size: int = flag(256, "images in one optimizer step, over all processes and --accum parts")
    accum: int = flag(1, "split each batch into so many parts, one after the other, to save memory")
    lr: float = flag(1e-4, "learning rate of AdamW (no weight decay)")
    lr_decay_steps: int = flag(0, "let the rate fall linearly to 0 over so many steps; 0 = constant, as in the paper")
    beta2: float = flag(0.999, "AdamW's second beta")
    ema_decay: float = flag(0.9999, "decay of the averaged weights that are sampled from; warms up in short runs")
    label_drop: float = flag(0.1, "share of labels replaced by the null label, for guidance")
    seed: int = flag(0, "determines initial weights, order, flips, noise: all that is random")
    # the machine
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
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


PRESETS = {
    # 10 classes of 16x16 colour images, drawn by this file. fp32: its matrices are too small for bf16 to pay on a CPU.
    "shapes": dict(data="shapes", image_size=16, patch_size=4, hidden_size=128, depth=4, num_heads=4, flip=False,
                   steps=7000, batch_size=32, lr=4e-3, lr_decay_steps=7000, beta2=0.99, ema_decay=0.999, dtype="fp32",
                   log_every=100, ckpt_every=1000, sample_every=500, cfg_scale=2.0),
    # CIFAR-10 in pixel space with the paper's recipe; DiT-S/4 has the paper's 64 tokens of DiT-S/4 on latents.
    "cifar10": dict(data="cifar10", image_size=32, model="DiT-S/4", steps=100_000, batch_size=128, ema_decay=0.9995,
                    ckpt_every=1000, sample_every=1000, cfg_scale=3.0),
}

# What --resume lets a flag change: all that does not make it another run (of --data, train() compares what is in it).
MAY_CHANGE = {"data", "steps", "accum", "device", "dtype", "compile", "grad_checkpoint", "log_every", "ckpt_every",
              "sample_every", "cfg_scale", "cache"}

RANGES = {  # name: (at least, less than)
    "image_size": (1, 4097), "patch_size": (1, math.inf), "hidden_size": (4, math.inf), "depth": (1, math.inf),
    "num_heads": (1, math.inf), "steps": (1, math.inf), "batch_size": (1, math.inf), "accum": (1, math.inf),
    "lr": (0, math.inf), "lr_decay_steps": (0, math.inf), "beta2": (0, 1), "ema_decay": (0, 1), "label_drop": (0, 1),
    "seed": (0, 2 ** 63), "log_every": (0, math.inf), "ckpt_every": (0, math.inf), "sample_every": (0, math.inf),
    "cfg_scale": (-1000, 1000)}


def model_args(cfg, num_classes):
    return dict(input_size=cfg.image_size, patch_size=cfg.patch_size, in_channels=3, hidden_size=cfg.hidden_size,
                depth=cfg.depth, num_heads=cfg.num_heads, num_classes=num_classes, block=cfg.block)


def check(cfg):
    """UserError for the first setting that cannot be meant, before anything is read, made or written."""
    for name, (low, high) in RANGES.items():
        if not low <= getattr(cfg, name) < high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)} should be at least {low}"
                            + (f" and less than {high}" if high < math.inf else ""))
    if cfg.dtype not in ("auto", "fp32", "bf16"):
        raise UserError(f"--dtype {cfg.dtype} is unknown: choose auto, fp32 or bf16")
    if cfg.batch_size % cfg.accum:
        raise UserError(f"--batch-size {cfg.batch_size} is not divisible by --accum {cfg.accum}")
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
    if flags.get("data") not in (None, "shapes", "cifar10"):
        flags["data"] = os.path.abspath(flags["data"])             # to be found again from any folder
    if "resume" in flags:
        return resumed_config(flags)
    preset = flags.get("preset", "shapes")
    if preset not in PRESETS:
        raise UserError(f"no preset {preset!r}: choose from {', '.join(PRESETS)}")
    chosen = dict(PRESETS[preset])
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
    if (Path(cfg.out) / "ckpt.pt").exists():
        raise UserError(f"{cfg.out} holds a run already: go on by --resume {cfg.out}, or name another folder by --out")
    return cfg


def resumed_config(flags):
    """The Config of the run in flags["resume"], with those flags that may change."""
    folder = flags.pop("resume")
    checkpoint = load_checkpoint(Path(folder) / "ckpt.pt")
    config = dataclasses.asdict(Config())                           # an older version's may lack a field, or have more
    config = {name: checkpoint["config"].get(name, default) for name, default in config.items()}
    different = [f"--{name.replace('_', '-')} {value} (the run has {config[name]})" for name, value in flags.items()
                 if name not in MAY_CHANGE and value != config[name]]
    if different:
        raise UserError(f"{folder} is another run than {', '.join(different)}: leave that out, or start anew by --out")
    cfg = Config(**{**config, **flags, "out": folder, "resume": folder})
    check(cfg)
    if cfg.steps <= checkpoint["step"]:
        raise UserError(f"{folder} has done {checkpoint['step']} steps already: ask for more by --steps")
    return cfg


# ----------------------------------------------------------------------------------------------------------------------
# Data: from any source to two arrays, images uint8 (n, 3, I, I) and labels (n,)


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

    identity = [(os.path.relpath(path, cfg.data), stat.st_size) for path, stat in zip(paths, stats, strict=True)]
    return Source(identity, [stat.st_mtime_ns for stat in stats], samples.classes, samples.targets, load)


def digest(*values):
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def prepare_data(cfg, source):
    """(images, labels), memory-mapped: made on the first call for this source and size, found again afterwards.

    They are written into a folder of another name, which is renamed when whole.
    """
    n, side = len(source.labels), cfg.image_size
    probe = [source.load(i).tobytes() for i in np.linspace(0, n - 1, 20).astype(int)]     # the code counts, too
    name = f"{Path(cfg.data).name}-{side}-{digest(source.identity, source.version, source.labels, probe)}"
    whole, part = Path(cfg.cache) / name, Path(cfg.cache) / f"{name}.part-{os.getpid()}"
    if not whole.exists():
        try:
            part.mkdir(parents=True)
            images = np.lib.format.open_memmap(part / "images.npy", mode="w+", dtype=np.uint8, shape=(n, 3, side, side))
            with (ThreadPoolExecutor(os.cpu_count()) as pool,       # decoding lets go of Python's lock
                  tqdm(total=n, desc=f"preparing {cfg.data}", unit="image") as bar):
                for start in range(0, n, 256):
                    for i, image in enumerate(pool.map(source.load, range(start, min(start + 256, n))), start):
                        images[i] = image.transpose(2, 0, 1)
                        bar.update()
            images.flush()
            np.save(part / "labels.npy", np.array(source.labels))
            os.rename(part, whole)
        except OSError as error:
            if not whole.exists():                                  # else another run was faster, which serves as well
                raise UserError(f"cannot write into {cfg.cache} ({error}): name another by --cache") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return np.load(whole / "images.npy", mmap_mode="r"), np.load(whole / "labels.npy")


# What a stream of random numbers is for. From 1, because numpy's seeding takes (a, b, 0) for (a, b).
ORDER, FLIP, TIME, NOISE, DROP = range(1, 6)


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch, ORDER)).permutation(n)


def draw_batch(cfg, images, labels, step):
    """(x, y, t, noise, drop) of a step, the global batch, as CPU tensors: a function of (seed, step) and the data."""
    def rng(purpose):
        return np.random.default_rng((cfg.seed, step, purpose))

    position = (step - 1) * cfg.batch_size + np.arange(cfg.batch_size)
    epoch, place = np.divmod(position, len(labels))
    index = np.array([permutation(len(labels), cfg.seed, e)[p] for e, p in zip(epoch.tolist(), place, strict=True)])
    flip = (rng(FLIP).random(cfg.batch_size) < 0.5) & cfg.flip
    x = images[index]
    x = np.where(flip[:, None, None, None], x[..., ::-1], x)
    t = rng(TIME).integers(1000, size=cfg.batch_size)
    noise = rng(NOISE).standard_normal(x.shape, dtype=np.float32)
    drop = rng(DROP).random(cfg.batch_size) < cfg.label_drop
    return tuple(map(torch.from_numpy, (x, labels[index], t, noise, drop)))


# ----------------------------------------------------------------------------------------------------------------------
# Devices: the only place that knows what the loop runs on


class Runtime:
    """The device, its dtype, and what they ask to be done to a model. One process is rank 0 of 1."""

    def __init__(self, cfg):
        self.device = pick_device(cfg.device)
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": self.natural_dtype()}[cfg.dtype]
        self.compile = self.device.type == "cuda" if cfg.compile is None else cfg.compile
        self.grad_checkpoint = cfg.grad_checkpoint
        self.stop = False

    def natural_dtype(self):
        """bfloat16 where the hardware multiplies in it, else float32."""
        has_bf16 = {"cuda": lambda: torch.cuda.get_device_capability(self.device) >= (8, 0),
                    "cpu": lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()}
        return torch.bfloat16 if has_bf16.get(self.device.type, lambda: False)() else torch.float32

    def prepare(self, model):
        """The model to train with: checkpointed and compiled as asked. It shares the parameters of `model`."""
        if self.grad_checkpoint:
            for block in model.blocks:
                block.forward = functools.partial(checkpointed, block.forward, use_reentrant=False)
        return torch.compile(model) if self.compile else model

    def put(self, tensors):
        return [tensor.to(self.device) for tensor in tensors]

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @contextlib.contextmanager
    def catching_signals(self):
        """Inside, the first Ctrl-C or SIGTERM sets .stop, so that the loop can finish its step and save."""
        def handler(number, frame):
            self.stop = True
            signal.signal(number, before[number])                   # the second one takes effect at once

        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number in before:
                signal.signal(number, before[number])


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def to_cpu(state):
    """A state dict with all its tensors on the CPU."""
    if isinstance(state, dict):
        return {key: to_cpu(value) for key, value in state.items()}
    if isinstance(state, list):
        return [to_cpu(value) for value in state]
    return state.detach().cpu() if torch.is_tensor(state) else state


def save_checkpoint(path, state):
    """Atomically: whoever reads `path` finds the old checkpoint or the new one, whole."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class Log:
    """log.csv: a row a logged step, numbers exact. Rows after `step`, of a run that was cut off, are cut off too."""

    columns = ["step", "loss", "mse", "vb", "grad_norm", "images_per_sec"]

    def __init__(self, path, step):
        rows = list(csv.reader(open(path)))[1:] if step and path.exists() else []
        self.file = open(path, "w", newline="")
        self.writer = csv.writer(self.file)
        self.writer.writerows([self.columns] + [row for row in rows if int(row[0]) <= step])
        self.file.flush()

    def row(self, *values):
        self.writer.writerow(map(repr, values))
        self.file.flush()


def open_run(cfg, step):
    """The run's folder, ready to write into, and its Log. A run from its start leaves nothing of an earlier one."""
    out = Path(cfg.out)
    try:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        for picture in (out / "samples").glob("[0-9]" * 6 + ".png"):
            if int(picture.stem) > step:
                picture.unlink()
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")
        return Log(out / "log.csv", step)
    except OSError as error:
        raise UserError(f"cannot write into {out} ({error.strerror}): name another folder by --out") from None


def save_samples(cfg, ema, class_names, path):
    """A grid of guided samples, a row a class, the same noise every time."""
    labels = [c for c in parse_classes(None, class_names) for _ in range(8)]
    images = sample_images(ema, labels, steps=25, sampler="ddim", cfg_scale=default_guidance(dataclasses.asdict(cfg)))
    grid_image(to_uint8(images), 8).save(path)


# ----------------------------------------------------------------------------------------------------------------------
# The loop (Sec. 4, Training)


class Diverged(UserError):
    """The loss is no number any more."""
    status = 3


def announce(cfg, rt, model, n, classes):
    """What will be run, in a line; and what may surprise."""
    print(f"{cfg.model or 'DiT'} {cfg.block}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; {n} "
          f"images, {classes} classes, {cfg.steps * cfg.batch_size / n:.1f} epochs; {rt.device}, "
          f"{str(rt.dtype).removeprefix('torch.')}; {cfg.out}", flush=True)
    if 0 < cfg.lr_decay_steps < cfg.steps:
        print(f"note: after step {cfg.lr_decay_steps} (--lr-decay-steps) the learning rate is 0 and nothing is learned")


def farewell(out):
    """What is there now, and what to try next."""
    command = f"  python sample.py {shlex.quote(out + '/ckpt.pt')}"
    print(f"done: {out}/ckpt.pt, {out}/log.csv, {out}/samples. Look at more:\n"
          f"{command}\n{command} --classes 0 --cfg-scale 1 --gif film.gif")


def progress_bar(steps, start):
    return tqdm(total=steps, initial=start, unit="step", mininterval=0.5 if sys.stderr.isatty() else 15)


def train_step(cfg, rt, model, original, ema, opt, diffusion, batch, step):
    """One optimizer step on the batch and one of the averaged weights: (loss, mse, vb, grad_norm), on the device."""
    totals = 0
    for part in zip(*(tensor.chunk(cfg.accum) for tensor in batch), strict=True):
        x, y, t, noise, drop = rt.put(part)
        with rt.autocast():
            losses = diffusion.training_losses(model, x / 127.5 - 1, t, noise, y=y, drop=drop)
        means = torch.stack([losses[name].mean() for name in ("loss", "mse", "vb")]) / cfg.accum
        means[0].backward()
        totals = totals + means.detach()
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in original.parameters()])
    for group in opt.param_groups:
        group["lr"] = cfg.lr * max(0.0, 1 - (step - 1) / cfg.lr_decay_steps) if cfg.lr_decay_steps else cfg.lr
    opt.step()
    opt.zero_grad()
    decay = min(cfg.ema_decay, (1 + step) / (10 + step))            # early on, the average forgets the initialisation
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(original.parameters()), None)
    return torch.cat([totals, grad_norm[None]])


def train(cfg):
    """The run that cfg describes, from its start or its checkpoint, until its last step or a signal."""
    rt, out, source, start = Runtime(cfg), Path(cfg.out), open_source(cfg), 0
    data_digest = digest(source.identity, source.class_names)
    if cfg.resume:
        state = load_checkpoint(out / "ckpt.pt")
        if state["config"].get("data_digest", data_digest) != data_digest:
            raise UserError(f"--data {cfg.data} does not hold the images that {out} was trained on: bring them back, "
                            "or start anew by --out")
    images, labels = prepare_data(cfg, source)
    torch.manual_seed(cfg.seed)
    original = DiT(**model_args(cfg, len(source.class_names)))
    ema = copy.deepcopy(original).to(rt.device).requires_grad_(False)
    model = rt.prepare(original.to(rt.device))
    opt = torch.optim.AdamW(original.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=0, fused=True)
    diffusion = GaussianDiffusion().to(rt.device)
    if cfg.resume:
        original.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        opt.load_state_dict(state["opt"])
        start = state["step"]
        del state
    log = open_run(cfg, start)
    announce(cfg, rt, original, len(labels), len(source.class_names))

    finite = torch.ones((), dtype=torch.bool, device=rt.device)
    logged, clock = start, time.perf_counter()
    with rt.catching_signals(), progress_bar(cfg.steps, start) as bar:
        for step in range(start + 1, cfg.steps + 1):
            batch = draw_batch(cfg, images, labels, step)
            numbers = train_step(cfg, rt, model, original, ema, opt, diffusion, batch, step)
            finite &= numbers.isfinite().all()                      # a gradient may overflow before the loss does
            bar.update()
            stop, last = rt.stop, step == cfg.steps
            log_due, sample_due, save_due = (every > 0 and (last or step % every == 0)
                                             for every in (cfg.log_every, cfg.sample_every, cfg.ckpt_every))
            if not (log_due or sample_due or save_due or last or stop):
                continue                                            # without waiting for the device
            if not finite:
                raise Diverged(f"loss or gradient is no number at step {step} or shortly before; no file was touched"
                               f" since. Start anew with a lower --lr than {cfg.lr}, or with --dtype fp32")
            now = time.perf_counter()
            if log_due:
                speed = (step - logged) * cfg.batch_size / (now - clock)
                log.row(step, *numbers.tolist(), speed)
                bar.set_postfix_str(f"loss {numbers[0]:.4f}, {speed:.0f} images/s", refresh=False)
                logged, clock = step, now
            if save_due or last or stop:
                save_checkpoint(out / "ckpt.pt", to_cpu(dict(
                    model=original.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(), step=step,
                    config=dict(dataclasses.asdict(cfg), data_digest=data_digest),
                    model_args=model_args(cfg, len(source.class_names)), class_names=source.class_names)))
            if stop and not last:
                print(f"stopped and saved at step {step}; go on with: python train.py --resume {shlex.quote(cfg.out)}")
                return
            if sample_due:
                save_samples(cfg, ema, source.class_names, out / "samples" / f"{step:06d}.png")
            clock += time.perf_counter() - now                      # pictures and checkpoints are not training
    farewell(cfg.out)


def main(argv):
    cfg = parse_args(argv)
    try:
        train(cfg)
    except torch.OutOfMemoryError:
        raise UserError("the device's memory does not hold this: raise --accum, or take --grad-checkpoint or a smaller "
                        "--batch-size") from None
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise UserError(f"torch.compile does not work here: take --no-compile ({str(error)[:200]})") from None
        raise


if __name__ == "__main__":
    run(main)
