"""Time training or sampling: images/s, memory, and the share of what a plain matrix product reaches on the same device.

    python studies/speed.py train --model DiT-S/2 --batch-size 8              # training steps, on random latents
    python studies/speed.py train --preset cifar10 --accum 2                  # any preset and any flag of train.py
    python studies/speed.py train --model DiT-S/2 --batch-size 8 --kinds official,diffusers,ours --rounds 3
    python studies/speed.py train --model DiT-XL/2 --batch-size 8 --sweep     # double the batch until memory ends
    python studies/speed.py train --model DiT-XL/2 --batch-size 64 --profile  # which operations take the time
    python studies/speed.py sample DiT-XL/2 --batch-size 1,8,64 --dtype bf16  # a size or a ckpt.pt; flags of sample.py
    torchrun --nproc_per_node=8 studies/speed.py train --batch-size 2048      # one kind and one batch size

A kind says whose model and step are timed, and after each + how:

    ours        this project, as the flags say (--dtype, --compile, --grad-checkpoint, ...)
    official    the official recipe's step: plain AdamW, weights averaged one by one (to sample: as ours+fp32)
    diffusers   diffusers' model in our step or sampler
    +tf32 +bf16                  the precision: float32 with rounded products (on CUDA), or bfloat16. Otherwise float32
    +compile +blocks +graphs     torch.compile of the model, of each block by itself, or to CUDA graphs. Otherwise none

Each measurement is a process of its own. A round measures each kind once, and ratios are taken within a round, because
the speed of a machine drifts. A training step counts as three forward passes, two flops per multiply-add; what
--grad-checkpoint computes twice counts once. Weights are random: they do not change the speed.
"""
import argparse
import dataclasses
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sample
import train
from dit import DiT, DiT_models, GaussianDiffusion
from sample import UserError, between

# What is timed: whose model and step ----------------------------------------------------------------------------------

WORDS = {"fp32", "tf32", "bf16", "compile", "blocks", "graphs"}
ALL_KINDS = "official,official+tf32,diffusers,diffusers+bf16,ours+fp32,ours+bf16,ours+bf16+compile,ours+bf16+graphs"


def parse_kind(kind):
    """("ours", {"bf16", "compile"}, the flags that say so) from ours+bf16+compile."""
    whose, *how = kind.split("+")
    if whose not in ("ours", "official", "diffusers") or set(how) - WORDS:
        raise UserError(f"no kind {kind!r}: choose ours, official or diffusers, and +{', +'.join(sorted(WORDS))}")
    flags = ["--dtype", "bf16" if "bf16" in how else "fp32",
             "--compile" if {"compile", "graphs"} & set(how) else "--no-compile"]
    return whose, set(how), [] if kind == "ours" else flags


def set_up(whose, how):
    """What no flag can say. To be called after the device is open and before the model is built."""
    if how or whose != "ours":
        torch.set_float32_matmul_precision("high" if "tf32" in how else "highest")
    if "graphs" in how:
        torch.compile = functools.partial(torch.compile, mode="reduce-overhead")
    if whose == "diffusers":
        train.DiT = DiffusersDiT


class DiffusersDiT(torch.nn.Module):
    """diffusers' model with the interface of ours. In training it drops labels by itself."""
    forward_with_cfg = DiT.forward_with_cfg

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 num_classes=1000, **others):
        super().__init__()
        from diffusers import DiTTransformer2DModel

        self.input_size, self.in_channels, self.num_classes = input_size, in_channels, num_classes
        self.inner = DiTTransformer2DModel(num_heads, hidden_size // num_heads, in_channels, 2 * in_channels, depth,
                                           sample_size=input_size, patch_size=patch_size,
                                           num_embeds_ada_norm=num_classes)
        self.blocks = self.inner.transformer_blocks

    def forward(self, x, t, y, drop=None):
        return self.inner(x, timestep=t, class_labels=y).sample


