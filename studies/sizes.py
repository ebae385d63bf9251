"""Figures 6 to 9: sizes and patch sizes. Loss against Gflops, against parameters, and against training compute.

    python studies/sizes.py                                     # three seeds

All have adaLN-Zero and one learning rate. In pixels a token has p x p x 3 numbers, and it cannot return more of them
than its width: patch size 8 (192 numbers) is left to a shallow model of width 384. Rows go to docs/studies/sizes.csv,
the picture to docs/studies/sizes.png.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import lab
import numpy as np
import plot

import sample

SIZES = {
    "S": dict(depth=2, hidden_size=64, num_heads=2),
    "M": dict(depth=4, hidden_size=128, num_heads=4),
    "L": dict(depth=6, hidden_size=192, num_heads=6),
    "W": dict(depth=2, hidden_size=384, num_heads=6),
}
PATCHES = {"S": [4, 2], "M": [4, 2], "L": [4], "W": [8]}
COLOURS = dict(zip(SIZES, ["tab:blue", "tab:orange", "tab:green", "tab:red"], strict=True))
MARKERS = {8: "s", 4: "o", 2: "^"}


def runs(seeds):
    return [
        dict(size=size, patch_size=patch_size, **SIZES[size], lr=lab.COMMON, seed=seed)
        for seed in seeds
        for size in SIZES
        for patch_size in PATCHES[size]
    ]


def compute(row, batch_size=32):
    """Training compute so far in 10^12 multiply-adds, as the paper counts: three forward passes a step."""
    return 3 * row["mmacs"] * batch_size * row["step"] / 1e6


def draw(groups, path):
    figure, (left, middle, right) = plot.axes(3)
    for (size, patch_size), rows in groups.items():
        look = dict(color=COLOURS[size], marker=MARKERS[patch_size], ms=5)
        ends = lab.last(rows)
        losses = [row["mse"] for row in ends]
        mmacs = [row["mmacs"] for row in ends]
        millions = [row["parameters"] / 1e6 for row in ends]
        left.loglog(mmacs, losses, ls="", label=f"{size}/{patch_size}", **look)
        middle.loglog(millions, losses, ls="", **look)
        for seed in lab.grouped(rows, "seed").values():
            so_far = [compute(row) for row in seed]
            right.loglog(so_far, [row["mse"] for row in seed], lw=1, **look)
    left.set(xlabel="million multiply-adds a forward pass", ylabel="eps-mse on unseen images")
    middle.set(xlabel="million parameters")
    right.set(xlabel="training compute, 10^12 multiply-adds")
    left.legend()
    plot.ticks(left.xaxis, [2, 5, 10, 20, 50])
    plot.ticks(middle.xaxis, [0.2, 0.5, 1, 2, 5])
    plot.ticks(right.xaxis, [0.02, 0.1, 0.5, 2, 10])
    for place in (left, middle, right):
        plot.ticks(place.yaxis, [0.025, 0.03, 0.04, 0.06, 0.1])
    plot.save(figure, path)


def main(argv):
    args = lab.parser(__doc__, steps=1500).parse_args(argv)
    rows = lab.study("sizes", runs(range(args.seeds)), args)
    groups = lab.grouped(rows, "size", "patch_size")
    named = {(f"{size}/{patch_size}",): some for (size, patch_size), some in groups.items()}
    lab.report("eps-mse", named, errors=lab.per_image("sizes", args))

    ends = [lab.last(some) for some in groups.values()]
    losses = [np.mean([row["mse"] for row in some]) for some in ends]
    for size in ("mmacs", "parameters"):
        values = [some[0][size] for some in ends]
        r = np.corrcoef(np.log(values), np.log(losses))[0, 1]
        print(f"correlation of log {size} and log eps-mse, of {len(ends)} models: {r:.2f}")
    draw(groups, f"{args.docs}/sizes.png")


if __name__ == "__main__":
    sample.run(main, less_memory="use --processes 1")
