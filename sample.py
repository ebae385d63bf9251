"""Guided images from a checkpoint: a grid with one row a class, and on request the film of their denoising.

    python sample.py runs/shapes/ckpt.pt                                      # samples.png, 8 images of each class
    python sample.py runs/shapes/ckpt.pt --classes star,heart --cfg-scale 1   # classes by name or number; no guidance
    python sample.py runs/shapes/ckpt.pt --sampler ddim --steps 50 --seed 1   # faster; other noise
    python sample.py runs/shapes/ckpt.pt --gif film.gif                       # x_t beside the predicted x_0
    python sample.py DiT-XL/2-256 --classes otter,207 --sampler dpm++         # official weights, downloaded once
    torchrun --nproc_per_node=8 sample.py CKPT --num-samples 50000 --out DIR  # a set for FID
    python sample.py DiT-XL/2 --bench --dtype bf16                            # images/s, of any size of Table 1

All that concerns the model (sizes, classes, pixels) is in the checkpoint. Image i of a run depends on its class, --seed
and i alone, so that neither the number of images nor the batch size changes it.
"""
import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import signal
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from dit import DiT, DiT_models, GaussianDiffusion

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
    keep_freed_memory()
    try:
        main(sys.argv[1:])
    except UserError as error:
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"{Path(sys.argv[0]).name}{rank}: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def keep_freed_memory():
    """Have glibc keep what is freed for what comes next: every 4 KB that it returns and asks for again is a fault."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2 ** 25)                          # the largest it takes


def out_of_memory(error):
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "allocate memory", "RESOURCE_EXHAUSTED"))


@contextlib.contextmanager
def limits_told(smaller):
    """Inside, what this machine cannot do is a UserError; `smaller` says how to need less memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            raise UserError(f"the device's memory does not hold this: {smaller}") from None
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise UserError(f"torch.compile does not work here: take --no-compile ({str(error)[:200]})") from None
        raise


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
# --bench, here and in train.py


