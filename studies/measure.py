"""Validate."""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from dit import GaussianDiffusion

QUARTERS = 4


def unseen_shapes(n, size=16):
    """(uint8 (n, 3, size, size), classes (n,)) of the built-in set. A run trains on images 0 to 19,999."""
    images = np.stack([train.draw_shape(20_000 + i, size) for i in range(n)]).transpose(0, 3, 1, 2).copy()
    return torch.from_numpy(images), torch.arange(n) % 10


def draws(i, shape):
    """The timesteps (4,), one in each quarter of 0..999, and the noise (4, C, H, W) of image i, for any model."""
    rng = np.random.default_rng((i, 1))                         # numpy pads short keys with zeros
    t = 250 * np.arange(QUARTERS) + rng.integers(250, size=QUARTERS)
    return torch.from_numpy(t), torch.from_numpy(rng.standard_normal((QUARTERS, *shape), dtype=np.float32))


@torch.no_grad()
def validation_losses(model, images, labels, numbers=None, batch_size=64, null=True):
    """{"mse", "vb", "null": (n, 4)} of the images x_0 in [-1, 1], one column for each quarter of the timesteps.

    null: eps-mse with the null label in place of the image's own.
    """
    diffusion, columns = GaussianDiffusion().to(images.device), []
    for first in range(0, len(images), batch_size):
        x, y = images[first:first + batch_size], labels[first:first + batch_size]
        t, noise = zip(*(draws(i, x.shape[1:]) for i in range(first, first + len(x))), strict=True)
        x, y = x.repeat_interleave(QUARTERS, dim=0), y.repeat_interleave(QUARTERS)
        t, noise = torch.cat(t).to(x.device), torch.cat(noise).to(x.device)
        terms = diffusion.training_losses(model, x, t, noise, y=y)
        found = [terms["mse"], terms["vb"]]
        if null:
            found.append(diffusion.training_losses(model, x, t, noise, y=torch.full_like(y, model.num_classes))["mse"])
        columns.append(torch.stack(found).view(len(found), -1, QUARTERS).double().cpu())
    return dict(zip(("mse", "vb", "null"), torch.cat(columns, dim=1), strict=False))
