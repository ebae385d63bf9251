"""Guided images from a checkpoint: a grid with one row per class, and if asked for a film of the denoising.

    python sample.py runs/shapes/ckpt.pt                                      # samples.png, 8 images of each class
    python sample.py runs/shapes/ckpt.pt --classes star,heart --cfg-scale 1   # classes by name or number; no guidance
    python sample.py runs/shapes/ckpt.pt --sampler ddim --steps 50 --seed 1   # faster; other noise
    python sample.py runs/shapes/ckpt.pt --gif film.gif                       # x_t beside the predicted x_0
    python sample.py DiT-XL/2-256 --classes otter,207 --sampler dpm++         # official weights, downloaded once
    torchrun --nproc_per_node=8 sample.py CKPT --num-samples 50000 --cfg-scale 1 --out DIR      # a set for FID

The sizes, the classes and the kind of the model come from the checkpoint. Image i depends on its class, --seed and i
alone: neither the number of images nor the batch size changes it.
In this file: Sampling, Checkpoints and the VAE, Sets for FID, Command line, Helpers that train.py shares.
"""
import argparse
import contextlib
import functools
import json
import math
import os
import re
import secrets
import signal
import sys
import unicodedata
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from dit import DiT, DiT_models, GaussianDiffusion

# Sampling -------------------------------------------------------------------------------------------------------------

class ImageNoise:
    """Standard normal noise shaped like x. Each image has a stream of its own, seeded by (seed, i)."""

    def __init__(self, seed, indices):
        self.streams = [np.random.default_rng((seed, i)) for i in indices]

    def __call__(self, x):
        noise = np.stack([stream.standard_normal(x.shape[1:], dtype=np.float32) for stream in self.streams])
        return torch.from_numpy(noise).to(x.device, x.dtype)


@torch.no_grad()
def sample_images(model, labels, indices=None, *, seed=0, cfg_scale=4.0, cfg_channels=None, steps=250, sampler="ddpm",
                  clip_denoised=None, progress=None, on_step=None):
    """Images (N, C, H, W) in [-1, 1], one per label (N,); latents if the model was trained on latents.

    Image k gets the noise of (seed, indices[k]); indices are 0..N-1 by default. sampler: ddpm, ddim or dpm++.
    clip_denoised clamps the predicted x_0 to [-1, 1]; by default for pixels (3 channels), not for latents (4).
    cfg_channels: see DiT.forward_with_cfg. progress, on_step: see GaussianDiffusion.p_sample_loop.
    """
    device = next(model.parameters()).device
    indices = range(len(labels)) if indices is None else indices
    clip_denoised = model.in_channels <= 3 if clip_denoised is None else clip_denoised
    diffusion = GaussianDiffusion().respaced(steps).to(device)
    loop = {"ddpm": diffusion.p_sample_loop, "ddim": diffusion.ddim_sample_loop,
            "dpm++": functools.partial(dpm_solver_loop, steps=steps)}[sampler]

    randn = ImageNoise(seed, indices)
    noise = randn(torch.empty(len(labels), model.in_channels, model.input_size, model.input_size, device=device))
    y = torch.as_tensor(labels, dtype=torch.long, device=device)
    return loop(model.forward_with_cfg, noise, clip_denoised=clip_denoised, randn=randn, progress=progress,
                on_step=on_step, y=y, cfg_scale=cfg_scale, cfg_channels=cfg_channels)


