"""Flow matching (arXiv 2210.02747, linear paths) in diffusion's place.

    python classroom/extensions/flow_matching.py                     # trains on the built-in shapes; train.py's flags
    python classroom/extensions/flow_matching.py runs/flow/ckpt.pt --steps 50     # draws samples; flags of sample.py

The path from image to noise is a straight line, the network predicts its velocity, and sampling follows it by Euler's
method. train.py and sample.py see another class in GaussianDiffusion's place, and a note in the model's arguments.
"""
import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sample
import train


class FlowMatching:
    """x_s = (1 - s) x_0 + s noise, with s from 0 (image) to 1 (noise). The network is given s as the timestep
    1000 s - 1. It returns the velocity dx/ds = noise - x_0 in the first half of its channels; the rest is not used."""
    num_steps = 1000

    def to(self, device):
        return self                                                               # there are no tables

    def respaced(self, num_steps):
        shorter = copy.copy(self)
        shorter.num_steps = num_steps
        return shorter

    def q_sample(self, x_start, t, noise):
        s = ((t + 1) / 1000)[:, None, None, None]
        return (1 - s) * x_start + s * noise

    def training_losses(self, model, x_start, t, noise, **model_kwargs):
        """dict(loss, mse, vb), each (N,): the mean squared error of the velocity; there is no bound."""
        velocity = model(self.q_sample(x_start, t, noise), t, **model_kwargs)[:, :x_start.shape[1]]     # (N, C, H, W)
        mse = ((noise - x_start - velocity) ** 2).flatten(1).mean(1)
        return dict(loss=mse, mse=mse, vb=torch.zeros_like(mse))

    @torch.no_grad()
    def p_sample_loop(self, model, noise, clip_denoised=False, randn=None, progress=None, on_step=None, **model_kwargs):
        """Euler's method from s = 1 to 0; arguments as for GaussianDiffusion.p_sample_loop."""
        x, steps = noise, range(self.num_steps)[::-1]
        for i in steps if progress is None else progress(steps):
            s = (i + 1) / self.num_steps
            t = torch.full((len(x),), 1000 * s - 1, device=x.device)              # (N,), fractional
            velocity = model(x, t, **model_kwargs)[:, :x.shape[1]].to(x.dtype)    # (N, C, H, W)
            if on_step is not None:
                on_step(i, x, x - s * velocity)
            x = x - velocity / self.num_steps
        return x

    ddim_sample_loop = p_sample_loop


def main(argv):
    if {"-h", "--help"} & set(argv):
        return print(__doc__)
    if any(word.partition("=")[0] == "--resume" for word in argv):
        raise sample.UserError("a run of flow_matching.py cannot be resumed: start another, with --out FOLDER")
    train.GaussianDiffusion = sample.GaussianDiffusion = FlowMatching
    # checkpoints say what they predict, so that sample.py does not take them for a diffusion model's
    sizes, DiT = train.model_args, train.DiT
    train.model_args = lambda *args, **kwargs: dict(sizes(*args, **kwargs), predicts="velocity")
    train.DiT = sample.DiT = lambda predicts, **sizes: DiT(**sizes)
    if argv and not argv[0].startswith("-"):
        return sample.main(argv)
    train.main(["--out", "runs/flow", *argv])


if __name__ == "__main__":
    sample.run(main, less_memory="lower --batch-size")