def official_step(cfg, rt, training, diffusion, batch, step):
    """The step of the official train.py."""
    x, y, t, noise, drop = rt.to_device(batch)
    x = x / 127.5 - 1 if x.dtype == torch.uint8 else x
    loss = diffusion.training_losses(training.wrapped, x, t, noise, y=y, drop=drop)["loss"].mean()
    training.opt.zero_grad()
    loss.backward()
    training.opt.step()
    with torch.no_grad():
        for average, parameter in zip(training.ema.parameters(), training.model.parameters(), strict=True):
            average.mul_(cfg.ema_decay).add_(parameter, alpha=1 - cfg.ema_decay)


# How it is timed ------------------------------------------------------------------------------------------------------

WARM = 3                        # steps before those that are timed: the first compiles, the others fill caches


def wait_for(device):
    """Return when the device has nothing left to do."""
    if device.type == "xla":
        sys.modules["torch_xla"].sync(wait=True)
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)


class Stopwatch:
    """Call it after each step. `first`: the seconds of the first one, with all that is built and compiled for it.
    `times`: of those after WARM, five together (except on a CPU), because a run waits for its device only to log."""

    def __init__(self, device, profile):
        self.device, self.group = device, 1 if device.type == "cpu" else 5
        self.profiler = torch.profiler.profile() if profile else None
        self.count, self.first, self.times, self.began = 0, None, [], time.perf_counter()

    def __call__(self, *args):
        self.count += 1
        if self.count > 1 and (self.count < WARM or (self.count - WARM) % self.group):
            return
        wait_for(self.device)
        seconds = time.perf_counter() - self.began
        if self.count == 1:
            self.first = seconds
        elif self.count > WARM:
            self.times.append(seconds / self.group)
        elif self.profiler:
            self.profiler.start()
        self.began = time.perf_counter()


def forward_flops(model_args):
    """The flops of one image's forward pass. (The paper's "Gflops" are multiply-adds: half of these.)"""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model, one = DiT(**model_args), torch.zeros(1, dtype=torch.long)
        model(torch.zeros(1, model.in_channels, model.input_size, model.input_size), one, one)
    return counter.get_total_flops()


def matrix_rate(device, dtype):
    """(n, flop/s) of the product of two n x n matrices, the best of five: what the device can give."""
    n, times = 4096 if device.type == "cpu" else 8192, []
    a, b = (torch.randn(n, n).to(device, dtype) for _ in range(2))
    for _ in range(6):
        wait_for(device)
        began = time.perf_counter()
        product = a @ b                                             # kept alive: XLA may skip an unused result
        wait_for(device)
        times.append(time.perf_counter() - began)
        del product
    return n, 2 * n ** 3 / min(times[1:])


