"""Train a DiT, as Sec. 4 of the paper does or with other settings.

    python train.py                                             # the built-in shapes: minutes on a laptop's CPU
    python train.py --preset cifar10                            # CIFAR-10, downloaded by torchvision
    python train.py --preset cifar10 --data FOLDER              # your pictures: one folder per class
    python train.py --preset cifar10 --block in-context         # another of the paper's four designs
    python train.py --preset imagenet256 --data FOLDER          # the paper's own: DiT-XL/2 on latents, encoded first
    python train.py --preset imagenet256 --data FOLDER --init DiT-XL/2-256      # start from the official weights
    python train.py --resume runs/shapes                        # continue a run
    torchrun --nproc_per_node=8 train.py --preset cifar10       # 8 GPUs, one process each
    python train.py --preset cifar10 --device xla               # all chips of a TPU machine, or of a pod

A run writes to runs/PRESET, or to --out: ckpt.pt, log.csv, config.json and samples/*.png. sample.py reads ckpt.pt.

In this file, from the paper outwards:

    Settings                 Config (each field is a flag), PRESETS
    The training step        draw_batch, Training, train_step
    The loop                 train, batches, sample_grid
    ------------------------ nothing below this line is about DiT
    The run's files          Folder
    Data                     open_source, Pixels, Latents, prepare_data
    Devices and processes    Runtime, XLARuntime
    Command line             parse_args, main
"""
import argparse
import collections
import colorsys
import contextlib
import copy
import csv
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import shlex
import signal
import stat
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils._triton import has_triton
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import sample
from dit import DESIGNS, Attention, DiT, DiT_models, GaussianDiffusion
from sample import SCALE, VAE, Parser, UserError, atomic_write, between, explaining, load_checkpoint, nfc, writing

# Settings -------------------------------------------------------------------------------------------------------------

def flag(default, help, type=None, choices=None):
    """A field of Config: its default, its help text, and what the command line accepts."""
    return dataclasses.field(default=default, metadata=dict(help=help, type=type, choices=choices))


@dataclasses.dataclass
class Config:
    """The settings of a run. Each field is a flag; the defaults are the paper's (Sec. 4) where it names a value."""
    # the images
    preset: str = flag("shapes", "shapes, cifar10 or imagenet256: settings to start from; other flags change them")
    data: str = flag("shapes", "shapes (built in), cifar10 (downloaded), or a folder that has one folder per class")
    image_size: int = flag(16, "side of the images in pixels; they are scaled and cropped to it", between(int, 1, 4097))
    vae: str = flag("", "train on latents of this VAE: a folder, or a name on the hub. Empty: train on pixels")
    flip: bool = flag(True, "mirror half of the images (the paper's only augmentation)")
    cache: str = flag("runs/cache", "folder for the prepared images")
    # the model (Table 1)
    model: str = flag("", "set the next four flags at once", choices=["", *DiT_models])
    patch_size: int = flag(4, "side p of a patch, in pixels or latents", between(int, 1))
    hidden_size: int = flag(128, "width D", between(int, 4))
    depth: int = flag(4, "number of blocks", between(int, 1))
    num_heads: int = flag(4, "attention heads", between(int, 1))
    block: str = flag("adaln-zero", "the block design", choices=list(DESIGNS))
    # the optimization
    steps: int = flag(400_000, "optimizer steps of the whole run", between(int, 1))
    batch_size: int = flag(256, "images per optimizer step, over all devices and --accum parts", between(int, 1))
    accum: int = flag(1, "split each batch into this many parts, one after the other: saves memory", between(int, 1))
    lr: float = flag(1e-4, "learning rate of AdamW (no weight decay)", between(float, 0))
    lr_decay_steps: int = flag(0, "let the rate fall linearly to 0 over these steps; 0: constant", between(int, 0))
    beta2: float = flag(0.999, "AdamW's second beta", between(float, 0, 1))
    init: str = flag("", "take the first weights from this checkpoint: a ckpt.pt or an official one")
    ema_decay: float = flag(0.9999, "decay of the averaged weights, which are sampled from", between(float, 0, 1))
    label_drop: float = flag(0.1, "share of labels replaced by the null label, for guidance", between(float, 0, 1))
    seed: int = flag(0, "determines initial weights, order, flips, noise: everything random", between(int, 0, 2 ** 63))
    # the machine
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps, or xla for a TPU")
    dtype: str = flag("auto", "auto: bf16 where the hardware multiplies in it", choices=["auto", "fp32", "bf16"])
    compile: bool | None = flag(None, "torch.compile the model; default: on CUDA with Triton only")
    grad_checkpoint: bool = flag(False, "recompute activations in the backward pass: less memory, a third more time")
    # what the run writes
    out: str = flag("", "folder of the run; default: runs/PRESET, or runs/FOLDER with --data FOLDER")
    log_every: int = flag(50, "steps between rows of log.csv; 0: none", between(int, 0))
    ckpt_every: int = flag(5000, "steps between checkpoints; 0: only the last", between(int, 0))
    sample_every: int = flag(5000, "steps between sample grids; 0: none", between(int, 0))
    cfg_scale: float = flag(4.0, "guidance scale of the sample grids; 1: none", between(float, -1000, 1000))
    resume: str = flag("", "folder of a run to continue")


PRESETS = {
    # 10 classes of 16x16 colour images, drawn by this file. fp32: its matrices are too small for bf16 to pay on a CPU.
    "shapes": dict(data="shapes", image_size=16, patch_size=4, hidden_size=128, depth=4, num_heads=4, flip=False,
                   steps=3000, batch_size=64, lr=4e-3, lr_decay_steps=3000, beta2=0.99, ema_decay=0.999, dtype="fp32",
                   log_every=50, ckpt_every=500, sample_every=500, cfg_scale=2.0),
    # CIFAR-10 in pixel space with the paper's recipe. 64 tokens, as DiT-S/4 has on 256-pixel latents.
    "cifar10": dict(data="cifar10", image_size=32, model="DiT-S/4", steps=100_000, batch_size=128, ema_decay=0.9995,
                    ckpt_every=1000, sample_every=1000, cfg_scale=3.0),
    # The paper's own: latents of 32x32x4. Its tables are of 400,000 steps, its best model of 7,000,000.
    "imagenet256": dict(data="", image_size=256, vae=VAE, model="DiT-XL/2"),
}


BUILT_IN = "shapes", "cifar10"                                      # what --data may name instead of a folder