@torch.no_grad()
def dpm_solver_loop(model, noise, steps, clip_denoised=False, randn=None, progress=None, on_step=None, **model_kwargs):
    """DPM-Solver++ of second order (arXiv 2211.01095) by diffusers: good in 20 to 25 steps.

    It is deterministic, so randn is not called. The other arguments are p_sample_loop's.
    """
    from diffusers import DPMSolverMultistepScheduler

    diffusion, x_t = GaussianDiffusion().to(noise.device), noise
    solver = DPMSolverMultistepScheduler(                           # a threshold of 1 with ratio 1 is plain clipping
        beta_schedule="linear", beta_start=1e-4, beta_end=2e-2, thresholding=clip_denoised, sample_max_value=1.0,
        dynamic_thresholding_ratio=1.0, use_lu_lambdas=True)        # even steps of log-SNR, as in its paper
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
    """[-1, 1] -> 0..255 by ADM's rounding: floor of 127.5 x + 128, clamped."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8).cpu()


def grid_image(images, columns):
    """A PIL picture of uint8 images (N, 3, H, W), `columns` per row. Small images are enlarged, pixel by pixel."""
    from torchvision.utils import make_grid  # takes a second to import, which --help need not spend

    enlarge = max(1, 64 // images.shape[-1])
    images = images.repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
    return Image.fromarray(make_grid(images, nrow=columns, padding=4, pad_value=255).permute(1, 2, 0).numpy())


class Film:
    """An on_step for sample_images that collects x_t beside the predicted x_0, and saves them as an animation.

    to_picture turns what the model sees into uint8 images.
    """

    def __init__(self, columns, steps, frames=60, to_picture=to_uint8):
        self.columns, self.frames, self.to_picture = columns, [], to_picture
        self.frames_shown = {round(i) for i in np.linspace(0, steps - 1, min(steps, frames))}

    def __call__(self, i, x_t, pred_xstart):
        if i in self.frames_shown:
            pair = [np.asarray(grid_image(self.to_picture(x), self.columns)) for x in (x_t, pred_xstart)]
            self.frames.append(Image.fromarray(np.concatenate(pair, axis=1)))

    def save(self, path, milliseconds=60, hold=2000):
        self.frames[0].save(path, format="gif", save_all=True, append_images=self.frames[1:], loop=0,
                            duration=[milliseconds] * (len(self.frames) - 1) + [hold])


# Checkpoints and the VAE ----------------------------------------------------------------------------------------------

SCALE = 0.18215                 # of Stable Diffusion's latents: with it, their standard deviation is about 1
VAE = "stabilityai/sd-vae-ft-ema"
OFFICIAL = {f"DiT-XL/2-{side}": f"https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-{side}x{side}.pt"
            for side in (256, 512)}


def load_checkpoint(path, check=True, num_heads=None):
    """A checkpoint in train.py's form, on the CPU. Official weights are brought into that form.

    Nothing in the file is executed, and tensors are read when they are used. check: compare the whole file with its
    checksums first. num_heads: for official weights that do not say it. UserError if it is no checkpoint.
    """
    if path in OFFICIAL and os.path.exists(path):
        raise UserError(f"{path} could be the official weights or your file: write ./{path} for your file, or start "
                        "in another folder")
    if path in OFFICIAL:
        path = download(OFFICIAL[path])
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else str(path)
    if not os.path.exists(path):
        raise UserError(f"no checkpoint {path}: give the path of a .pt file, or {' or '.join(OFFICIAL)}")
    with explaining(f"cannot read {path}", "ask its owner for the right to read it", OSError):
        open(path, "rb").close()
    try:
        zipped = zipfile.is_zipfile(path)                           # files of torch before 1.6 are not
        if check and zipped and zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum does not match")
        with torch.serialization.safe_globals([argparse.Namespace]):              # the official train.py's settings
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception:                                               # damaged bytes make the unpickler raise anything
        raise UserError(f"{path} is damaged, or not a checkpoint of tensors and plain values: give a ckpt.pt that "
                        "train.py wrote") from None

    found = checkpoint if isinstance(checkpoint, dict) else {}
    if isinstance(found.get("args"), argparse.Namespace):
        return official_checkpoint(path, found.get("ema"), found["args"], num_heads)
    if "x_embedder.proj.weight" in found:
        return official_checkpoint(path, found, None, num_heads)
    kinds = dict(model=dict, ema=dict, opt=dict, step=int, config=dict, model_args=dict, class_names=list)
    lacking = [name for name, kind in kinds.items() if not isinstance(found.get(name), kind)]
    if not lacking:
        config, names = found["config"], found["class_names"]
        kinds = dict(cfg_scale=float | int, label_drop=float | int) | (dict(vae=str) if "scale" in config else {})
        lacking = [f"config[{name!r}]" for name, kind in kinds.items() if not isinstance(config.get(name), kind)]
        if len(names) != found["model_args"].get("num_classes") or not all(isinstance(name, str) for name in names):
            lacking.append("a name for each class")
    if lacking:
        raise UserError(f"{path} is not a checkpoint of train.py: it lacks {', '.join(lacking)}")
    return checkpoint


def download(url):
    """The path of a file in torch.hub's folder, which is downloaded on the first call."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.exists():
        return path
    # a server or a proxy may answer anything; one of many processes downloads
    with explaining(f"cannot download {url}", "get it by other means and give its path", Exception):
        with FileLock(f"{path}.lock"):
            if not path.exists():
                torch.hub.download_url_to_file(url, f"{path}.part")
                if not zipfile.is_zipfile(f"{path}.part"):          # torch.hub does not notice
                    raise OSError("it broke off")
                os.replace(f"{path}.part", path)
    return path


