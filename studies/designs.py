"""Figure 5: the four block designs, each at its own best learning rate, and all at one.

    python studies/designs.py                                   # 30 runs

Four rates are tried with seed 0. The best one and the common one are repeated with the other seeds. Rows go to
docs/studies/designs.csv, the picture to docs/studies/designs.png. On pictures of your own, use train.py, measure.py
and plot.py (docs/findings.md).
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import lab
import plot

import sample
from dit import DESIGNS

LOSSES = [0.04, 0.05, 0.06, 0.08, 0.1]                              # marked in the picture


def draw(best, common, rows, path):
    """Validation over training, of each design at its best rate; and the end of training, over the rate."""
    figure, (left, middle, right) = plot.axes(3)
    left.set(title="each at its best learning rate", xlabel="step", ylabel="eps-mse on unseen images")
    middle.set(title=f"all at {lab.COMMON:g}", xlabel="step")
    right.set(title="the end of training", xlabel="learning rate")
    for (block,), some in rows.items():
        colour = plot.COLOURS[block]
        steps = plot.seeds(left, best[block,], block, colour)
        plot.seeds(middle, common[block,], block, colour)

        # all seeds are points; seed 0, which all rates have, is a line
        ends = sorted(lab.last(some), key=lambda row: row["lr"])
        rates, losses = [row["lr"] for row in ends], [row["mse"] for row in ends]
        right.loglog(rates, losses, "o", ms=4, color=colour)
        first = [row for row in ends if row["seed"] == 0]
        right.loglog(lab.RATES, [row["mse"] for row in first], color=colour)
    left.legend()
    middle.sharey(left)
    plot.ticks(left.xaxis, steps)
    plot.ticks(middle.xaxis, steps)
    plot.ticks(right.xaxis, lab.RATES)
    for place in (left, middle, right):
        plot.ticks(place.yaxis, LOSSES)
    plot.save(figure, path)


def main(argv):
    args = lab.parser(__doc__, steps=1500).parse_args(argv)
    best, common, rows = lab.sweep("designs", [dict(block=block) for block in DESIGNS], args)
    errors = lab.per_image("designs", args)
    lab.report("eps-mse, each design at its best rate", best, errors=errors)
    lab.report(f"eps-mse, all at {lab.COMMON:g}", common, errors=errors)
    lab.report("label use, at the best rates", best, "label_use", sign=-1)
    draw(best, common, rows, f"{args.docs}/designs.png")


if __name__ == "__main__":
    sample.run(main, less_memory="use --processes 1")