def wait_for(device):
    """Return when the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matrix_rate(device, dtype, wait):
    """(n, flop/s) of a product of two large n x n matrices, the best of five: what the device has to give."""
    n = 4096 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n).to(device, dtype) for _ in range(2))
    times = []
    for _ in range(6):
        wait()
        began = time.perf_counter()
        product = a @ b                                             # held: what nobody holds may never be computed
        wait()
        times.append(time.perf_counter() - began)
        del product
    return n, 2 * n ** 3 / min(times[1:])


def forward_flops(model_args):
    """Flops of a forward pass of one image, two a multiply-add (the paper's "Gflops" are multiply-adds)."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model, one = DiT(**model_args), torch.zeros(1, dtype=torch.long)
        side = model.grid_size * model.patch_size
        model(torch.zeros(1, model.in_channels, side, side), one, one)
    return counter.get_total_flops()


def peak_memory(device):
    """The most bytes that there have been on a CUDA device, elsewhere in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # which Windows has not
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def speed(images, times, flops, peak, best):
    """The line of --bench: `times` of steps that take `flops` each on a device and bring so many images, or parts."""
    low, middle, high = np.quantile(times, (0.1, 0.5, 0.9))
    rate, (n, limit) = flops / middle, best
    return (f"{images / middle:.4g} images/s; {1000 * middle:.4g} ms a step ({1000 * low:.4g} to {1000 * high:.4g} for "
            f"80 % of {len(times)}); {peak / 1e9:.3g} GB at the most; {rate / 1e12:.3g} TFLOP/s a device, "
            f"{rate / limit:.0%} of {limit / 1e12:.3g} in a product of {n} x {n} matrices")


# ----------------------------------------------------------------------------------------------------------------------
# Models


SCALE = 0.18215                 # of the latents of Stable Diffusion's VAE: with it, their standard deviation is about 1
VAE = "stabilityai/sd-vae-ft-ema"
OFFICIAL = {f"DiT-XL/2-{side}": f"https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-{side}x{side}.pt"
            for side in (256, 512)}


def load_checkpoint(path, check=True):
    """A checkpoint as train.py saves it, on the CPU; official weights (see load_model) are brought into its form.

    Nothing in the file is executed, and a tensor is read when it is used; check: compare the whole file with its
    checksums first. UserError if it is no such file.
    """
    if path in OFFICIAL:
        path = download(OFFICIAL[path])
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else str(path)
    try:
        zipped = zipfile.is_zipfile(path)                           # files of torch before 1.6 are not
        if check and zipped and zipfile.ZipFile(path).testzip():
            raise ValueError("a bit has flipped")
        with torch.serialization.safe_globals([argparse.Namespace]):           # the official train.py's settings
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}: give the path of a .pt file, or {' or '.join(OFFICIAL)}") from None
    except Exception:                                               # the bytes decide what the unpickler raises
        raise UserError(f"{path} is not a checkpoint, or a damaged one: give a ckpt.pt that train.py wrote") from None
    found = checkpoint if isinstance(checkpoint, dict) else {}
    if isinstance(found.get("args"), argparse.Namespace):
        return official_checkpoint(path, found.get("ema"))
    if "x_embedder.proj.weight" in found:
        return official_checkpoint(path, found)
    kinds = dict(model=dict, ema=dict, opt=dict, step=int, config=dict, model_args=dict, class_names=list)
    if lacking := [name for name, kind in kinds.items() if not isinstance(found.get(name), kind)]:
        raise UserError(f"{path} is not a checkpoint of train.py: it lacks {', '.join(lacking)}")
    return checkpoint


def download(url):
    """The path of a file in torch.hub's folder, fetched on the first call."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):                              # of many processes, one fetches it
            if not path.exists():
                torch.hub.download_url_to_file(url, part)
                if not zipfile.is_zipfile(part):                    # whose table of contents is at the end
                    part.unlink()
                    raise OSError("it broke off")
                part.rename(path)
    except (OSError, HTTPException) as error:
        raise UserError(f"cannot download {url} ({error}): fetch it by other means and give the file's path") from None
    return path


def official_checkpoint(path, state):
    """A checkpoint like train.py's around a state dict with the official names; the sizes follow from the shapes."""
    try:
        width, channels, p, _ = state["x_embedder.proj.weight"].shape
        tokens = state["pos_embed"].shape[1]
        classes = len(state["y_embedder.embedding_table.weight"]) - 1
        learn_sigma = len(state["final_layer.linear.weight"]) == 2 * channels * p * p
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        heads = {size.keywords["hidden_size"]: size.keywords["num_heads"] for size in DiT_models.values()}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else f"its tensors are others: {error}"
        raise UserError(f"{path} is neither a checkpoint of train.py nor an official one: {why}") from None
    class_names = imagenet_names() if classes == 1000 else [str(c) for c in range(classes)]
    config = dict(cfg_scale=4.0, label_drop=0.1, **(dict(vae=VAE, scale=SCALE) if channels == 4 else {}))
    model_args = dict(input_size=math.isqrt(tokens) * p, patch_size=p, in_channels=channels, hidden_size=width,
                      depth=depth, num_heads=heads.get(width, 16), num_classes=classes, learn_sigma=learn_sigma)
    return dict(model=state, ema=state, opt={}, step=0, config=config, model_args=model_args, class_names=class_names)


def imagenet_names():
    from torchvision.models import ResNet50_Weights

    return ResNet50_Weights.DEFAULT.meta["categories"]


def fit(path, model, state, whose="it describes"):
    """Load a state dict strictly; a UserError names the first three keys that do not fit."""
    expected = model.state_dict()
    shapes = {name: tuple(getattr(tensor, "shape", "?")) for name, tensor in state.items()}
    wrong = [f"{name} is missing" for name in expected if name not in state]
    wrong += [f"{name} is not the model's" for name in state if name not in expected]
    wrong += [f"{name} is {shapes[name]}, not {tuple(tensor.shape)}" for name, tensor in expected.items()
              if name in state and shapes[name] != tuple(tensor.shape)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{path} does not fit the model that {whose}: {', '.join(wrong[:3])}{more}")
    model.load_state_dict(state)


def load_model(path_or_name, device="cpu"):
    """(model, info) of a checkpoint: its EMA weights, in eval mode, on `device`.

    path_or_name: a ckpt.pt of train.py, or its folder; a .pt of the official layout, or of the official train.py; or
    one of OFFICIAL, which is downloaded once. info: dict(config, class_names (one a class), step, space: "pixel" or
    "latent", model_args: those of DiT).
    """
    checkpoint = load_checkpoint(path_or_name)
    try:
        with torch.device("meta"):
            model = DiT(**checkpoint["model_args"])
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path_or_name} describes a model that cannot be ({error}): is it a DiT?") from None
    model = model.to_empty(device="cpu")
    fit(path_or_name, model, checkpoint["ema"])
    info = dict(config=checkpoint["config"], class_names=checkpoint["class_names"], step=checkpoint["step"],
                space="latent" if "scale" in checkpoint["config"] else "pixel", model_args=checkpoint["model_args"])
    return model.to(device).eval().requires_grad_(False), info


def load_vae(name, device="cpu"):
    """diffusers' AutoencoderKL, from a folder that save_pretrained wrote, or from the hub as OWNER/NAME, or
    OWNER/NAME/FOLDER where it is a part of a pipeline; UserError if it is none."""
    from diffusers import AutoencoderKL  # seconds that pixels need not wait

    parts = str(name).split("/") if str(name)[0].isalnum() and not os.path.isdir(name) else [str(name)]
    try:
        vae, report = AutoencoderKL.from_pretrained("/".join(parts[:2]), subfolder="/".join(parts[2:]),
                                                    low_cpu_mem_usage=False, output_loading_info=True)
        if wrong := report["missing_keys"] + report["unexpected_keys"]:        # of which diffusers only warns
            raise ValueError(f"missing or not its own: {', '.join(wrong[:3])}")
    except Exception as error:                                      # diffusers and hub raise whatever befalls them
        raise UserError(f"no VAE {name!r} ({str(error)[:200]}): give --vae a folder with diffusers' AutoencoderKL, or "
                        f"a name on the hub such as {VAE}") from None
    channels, factor = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    if (channels, factor) != (4, 8):
        raise UserError(f"the VAE {name} makes {channels} channels of 1/{factor} of the size, not 4 of 1/8 as Stable "
                        f"Diffusion's: take one such as {VAE}")
    return vae.to(device).eval().requires_grad_(False)


@torch.no_grad()
def decode(vae, latents, scale):
    """Images (N, 3, 8 H, 8 W) in about [-1, 1], on the CPU, of latents (N, 4, H, W): eight at a time."""
    return torch.cat([vae.decode(part / scale).sample.cpu() for part in latents.to(vae.device).split(8)])


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
def sample_images(model, labels, indices=None, *, seed=0, cfg_scale=4.0, cfg_channels=None, steps=250, sampler="ddpm",
                  clip_denoised=True, progress=None, on_step=None):
    """Images (N, C, H, W) in [-1, 1] for the labels (N,), one a label; latents, if the model was trained on them.

    Image k has the noise of (seed, indices[k]); indices are 0..N-1 unless given. clip_denoised is wrong for latents.
    sampler: ddpm, ddim or dpm++. cfg_channels: see DiT.forward_with_cfg. progress, on_step: see p_sample_loop.
    """
    device = next(model.parameters()).device
    indices = range(len(labels)) if indices is None else indices
    diffusion = GaussianDiffusion().respaced(steps).to(device)
    loop = {"ddpm": diffusion.p_sample_loop, "ddim": diffusion.ddim_sample_loop,
            "dpm++": functools.partial(dpm_solver_loop, steps=steps)}[sampler]
    randn = ImageNoise(seed, indices)
    side = model.grid_size * model.patch_size
    noise = randn(torch.empty(len(labels), model.in_channels, side, side, device=device))
    y = torch.as_tensor(labels, dtype=torch.long, device=device)
    return loop(model.forward_with_cfg, noise, clip_denoised=clip_denoised, randn=randn, progress=progress,
                on_step=on_step, y=y, cfg_scale=cfg_scale, cfg_channels=cfg_channels)


@torch.no_grad()
def dpm_solver_loop(model, noise, steps, clip_denoised=False, randn=None, progress=None, on_step=None, **model_kwargs):
    """DPM-Solver++ of second order (arXiv 2211.01095), diffusers' implementation: good in 20 to 25 steps.

    Deterministic, so that randn is not called; the other arguments are p_sample_loop's.
    """
    from diffusers import DPMSolverMultistepScheduler

    diffusion, x_t = GaussianDiffusion().to(noise.device), noise
    solver = DPMSolverMultistepScheduler(                           # thresholds of 1, ratio of 1: plain clipping
        beta_schedule="linear", beta_start=1e-4, beta_end=2e-2, thresholding=clip_denoised, sample_max_value=1.0,
        dynamic_thresholding_ratio=1.0, use_lu_lambdas=True)        # even steps of log-SNR, as its paper has them
    solver.set_timesteps(steps)
    timesteps = list(enumerate(solver.timesteps.tolist()))
    for k, timestep in timesteps if progress is None else progress(timesteps):
        t = torch.full((len(x_t),), timestep, device=x_t.device)
        out = model(x_t, t, **model_kwargs).to(x_t.dtype)
        if on_step is not None:
            on_step(steps - 1 - k, x_t, diffusion.p_mean_variance(out, x_t, t, clip_denoised)["pred_xstart"])
        x_t = solver.step(out[:, :x_t.shape[1]], timestep, x_t).prev_sample
    return x_t


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
    """on_step for sample_images: collects x_t beside the predicted x_0, to be saved as an animation.

    to_picture makes uint8 images of what the model sees.
    """

    def __init__(self, columns, steps, frames=60, to_picture=to_uint8):
        self.columns, self.frames, self.to_picture = columns, [], to_picture
        self.shown = {round(i) for i in np.linspace(0, steps - 1, min(steps, frames))}

    def __call__(self, i, x_t, pred_xstart):
        if i in self.shown:
            pair = [np.asarray(grid_image(self.to_picture(x), self.columns)) for x in (x_t, pred_xstart)]
            self.frames.append(Image.fromarray(np.concatenate(pair, axis=1)))

    def save(self, path, milliseconds=60, hold=2000):
        durations = [milliseconds] * (len(self.frames) - 1) + [hold]
        self.frames[0].save(path, save_all=True, append_images=self.frames[1:], duration=durations, loop=0)


# ----------------------------------------------------------------------------------------------------------------------
# Sample sets (the paper's FID is of 50,000 images)


def set_labels(args, class_names):
    """The label of each image of a set: of --labels, or uniformly random, of image i by (seed, i)."""
    if args.labels is None:
        return [int(np.random.default_rng((args.seed, i, 1)).integers(len(class_names)))
                for i in range(args.num_samples)]
    try:
        lines = Path(args.labels).read_text(encoding="utf-8-sig").split("\n")[:args.num_samples]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --labels {args.labels} ({error}): it should hold one class a line") from None
    if len(lines) < args.num_samples:
        raise UserError(f"--labels {args.labels} has {len(lines)} lines: it needs {args.num_samples} (--num-samples)")
    return [class_number(line.strip(), class_names) for line in lines]


def make_set(args, settings, labels, draw):
    """Fill the folder args.out with 000000.png ..., and with samples.npz (arr_0: uint8, NHWC) when the last is there.

    The processes of torchrun share the batches, whose members do not depend on how many there are. A restart goes on
    with what is missing; other settings than the folder's, and a folder with pictures of another origin, are refused.
    """
    out, rank, world = Path(args.out), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock"):
            known = json.loads((out / "settings.json").read_text()) if (out / "settings.json").exists() else {}
            if not known and any(out.glob("*.png")):
                raise UserError(f"{out} holds pictures of another origin: name another folder by --out")
            known = dict(dtype="fp32", compile=False) | known if known else {}              # before there were these
            if known not in ({}, settings):
                different = [f"{name} {known.get(name)}" for name in settings if known.get(name) != settings[name]]
                raise UserError(f"{out} holds another set, of {', '.join(different)}: name another folder by --out")
            with replacing(out / "settings.json", "w") as file:
                json.dump(settings, file, indent=1)
        with ThreadPoolExecutor(1) as writer:                       # writes a batch while the next is drawn
            written = writer.submit(write_pngs, [], [])
            for start in tqdm(range(args.batch_size * rank, len(labels), args.batch_size * world), disable=rank > 0,
                              desc="sampling", unit="batch"):
                batch = range(start, min(start + args.batch_size, len(labels)))
                paths = [out / f"{i:06d}.png" for i in batch]
                if not all(path.exists() for path in paths):
                    images = draw([labels[i] for i in batch], batch)
                    written.result()
                    written = writer.submit(write_pngs, paths, images)
            written.result()
        paths = [out / f"{i:06d}.png" for i in range(len(labels))]
        with FileLock(out / ".lock"):
            if all(path.exists() for path in paths) and not (out / "samples.npz").exists():
                write_npz(out / "samples.npz", paths)
                print(f"{out}: {len(labels)} images, and samples.npz for ADM's evaluation")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot fill {out} ({error}): make room, or name another folder by --out") from None


def write_pngs(paths, images):
    for path, image in zip(paths, images, strict=True):
        with replacing(path) as file:
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="png")


