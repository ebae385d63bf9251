"""Figures 7 and 10, and guidance: what the models of sizes.py draw.

    python studies/samples.py                                   # after sizes.py

Figure 10: more sampling steps against a larger model, ddpm without guidance. Guidance: recognized samples and KID over
the scale, 50 ddim steps of M/4. Figure 7: one noise, decoded by every size. The models are those of seed 0; they are
trained if they are not there. Rows go to docs/studies/steps.csv and guidance.csv, pictures beside them.
"""
import functools
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent))
import judge
import lab
import numpy as np
import plot
import sizes
import torch

import sample
import train

STEPS = 4, 8, 16, 32, 64, 128
SCALES = 0.0, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0
ORDER = ["S/4", "S/2", "M/4", "M/2", "L/4", "W/8"]


@functools.lru_cache(maxsize=1)
def trained_judge():
    torch.set_num_threads(1)
    return judge.Judge()


def score(about, path, images):
    """The row of a model's samples: how many are recognized, and their KID."""
    model, _ = sample.load_model(path)
    how = {name: about[name] for name in ("steps", "sampler", "cfg_scale")}
    labels = torch.arange(images) % 10
    parts = []
    for k in range(0, images, 250):
        some = slice(k, k + 250)
        x = sample.sample_images(model, labels[some], range(images)[some], **how)
        parts.append(sample.to_uint8(x))
    return about | trained_judge().score(torch.cat(parts), labels)


def scored(name, jobs, args):
    """The rows of these jobs, (about, path of the checkpoint)."""
    lock = train.hold(SimpleNamespace(out=f"{args.out}/{name}"))    # noqa: F841  (held until the end)
    made = dict(samples=args.samples, trained=args.steps)
    jobs = [(about | made, path) for about, path in jobs]
    table = lab.Table(f"{args.docs}/{name}.csv")
    left = [(about, path, args.samples) for about, path in jobs if not table.of(about)]
    for (about, *_), row in lab.side_by_side(score, left, args.processes, name):
        table.add([row], about)
    return [row for about, _ in jobs for row in table.of(about)]


def errors(rows, column):
    """What errorbar takes: KID's standard error, or the ends of the share's interval."""
    if column == "kid":
        return [row["kid_error"] for row in rows]
    below = [row["recognized"] - row["low"] for row in rows]
    above = [row["high"] - row["recognized"] for row in rows]
    return np.maximum([below, above], 0)                            # rounding: at a share of 1 it was -2e-16


def draw_steps(rows, path):
    """KID and recognized samples over the compute of an image."""
    figure, places = plot.axes(2)
    for (name,), some in lab.grouped(rows, "model").items():
        size, patch_size = name.split("/")
        look = dict(color=sizes.COLOURS[size], marker=sizes.MARKERS[int(patch_size)])
        compute = [row["mmacs"] * row["steps"] / 1e3 for row in some]
        for place, column in zip(places, ("kid", "recognized"), strict=True):
            values = [row[column] for row in some]
            place.errorbar(compute, values, errors(some, column), ms=5, lw=1, label=name, **look)
            place.set(xscale="log", xlabel="billion multiply-adds to draw an image")
            plot.ticks(place.xaxis, [0.01, 0.03, 0.1, 0.3, 1, 3])
    places[0].set(ylabel="KID x 1000")
    places[1].set(ylabel="share of recognized samples")
    places[1].legend()
    plot.save(figure, path)


def draw_guidance(rows, path):
    figure, (left, right) = plot.axes(2)
    scales = [row["cfg_scale"] for row in rows]
    for place, column in ((left, "recognized"), (right, "kid")):
        values = [row[column] for row in rows]
        place.errorbar(scales, values, errors(rows, column), marker="o")
    left.set(xlabel="guidance scale", ylabel="share of recognized samples")
    right.set(xlabel="guidance scale", ylabel="KID x 1000")
    plot.save(figure, path)


def main(argv):
    flags = lab.parser(__doc__, steps=1500, seeds=0)
    flags.add_argument("--samples", type=sample.between(int, 20), default=500, help="a model and setting (500)")
    args = flags.parse_args(argv)
    rows = lab.study("sizes", sizes.runs([0]), args, keep=True)
    models = {f"{row['size']}/{row['patch_size']}": row for row in rows if row["step"] == args.steps}
    paths = {name: lab.checkpoint("sizes", row, args) for name, row in models.items()}

    jobs = []
    for steps in STEPS:
        for name in ORDER:
            about = dict(model=name, mmacs=models[name]["mmacs"], sampler="ddpm", cfg_scale=1.0, steps=steps)
            jobs.append((about, paths[name]))
    draw_steps(scored("steps", jobs, args), f"{args.docs}/steps.png")

    jobs = [(dict(model="M/4", sampler="ddim", steps=50, cfg_scale=scale), paths["M/4"]) for scale in SCALES]
    draw_guidance(scored("guidance", jobs, args), f"{args.docs}/guidance.png")

    # a row is one noise and class, decoded by all models
    columns = []
    for name in ORDER:
        model, _ = sample.load_model(paths[name])
        columns.append(sample.sample_images(model, range(10), sampler="ddim", steps=50, cfg_scale=2))
    images = sample.to_uint8(torch.stack(columns, dim=1).flatten(0, 1))
    sample.grid_image(images, len(ORDER)).save(f"{args.docs}/noise.png")


if __name__ == "__main__":
    sample.run(main, less_memory="use --processes 1")