def peak_memory(device):
    """The most bytes in use so far: of the CUDA device, elsewhere of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return math.nan
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def result_of(watch, images, flops, dtype):
    """The numbers of a measurement: a step makes so many images and takes so many flops on each device."""
    peak, (n, limit) = peak_memory(watch.device), matrix_rate(watch.device, dtype)
    low, middle, high = np.quantile(watch.times, (0.1, 0.5, 0.9))
    return dict(rate=images / middle, ms=1000 * middle, low=1000 * low, high=1000 * high, first=watch.first,
                peak=peak / 1e9, tflops=flops / middle / 1e12, share=flops / middle / limit, limit=limit / 1e12, n=n)


LINE = ("{rate:.4g} images/s; {ms:.4g} ms a step (80 % within {low:.4g} to {high:.4g}, the first {first:.3g} s); peak "
        "{peak:.3g} GB; {tflops:.3g} TFLOP/s a device, {share:.0%} of {limit:.3g} in a product of {n} x {n} matrices")

# One measurement ------------------------------------------------------------------------------------------------------

def random_data(cfg):
    """(images, labels) of 1000 classes, as prepare_data returns them: random latents or pixels."""
    rng, side = np.random.default_rng(0), train.model_args(cfg, 1000)["input_size"]
    labels = rng.integers(1000, size=64)
    if cfg.vae:
        return rng.random((64, 2, 8, side, side), dtype=np.float32).astype(np.float16), labels
    return rng.integers(256, size=(64, 3, side, side), dtype=np.uint8), labels


def time_training(args, flags, whose, how):
    """(devices, stopwatch, images per step, flops per step and device, dtype) of training steps."""
    nowhere = os.path.join(tempfile.gettempdir(), "a-run-that-is-only-timed")     # nothing is written there
    cfg = train.parse_args(["--preset", "imagenet256", *flags, "--data", args.data or "shapes", "--out", nowhere])
    rt = train.open_runtime(cfg)
    set_up(whose, how)
    (images, labels), classes = random_data(cfg), 1000
    if args.data:
        source, codec = train.open_source(cfg), train.Latents(cfg, rt) if cfg.vae else train.Pixels()
        (images, labels), classes = train.prepare_data(cfg, rt, source, codec), len(source.class_names)
        rt.barrier()
    watch, step_of = Stopwatch(rt.device, args.profile), train.train_step
    training, diffusion = train.Training(cfg, rt, classes), GaussianDiffusion().to(rt.device)
    if whose == "official":
        step_of, training.opt = official_step, torch.optim.AdamW(training.model.parameters(), cfg.lr, weight_decay=0)
    for block in training.model.blocks if "blocks" in how else []:
        block.compile(dynamic=False)

    # the loop of train.train, without files and pictures
    longer = dataclasses.replace(cfg, steps=WARM + args.timed)
    for step, batch in train.batches(longer, rt, images, labels, 0):
        step_of(cfg, rt, training, diffusion, batch, step)
        rt.mark_step()
        rt.any(rt.stop)
        watch()
    rt.close()
    flops = 3 * cfg.batch_size / rt.devices * forward_flops(train.model_args(cfg, classes))
    return f"{rt.devices} x {rt.kind}", watch, cfg.batch_size, flops, rt.dtype


def time_sampling(args, flags, whose, how):
    """The same of a sampler's steps, with guidance and without decoding. An image takes --steps of them."""
    asked = sample.parse_args(["--num-samples", "1", "--cfg-scale", "4", *flags])
    if asked.steps < WARM + args.timed:
        raise UserError(f"{asked.steps} sampling steps are fewer than {WARM} warm ones and --timed {args.timed}")
    device, world = sample.pick_device(asked.device), int(os.environ.get("WORLD_SIZE", 1))
    set_up(whose, how)
    sizes = (DiT_models[asked.checkpoint].keywords if asked.checkpoint in DiT_models
             else sample.load_checkpoint(asked.checkpoint)["model_args"])
    model = (DiffusersDiT if whose == "diffusers" else DiT)(**sizes).to(device).eval().requires_grad_(False)
    for module in model.blocks if "blocks" in how else [model] * asked.compile:
        module.compile(dynamic=False, mode="reduce-overhead" if "graphs" in how else None)

    watch, dtype = Stopwatch(device, args.profile), torch.bfloat16 if asked.dtype == "bf16" else torch.float32
    with torch.autocast(device.type, torch.bfloat16, enabled=asked.dtype == "bf16"):
        sample.sample_images(model, [0] * asked.batch_size, steps=asked.steps, sampler=asked.sampler,
                             cfg_scale=asked.cfg_scale, cfg_channels=asked.cfg_channels, on_step=watch,
                             progress=lambda steps: steps[:WARM + args.timed])
    flops = asked.batch_size * (1 if asked.cfg_scale == 1 else 2) * forward_flops(sizes)
    return f"{world} x {device.type}", watch, world * asked.batch_size / asked.steps, flops, dtype


def measure(args, flags):
    """Time one kind at one batch size in this process, and print it."""
    whose, how, kind_flags = parse_kind(args.kinds[0])
    flags = [*flags, *kind_flags, *(["--batch-size", str(args.batch_size[0])] if args.batch_size else [])]
    time_steps = time_training if args.what == "train" else time_sampling
    devices, watch, *numbers = time_steps(args, flags, whose, how)
    if os.environ.get("RANK", "0") != "0":
        return
    if args.profile:
        watch.profiler.stop()
        by = "self_device_time_total" if watch.device.type == "cuda" else "self_cpu_time_total"
        return print(watch.profiler.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=60))
    result = result_of(watch, *numbers)
    if args.json:
        return print(json.dumps(result))
    print(f"{args.kinds[0]}, {args.what} {' '.join(flags)}; {devices}, {numbers[-1]}\n{LINE.format(**result)}")
    if args.what == "train":
        hours = 400_000 * 256 / result["rate"] / 3600
        print(f"400,000 steps of 256 images, as in the paper's tables, would take {hours:,.0f} hours here")