def write_npz(path, pictures):
    """The pictures as np.savez would store them under arr_0, one in memory at a time."""
    with (replacing(path) as file, zipfile.ZipFile(file, "w") as npz,
          npz.open("arr_0.npy", "w", force_zip64=True) as array):
        width, height = Image.open(pictures[0]).size
        np.lib.format.write_array_header_1_0(array, dict(
            descr="|u1", fortran_order=False, shape=(len(pictures), height, width, 3)))
        for picture in pictures:
            array.write(np.asarray(Image.open(picture)).tobytes())


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def class_number(word, class_names):
    """The number of a class from its name, or from its number."""
    if word in class_names:
        return class_names.index(word)
    if word.isdecimal() and int(word) < len(class_names):
        return int(word)
    names = ", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else "")
    raise UserError(f"no class {word!r}: choose from 0..{len(class_names) - 1} or {names}")


def parse_classes(text, class_names):
    """Class numbers from "3,5" or "star,heart"; all classes, or ten spread over them, from None."""
    if text is None:
        return np.linspace(0, len(class_names) - 1, min(10, len(class_names))).round().astype(int).tolist()
    words = [text] if text in class_names else text.split(",")
    return [class_number(word.strip(), class_names) for word in words]


def parse_args(argv):
    parser = Parser(prog="sample.py", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help=f"a ckpt.pt of train.py, an official .pt, or {' or '.join(OFFICIAL)}")
    parser.add_argument("--classes", help="names or numbers, separated by commas; default: all, ten at the most")
    parser.add_argument("--per-class", type=int, default=8, help="images of each class, in a row (default: 8)")
    parser.add_argument("--cfg-scale", type=float, help="1.0 = no guidance, 0.0 = unconditional (default: the run's)")
    parser.add_argument("--cfg-channels", type=int, help="guide the first of them only; 3: the paper (default: all)")
    parser.add_argument("--steps", type=int, help="of the 1000 timesteps (default: 250; dpm++: 25)")
    parser.add_argument("--sampler", choices=["ddpm", "ddim", "dpm++"], default="ddpm",
                        help="ddpm, the paper's (default); ddim is good in 50 steps, dpm++ in 25")
    parser.add_argument("--vae", help="decoder of latents: a folder or a name on the hub (default: the run's)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images (default: 0)")
    parser.add_argument("--batch-size", type=int, default=128, help="images that are denoised together (default: 128)")
    parser.add_argument("--num-samples", type=int, help="make a set of so many images for FID, in the folder --out")
    parser.add_argument("--labels", help="a file with their classes, one a line (default: uniformly random)")
    parser.add_argument("--out", help="the picture, or the folder of the set, to write (default: samples.png, samples)")
    parser.add_argument("--gif", help="an animation to write as well: x_t beside the predicted x_0")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32",
                        help="bf16: faster where the hardware has it; images differ a little, with the batch size too")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                        help="torch.compile the model: pays in large sets; images differ as by another batch size")
    parser.add_argument("--bench", action="store_true", help="time batches of 1, 8 and --batch-size, or what of it "
                        "fits, instead; the checkpoint may be a size of Table 1, DiT-S/2 say, with random weights")
    args = parser.parse_args(argv)
    args.steps = args.steps if args.steps is not None else 25 if args.sampler == "dpm++" else 250
    for name, low, high in [("per_class", 1, 1000), ("steps", 1, 1000), ("batch_size", 1, 10**5), ("seed", 0, 2**63)]:
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} is out of range: {low} to {high}")
    if args.cfg_scale is not None and not np.isfinite(args.cfg_scale):
        raise UserError(f"--cfg-scale {args.cfg_scale} is no number to guide with: 1.0 is no guidance, 4.0 is strong")
    if args.bench and args.steps < 3:
        raise UserError(f"--bench times steps from the second on: take more --steps than {args.steps}")
    if args.bench and (args.gif or args.out or args.num_samples is not None):
        raise UserError("--bench leaves nothing: leave --out, --gif and --num-samples out")
    if args.num_samples is not None:
        args.out = args.out or "samples"
        if not 1 <= args.num_samples <= 10**6:
            raise UserError(f"--num-samples {args.num_samples} is out of range: 1 to {10**6}")
        if args.gif or args.classes:
            raise UserError("--num-samples goes without --gif and --classes: see --labels")
        return args
    if args.labels is not None or "RANK" in os.environ:
        raise UserError("--labels and torchrun are for sets of samples: say how many by --num-samples")
    args.out = args.out or "samples.png"
    for path, kinds in [(args.out, (".png", ".jpg")), (args.gif, (".gif",))]:
        if path is not None and (not path.endswith(kinds) or Path(path).is_dir()):
            raise UserError(f"{path} should be a file that ends in {' or '.join(kinds)}")
        if path is not None and not (Path(path).parent.is_dir() and os.access(Path(path).parent, os.W_OK)):
            raise UserError(f"no folder {Path(path).parent} to write {path} into: make it first")
    return args


