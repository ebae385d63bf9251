"""Make docs/reference/PRESET.csv: what a right run measures after some steps, for `is my loss right?`.

    python studies/reference.py                                 # the preset shapes with three seeds: 15 minutes

Trains as train.py does, and validates the averaged weights on the images of measure.py. mse_error and vb_error are
standard errors of the difference to the first seed.
"""
import csv
import sys

import measure
import torch

import sample
import train
from dit import DESIGNS, GaussianDiffusion

CHECKED = 100, 300, 1000, 3000                                  # and after the last step


def rows_of(cfg, firsts, images, labels):
    """A row of the file for each checked step of a run. firsts: {step: losses of the first seed}, filled by it."""
    rt, source = train.Runtime(cfg), train.open_source(cfg)
    data = train.prepare_data(cfg, rt, source, train.Pixels())
    training, diffusion = train.Training(cfg, rt, len(source.class_names)), GaussianDiffusion().to(rt.device)
    for step, batch in train.batches(cfg, rt, *data, 0):
        train.train_step(cfg, rt, training, diffusion, batch, step)
        if step in CHECKED or step == cfg.steps:
            losses = measure.validation_losses(training.ema, images / 127.5 - 1, labels)
            first = firsts.setdefault(step, losses)
            errors = {f"{name}_error": measure.error(losses[name] - first[name]) for name in ("mse", "vb")}
            yield dict(preset=cfg.preset, block=cfg.block, seed=cfg.seed, step=step, **measure.summary(losses), **errors)


def main(argv):
    flags = sample.Parser(description=__doc__.split("\n")[0])
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--images", type=int, default=measure.REFERENCE_IMAGES)
    flags.add_argument("--out", default=measure.REFERENCE, type=measure.Path)
    args, settings = flags.parse_known_args(argv)
