"""Overlay the logs of any runs: raw points, smoothed curves, log-log.

    python studies/plot.py runs/shapes runs/other                           # writes plot.png
    python studies/plot.py runs/a runs/b --column mse --out mse.png         # another column of log.csv

Two runs with one seed saw the same images, timesteps and noise at every step: their losses are paired, and the
difference is smooth where the losses are not. The right half shows the difference to the first run.
"""
import csv
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sample
from sample import UserError, explaining

COLOURS = {"in-context": "tab:orange", "cross-attention": "tab:green", "adaln": "tab:blue", "adaln-zero": "tab:red"}
PAIRED = "seed", "batch_size", "label_drop", "data", "image_size", "vae", "flip"        # what batches are drawn by


def axes(columns):
    """(figure, axes side by side)."""
    with explaining("pictures need matplotlib", "pip install -e '.[eval]'", ImportError):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    figure, places = plt.subplots(1, columns, figsize=(5.2 * columns, 4), layout="constrained", squeeze=False)
    for place in places[0]:
        place.grid(alpha=0.3, which="both")
    return figure, places[0]


def seeds(place, rows, label, colour):
    """The validation loss over training, a line for each seed."""
    for seed in sorted({row["seed"] for row in rows}):
        some = [row for row in rows if row["seed"] == seed]
        steps, losses = [row["step"] for row in some], [row["mse"] for row in some]
        place.loglog(steps, losses, color=colour, lw=1, label=label)
        label = None                                                # the legend names them once
    return steps


def ticks(axis, values):
    """Mark these values of a logarithmic axis, in plain numbers."""
    axis.set_ticks(values, [f"{value:g}" for value in values])
    axis.set_ticks([], minor=True)


def save(figure, path):
    with sample.atomic_write(Path(path)) as file:
        figure.savefig(file, dpi=110, format="png")
    print(path)


def read_log(folder, column):
    """(steps, values) of a run's log.csv."""
    with explaining(f"{folder} is no run", "give folders that train.py wrote", OSError):
        with open(Path(folder) / "log.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    if not rows or column not in rows[0]:
        raise UserError(f"{folder}/log.csv has no {column}: it has {', '.join(rows[0] if rows else ['no rows'])}")
    return np.array([int(row["step"]) for row in rows]), np.array([float(row[column]) for row in rows])


def smooth(values):
    """A running mean over a fifteenth of the points, narrower at both ends."""
    reach = len(values) // 30
    means = []
    for i in range(len(values)):
        w = min(reach, i, len(values) - 1 - i)
        means.append(values[i - w:i + w + 1].mean())
    return np.array(means)


def paired(folders):
    """Whether the runs drew the same batches."""
    with explaining("a run lacks its config.json", "give folders that train.py wrote", OSError):
        settings = [json.loads((Path(folder) / "config.json").read_text()) for folder in folders]
    return all(one.get(name) == settings[0].get(name) for one in settings for name in PAIRED)


def main(argv):
    flags = sample.Parser(description=__doc__.split("\n")[0])
    flags.add_argument("runs", nargs="+", help="folders with a log.csv")
    flags.add_argument("--column", default="loss", help="of log.csv (loss)")
    flags.add_argument("--out", default="plot.png", help="the picture (plot.png)")
    args = flags.parse_args(argv)

    logs = {folder: read_log(folder, args.column) for folder in args.runs}
    differences = [folder for folder in args.runs[1:] if paired([args.runs[0], folder])]
    figure, places = axes(1 + bool(differences))
    for number, (folder, (steps, values)) in enumerate(logs.items()):
        colour = COLOURS.get(Path(folder).name, f"C{number}")       # a folder named after its design
        places[0].loglog(steps, values, ".", ms=2, alpha=0.3, color=colour)
        places[0].loglog(steps, smooth(values), color=colour, label=folder)
        if folder in differences:
            first_steps, first_values = logs[args.runs[0]]
            both, here, there = np.intersect1d(steps, first_steps, return_indices=True)
            difference = values[here] - first_values[there]
            places[1].semilogx(both, difference, ".", ms=2, alpha=0.3, color=colour)
            places[1].semilogx(both, smooth(difference), color=colour, label=folder)
    for place, label in zip(places, (args.column, f"difference to {args.runs[0]}"), strict=False):
        place.set(xlabel="step", ylabel=label)
        place.legend()
    save(figure, args.out)


if __name__ == "__main__":
    sample.run(main, less_memory="give fewer runs")