def sample_as_asked(args, model, labels, indices, **kwargs):
    """sample_images by the command line's settings."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
        return sample_images(model, labels, indices, seed=args.seed, cfg_scale=args.cfg_scale, sampler=args.sampler,
                             cfg_channels=args.cfg_channels, steps=args.steps, **kwargs)


def random_model(name, device):
    """(model, info) as load_model's: of a size of Table 1, untrained, for latents of 32 x 32."""
    model = DiT_models[name]().to(device).eval().requires_grad_(False)
    info = dict(config=dict(cfg_scale=4.0, label_drop=0.1), class_names=[str(c) for c in range(1000)], step=0,
                space="latent", model_args=DiT_models[name].keywords)
    return model, info


def step_times(args, model, n, clip_denoised, timed=10):
    """The seconds of each of some steps of a batch of n, after one to get warm."""
    device, stamps = next(model.parameters()).device, []
    if args.compile:
        torch.compiler.reset()                                      # it compiles for eight sizes, then no more
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def on_step(*_):
        wait_for(device)
        stamps.append(time.perf_counter())

    sample_as_asked(args, model, [0] * n, range(n), clip_denoised=clip_denoised, on_step=on_step,
                    progress=lambda steps: steps[:timed + 2])
    return np.diff(stamps)[1:]