def official_checkpoint(path, state, args=None, num_heads=None):
    """A checkpoint in train.py's form from a state dict with the official names.

    args: the settings that the official train.py saves with it. What they do not say follows from the shapes. UserError
    for what neither says, and for a model of another kind in the same layout.
    """
    table, name = "y_embedder.embedding_table.weight", Path(path).name
    with explaining(f"{path} is neither a checkpoint of train.py nor an official one", "give one of them",
                    KeyError, TypeError, ValueError, AttributeError, IndexError):
        width, channels, p, _ = state["x_embedder.proj.weight"].shape
        tokens, (rows, _) = state["pos_embed"].shape[1], state[table].shape
        learn_sigma = len(state["final_layer.linear.weight"]) == 2 * channels * p * p
        depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    if str(getattr(args, "model", name)).lower().startswith("sit") or hasattr(args, "prediction"):
        raise UserError(f"{path} is a SiT, which does not predict the noise of DiT's diffusion: use SiT's own code")
    if channels not in (3, 4):
        raise UserError(f"{path} makes {channels} channels: it takes 3 (pixels) or 4 (Stable Diffusion's latents)")

    # the number of heads leaves no trace in the shapes
    table_1 = {size.keywords["hidden_size"]: size.keywords["num_heads"] for size in DiT_models.values()}
    num_heads = num_heads or table_1.get(width)
    if num_heads is None:
        raise UserError(f"{path} does not say its number of heads, and Table 1 has no width {width}: add --num-heads")

    # the last row is the null label, unless the model was trained without label dropout
    classes = getattr(args, "num_classes", rows if rows in (1, 1000) else rows - 1)
    if type(classes) is not int or classes not in (rows, rows - 1) or classes < 1:
        raise UserError(f"{path} says {classes!r} classes, but its label table has {rows} rows: it needs one for each "
                        "class, and may have one more")
    if classes == rows:
        state = state | {table: torch.cat([state[table], torch.zeros_like(state[table][:1])])}
    published = name in [Path(url).name for url in OFFICIAL.values()]
    class_names = [str(c) for c in range(classes)]
    if classes == 1000 and (published or "imagenet" in str(getattr(args, "data_path", "")).lower()):
        from torchvision.models import ResNet50_Weights
        class_names = ResNet50_Weights.DEFAULT.meta["categories"]

    config = dict(cfg_scale=4.0, label_drop=0.1 if classes < rows else 0.0)
    if channels == 4:
        config |= dict(vae=f"stabilityai/sd-vae-ft-{getattr(args, 'vae', 'ema')}", scale=SCALE)
    if args is None and not published:
        config["assumed"] = f"{classes} classes" + (" and the null label" if classes < rows else "")
    model_args = dict(input_size=math.isqrt(tokens) * p, patch_size=p, in_channels=channels, hidden_size=width,
                      depth=depth, num_heads=num_heads, num_classes=classes, learn_sigma=learn_sigma)
    return dict(model=state, ema=state, opt={}, step=0, config=config, model_args=model_args, class_names=class_names)


def load_strictly(path, model, state):
    """model.load_state_dict(state), with its own words in a UserError if a name or a shape does not fit."""
    what, errors = f"the weights in {path} do not fit the model", (RuntimeError, AttributeError, TypeError)
    with explaining(what, "is it a DiT?", *errors):
        model.load_state_dict(state)


def load_model(path_or_name, device="cpu", num_heads=None):
    """(model, info) of a checkpoint: its averaged weights (EMA), in eval mode, on `device`.

    path_or_name: a ckpt.pt of train.py, or its folder; a .pt in the official layout, or of the official train.py; or a
    name in OFFICIAL. num_heads: for official weights that do not say it. info: dict(config, class_names, step,
    model_args, space: "pixel" or "latent").
    """
    checkpoint = load_checkpoint(path_or_name, num_heads=num_heads)
    with explaining(f"{path_or_name} describes an impossible model", "is it a DiT?",
                    TypeError, ValueError, ZeroDivisionError, RuntimeError), torch.device("meta"):
        model = DiT(**checkpoint["model_args"])
    model = model.to_empty(device="cpu")
    load_strictly(path_or_name, model, checkpoint["ema"])
    info = {name: checkpoint[name] for name in ("config", "class_names", "step", "model_args")}
    info["space"] = "latent" if "scale" in info["config"] else "pixel"
    return model.to(device).eval().requires_grad_(False), info


