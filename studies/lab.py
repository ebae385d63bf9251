"""Train many small models side by side and validate them while they train: what the studies share.

A study is a list of runs. A run says what differs from the preset, such as dict(block="adaln", lr=4e-3, seed=0). Its
losses become rows of docs/studies/STUDY.csv when it ends, and a run that has its rows there is not repeated. Its
averaged weights lie in runs/studies/STUDY/, as a checkpoint. Runs are trained by two processes of one thread each: such
small models are faster so than one after the other on two threads.
"""
import csv
import json
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import measure
from speed import forward_flops

import sample
import train
from dit import GaussianDiffusion

CHECKED = 100, 300, 600, 1000                                       # a run is validated after these steps, and the last
RATES, COMMON = (1e-3, 2e-3, 4e-3, 8e-3), 2e-3                      # learning rates to choose from, and one for all
MEASURES = ["mse", "vb", "mse_q1", "mse_q2", "mse_q3", "mse_q4", "label_use"]


def parser(description, steps):
    """The flags of every study."""
    flags = sample.Parser(description=description.split("\n")[0])
    flags.add_argument("--steps", type=sample.between(int, 1), default=steps, help=f"of each run ({steps})")
    flags.add_argument("--seeds", type=sample.between(int, 1), default=3, help="runs of each kind (3)")
    flags.add_argument("--processes", type=sample.between(int, 1), default=2, help="that train side by side (2)")
    flags.add_argument("--images", type=sample.between(int, 1), default=512, help="to validate on (512)")
    flags.add_argument("--docs", default="docs/studies", help="folder of the rows and pictures")
    flags.add_argument("--out", default="runs/studies", help="folder of the checkpoints")
    return flags


def key(run):
    """A name for files: block=adaln,lr=0.004,seed=0."""
    return ",".join(f"{name}={value}" for name, value in run.items())


def train_run(run, settings, alter, path, validation):
    """Train one model. Returns its rows, and the eps-mse of each validation image at the end."""
    torch.set_num_threads(1)
    cfg = train.Config(**settings | {name: value for name, value in run.items() if name in settings})
    runtime = train.Runtime(cfg)
    source = train.open_source(cfg)
    images, labels = train.prepare_data(cfg, runtime, source, train.Pixels())
    training, diffusion = train.Training(cfg, runtime, len(source.class_names)), GaussianDiffusion()
    if alter:
        alter(training, runtime, run)
        training.ema.load_state_dict(training.model.state_dict())
    about = dict(run, parameters=sum(p.numel() for p in training.model.parameters()),
                 mmacs=forward_flops(train.model_args(cfg, len(source.class_names))) / 2e6)

    rows, began, validating = [], time.perf_counter(), 0.0
    for step, batch in train.batches(cfg, runtime, images, labels, 0):
        train.train_step(cfg, runtime, training, diffusion, batch, step)
        if step in CHECKED or step == cfg.steps:
            paused = time.perf_counter()
            found = measure.validation_losses(training.ema, *validation)
            validating += time.perf_counter() - paused
            by_quarter = dict(zip(MEASURES[2:6], found["mse"].mean(0).tolist(), strict=True))
            rows.append(about | dict(step=step, mse=found["mse"].mean().item(), vb=found["vb"].mean().item(),
                                     **by_quarter, label_use=(found["null"] - found["mse"]).mean().item(),
                                     seconds=round(time.perf_counter() - began - validating, 1)))

    state = train.about_run(cfg, source, train.Pixels()) | train.to_cpu(training.state()) | dict(step=cfg.steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    with sample.atomic_write(path) as file:
        torch.save(state | dict(opt={}, model={}), file)            # what sample.py needs: the averaged weights
    return rows, found["mse"].mean(1).numpy().astype(np.float32)


def read(path):
    """The rows of a study, {column: value}. Numbers are numbers."""
    def number(text):
        try:
            return json.loads(text)
        except ValueError:
            return text

    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        return [{name: number(text) for name, text in row.items()} for row in csv.DictReader(file)]


def study(name, runs, args, alter=None, settings=None, validation=None):
    """Train what is not trained yet; return the rows of these runs."""
    os.environ["OMP_NUM_THREADS"] = "1"                             # of the processes to come
    settings = vars(train.Config(**train.PRESETS["shapes"])) | dict(
        batch_size=32, lr_decay_steps=0, device="cpu", steps=args.steps) | (settings or {})
    table = Path(args.docs) / f"{name}.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    done, ends = read(table), table.with_suffix(".npz")
    per_image = dict(np.load(ends)) if ends.exists() else {}

    def rows_of(run):
        return [row for row in done if all(row.get(column) == value for column, value in run.items())]

    left = [run for run in runs if not any(row["step"] == args.steps for row in rows_of(run))]
    if left and validation is None:
        images, labels = measure.unseen_shapes(args.images)
        validation = images / 127.5 - 1, labels
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(train_run, run, settings, alter, Path(args.out) / name / f"{key(run)}.pt", validation): run
                for run in left}
        for job in tqdm(as_completed(jobs), desc=name, unit="run", total=len(jobs)):
            rows, errors = job.result()
            done += rows
            with sample.atomic_write(table, "w", newline="") as file:
                writer = csv.DictWriter(file, done[0])
                writer.writeheader()
                writer.writerows(done)
            per_image[key(jobs[job])] = errors
            with sample.atomic_write(ends) as file:
                np.savez(file, **per_image)
    return [row for run in runs for row in rows_of(run) if row["step"] <= args.steps]


