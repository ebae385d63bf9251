"""Sec. 4: the average of the weights (EMA), with a decay that warms up, with a constant one, and without.

    python studies/averages.py                                  # three seeds

The paper averages with a decay of 0.9999 from the first step on. After n steps, 0.9999^n of such an average is still
the initial weights. The runs of one seed train the same weights; they differ in the average alone. Rows go to
docs/studies/averages.csv, the picture to docs/studies/averages.png.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import lab
import plot

import sample

KINDS = [
    dict(average="none", ema_decay=0.0),
    dict(average="warm-up", ema_decay=0.9999),                  # min(0.9999, (1 + n) / (10 + n)), as train.py does
    dict(average="constant", ema_decay=0.999),
    dict(average="constant", ema_decay=0.9999),
]


def alter(training, runtime, run):
    """Let the decay be constant: train_step's warms up."""
    if run["average"] == "constant":
        update_ema = runtime.update_ema
        runtime.update_ema = lambda ema, parameters, decay: update_ema(ema, parameters, run["ema_decay"])


def draw(groups, path):
    figure, (place,) = plot.axes(1)
    for number, (name, rows) in enumerate(groups.items()):
        steps = plot.seeds(place, rows, " ".join(name), f"C{number}")
    place.set(title="of the averaged weights", xlabel="step", ylabel="eps-mse on unseen images")
    plot.ticks(place.xaxis, steps)
    plot.ticks(place.yaxis, [0.05, 0.1, 0.2, 0.5, 1])
    place.legend()
    plot.save(figure, path)


def main(argv):
    args = lab.parser(__doc__, steps=1500).parse_args(argv)
    rows = lab.study("averages", [kind | dict(lr=lab.COMMON, seed=seed) for seed in range(args.seeds)
                                  for kind in KINDS], args, alter=alter)
    groups = {}
    for (average, decay), some in lab.grouped(rows, "average", "ema_decay").items():
        groups[(average, f"{decay:g}") if decay else (average,)] = some
    lab.report("eps-mse of the averaged weights", groups, errors=lab.per_image("averages", args))
    draw(groups, f"{args.docs}/averages.png")


if __name__ == "__main__":
    sample.run(main, less_memory="use --processes 1")
