"""train.py's and sample.py's --bench, side by side with the same loop around others' insides (see speed.md).

    python docs/speed.py --model DiT-S/2 --batch-size 8 --steps 20             # training: all kinds, in turns
    python docs/speed.py sample DiT-S/2 --batch-size 8                         # guided sampling likewise
    python docs/speed.py --rounds 5 --kinds official,bf16 --preset cifar10 --data ''    # these two, five times

official        the official recipe's step: eager float32, AdamW as it comes, averaged weights one by one
official tf32   the same, with TF32 products on CUDA
diffusers       diffusers' DiTTransformer2DModel in our loop, float32; diffusers bf16: in bfloat16
fp32, bf16      ours; + compile: with --compile; + cudagraphs: compiled to CUDA graphs
Each measurement is a process of its own; a round has one of each kind; ratios are taken within a round.
"""
import functools
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sample
import train
from dit import DiT

KINDS = {
    "official": ["--dtype", "fp32", "--no-compile"],
    "official tf32": ["--dtype", "fp32", "--no-compile"],
    "diffusers": ["--dtype", "fp32", "--no-compile"],
    "diffusers bf16": ["--dtype", "bf16", "--no-compile"],
    "fp32": ["--dtype", "fp32", "--no-compile"],
    "bf16": ["--dtype", "bf16", "--no-compile"],
    "bf16 + compile": ["--dtype", "bf16", "--compile"],
    "bf16 + compile + cudagraphs": ["--dtype", "bf16", "--compile"],
}


class OfficialTraining(train.Training):
    """Without what Runtime does to the model and the optimizer."""

    def __init__(self, cfg, rt, num_classes):
        super().__init__(cfg, rt, num_classes)
        self.model = self.original
        self.opt = torch.optim.AdamW(self.original.parameters(), lr=cfg.lr, weight_decay=0)


def official_step(cfg, rt, training, diffusion, batch, step):
    x, y, t, noise, drop = rt.put(batch)
    x = x / 127.5 - 1 if x.dtype == torch.uint8 else x
    loss = diffusion.training_losses(training.model, x, t, noise, y=y, drop=drop)["loss"].mean()
    training.opt.zero_grad()
    loss.backward()
    training.opt.step()
    with torch.no_grad():
        for averaged, parameter in zip(training.ema.parameters(), training.original.parameters(), strict=True):
            averaged.mul_(cfg.ema_decay).add_(parameter, alpha=1 - cfg.ema_decay)


class DiffusersDiT(torch.nn.Module):
    """diffusers' model where ours is called. It drops labels by itself."""
    forward_with_cfg = DiT.forward_with_cfg

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 num_classes=1000, block="adaln-zero"):
        super().__init__()
        from diffusers import DiTTransformer2DModel

        self.in_channels, self.num_classes = in_channels, num_classes
        self.patch_size, self.grid_size = patch_size, input_size // patch_size
        self.inner = DiTTransformer2DModel(num_heads, hidden_size // num_heads, in_channels, 2 * in_channels, depth,
                                           sample_size=input_size, patch_size=patch_size,
                                           num_embeds_ada_norm=num_classes)

    def forward(self, x, t, y, drop=None):
        return self.inner(x, timestep=t, class_labels=y).sample


def measure(kind, argv):
    """One measurement: --bench with the insides of `kind`."""
    if kind == "official tf32":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if kind.startswith("official"):
        train.Training, train.train_step = OfficialTraining, official_step
    else:
        sample.keep_freed_memory()
    if kind.startswith("diffusers"):
        train.DiT = DiffusersDiT
        sample.DiT_models = {name: functools.partial(DiffusersDiT, **size.keywords)
                             for name, size in sample.DiT_models.items()}
    if "cudagraphs" in kind:
        torch.compile = functools.partial(torch.compile, mode="reduce-overhead")
    argv = [*argv, *KINDS[kind], "--bench"]
    if argv[0] == "sample":
        return sample.main(argv[1:])
    train.main(["--preset", "imagenet256", "--data", "", *argv])


def in_turns(argv):
    kinds, rounds = None, 3
    while argv and argv[0] in ("--kinds", "--rounds"):
        kinds, rounds = (argv[1].split(","), rounds) if argv[0] == "--kinds" else (kinds, int(argv[1]))
        argv = argv[2:]
    only_cuda = () if torch.cuda.is_available() else ("official tf32", "bf16 + compile + cudagraphs")
    only_training = ("official", "official tf32") if argv[:1] == ["sample"] else ()          # there it is fp32
    kinds = kinds or [kind for kind in KINDS if kind not in (*only_cuda, *only_training)]
    rates = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            done = subprocess.run([sys.executable, __file__, *argv], env=os.environ | {"KIND": kind}, text=True,
                                  capture_output=True)
            print(f"{kind}: {done.stdout.strip()}{done.stderr[-500:] if done.returncode else ''}", flush=True)
            rates[kind].append([float(rate) for rate in re.findall(r"(\S+) images/s", done.stdout)])
    print("\nmedians over the rounds; for sample a row for each batch size, in their order"
          "\n| | images/s | times the first |\n|---|--:|--:|")
    for kind in kinds:
        both = [[(ours, ours / first) for ours, first in zip(*pair, strict=False)]
                for pair in zip(rates[kind], rates[kinds[0]], strict=True)]
        for some in zip(*both, strict=False):
            print(f"| {kind} | {statistics.median(rate for rate, _ in some):.4g} | "
                  f"{statistics.median(ratio for _, ratio in some):.2f} |")


if __name__ == "__main__":
    if "KIND" in os.environ:
        measure(os.environ["KIND"], sys.argv[1:])
    else:
        in_turns(sys.argv[1:])