# Many measurements ----------------------------------------------------------------------------------------------------

def in_a_process(argv, kind, size):
    """The result of one measurement in a new process; None if memory ran out."""
    done = subprocess.run([sys.executable, __file__, *argv, "--kinds", kind, "--batch-size", str(size), "--json"],
                          capture_output=True, text=True)
    last = done.stderr.strip().split("\n")[-1][:300]
    full = done.returncode == -9 or "out of memory" in last         # Linux ends a process that is too large with 9
    if done.returncode and not full:
        raise UserError(f"{kind} ended with status {done.returncode}: {last}")
    result = None if full else json.loads(done.stdout.strip().split("\n")[-1])
    print(f"{kind}, batch {size}: {LINE.format(**result) if result else 'out of memory'}", flush=True)
    return result


def in_turns(args, argv):
    """Measure each kind at each batch size in rounds, until memory runs out; then print a table of medians."""
    found = {}                                                      # (kind, size): the result of each round
    for _ in range(args.rounds):
        kinds, sizes = list(args.kinds), list(args.batch_size)
        while sizes and kinds:
            size, first = sizes.pop(0), math.nan
            for kind in list(kinds):
                result = in_a_process(argv, kind, size)
                if result is None:
                    kinds.remove(kind)                              # nor will it fit at a larger size
                    continue
                first = result["rate"] if kind == args.kinds[0] else first
                found.setdefault((kind, size), []).append(result | dict(ratio=result["rate"] / first))
            if args.sweep and not sizes:
                sizes.append(2 * size)
    print(f"\n| medians of {args.rounds} | batch | images/s | times {args.kinds[0]} | peak GB | share of the matrix "
          "product |\n|---|--:|--:|--:|--:|--:|")
    for (kind, size), results in found.items():
        median = {name: statistics.median(result[name] for result in results) for name in results[0]}
        print("| {} | {} | {rate:.4g} | {ratio:.2f} | {peak:.3g} | {share:.0%} |".format(kind, size, **median))


def main(argv):
    parser = sample.Parser(prog="speed.py", description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter,
                           epilog="All other flags are those of train.py or sample.py: see their --help.")
    add = parser.add_argument
    add("what", choices=["train", "sample"])
    add("--batch-size", type=lambda text: [between(int, 1)(size) for size in text.split(",")],
        help="over all devices; or several sizes, separated by commas")
    add("--kinds", default="ours", help=f"one or several, separated by commas (default: ours). all: {ALL_KINDS}")
    add("--rounds", type=between(int, 1), default=1, help="how often to measure everything (default: 1)")
    add("--timed", type=between(int, 5), default=20, help=f"steps to time, after {WARM} others (default: 20)")
    add("--sweep", action="store_true", help="after the last batch size, double it until memory ends")
    add("--profile", action="store_true", help="print the profiler's table of operations instead of the speed")
    add("--data", help="train on these images, as train.py --data (default: random ones; no VAE is needed)")
    add("--json", action="store_true", help="print the numbers of one measurement as JSON")
    args, flags = parser.parse_known_args(argv)
    args.kinds = (ALL_KINDS if args.kinds == "all" else args.kinds).split(",")
    many = args.sweep or len(args.kinds) > 1 or len(args.batch_size or [1]) > 1 or args.rounds > 1
    if args.json or not many:                                       # with --json, this is one of many
        return measure(args, flags)
    if "RANK" in os.environ or args.profile or not args.batch_size:
        raise UserError("several measurements need a --batch-size, and go without torchrun and --profile")
    in_turns(args, argv)


if __name__ == "__main__":
    sample.run(main, less_memory="lower --batch-size, or use --grad-checkpoint")