def load_vae(name, device="cpu"):
    """diffusers' AutoencoderKL, from a folder that save_pretrained wrote or from the hub: OWNER/NAME, or
    OWNER/NAME/FOLDER where it is part of a pipeline. UserError if there is none, or not like Stable Diffusion's."""
    from diffusers import AutoencoderKL  # takes seconds to import, which pixels need not spend

    parts = str(name).split("/") if str(name)[0].isalnum() and not os.path.isdir(name) else [str(name)]
    remedy = f"give --vae a folder with diffusers' AutoencoderKL, or a name on the hub such as {VAE}"
    with explaining(f"no VAE {name!r}", remedy, Exception):         # diffusers and the hub raise many kinds
        vae, report = AutoencoderKL.from_pretrained("/".join(parts[:2]), subfolder="/".join(parts[2:]),
                                                    low_cpu_mem_usage=False, output_loading_info=True)
        if wrong := report["missing_keys"] + report["unexpected_keys"]:           # diffusers only warns about these
            raise ValueError(f"missing or unknown weights: {', '.join(wrong[:3])}")
    channels, factor = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    if (channels, factor) != (4, 8):
        raise UserError(f"the VAE {name} makes {channels} channels of 1/{factor} of the size. Stable Diffusion's make "
                        f"4 of 1/8: use one of those, such as {VAE}")
    return vae.to(device).eval().requires_grad_(False)


@torch.no_grad()
def decode(vae, latents, scale):
    """Images (N, 3, 8 H, 8 W) in about [-1, 1], on the CPU, from latents (N, 4, H, W), eight at a time."""
    return torch.cat([vae.decode(part / scale).sample.cpu() for part in latents.to(vae.device).split(8)])


def default_guidance(config, class_names):
    """The guidance scale of a run's pictures; 1, which is none, if no null label was trained or there is one class."""
    return config["cfg_scale"] if config["label_drop"] > 0 and len(class_names) > 1 else 1.0


# Sets for FID (the paper's FID is of 50,000 images) -------------------------------------------------------------------

def set_labels(args, class_names):
    """The label of each image of a set: from --labels, or uniformly random, that of image i by (seed, i)."""
    if args.labels is None:
        streams = (np.random.default_rng((args.seed, i, 1)) for i in range(args.num_samples))
        return [int(stream.integers(len(class_names))) for stream in streams]
    with explaining(f"cannot read --labels {args.labels}", "it should hold one class per line", OSError):
        text = Path(args.labels).read_text(encoding="utf-8-sig", errors="surrogateescape")
    lines = [line.strip().replace("\t", ":") for line in text.split("\n")[:args.num_samples]]  # or a labels.txt
    if len(lines) < args.num_samples:
        raise UserError(f"--labels {args.labels} has {len(lines)} lines: it needs {args.num_samples} (--num-samples)")
    numbers = {line: class_number(line, class_names) for line in dict.fromkeys(lines)}
    return [numbers[line] for line in lines]


