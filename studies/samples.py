"""Figures 7 and 10, and guidance: what the models of sizes.py draw.

    python studies/samples.py steps                             # Figure 10: sampling steps against the model's compute
    python studies/samples.py guidance                          # recognized samples and KID over the guidance scale
    python studies/samples.py noise                             # Figure 7: one noise, decoded by every size

Run sizes.py first: its models of seed 0 are used, and trained if they are not there. Rows go to docs/studies/steps.csv
and guidance.csv, pictures beside them.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import lab
import sizes

import sample

STEPS = 4, 8, 16, 32, 64, 128, 250
SCALES = 0.0, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0


def models(args):
    """[(name, model, million multiply-adds)] of sizes.py, seed 0."""
    runs = sizes.runs([0])
    rows = lab.last_of(lab.study("sizes", runs, args, checkpoints=True))
    return [(f"{run['size']}/{run['patch_size']}", sample.load_model(lab.checkpoint("sizes", run, args))[0],
             row["mmacs"]) for run, row in zip(runs, rows, strict=True)]
