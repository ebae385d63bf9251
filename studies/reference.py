"""Make docs/reference/shapes.csv: the losses of a right run on the images of measure.py, after some steps.

    python studies/reference.py                                 # three seeds of the preset
    python studies/reference.py --block adaln                   # the rows of another design
"""
import lab
import measure

import sample
import train
from dit import DESIGNS


def main(argv):
    flags = lab.parser(__doc__, steps=3000)
    flags.add_argument("--block", choices=list(DESIGNS), default="adaln-zero")
    flags.set_defaults(docs=str(measure.REFERENCE))
    args = flags.parse_args(argv)
    runs = [dict(block=args.block, seed=seed) for seed in range(args.seeds)]
    lab.study("shapes", runs, args, settings=vars(train.Config(**train.PRESETS["shapes"])) | dict(device="cpu"))


if __name__ == "__main__":
    sample.run(main, less_memory="use --processes 1")