def make_set(args, model, vae_name, class_names, draw, how):
    """Fill the folder args.out with 000000.png ..., labels.txt, and samples.npz (arr_0: uint8, NHWC).

    The processes of torchrun share the batches; a batch's images do not depend on the number of processes. A restart
    makes what is missing. A folder with other settings, or with PNG files of another program, is refused.
    """
    out, rank, world = Path(args.out), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    labels = set_labels(args, class_names)
    paths = [out / f"{i:06d}.png" for i in range(len(labels))]
    crc = functools.reduce(lambda crc, weight: zlib.crc32(weight.cpu().numpy(), crc), model.state_dict().values(), 0)
    flags = "num_samples cfg_scale cfg_channels steps sampler seed batch_size dtype compile".split()
    settings = {name: getattr(args, name) for name in flags} | dict(
        vae=vae_name, weights=crc, labels=zlib.crc32(str(labels).encode()))
    torch.set_num_threads(1)                                        # on a CPU, another number rounds otherwise
    with writing(out), FileLock(out / ".lock"):
        known = None
        if (out / "settings.json").exists():
            with contextlib.suppress(ValueError):                   # damaged, or not JSON
                known = json.loads((out / "settings.json").read_text())
            if not isinstance(known, dict):
                raise UserError(f"{out}/settings.json is damaged: choose another folder with --out")
        if known is None and any(out.glob("*.png")):
            raise UserError(f"{out} contains PNG files that sample.py did not write: choose another folder with --out")
        if different := [f"{k} {known.get(k)}" for k in settings if known is not None and known.get(k) != settings[k]]:
            raise UserError(f"{out} holds another set, with {', '.join(different)}: choose another folder with --out")
        with atomic_write(out / "settings.json", "w") as file:
            json.dump(settings, file, indent=1)
        with atomic_write(out / "labels.txt", "w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{label}\t{class_names[label]}\n" for label in labels)

    if rank == 0:
        print(f"{out}: {len(labels)} images; {how}, seed {args.seed}", flush=True)
    starts = range(args.batch_size * rank, len(labels), args.batch_size * world)
    for start in tqdm(starts, disable=rank > 0, desc="sampling", unit="batch"):
        batch = range(start, min(start + args.batch_size, len(labels)))
        if not all(paths[i].exists() for i in batch):
            for i, image in zip(batch, draw([labels[i] for i in batch], batch), strict=True):
                with atomic_write(paths[i]) as file:
                    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="png")

    with writing(out), FileLock(out / ".lock"):
        if all(path.exists() for path in paths) and not (out / "samples.npz").exists():
            for half in out.glob("*.part"):                         # left by a killed process
                half.unlink()
            write_npz(out / "samples.npz", paths)
            print(f"{out}/samples.npz: for ADM's evaluation; labels.txt: number and name of each image's class")


def write_npz(path, pictures):
    """The pictures as np.savez stores them under arr_0, with one in memory at a time."""
    with (atomic_write(path) as file, zipfile.ZipFile(file, "w") as npz,
          npz.open("arr_0.npy", "w", force_zip64=True) as array):
        width, height = Image.open(pictures[0]).size
        np.lib.format.write_array_header_1_0(array, dict(
            descr="|u1", fortran_order=False, shape=(len(pictures), height, width, 3)))
        for picture in pictures:
            array.write(np.asarray(Image.open(picture)).tobytes())


# Command line ---------------------------------------------------------------------------------------------------------

def class_number(word, class_names):
    """The number of a class from its name, its number, or both as in 3:heart. UserError if two classes fit."""
    word, readings = nfc(word), {}
    for i, name in enumerate(nfc(name).strip() for name in class_names):
        # 1 may mean the folder 01, or 001.albatross
        same_number = word.isdecimal() and re.match(f"0*{word}(?![0-9A-Za-z])", name)
        if same_number or word in (str(i), name, f"{i}:{name}"):
            readings[f"{i}:{name}"] = i
    if len(readings) > 1:
        raise UserError(f"class {word!r} could be {' or '.join(readings)} (number:name): write one of these")
    if not readings:
        raise UserError(f"no class {word!r}: choose from 0..{len(class_names) - 1} or {', '.join(class_names[:10])}")
    return readings.popitem()[1]


def parse_classes(text, class_names):
    """Class numbers from "3,5" or "star,heart"; from None all classes, or ten spread over them."""
    if text is None:
        return np.linspace(0, len(class_names) - 1, min(10, len(class_names))).round().astype(int).tolist()
    words = [text] if text in class_names else text.split(",")      # a name may contain a comma
    return [class_number(word.strip(), class_names) for word in words]


