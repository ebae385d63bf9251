"""Figure 5: the four block designs, each at its own best learning rate, and all at one.

    python studies/designs.py                                           # 40 minutes on two CPU cores
    python studies/designs.py --data cifar10/train --held-out cifar10/test    # one rate and seed; as long

Four rates are tried with seed 0. The best one and the common one are repeated with the other seeds. Rows go to
docs/studies/designs.csv, the picture to docs/studies/designs.png. Of a folder of pictures the rows go to
designs_pictures.csv; measure.py gives the KID of its checkpoints.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import lab
import measure
import plot

import sample
import train
from dit import DESIGNS


def draw(best, common, rows, path):
    """Validation over training, of each design at its best rate; and the end of training, over the rate."""
    figure, (left, middle, right) = plot.axes(3)
    for (block,), colour in zip(best, plot.COLOURS.values(), strict=True):
        for place, some in ((left, best), (middle, common)):
            for number, seed in enumerate(lab.grouped(some[block,], "seed").values()):
                steps, losses = zip(*((row["step"], row["mse"]) for row in seed), strict=True)
                place.loglog(steps, losses, color=colour, lw=1, label=None if number else block)
        ends = sorted((row["lr"], row["mse"], row["seed"]) for row in rows[block,] if row["step"] == steps[-1])
        right.loglog(*zip(*((lr, loss) for lr, loss, seed in ends if seed == 0), strict=True), color=colour)
        right.loglog(*zip(*((lr, loss) for lr, loss, seed in ends), strict=True), "o", ms=4, color=colour)
    left.set(title="each at its best learning rate", xlabel="step", ylabel="eps-mse on unseen images")
    middle.set(title=f"all at {lab.COMMON:g}", xlabel="step")
    right.set(title="the end of training", xlabel="learning rate")
    left.legend()
    for place in (left, middle):
        plot.ticks(place.xaxis, steps)
        plot.ticks(place.yaxis, [0.04, 0.05, 0.06, 0.08, 0.1])
    plot.ticks(right.xaxis, lab.RATES)
    plot.ticks(right.yaxis, [0.04, 0.05, 0.06, 0.08, 0.1])
    plot.save(figure, path)


def on_pictures(args):
    """The four designs at 6 x 192 and patch size 4, on 32 x 32 pictures."""
    settings = train.PRESETS["cifar10"] | dict(model="", depth=6, hidden_size=192, num_heads=6, patch_size=4,
                                               batch_size=64, dtype="fp32", data=args.data)
    cfg = train.Config(**settings)
    names = train.open_source(cfg).class_names
    info = dict(config=settings, class_names=names, model_args=train.model_args(cfg, len(names)), space="pixel")
    held_out = measure.HeldOut(args.data, info, args.held_out, train.Runtime(cfg))
    validation = held_out.encode(held_out.pictures(range(args.images))), held_out.labels(args.images)
    rows = lab.study("designs_pictures", [dict(block=block, lr=1e-3, seed=0) for block in DESIGNS], args,
                     settings=settings, validation=validation)
    lab.report("eps-mse of one seed", lab.grouped(rows, "block"))


def main(argv):
    flags = lab.parser(__doc__, steps=1500)
    flags.add_argument("--data", help="train on this folder of pictures instead, one folder per class")
    flags.add_argument("--held-out", help="and validate on this one")
    args = flags.parse_args(argv)
    if bool(args.data) != bool(args.held_out):
        raise sample.UserError("--data and --held-out go together")
    if args.data:
        return on_pictures(args)
    best, common, rows = lab.sweep("designs", [dict(block=block) for block in DESIGNS], args)
    errors = lab.per_image("designs", args)
    lab.report("eps-mse, each design at its best rate", best, errors=errors)
    lab.report(f"eps-mse, all at {lab.COMMON:g}", common, errors=errors)
    lab.report("label use, at the best rates", best, "label_use", sign=-1)
    draw(best, common, rows, f"{args.docs}/designs.png")


if __name__ == "__main__":
    sample.run(main, less_memory="use --processes 1")