def bench(args, model, info):
    """Time the sampler at batch 1, 8 and --batch-size, which is halved until it fits, without decoding."""
    device = next(model.parameters()).device
    print(f"{args.checkpoint}: {args.sampler}, {args.steps} steps, guidance {args.cfg_scale:g}; {device.type}, "
          f"{args.dtype}{', compiled' if args.compile else ''}", flush=True)
    best = matrix_rate(device, torch.bfloat16 if args.dtype == "bf16" else torch.float32, lambda: wait_for(device))
    flops = (1 if args.cfg_scale == 1 else 2) * forward_flops(info["model_args"])
    sizes, largest = sorted({1, min(8, args.batch_size), args.batch_size}), 0
    while sizes:
        n = sizes.pop(0)
        try:
            times = step_times(args, model, n, clip_denoised=info["space"] == "pixel")
        except RuntimeError as error:
            if n == 1 or not out_of_memory(error):
                raise
            sizes = [n // 2] if n // 2 > largest else []
        else:
            print(f"batch {n}:", speed(n / args.steps, times, n * flops, peak_memory(device), best), flush=True)
            largest = n


@limits_told("take a smaller --batch-size")
def main(argv):
    args = parse_args(argv)
    exit_on_sigterm()
    gpu = args.device in ("auto", "cuda") and "LOCAL_RANK" in os.environ and torch.cuda.is_available()
    device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if gpu else args.device)
    if args.bench and args.checkpoint in DiT_models:
        model, info = random_model(args.checkpoint, device)
    else:
        model, info = load_model(args.checkpoint, device)
    latent = info["space"] == "latent"
    if args.vae and not latent:
        raise UserError(f"{args.checkpoint} makes pixels: leave --vae out")
    if args.cfg_channels is not None and not 1 <= args.cfg_channels <= model.in_channels:
        raise UserError(f"--cfg-channels {args.cfg_channels} is out of range: 1 to {model.in_channels}")
    if args.cfg_scale is None:
        args.cfg_scale = default_guidance(info["config"])
    if args.cfg_scale != 1 and info["config"]["label_drop"] == 0:
        raise UserError("this checkpoint was trained without label dropout, so it has no null class to guide against: "
                        "take --cfg-scale 1")
    if args.compile:
        model.compile(dynamic=False)
    if args.bench:
        return bench(args, model, info)
    sets = args.num_samples is not None
    if sets and device.type == "cpu":
        torch.set_num_threads(1)                                    # more would round differently
    classes = parse_classes(args.classes, info["class_names"])
    labels = set_labels(args, info["class_names"]) if sets else [c for c in classes for _ in range(args.per_class)]
    if args.gif and len(labels) > args.batch_size:
        raise UserError(f"--gif shows one batch: ask for fewer than {len(labels)} images or a --batch-size of as many")
    vae_name = args.vae or info["config"]["vae"] if latent else None
    vae = load_vae(vae_name, device) if latent else None

    def to_picture(x):
        return to_uint8(decode(vae, x, info["config"]["scale"]) if latent else x)

    def draw(labels, indices, on_step=None):
        return to_picture(sample_as_asked(args, model, labels, indices, clip_denoised=not latent, on_step=on_step))

    if sets:
        settings = {name: getattr(args, name) for name in (
            "num_samples", "cfg_scale", "cfg_channels", "steps", "sampler", "seed", "batch_size", "dtype", "compile")}
        weights = functools.reduce(lambda crc, w: zlib.crc32(w.cpu().numpy(), crc), model.state_dict().values(), 0)
        make_set(args, settings | dict(weights=weights, vae=vae_name, labels=zlib.crc32(bytes(str(labels), "ascii"))),
                 labels, draw)
    else:
        make_grid_of(args, classes, labels, info["class_names"], draw, to_picture)


def make_grid_of(args, classes, labels, class_names, draw, to_picture):
    """The picture args.out with a row a class, and the film args.gif."""
    film = Film(args.per_class, args.steps, to_picture=to_picture) if args.gif else None
    images = []
    with tqdm(total=len(labels) * args.steps, desc="sampling", unit="step", unit_scale=True) as bar:
        def on_step(i, x_t, pred_xstart):
            bar.update(len(x_t))
            if film:
                film(i, x_t, pred_xstart)

        for start in range(0, len(labels), args.batch_size):
            batch = labels[start:start + args.batch_size]
            images.append(draw(batch, range(start, start + len(batch)), on_step))
    grid_image(torch.cat(images), args.per_class).save(args.out)
    if film:
        film.save(args.gif)
    print(f"{args.out}: {len(labels)} images, a row each of {', '.join(class_names[c] for c in classes)}; "
          f"{args.sampler}, {args.steps} steps, guidance {args.cfg_scale:g}, seed {args.seed} (--seed for others)"
          + (f"; {args.gif}: x_t and the predicted x_0" if film else ""))


if __name__ == "__main__":
    run(main)