def parse_args(argv):
    parser = Parser(prog="sample.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", help=f"a ckpt.pt of train.py, an official .pt, or {' or '.join(OFFICIAL)}")
    add("--classes", help="names or numbers, separated by commas (default: all, at most ten)")
    add("--per-class", type=between(int, 1, 1001), default=8, help="images of each class, in a row (default: 8)")
    add("--cfg-scale", type=between(float, -1000, 1000), help="1: no guidance, 0: unconditional (default: the run's)")
    add("--cfg-channels", type=int, help="guide only the first channels; 3: as in the paper (default: all)")
    add("--steps", type=between(int, 1, 1001), help="of the 1000 timesteps (default: 250; dpm++: 25)")
    add("--sampler", choices=["ddpm", "ddim", "dpm++"], default="ddpm", help="ddim is good in 50 steps, dpm++ in 25")
    add("--vae", help="decoder of latents: a folder or a name on the hub (default: the run's)")
    add("--seed", type=between(int, 0, 2 ** 63), default=0, help="another seed, other images (default: 0)")
    add("--batch-size", type=between(int, 1, 100_001), default=128, help="images drawn together (default: 128)")
    add("--num-samples", type=between(int, 1, 1_000_001), help="make a set of this many images in the folder --out")
    add("--labels", help="a file with the set's classes, one per line (default: uniformly random)")
    add("--num-heads", type=between(int, 1), help="of weights in the official layout that do not say it")
    add("--out", help="the picture, or the folder of the set (default: samples.png, samples)")
    add("--gif", help="also write an animation: x_t beside the predicted x_0")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16 is faster; images change a little")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile: pays in large sets")
    args = parser.parse_args(argv)
    args.steps = args.steps or (25 if args.sampler == "dpm++" else 250)

    if args.num_samples is not None:
        args.out = args.out or "samples"
        if args.gif or args.classes:
            raise UserError("--num-samples goes without --gif and --classes: use --labels for chosen classes")
        if args.cfg_scale is None:
            raise UserError("say the guidance of a set: --cfg-scale 1 is none, as in most of the paper's tables")
        return args
    if args.labels is not None or "RANK" in os.environ:
        raise UserError("--labels and torchrun are for sets: say how many images with --num-samples")
    args.out = args.out or "samples.png"
    for path, endings in [(args.out, (".png", ".jpg")), (args.gif, (".gif",))]:
        if path and (not path.endswith(endings) or os.path.isdir(path)
                     or not os.access(f"{Path(path).parent}/", os.W_OK)):
            raise UserError(f"cannot write {path}: name a {' or '.join(endings)} file in a folder that exists")
    return args


def main(argv):
    args = parse_args(argv)
    device = pick_device(args.device)
    model, info = load_model(args.checkpoint, device, args.num_heads)
    config, class_names, latent = info["config"], info["class_names"], info["space"] == "latent"

    # what the model can do
    if "assumed" in config and os.environ.get("RANK", "0") == "0":
        print(f"note: {args.checkpoint} holds weights alone: taken for a DiT that predicts the noise, with "
              f"{config['assumed']}")
    if args.num_heads not in (None, heads := info["model_args"].get("num_heads")):
        raise UserError(f"{args.checkpoint} has {heads} heads: leave --num-heads out")
    if args.vae and not latent:
        raise UserError(f"{args.checkpoint} makes pixels: leave --vae out")
    if args.cfg_channels is not None and not 1 <= args.cfg_channels <= model.in_channels:
        raise UserError(f"--cfg-channels {args.cfg_channels} is out of range: 1 to {model.in_channels}")
    if args.cfg_scale is None:
        args.cfg_scale = default_guidance(config, class_names)
    if args.cfg_scale != 1 and config["label_drop"] == 0:
        raise UserError("this checkpoint was trained without label dropout, so it has no null label to guide with: "
                        "use --cfg-scale 1")

    # how images are drawn
    vae_name = args.vae or config["vae"] if latent else None
    vae = load_vae(vae_name, device) if latent else None
    how = f"{args.sampler}, {args.steps} steps, guidance {args.cfg_scale:g}" + (f", VAE {vae_name}" if latent else "")
    if args.compile:
        model.compile(dynamic=False)

    def to_picture(x):
        return to_uint8(decode(vae, x, config["scale"]) if latent else x)

    def draw(labels, indices, **kwargs):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
            x = sample_images(model, labels, indices, seed=args.seed, cfg_scale=args.cfg_scale, steps=args.steps,
                              sampler=args.sampler, cfg_channels=args.cfg_channels, **kwargs)
        return to_picture(x)

    if args.num_samples is not None:
        make_set(args, model, vae_name, class_names, draw, how)
    else:
        make_grid(args, class_names, draw, to_picture, how)


