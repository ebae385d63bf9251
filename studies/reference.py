"""Make docs/reference/shapes.csv: the losses of a right run on the images of measure.py, after some steps.

    python studies/reference.py                                 # three seeds of the preset: 15 minutes
    python studies/reference.py --block adaln                   # the rows of another design; all flags of train.py

mse_error, vb_error: the standard error of the difference to the first seed.
"""
import csv
import dataclasses
import os
import tempfile

import measure

import sample
import train
from dit import GaussianDiffusion

CHECKED = 100, 300, 1000, 3000                                  # and after the last step
SEEDS = 3


def rows_of(cfg, firsts, images, labels):
    """The rows of a run. firsts: {step: validation losses} of the first seed, which fills it."""
    rt, source = train.Runtime(cfg), train.open_source(cfg)
    data = train.prepare_data(cfg, rt, source, train.Pixels())
    training, diffusion = train.Training(cfg, rt, len(source.class_names)), GaussianDiffusion().to(rt.device)
    for step, batch in train.batches(cfg, rt, *data, 0):
        train.train_step(cfg, rt, training, diffusion, batch, step)
        if step in CHECKED or step == cfg.steps:
            losses = measure.validation_losses(training.ema, images.to(rt.device), labels.to(rt.device))
            first = firsts.setdefault(step, losses)
            errors = {f"{name}_error": measure.error((losses[name] - first[name]).mean(1))
                      for name in ("mse", "vb")}
            about = dict(preset=cfg.preset, block=cfg.block, seed=cfg.seed, step=step)
            yield about | measure.summary(losses) | errors


def main(argv):
    cfg, firsts = train.parse_args(["--out", os.path.join(tempfile.gettempdir(), "nothing is written here"), *argv]), {}
    if cfg.data != "shapes":
        raise sample.UserError("reference values are of the built-in set: use --preset shapes")
    images, labels = measure.unseen_shapes(measure.REFERENCE_IMAGES, cfg.image_size)
    path = measure.REFERENCE / f"{cfg.preset}.csv"
    rows = [row for row in measure.read_rows(path) if row["block"] != cfg.block]
    for seed in range(SEEDS):
        rows += rows_of(dataclasses.replace(cfg, seed=seed), firsts, images / 127.5 - 1, labels)
    with sample.atomic_write(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[-1])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sample.run(main, less_memory="lower --batch-size")