def model_args(cfg, num_classes):
    """The arguments of DiT for this run."""
    side, channels = (cfg.image_size // 8, 4) if cfg.vae else (cfg.image_size, 3)
    return dict(input_size=side, patch_size=cfg.patch_size, in_channels=channels, hidden_size=cfg.hidden_size,
                depth=cfg.depth, num_heads=cfg.num_heads, num_classes=num_classes, block=cfg.block)


# The training step (Sec. 4) -------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=2)
def order_of_images(n, seed, epoch):
    """The order in which an epoch visits n images."""
    # numpy pads short keys with zeros: without the 1, this would be the stream of example 0 of step `epoch`
    return np.random.default_rng((seed, epoch, 0, 1)).permutation(n)


def draw_batch(cfg, images, labels, step, share=slice(None)):
    """(x, y, t, noise, drop) of a step, as CPU tensors of the examples in `share`. x: uint8 pixels or float32 latents.

    Everything random about example i of a step comes from a generator of its own, keyed by (seed, step, i). So it is
    the same on any number of processes and after any restart, and a checkpoint needs no random state.
    """
    examples = []
    for i in range(cfg.batch_size)[share]:
        rng = np.random.default_rng((cfg.seed, step, i))

        # which image: every epoch visits each of them once
        epoch, place = divmod((step - 1) * cfg.batch_size + i, len(labels))
        index = order_of_images(len(labels), cfg.seed, epoch)[place]

        # what the loss needs: the timestep, and whether the label is dropped (Sec. 3.1, classifier-free guidance)
        flip = rng.random() < 0.5 and cfg.flip
        t = rng.integers(1000)
        drop = rng.random() < cfg.label_drop

        # the image, or a latent from the VAE's posterior N(mean, std^2); a mirror image has a posterior of its own
        if cfg.vae:
            mean, std = np.split(images[index][int(flip)].astype(np.float32), 2)               # (4, I/8, I/8) each
            x = SCALE * (mean + std * rng.standard_normal(mean.shape, dtype=np.float32))
        else:
            x = images[index][..., ::-1] if flip else images[index]                            # (3, I, I)

        noise = rng.standard_normal(x.shape, dtype=np.float32)
        examples.append((x, labels[index], t, noise, drop))
    return tuple(torch.from_numpy(np.stack(column)) for column in zip(*examples, strict=True))


class Training:
    """What a step changes: the model, the running average of its weights (EMA), and AdamW's moments."""

    def __init__(self, cfg, rt, num_classes):
        torch.manual_seed(cfg.seed)
        self.model = DiT(**model_args(cfg, num_classes))
        self.ema = copy.deepcopy(self.model).to(rt.device).requires_grad_(False)
        self.wrapped = rt.prepare(self.model.to(rt.device))         # what the loss calls; its weights are the model's
        self.opt = rt.optimizer(self.model.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=0)

    def start_from(self, path, ours):
        """Take the averaged weights of a checkpoint; if it has other classes, all but its label table.

        ours: what a checkpoint of this run says. The same weights with other heads would be another function.
        """
        sizes, table = ours["model_args"], "y_embedder.embedding_table.weight"
        in_table_1 = any(size.keywords["hidden_size"] == sizes["hidden_size"] for size in DiT_models.values())
        theirs = load_checkpoint(path, num_heads=None if in_table_1 else sizes["num_heads"])
        different = [f"{name} {size}, not {sizes[name]}" for name, size in theirs["model_args"].items()
                     if name in sizes.keys() - {"num_classes"} and size != sizes[name]]
        if different:
            raise UserError(f"--init {path} is a model with {'; '.join(different)}: give this run the same sizes")
        names, others = (list(map(nfc, about["class_names"])) for about in (ours, theirs))
        imagenet = (names[0], names[-1], others[0]) == ("n01440764", "n15075141", "tench")
        same_classes = names == others or (imagenet and len(names) == len(others))
        new_table = {} if same_classes else {table: self.model.state_dict()[table]}
        sample.load_strictly(path, self.model, theirs["ema"] | new_table)
        self.ema.load_state_dict(self.model.state_dict())
        return "all weights" if same_classes else "all weights but the label table"

    def state(self):
        return dict(model=self.model.state_dict(), ema=self.ema.state_dict(), opt=self.opt.state_dict())

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        # the moments, copied out of the file; lr and the like are this run's, `fused` and the like this device's
        moments = dict(state["opt"], param_groups=self.opt.state_dict()["param_groups"])
        if len(moments["state"]) != len(list(self.model.parameters())):
            raise ValueError("it lacks moments of AdamW")
        self.opt.load_state_dict(copy.deepcopy(moments))


def learning_rate(cfg, step):
    """Constant, as in the paper, or falling linearly to 0 over cfg.lr_decay_steps."""
    return cfg.lr * max(0.0, 1 - (step - 1) / cfg.lr_decay_steps) if cfg.lr_decay_steps else cfg.lr


def train_step(cfg, rt, training, diffusion, batch, step):
    """One optimizer step on this process's share of the batch.

    Returns (4,) on the device: loss, mse and vb, averaged over the share, and the norm of the whole batch's gradient.
    """
    # forward and backward, in cfg.accum parts
    losses = 0
    parts = zip(*(tensor.chunk(cfg.accum) for tensor in batch), strict=True)
    for k, part in enumerate(parts, start=1):
        x, y, t, noise, drop = rt.to_device(part)
        x = x / 127.5 - 1 if x.dtype == torch.uint8 else x                        # pixels to [-1, 1]
        with rt.accumulating(last=k == cfg.accum):
            with rt.autocast():
                terms = diffusion.training_losses(training.wrapped, x, t, noise, y=y, drop=drop)
            means = torch.stack([terms[name].mean() for name in ("loss", "mse", "vb")]) / cfg.accum
            means[0].backward()
        losses = losses + means.detach()

    # AdamW
    parameters = list(training.model.parameters())
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    for group in training.opt.param_groups:
        group["lr"] = learning_rate(cfg, step)
    training.opt.step()
    training.opt.zero_grad()

    # the average; its decay warms up, or short runs would sample from their initial weights
    decay = min(cfg.ema_decay, (1 + step) / (10 + step))
    rt.update_ema(training.ema.parameters(), parameters, decay)
    return torch.cat([losses, grad_norm[None]])


# The loop -------------------------------------------------------------------------------------------------------------

def train(cfg, rt):
    """Train from the start, or from the run's checkpoint, until the last step or a signal."""
    # what is learned from, and what learns
    source, codec = open_source(cfg), Latents(cfg, rt) if cfg.vae else Pixels()
    about = about_run(cfg, source, codec)
    rt.barrier()                                                    # one machine may have read for hours
    rt.check_same(rt.dtype, about["config"] | dict(data="", vae="", cache="", resume=""))
    training, diffusion = Training(cfg, rt, len(source.class_names)), GaussianDiffusion().to(rt.device)
    start = steps_done(cfg, rt, training, about)

    # prepare the images, which can take hours; then start together
    images, labels = prepare_data(cfg, rt, source, codec)
    rt.barrier()
    rt.check_same(start)
    folder = Folder(cfg, start, writes=rt.rank == 0)
    announce(cfg, rt, training.model, source)

    finite = torch.ones((), dtype=torch.bool, device=rt.device)
    logged, clock = start, time.perf_counter()
    with rt.catching_signals(), rt.progress_bar(cfg.steps, start) as bar:
        for step, batch in batches(cfg, rt, images, labels, start):
            # one step; nothing here waits for the device, which may still be busy when the next step begins
            numbers = train_step(cfg, rt, training, diffusion, batch, step)
            finite &= numbers.isfinite().all()
            rt.mark_step()
            bar.update()

            # is anything else due?
            stop, last = rt.any(rt.stop), step == cfg.steps
            log_due, save_due, sample_due = (every > 0 and (last or step % every == 0)
                                             for every in (cfg.log_every, cfg.ckpt_every, cfg.sample_every))
            if not (log_due or save_due or sample_due or last or stop):
                continue
            now = time.perf_counter()

            # a loss or gradient that is not finite ends the run before anything is written
            if rt.any(not finite):
                raise UserError(f"the loss or the gradient is not finite at step {step} or shortly before. No file was "
                                f"written since. Use a lower --lr than {cfg.lr}, or --dtype fp32", status=3)
            # log
            if log_due:
                numbers, rate = rt.mean(numbers), (step - logged) * cfg.batch_size / (now - clock)
                folder.log(step, *numbers, rate)
                bar.set_postfix_str(f"loss {numbers[0]:.4f}, {rate:.0f} images/s", refresh=False)
                logged, clock = step, now
            # save
            if save_due or last or stop:
                folder.save(about | rt.to_cpu(training.state()) | dict(step=step))
                rt.barrier()
            # sample
            if sample_due and (last or not stop):
                folder.save_picture(step, sample_grid(cfg, rt, training.ema, codec, source.class_names))
            # stop on Ctrl-C or SIGTERM
            if stop and not last:
                return rt.say(f"stopped and saved at step {step}; resume with: {rt.launcher} train.py --resume "
                              f"{shlex.quote(cfg.out)}")
            clock += time.perf_counter() - now                      # checkpoints and pictures are not training
    rt.say(f"done: {cfg.out}. Draw more images with:\n  python sample.py {shlex.quote(cfg.out + '/ckpt.pt')} --seed 1")


def steps_done(cfg, rt, training, about):
    """Load the checkpoint of a run to resume, or the weights that --init names; return the steps already done."""
    if not cfg.resume:
        if cfg.init:
            rt.say(f"{training.start_from(cfg.init, about)} taken from {cfg.init}")
        return 0
    saved = load_checkpoint(Path(cfg.out) / "ckpt.pt", check=rt.local_rank == 0)
    if saved["config"].get("data_digest") != about["config"]["data_digest"]:
        raise UserError(f"{cfg.out} was trained on other images than --data {cfg.data}, or with another --vae: restore "
                        "them, or start a new run with --out")
    with explaining(f"{cfg.out}/ckpt.pt does not fit the model that it describes", "was it changed by hand?",
                    RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        training.load(saved)
    return saved["step"]


def batches(cfg, rt, images, labels, start):
    """(step, this process's share of the batch) after step `start`. A thread draws one step ahead of the device."""
    def draw(step):
        return rt.pin_memory(draw_batch(cfg, images, labels, step, rt.share(cfg.batch_size)))

    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(draw, start + 1)
        for step in range(start + 1, cfg.steps + 1):
            batch = ahead.result()
            if step < cfg.steps:
                ahead = thread.submit(draw, step + 1)
            yield step, batch


def sample_grid(cfg, rt, ema, codec, class_names):
    """A picture of guided samples, one row per class, from the same noise every time.

    It is drawn in parts that fit where a training step fits. Every process draws it and rank 0 writes it, so that no
    process waits long and all machines of a pod run the same programs.
    """
    labels = [c for c in sample.parse_classes(None, class_names) for _ in range(8)]
    part = max(1, cfg.batch_size // rt.devices // cfg.accum // 2)                 # guidance doubles the batch
    pictures = []
    for k in range(0, len(labels), part):
        x = sample.sample_images(ema, labels[k:k + part], range(k, len(labels))[:part], steps=25, sampler="ddim",
                                 cfg_scale=sample.default_guidance(dataclasses.asdict(cfg), class_names),
                                 on_step=lambda *_: rt.mark_step())
        pictures.append(sample.to_uint8(codec.decode(x)))
    return sample.grid_image(torch.cat(pictures), 8)


def announce(cfg, rt, model, source):
    """Say what is trained, on what, and where."""
    n, names = len(source.labels), source.class_names
    devices = f"{rt.devices} x {rt.kind}" if rt.devices > 1 else rt.kind
    rt.say(f"{cfg.model or 'DiT'} {cfg.block}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; "
           f"{n} images, {len(names)} classes ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}), "
           f"{cfg.steps * cfg.batch_size / n:.1f} epochs; {devices}, {str(rt.dtype).removeprefix('torch.')}; {cfg.out}")
    if source.note:
        rt.say(f"note: {source.note}")
    if 0 < cfg.lr_decay_steps < cfg.steps:
        rt.say(f"note: after step {cfg.lr_decay_steps} (--lr-decay-steps) the learning rate is 0: nothing is learned")


# Below this line: files, data, devices, command line. Nothing below is about DiT ======================================

# The run's files ------------------------------------------------------------------------------------------------------

FORMAT = 2                      # of a run: 2 draws by (seed, step, example). A run of another format cannot be resumed


class Folder:
    """The files of a run: config.json, log.csv, ckpt.pt and samples/. Only the process that `writes` touches them.

    Files are replaced atomically. log.csv has one row per logged step, with exact floats. On resume, the rows after
    `step` are removed, since those steps are done again. The folder is locked until the process ends, however it ends.
    """
    columns = ["step", "loss", "mse", "vb", "grad_norm", "images_per_sec"]

    def __init__(self, cfg, step, writes=True):
        self.out, self.writes = Path(cfg.out), writes
        self.log_path = self.out / "log.csv"
        if not writes:
            return
        with writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = hold(cfg)
            refuse_a_second_run(cfg)                                # it may have come and gone since the start
            for folder in (self.out, self.out / "samples"):
                for half in folder.glob("*.????????.part"):         # left by a killed run
                    half.unlink()
            with atomic_write(self.out / "config.json", "w") as file:
                file.write(json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")
            rows = self.rows_until(step)
            with atomic_write(self.log_path, "w", newline="") as file:
                csv.writer(file).writerows([self.columns, *rows])
            self.log_file = open(self.log_path, "a", newline="")

    def rows_until(self, step):
        """The rows of log.csv up to `step`. A killed run may have left half a row."""
        if step == 0 or not self.log_path.exists():
            return []
        rows = [line.split(",") for line in self.log_path.read_text(errors="replace").splitlines()[1:]]
        return [row for row in rows if len(row) == len(self.columns) and row[0].isdecimal() and int(row[0]) <= step]

    def log(self, *values):
        """Append a row to log.csv."""
        if self.writes:
            with writing(self.log_path):
                csv.writer(self.log_file).writerow(map(repr, values))
                self.log_file.flush()

    def save(self, state):
        """Write ckpt.pt, after flushing the log to disk."""
        if self.writes:
            with writing(self.log_path):
                os.fsync(self.log_file.fileno())
            with atomic_write(self.out / "ckpt.pt") as file:
                torch.save(state, file)

    def save_picture(self, step, image):
        if self.writes:
            with atomic_write(self.out / "samples" / f"{step:07d}.png") as file:
                image.save(file, format="png")


def hold(cfg):
    """The lock of the run's folder, for as long as the result lives. UserError if another run has it."""
    lock = FileLock(Path(cfg.out) / ".lock", timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another run is writing into {cfg.out}: wait for its end, or choose another folder with --out "
                        "(if there is no other run, remove its file .lock)") from None
    except (OSError, NotImplementedError):                          # a file system without locks
        pass
    return lock


def about_run(cfg, source, codec):
    """What a checkpoint says about its run: the settings, the images, and how to rebuild the model."""
    data_digest = digest(source.identity, source.class_names, codec.identity)
    return dict(config=dict(dataclasses.asdict(cfg), format=FORMAT, data_digest=data_digest, **codec.constants),
                model_args=model_args(cfg, len(source.class_names)), class_names=source.class_names)


def to_cpu(state):
    """A state dict with all its tensors on the CPU."""
    if isinstance(state, dict):
        return {key: to_cpu(value) for key, value in state.items()}
    return state.detach().cpu() if torch.is_tensor(state) else state


def digest(*values):
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


# Data: any source becomes two arrays, labels (n,) and images (n, ...): pixels, or moments of latents ------------------

class Source(NamedTuple):
    """A data set before its preparation."""
    identity: list              # the images, wherever they lie: a run is resumed on the same ones only
    mtimes: list                # if a file was touched, the arrays are made again
    class_names: list
    labels: list
    load: Callable              # i -> uint8 (I, I, 3), or UserError
    note: str = ""              # such as what is left out


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
    """Image i of the built-in set, uint8 (size, size, 3): shape i % 10, of random place, size, tilt and colours."""
    rng = np.random.default_rng(i)
    scale = rng.uniform(0.75, 0.95)
    cx, cy = rng.uniform(-0.6, 0.6, size=2) * (1 - scale)
    tilt = rng.uniform(-0.12, 0.12)
    hue = rng.random()
    background = colorsys.hsv_to_rgb(hue, rng.uniform(0.3, 0.9), rng.uniform(0.1, 0.35))
    foreground = colorsys.hsv_to_rgb((hue + rng.uniform(0.2, 0.8)) % 1, rng.uniform(0.3, 0.9), rng.uniform(0.8, 1.0))
    fine = (np.arange(4 * size) + 0.5) / (2 * size) - 1             # each pixel is the mean of 4 x 4 points
    x, y = np.meshgrid((fine - cx) / scale, (-fine - cy) / scale)
    x, y = x * np.cos(tilt) - y * np.sin(tilt), x * np.sin(tilt) + y * np.cos(tilt)
    inside = list(SHAPES.values())[i % len(SHAPES)](x, y)
    cover = inside.reshape(size, 4, size, 4).mean(axis=(1, 3))[..., None]
    return (255 * (cover * np.array(foreground) + (1 - cover) * np.array(background))).round().astype(np.uint8)


UPRIGHT = {                     # EXIF's orientation -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright_rgb(image):
    """A PIL image turned as its EXIF says, in RGB, over white where it is transparent."""
    image.load()
    if image.mode[0] in "IF":
        raise ValueError(f"pixels of mode {image.mode}, not of 8 bits")
    with contextlib.suppress(Exception):                            # EXIF may be damaged; only one entry of it is read
        orientation = image.getexif()[0x0112]
        number = orientation[0] if isinstance(orientation, (bytes, tuple)) else orientation
        image = image.transpose(UPRIGHT[int(number)])
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def middle(image, width, height):
    """The middle of a PIL image."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def center_crop(image, size):
    """A PIL image as uint8 (size, size, 3), by ADM's rule: halve with box filters, resize bicubically, crop."""
    image = upright_rgb(image)
    longest = 16 * min(image.size)                                  # enlarging 1 x 60,000 pixels would take gigabytes
    image = middle(image, min(image.width, longest), min(image.height, longest))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return np.asarray(middle(image, size, size))


def open_source(cfg):
    """The Source that --data names. UserError if there is none."""
    if cfg.data == "shapes":
        labels = [i % len(SHAPES) for i in range(20_000)]
        return Source(["shapes", len(labels)], [], list(SHAPES), labels, lambda i: draw_shape(i, cfg.image_size))
    return open_cifar10(cfg) if cfg.data == "cifar10" else open_folder(cfg)


def open_cifar10(cfg):
    import torchvision.datasets  # takes a second to import, which the shapes need not spend

    with explaining("cannot get CIFAR-10", "give a folder of images with --data", OSError, RuntimeError):
        Path(cfg.cache).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(cfg.cache) / "cifar10.lock"):            # one process downloads it
            data = torchvision.datasets.CIFAR10(Path(cfg.cache) / "cifar10", download=True)
    return Source(["cifar10", len(data.targets)], [], data.classes, data.targets,
                  lambda i: center_crop(Image.fromarray(data.data[i]), cfg.image_size))


NO_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS", "IPTC"}         # Pillow knows but does not draw them


def is_picture(path):
    """Whether Pillow reads files with this extension, or else the content. (TGA has no mark in its content.)"""
    Image.init()
    kind = Image.EXTENSION.get(Path(path).suffix.lower())
    if kind not in Image.OPEN:
        with contextlib.suppress(Exception), Image.open(path) as image:
            kind = image.format if image.format != "TGA" else None
    return kind in Image.OPEN.keys() - NO_PICTURES


OUTPUTS = {"config.json", "log.csv"}, {"settings.json", "labels.txt"}       # the files that mark a run, and a set


def is_visible(name):
    """Not hidden, nor what a NAS, a Mac or a disk keeps for itself."""
    return name[0] != "." and name not in ("@eaDir", "__MACOSX", "lost+found")


def files_below(data, skipped, left_out):
    """All visible files below the folder `data`. Each folder is read once; if links lead to it, under its own name."""
    def fail(error):
        raise error

    skipped, seen = set(map(os.path.realpath, skipped)), set(map(str, Path(os.path.realpath(data)).parents))
    starts = [data]
    for start in starts:                                            # folders that links lead to are added at the end
        for folder, folders, names in os.walk(start, onerror=fail):
            real = os.path.realpath(folder)
            if real in seen:
                left_out["links to folders that are read anyway"].append(folder)
                folders.clear()
            elif real in skipped or any(marks <= set(names) for marks in OUTPUTS):
                left_out["folders of runs and sets"].append(folder)
                folders.clear()
            else:
                folders[:] = sorted(filter(is_visible, folders))
                starts += [path for name in folders if os.path.islink(path := os.path.join(folder, name))]
                yield from (os.path.join(folder, name) for name in sorted(names) if is_visible(name))
            seen.add(real)


def list_folder(data, skipped):
    """({class: [(path below data, os.stat)] of its pictures}, {what is left out: paths}) of the folder `data`."""
    classes, left_out = {}, collections.defaultdict(list)
    for path in files_below(data, skipped, left_out):
        relative = os.path.relpath(path, data)
        name, *below = nfc(relative).split(os.sep)
        if os.path.islink(path) and not os.path.exists(path):
            left_out["links that lead nowhere"].append(path)
        elif not stat.S_ISREG((status := os.stat(path)).st_mode) or not is_picture(path):
            left_out["files that Pillow does not read"].append(path)
        elif not below:
            left_out["pictures beside the class folders"].append(path)
        else:
            classes.setdefault(name, []).append((relative, status))

    told = {path for paths in left_out.values() for path in paths}
    folders = [entry for entry in os.scandir(data) if entry.is_dir() and is_visible(entry.name)]
    empty = [entry.path for entry in folders if nfc(entry.name) not in classes and entry.path not in told]
    left_out |= {"folders without pictures": empty} if empty else {}
    if len({nfc(entry.name) for entry in folders}) < len(folders):
        raise UserError(f"{data} has folders of one name in two spellings of Unicode: rename one")
    for found in classes.values():
        found.sort(key=lambda picture: os.path.split(picture[0]))
    return dict(sorted(classes.items())), left_out


SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


def open_folder(cfg):
    data = cfg.data
    link = f", a link to {os.readlink(data)}," if os.path.islink(data) else ""
    with explaining(f"cannot read --data {data}{link}", "it should hold one folder per class", OSError):
        classes, left_out = list_folder(data, skipped=[cfg.out, cfg.cache])
    said = "; ".join(f"{kind}: {len(paths)}, such as {os.path.relpath(min(paths), data)}"
                     for kind, paths in left_out.items())
    if not classes:
        raise UserError(f"no images in --data {data} ({said or 'it is empty'}): it should hold one folder per class")

    pictures = [picture for some in classes.values() for picture in some]
    note = f"left out of {data}: {said}" if said else ""

    # folders of folders
    deep = {name: sum(relative.count(os.sep) > 1 for relative, _ in some) for name, some in classes.items()}
    if any(deep.values()) and {name.lower() for name in classes} <= SPLITS:
        raise UserError(f"{data} has splits ({', '.join(classes)}) and not classes: choose one, such as --data "
                        f"{os.path.join(data, max(deep, key=deep.get))}")
    if sum(deep.values()) == len(pictures):
        note += f"{'; ' * bool(note)}all pictures lie deeper than the class folders: is {data} the right level?"

    def load(i):
        path = os.path.join(data, pictures[i][0])
        try:
            with Image.open(path) as image:
                return center_crop(image, cfg.image_size)
        except Exception as error:                                  # decoders raise anything
            reason = str(error).replace(repr(path), "it")[:100]
            raise UserError(f"{path} ({type(error).__name__}: {reason})") from None

    identity = [(nfc(relative).replace(os.sep, "/"), status.st_size) for relative, status in pictures]
    labels = [label for label, some in enumerate(classes.values()) for _ in some]
    return Source(identity, [status.st_mtime_ns for _, status in pictures], list(classes), labels, load, note)


class Pixels:
    """Train on pixels. Prepared images are uint8 (3, I, I)."""
    identity, constants, slow = [], {}, False

    def encode(self, images):                                       # uint8 (k, I, I, 3)
        return images.transpose(0, 3, 1, 2)                         # uint8 (k, 3, I, I)

    def decode(self, x):
        return x


class Latents:
    """Train on latents (Sec. 3.1). A prepared image is the mean and the standard deviation of the VAE's posterior, of
    the image and of its mirror image: float16 (2, 2 C, I/8, I/8). The mirrored latent is not the mirror image's."""
    constants, slow = dict(scale=SCALE), True

    def __init__(self, cfg, rt):
        self.vae = sample.load_vae(cfg.vae, rt.own_device)
        weights = hashlib.sha256()
        for tensor in self.vae.state_dict().values():
            weights.update(tensor.cpu().numpy().tobytes())
        self.identity = [weights.hexdigest()]                       # another VAE makes other latents

    @torch.no_grad()
    def encode(self, images):                                       # uint8 (k, I, I, 3)
        moments = []
        for some in np.array_split(images, -(-len(images) // 8)):
            x = torch.from_numpy(some.transpose(0, 3, 1, 2).copy()).to(self.vae.device) / 127.5 - 1
            both = [self.vae.encode(view).latent_dist for view in (x, x.flip(3))]
            moments.append(torch.stack([torch.cat([p.mean, p.std], dim=1) for p in both], dim=1).cpu())
        moments = torch.cat(moments).half()                         # (k, 2, 2C, I/8, I/8)
        if not moments.isfinite().all():
            raise UserError("the VAE gives numbers that are not finite: use another --vae")
        return moments.numpy()

    def decode(self, x):
        return sample.decode(self.vae, x, SCALE)


IMAGES_PER_PART, MOST_PARTS = 256, 200                              # each part is an open file


class Parts:
    """The prepared images, memory-mapped from files of `size` images each: parts[i] is image i."""

    def __init__(self, paths, size):
        self.arrays, self.size = [], size
        for path in paths:
            with (explaining(f"{path} is damaged", "remove it, and it is made again", ValueError, EOFError),
                  explaining(f"cannot read {path}", "choose another folder with --cache", OSError)):
                self.arrays.append(np.load(path, mmap_mode="r"))

    def __len__(self):
        return sum(map(len, self.arrays))

    def __getitem__(self, i):
        part, row = divmod(int(i), self.size)
        return self.arrays[part][row]


def prepare_data(cfg, rt, source, codec):
    """(images, labels): made on the first call for this source and codec, found again afterwards.

    Each part is a file that appears when it is complete. So processes that start together share the work without
    locks, and what a killed one leaves undone is done by the others or by the next run.
    """
    n, broken = len(source.labels), {}

    def load(i):
        try:
            return source.load(i)
        except UserError as error:
            broken[i] = str(error)

    # the code's fingerprint
    some_images = [load(i) for i in np.linspace(0, n - 1, 20).astype(int)]
    some_images = [None if image is None else image.tobytes() for image in some_images]
    size = max(IMAGES_PER_PART, -(-n // MOST_PARTS))
    key = digest(source.identity, source.mtimes, source.labels, some_images, cfg.image_size, codec.identity, size)
    folder = Path(cfg.cache) / f"{Path(cfg.data).name}-{cfg.image_size}-{key}"
    paths = {range(start, min(start + size, n)): folder / f"{start:07d}.npy" for start in range(0, n, size)}
    mine = list(paths)[rt.rank::rt.world]

    with ThreadPoolExecutor(os.cpu_count()) as pool:                # decoding a file releases the GIL
        if codec.slow:                                              # find broken images now, not after hours
            for indices in tqdm(mine, desc=f"reading {cfg.data}", unit="part", disable=rt.rank > 0):
                if not paths[indices].exists():
                    list(pool.map(load, indices))
        # first this process's share, then what is left of the others', from the end
        with tqdm(total=n, desc=f"preparing {cfg.data}", unit="image", disable=rt.rank > 0) as bar:
            for indices in [*mine, *(part for part in reversed(paths) if part not in mine)]:
                have_been_read = broken and codec.slow and indices in mine
                if not paths[indices].exists() and not have_been_read:
                    images = list(pool.map(load, indices))
                    if not broken:                                  # else go on, to tell all of them
                        images = codec.encode(np.stack(images))
                        with atomic_write(paths[indices]) as file:
                            np.save(file, images)
                bar.update(len(indices))
    if broken:
        first = [broken[i] for i in sorted(broken)[:10]]
        raise UserError(f"cannot read {len(broken)} of {n} pictures: repair or remove {'; '.join(first)}")
    return Parts(paths.values(), size), np.array(source.labels)


# Devices and processes: the only place that knows what the loop runs on -----------------------------------------------

class Runtime:
    """One process and its device: rank 0 of 1, or one of the N processes that torchrun started.

    A batch is split over `devices` devices. This process loads part `rank` of `world`; `local_rank` is its number on
    its machine. `own_device` is for work that the other processes do not share, such as encoding images.
    """
    checkpoint = staticmethod(functools.partial(checkpoint, use_reentrant=False))

    def __init__(self, cfg):
        self.find_devices(cfg)
        if cfg.batch_size % (self.devices * cfg.accum):
            raise UserError(f"--batch-size {cfg.batch_size} is not divisible by {self.devices} devices times --accum "
                            f"{cfg.accum}: use a multiple of {self.devices * cfg.accum}")
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": self.natural_dtype()}[cfg.dtype]
        self.compile = self.device.type == "cuda" and has_triton() if cfg.compile is None else cfg.compile
        self.grad_checkpoint, self.stop, self.ddp = cfg.grad_checkpoint, False, None
        self.connect()

    def find_devices(self, cfg):
        """Set rank, world, local_rank, devices, device and own_device."""
        known = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ]
        if len(known) not in (0, 3):
            raise UserError("only some of RANK, WORLD_SIZE and LOCAL_RANK are set: start with torchrun, or unset them")
        if known and cfg.device not in ("auto", "cuda", "cpu"):
            raise UserError(f"--device {cfg.device} is one device: under torchrun use auto, cuda or cpu")
        self.rank, self.world, self.local_rank = map(int, known or (0, 1, 0))
        one_each = known and cfg.device == "auto" and not torch.cuda.is_available()     # not one MPS for all
        self.device = self.own_device = sample.pick_device("cpu" if one_each else cfg.device)
        self.devices, self.kind = self.world, self.device.type
        here = os.environ.get("LOCAL_WORLD_SIZE", self.world)
        self.launcher = f"torchrun --nproc_per_node={here}" if self.world > 1 else "python"

    def connect(self):
        """Join the other processes."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
            # nccl gives up after minutes, which is right for a step; preparing data may take days
            self.slow_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))

    def close(self):
        if self.world > 1:
            self.barrier()
            dist.destroy_process_group()

    def natural_dtype(self):
        """bfloat16 where the hardware multiplies in it, else float32."""
        has_bf16 = {"cuda": lambda: torch.cuda.get_device_capability(self.device) >= (8, 0),
                    "cpu": lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
                    "xla": lambda: self.on_tpu}
        return torch.bfloat16 if has_bf16.get(self.device.type, lambda: False)() else torch.float32

    # the model

    def replaced_forwards(self):
        """What this device computes otherwise: {class of module: function(module, x)}."""
        return {Attention: attention} if (self.device.type, self.dtype) == ("cpu", torch.bfloat16) else {}

    def prepare(self, model):
        """What a step calls: `model`, checkpointed, averaging its gradients and compiled as needed. Same parameters."""
        forwards = self.replaced_forwards()
        for module in model.modules():
            if type(module) in forwards:
                module.forward = functools.partial(forwards[type(module)], module)
        if self.grad_checkpoint:
            for block in model.blocks:
                block.forward = functools.partial(self.checkpoint, block.forward)
        if self.world > 1 and self.device.type != "xla":            # whose compiler averages by itself
            model = self.ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        return torch.compile(model) if self.compile else model

    def optimizer(self, parameters, **kwargs):
        return torch.optim.AdamW(parameters, fused=True, **kwargs)

    def update_ema(self, ema, parameters, decay):
        """ema = decay ema + (1 - decay) parameters."""
        get_ema_multi_avg_fn(decay)(list(ema), parameters, None)

    # a step

    def share(self, n):
        """The part of a batch of n that this process loads."""
        return slice(self.rank * n // self.world, (self.rank + 1) * n // self.world)

    def pin_memory(self, tensors):
        """The tensors in pinned memory, which CUDA copies asynchronously."""
        if self.device.type != "cuda":
            return tensors
        with torch.cuda.device(self.device):                        # a new thread would use device 0
            return [tensor.pin_memory() for tensor in tensors]

    def to_device(self, tensors):
        pinned = self.device.type == "cuda"                         # only pinned memory may be copied asynchronously
        return [tensor.to(self.device, non_blocking=pinned) for tensor in tensors]

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def accumulating(self, last):
        """The context of one of --accum parts: gradients are averaged over the processes in the last one only."""
        return self.ddp.no_sync() if self.ddp and not last else contextlib.nullcontext()

    def mark_step(self):
        """Mark the end of a step, for compilers that compile a step as one program."""

    # agreement

    def mean(self, numbers):
        """The mean over all processes, as a list."""
        numbers = numbers.cpu()
        if self.world > 1:
            dist.all_reduce(numbers)
        return (numbers / self.world).tolist()

    def maximum(self, number, group=None):
        """The largest of all processes' integers."""
        number = torch.tensor(int(number))
        if self.world > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=group)
        return number.item()

    def any(self, flag):
        """Whether `flag` is true in any process."""
        return bool(self.maximum(flag))

    def barrier(self):
        """Wait for all processes, for days if need be."""
        self.maximum(0, self.slow_group if self.world > 1 else None)

    def check_same(self, *values):
        """UserError if the processes do not all have the same values."""
        number = int(digest(*values)[:15], 16)
        if self.maximum(number) != -self.maximum(-number):
            raise UserError("the processes do not have the same flags, data, precision or checkpoint: start all with "
                            "the same command line, and with --out on a disk that all of them see")

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def progress_bar(self, steps, start):
        return tqdm(total=steps, initial=start, unit="step", disable=self.rank > 0,
                    mininterval=0.5 if sys.stderr.isatty() else 15)

    def to_cpu(self, state):
        """The state on the CPU, in the process that writes it. On XLA, all processes take part in the copy."""
        return to_cpu(state) if self.rank == 0 or self.device.type == "xla" else {}

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


class XLARuntime(Runtime):
    """One process per machine for all its TPU chips. The program is that of the global batch: torch_xla's SPMD splits
    the batch over the chips of all machines, and the compiler adds the communication."""

    def find_devices(self, cfg):
        if "RANK" in os.environ:                                    # each process would believe to be rank 0 of 1
            raise UserError("--device xla drives all chips of a machine from one process: start it without torchrun")
        if cfg.compile:
            raise UserError("--device xla compiles by itself: use --no-compile")
        remedy = "pip install -e '.[tpu]' and set PJRT_DEVICE, or use --device auto"
        with explaining("--device xla needs torch_xla and a device", remedy, ImportError, RuntimeError):
            import torch_xla
            import torch_xla.backends
            import torch_xla.distributed.spmd as spmd
            import torch_xla.runtime as xr
            import torch_xla.utils.checkpoint
            from torch_xla.core.xla_model import send_cpu_data_to_device

            xr.use_spmd()                                           # before anything touches a device
            self.mesh, self.devices = spmd.get_1d_mesh("data"), xr.global_runtime_device_count()
        self.torch_xla, self.spmd, self.send = torch_xla, spmd, send_cpu_data_to_device
        self.checkpoint = torch_xla.utils.checkpoint.checkpoint     # torch's own cannot run there
        self.rank, self.world, self.local_rank = xr.process_index(), xr.process_count(), 0
        self.on_tpu, self.kind, self.launcher = xr.device_type() == "TPU", f"xla ({xr.device_type()})", "python"
        self.device = torch_xla.device()
        # for work of one process alone: on the XLA device, all machines must run the same programs
        self.own_device = self.device if self.world == 1 else torch.device("cpu")

    def connect(self):
        if self.on_tpu and self.dtype == torch.float32:
            self.torch_xla.backends.set_mat_mul_precision("highest")              # the default multiplies in bfloat16
        if self.world > 1:
            import torch_xla.distributed.xla_backend  # noqa: F401  (registers xla://)

            dist.init_process_group("gloo", init_method="xla://")
            self.slow_group = dist.new_group(timeout=datetime.timedelta(days=7))

    def replaced_forwards(self):
        return {nn.LayerNorm: layer_norm}

    # On XLA, values that change every step must be 1-d tensors. XLA merges equal Python numbers, so when two of them
    # coincide (at step 8, 1 - decay and the loss's 0.5) it compiles a second program.

    def optimizer(self, parameters, **kwargs):
        return torch.optim.AdamW(parameters, capturable=True, **kwargs)

    @torch.no_grad()
    def update_ema(self, ema, parameters, decay):
        weight = torch.tensor([1 - decay]).to(self.device)
        for average, parameter in zip(ema, parameters, strict=True):
            average.lerp_(parameter, weight)

    def to_device(self, tensors):
        return [self.send(tensor, self.device, self.spmd.ShardingSpec(
            self.mesh, ("data",) + (None,) * (tensor.dim() - 1), minibatch=True))[0] for tensor in tensors]

    def mark_step(self):
        self.torch_xla.sync()


def attention(module, x):                                           # (N, T, D)
    """dit.Attention by its formula. On CPUs, the backward pass of torch's own is several times slower in bfloat16."""
    N, T, D = x.shape
    qkv = module.qkv(x).view(N, T, 3, module.num_heads, -1)         # (N, T, 3, h, D/h)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # (N, h, T, D/h) each
    weights = (q / q.shape[-1] ** 0.5 @ k.transpose(2, 3)).softmax(-1)            # (N, h, T, T)
    return module.proj((weights @ v).transpose(1, 2).reshape(N, T, D))            # (N, T, D)


def layer_norm(norm, x):
    """nn.LayerNorm by its formula. torch_xla's own merges batch and tokens: all chips would gather the whole batch."""
    variance, mean = torch.var_mean(x.float(), dim=-1, correction=0, keepdim=True)
    x = (x - mean) * torch.rsqrt(variance + norm.eps)
    return x if norm.weight is None else x * norm.weight + norm.bias


def open_runtime(cfg):
    return XLARuntime(cfg) if cfg.device == "xla" else Runtime(cfg)


# Command line ---------------------------------------------------------------------------------------------------------

# The flags that --resume lets change: it stays the same run. What --data and --vae hold is compared later.
MAY_CHANGE = {"data", "vae", "steps", "accum", "device", "dtype", "compile", "grad_checkpoint", "log_every",
              "ckpt_every", "sample_every", "cfg_scale", "cache"}


def parse_args(argv):
    """The Config of a command line: defaults < preset < --model < explicit flags. On --resume: the checkpoint's."""
    parser = Parser(prog="train.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    for field in dataclasses.fields(Config):
        is_bool = field.type in (bool, bool | None)
        kind = (dict(action=argparse.BooleanOptionalAction) if is_bool else
                dict(type=field.metadata["type"] or field.type, choices=field.metadata["choices"]))
        default = PRESETS["shapes"].get(field.name, field.default)
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, **kind,
                            help=field.metadata["help"] + ("" if default in ("", None) else f" (shapes: {default})"))
    flags = vars(parser.parse_args(argv))
    data = flags.get("data")
    if data in BUILT_IN and os.path.isdir(data):
        raise UserError(f"--data {data} could be the built-in {data} or the folder {data} here: write ./{data} for the "
                        "folder, or start in another folder for the built-in one")
    if data and data not in BUILT_IN:
        flags["data"] = os.path.abspath(data)                       # a resumed run finds it from any folder
    if os.path.exists(flags.get("vae", "")):
        flags["vae"] = os.path.abspath(flags["vae"])
    if "resume" in flags:
        return resumed_config(flags)

    preset = flags.get("preset", "shapes")
    if preset not in PRESETS:
        raise UserError(f"no preset {preset!r}: choose from {', '.join(PRESETS)}")
    sizes = DiT_models.get(flags.get("model", PRESETS[preset].get("model")))
    cfg = Config(**PRESETS[preset] | (sizes.keywords if sizes else {}) | flags)
    if sizes and any(getattr(cfg, name) != size for name, size in sizes.keywords.items()):
        cfg.model = ""                                              # an explicit size makes it another model
    cfg.out = cfg.out or f"runs/{preset if cfg.data == PRESETS[preset]['data'] else Path(cfg.data).name}"
    check(cfg)
    refuse_a_second_run(cfg)
    return cfg


def refuse_a_second_run(cfg):
    """UserError if a new run's folder holds a checkpoint."""
    if not cfg.resume and (Path(cfg.out) / "ckpt.pt").exists():
        raise UserError(f"{cfg.out} already holds a run: continue it with --resume {shlex.quote(cfg.out)}, or choose "
                        "another folder with --out")


def resumed_config(flags):
    """The Config of the run in the folder flags["resume"], with the flags that may change."""
    path = Path(flags.pop("resume"))
    folder = str(path.parent if path.name == "ckpt.pt" else path)   # its ckpt.pt may be named, too
    saved = load_checkpoint(Path(folder) / "ckpt.pt", check=False)  # only its settings are read here
    if saved["config"].get("format") != FORMAT:
        raise UserError(f"{folder} is a run of an older version, which drew other random numbers: finish it with that "
                        f"version, or start a new run from its weights with --init {shlex.quote(folder)} --out NEW")
    config = {field.name: saved["config"].get(field.name) for field in dataclasses.fields(Config)}
    with explaining(f"{folder}/ckpt.pt has settings that no run has", "was it changed by hand?", ValueError,
                    argparse.ArgumentTypeError):
        for field in dataclasses.fields(Config):
            value, kind, choices = config[field.name], field.metadata["type"], field.metadata["choices"]
            if not isinstance(value, field.type) or (choices and value not in choices):
                raise ValueError(f"{field.name} {value}")
            if kind:
                kind(str(value))
    latents_or_pixels = {"vae"} if not flags.get("vae") or not config["vae"] else set()
    different = [f"--{name.replace('_', '-')} {value} (the run has {config[name]})" for name, value in flags.items()
                 if name not in MAY_CHANGE - latents_or_pixels and value != config[name]]
    if different:
        raise UserError(f"{folder} is another run than {', '.join(different)}: leave that out, or start a new run with "
                        "--out")
    cfg = Config(**config | flags | dict(out=folder, resume=folder))
    check(cfg)
    if not 0 < saved["step"] < cfg.steps:
        raise UserError(f"{folder} has done {saved['step']} steps: ask for more with --steps")
    return cfg


def check(cfg):
    """UserError for settings that do not fit together, before anything is read or written."""
    if not cfg.data:
        raise UserError("say which images: --data FOLDER, with one folder per class")
    if cfg.vae and cfg.image_size % 8:
        raise UserError(f"--image-size {cfg.image_size} is not divisible by 8, the VAE's reduction")
    with explaining("no such model", "change the sizes", ValueError), torch.device("meta"):
        DiT(**model_args(cfg, num_classes=1) | dict(depth=1))
    if cfg.data not in BUILT_IN and os.path.realpath(cfg.data) in map(os.path.realpath, (cfg.out, cfg.cache)):
        raise UserError(f"--data {cfg.data} is also --out or --cache: keep the pictures in a folder of their own")
    existing = next(path for path in [Path(cfg.out), *Path(cfg.out).absolute().parents] if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"cannot write into {cfg.out}: choose another folder with --out")


def main(argv):
    cfg = parse_args(argv)
    rt = open_runtime(cfg)
    try:
        # a run that exists is held before its checkpoint is read, a new one when its folder is made
        rt.lock = hold(cfg) if rt.rank == 0 and (Path(cfg.out) / ".lock").exists() else None
        train(cfg, rt)
        rt.close()
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise UserError("another process of this run has ended, and its own message says why. Continue with "
                            f"--resume {cfg.out} if that has a ckpt.pt, else start again", status=1) from None
        raise


if __name__ == "__main__":
    sample.run(main, less_memory="raise --accum, use --grad-checkpoint, or lower --batch-size")