def sweep(name, kinds, args, **how):
    """Each kind of run at each rate with seed 0, then at its best rate and at the common one with the other seeds.

    kinds: what the runs differ in, such as dict(block="adaln"). Returns (the rows at each kind's best rate, those at
    the common rate, all), each {the kind's values: rows}.
    """
    at_seed_0 = study(name, [kind | dict(lr=lr, seed=0) for lr in RATES for kind in kinds], args, **how)
    at_the_end = grouped([row for row in at_seed_0 if row["step"] == args.steps], *kinds[0])
    best = {kind: min(rows, key=lambda row: row["mse"])["lr"] for kind, rows in at_the_end.items()}
    again = [kind | dict(lr=lr, seed=seed) for seed in range(1, args.seeds) for kind in kinds
             for lr in dict.fromkeys([best[tuple(kind.values())], COMMON])]
    rows = grouped(at_seed_0 + study(name, again, args, **how), *kinds[0])
    return ({kind: [row for row in some if row["lr"] == best[kind]] for kind, some in rows.items()},
            {kind: [row for row in some if row["lr"] == COMMON] for kind, some in rows.items()}, rows)


def last(rows):
    """The rows after the last step, in the order of the seeds."""
    return sorted((row for row in rows if row["step"] == max(row["step"] for row in rows)), key=lambda row: row["seed"])


def grouped(rows, *columns):
    """{values of the columns: rows}."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[column] for column in columns)].append(row)
    return dict(groups)


def report(title, groups, column="mse", sign=1):
    """Print each kind's values at the end, one for each seed, and what they show. sign: -1 if larger is better.

    One kind is better than another if every seed says so, and the gap of the means exceeds twice the larger range of
    the seeds.
    """
    values = {kind: np.array([row[column] for row in last(rows)]) for kind, rows in groups.items()}
    print(title)
    for kind, some in values.items():
        print(f"  {' '.join(kind):36} lr {groups[kind][0]['lr']:<6g} " + "  ".join(f"{value:.5f}" for value in some))
    for better, ours in values.items():
        for worse, theirs in values.items():
            gaps = sign * (theirs - ours)
            if len(ours) > 1 and gaps.min() > 0 and gaps.mean() > 2 * max(np.ptp(ours), np.ptp(theirs)):
                share = gaps.mean() / abs(theirs.mean())
                print(f"  {' '.join(better)} is better than {' '.join(worse)} by {share:.0%}")
