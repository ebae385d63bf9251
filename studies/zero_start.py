"""Sec. 3.2, adaLN-Zero: what does starting at zero do by itself?

    python studies/zero_start.py                                # after designs.py

The paper gave a zero start to one design, together with gates. Here the other three get it too, and adaLN-Zero loses
it. Rates and seeds are those of designs.py, whose rows are the comparison. Rows go to docs/studies/zero_start.csv, the
picture to docs/studies/zero_start.png.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import designs
import lab
import plot
import torch

import sample

AS_IS, BRANCHES, MODULATION, GATES = "as in dit.py", "branches at 0", "gamma, beta at 0", "gates at 1"
KINDS = [
    dict(block="in-context", start=BRANCHES),
    dict(block="cross-attention", start=BRANCHES),
    dict(block="adaln", start=BRANCHES),
    dict(block="adaln", start=MODULATION),
    dict(block="adaln-zero", start=GATES),
]


@torch.no_grad()
def alter(training, runtime, run):
    """Change the initial weights as the run says."""
    for block in training.model.blocks:
        if run["start"] == BRANCHES:                                # the last linear layer of each residual branch
            for name, layer in block.named_modules():
                if name in ("attn.proj", "cross_attn.proj", "mlp.fc2"):
                    layer.weight.zero_()
        if run["start"] == MODULATION:                              # plain adaLN starts with Xavier's
            block.adaLN_modulation[1].weight.zero_()
        if run["start"] == GATES:                                   # alpha = 1: each branch counts from the start
            beta1, gamma1, alpha1, beta2, gamma2, alpha2 = block.adaLN_modulation[1].bias.chunk(6)
            alpha1.fill_(1)
            alpha2.fill_(1)
    if run["start"] == MODULATION:
        training.model.final_layer.adaLN_modulation[1].weight.zero_()


def draw(best, path):
    """The end of training of each design and start, a point for each seed."""
    figure, (place,) = plot.axes(1)
    names = sorted(best, key=lambda kind: (list(plot.COLOURS).index(kind[0]), kind[1] != AS_IS))
    for height, (block, start) in enumerate(reversed(names)):
        losses = [row["mse"] for row in lab.last(best[block, start])]
        place.plot(losses, [height] * len(losses), "o", color=plot.COLOURS[block],
                   fillstyle="full" if start == AS_IS else "none")
    place.set_yticks(range(len(names)), [f"{block}, {start}" for block, start in reversed(names)])
    place.set(title="each at its best learning rate", xlabel="eps-mse on unseen images")
    plot.save(figure, path)


def main(argv):
    args = lab.parser(__doc__, steps=1500).parse_args(argv)
    published = lab.sweep("designs", [dict(block=block) for block in designs.DESIGNS], args)
    altered = lab.sweep("zero_start", KINDS, args, alter=alter)
    best, common, _ = ({(block, AS_IS): rows for (block,), rows in one.items()} | other
                       for one, other in zip(published, altered, strict=True))
    errors = lab.per_image("designs", args) | lab.per_image("zero_start", args)
    lab.report("eps-mse, each at its best rate", best, errors=errors)
    lab.report(f"eps-mse, all at {lab.COMMON:g}", common, errors=errors)
    draw(best, f"{args.docs}/zero_start.png")


if __name__ == "__main__":
    sample.run(main, less_memory="use --processes 1")