def make_grid(args, class_names, draw, to_picture, how):
    """Write the picture args.out, with one row per class, and the film args.gif."""
    classes = parse_classes(args.classes, class_names)
    labels = [c for c in classes for _ in range(args.per_class)]
    if args.gif and len(labels) > args.batch_size:
        raise UserError(f"--gif shows one batch: ask for fewer than {len(labels)} images, or raise --batch-size")
    film = Film(args.per_class, args.steps, to_picture=to_picture) if args.gif else None
    batches = [range(len(labels))[k:k + args.batch_size] for k in range(0, len(labels), args.batch_size)]
    images, stopped = [], False
    try:
        for batch in batches:
            images.append(draw([labels[i] for i in batch], batch, on_step=film, progress=tqdm))
    except KeyboardInterrupt:                                       # the batches that are drawn are not lost
        if not images:
            raise
        stopped = True
    images = torch.cat(images)
    with atomic_write(Path(args.out)) as file:
        grid_image(images, args.per_class).save(file, format="png" if args.out.endswith(".png") else "jpeg")
    if film:
        with atomic_write(Path(args.gif)) as file:
            film.save(file)
    rows = ", ".join(class_names[c] for c in dict.fromkeys(labels[:len(images)]))
    print(f"{args.out}: {len(images)} images, one row per class ({rows}); {how}, seed {args.seed} (--seed for others)"
          + (f"; {args.gif}: x_t and the predicted x_0" if film else ""))
    if stopped:
        raise KeyboardInterrupt


# Helpers that train.py shares -----------------------------------------------------------------------------------------

class UserError(Exception):
    """An error that the user can fix: shown as one line that says what is wrong and what to do."""

    def __init__(self, message, status=2):
        super().__init__(" ".join(message.split()))                 # one line, whatever a library put into it
        self.status = status


class Parser(argparse.ArgumentParser):
    """argparse, but its errors are UserErrors."""

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def between(kind, low, high=math.inf):
    """An argparse type: numbers of this kind from `low` up to, but not including, `high`."""
    def parse(text):
        number = kind(text)
        if not low <= number < high:
            raise argparse.ArgumentTypeError(f"{text} should be at least {low}"
                                             + (f" and less than {high}" if high < math.inf else ""))
        return number

    parse.__name__ = kind.__name__                                  # for argparse's own messages
    return parse


def nfc(text):
    """One spelling for names that look the same: a Mac writes an accent as a letter of its own."""
    return unicodedata.normalize("NFC", text)


def run(main, less_memory):
    """main(), with errors that the user can fix shown as one line. less_memory: what to do if memory runs out."""
    with contextlib.suppress(AttributeError):                       # a console without the letters of a class's name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (UserError, RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            error = UserError(f"out of memory: {less_memory}")
        elif type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            error = UserError(f"torch.compile does not work here: use --no-compile ({str(error)[:200]})")
        elif not isinstance(error, UserError):
            raise
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"{Path(sys.argv[0]).name}{rank}: {error}", file=sys.stderr)
        sys.exit(error.status)


@contextlib.contextmanager
def explaining(what, remedy, *errors):
    """Inside, errors of these kinds become a UserError: what is wrong, the error's own words, and what to do."""
    try:
        yield
    except errors as error:
        if out_of_memory(error):
            raise
        raise UserError(f"{what} ({str(error)[:300] or type(error).__name__}): {remedy}") from None


def out_of_memory(error):
    return isinstance(error, MemoryError) or re.search("out of memory|allocate memory|RESOURCE_EXHAUSTED", str(error))


def writing(path):
    """Inside, a failure to write is a UserError."""
    errors = OSError, RuntimeError, ValueError, OverflowError       # torch.save, json and Pillow turn one into another
    return explaining(f"cannot write {path}", "make room, or choose another folder", *errors)


@contextlib.contextmanager
def atomic_write(path, mode="wb", **kwargs):
    """Open a temporary file that is renamed to `path` once it is complete and on disk. Until then the old one stays."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")             # each writer has its own
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, mode, **kwargs) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            with contextlib.suppress(OSError):
                part.unlink()


def pick_device(name):
    """torch.device for a name, or for auto: cuda, mps or cpu. Under torchrun, cuda is this process's own GPU."""
    tasks = [int(os.environ.get(name) or 1) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")]
    if max(tasks) > 1 and "RANK" not in os.environ:
        raise UserError(f"srun or mpirun has started {max(tasks)} processes, and each would do the whole work: let it "
                        "start one torchrun on each machine")
    kinds = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    name = kinds[0] if name == "auto" else name
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with contextlib.suppress(RuntimeError, AssertionError, NotImplementedError, ImportError):
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")              # TF32: a picture may move by a grey level
        if device.type in kinds:
            return device
    raise UserError(f"no device {name!r} here: use --device auto, or one of {', '.join(kinds)}; under torchrun, start "
                    "no more processes than there are GPUs")


if __name__ == "__main__":
    run(main, less_memory="lower --batch-size")
