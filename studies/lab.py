"""Train many small models side by side and validate them while they train: what the studies share.

A study is a list of runs. A run says what differs from the preset, such as dict(block="adaln", lr=4e-3, seed=0). Its
losses become rows of docs/studies/STUDY.csv when it ends, and a run that has its rows there is not repeated. Its
averaged weights lie in runs/studies/STUDY/, as a checkpoint. Runs are trained by two processes of one thread each: such
small models are faster so than one after the other on two threads.
"""
import contextlib
import csv
import itertools
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import measure
import plot
from speed import forward_flops

import sample
import train
from dit import GaussianDiffusion

CHECKED = 100, 300, 600, 1000                                       # a run is validated after these steps, and the last
RATES, COMMON = (1e-3, 2e-3, 4e-3, 8e-3), 2e-3                      # learning rates to choose from, and one for all


def parser(description, steps, seeds=3):
    """The flags of every study. seeds: 0 if it has no choice of them."""
    flags = sample.Parser(description=description.split("\n")[0])
    add, count = flags.add_argument, sample.between(int, 1)
    add("--steps", type=count, default=steps, help=f"of training each run ({steps})")
    if seeds:
        add("--seeds", type=count, default=seeds, help=f"runs of each kind ({seeds})")
    add("--processes", type=count, default=2, help="that train side by side (2)")
    add("--images", type=count, default=512, help="to validate on (512)")
    docs = measure.REFERENCE.with_name("studies")
    add("--docs", default=str(docs), help="folder of the rows and pictures (%(default)s)")
    add("--out", default="runs/studies", help="folder of the checkpoints (%(default)s)")
    return flags


def key(run):
    """A name for a run, or for a row of it: block=adaln,lr=0.004,seed=0."""
    about = itertools.takewhile(lambda item: item[0] != "parameters", run.items())
    return ",".join(f"{name}={value}" for name, value in about)


def checkpoint(name, run, args):
    return Path(args.out) / name / f"{key(run)},steps={args.steps}.pt"


class Table:
    """Rows in a file of comma-separated values, as dictionaries. Numbers are numbers."""

    def __init__(self, path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = self.read()

    def read(self):
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            return [{name: self.number(text) for name, text in row.items()} for row in csv.DictReader(file)]

    @staticmethod
    def number(text):
        for kind in int, float:                                     # float reads nan, too
            with contextlib.suppress(ValueError):
                return kind(text)
        return text

    def of(self, about):
        """The rows that have all these values."""
        return [row for row in self.rows if about.items() <= row.items()]

    def add(self, rows, about):
        """Put rows where the rows of `about` were, if there were any. Others may have written since."""
        others = [row for row in self.read() if not about.items() <= row.items()]
        self.rows = others + rows
        with sample.atomic_write(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(self.rows)


def side_by_side(work, jobs, processes, desc):
    """(job, work(*job)) for each of the jobs as it ends, in processes of one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(work, *job): job for job in jobs}
        try:
            for done in tqdm(as_completed(running), desc=desc, unit="run", total=len(jobs)):
                yield running[done], done.result()
        except BrokenProcessPool:
            raise sample.UserError("one of the processes was killed, as a system does that has no memory left: "
                                   "use --processes 1") from None
        except BaseException:                                       # Ctrl-C, too
            for process in multiprocessing.active_children():
                process.terminate()                                 # or all that is queued would be done first
            raise


def train_run(run, settings, alter, path, validation):
    """Train one model. Returns its rows, and the eps-mse of each validation image at the end."""
    torch.set_num_threads(1)
    cfg = train.Config(**settings | {name: value for name, value in run.items() if name in settings})
    runtime = train.Runtime(cfg)
    source = train.open_source(cfg)
    images, labels = train.prepare_data(cfg, runtime, source, train.Pixels())
    training = train.Training(cfg, runtime, len(source.class_names))
    diffusion = GaussianDiffusion()
    if alter:
        alter(training, runtime, run)
        training.ema.load_state_dict(training.model.state_dict())
    about = run | dict(
        parameters=sum(p.numel() for p in training.model.parameters()),
        mmacs=forward_flops(train.model_args(cfg, len(source.class_names))) / 2e6,
    )

    rows = []
    began, validating = time.perf_counter(), 0.0
    for step, batch in train.batches(cfg, runtime, images, labels, 0):
        train.train_step(cfg, runtime, training, diffusion, batch, step)
        if step in CHECKED or step == cfg.steps:
            paused = time.perf_counter()
            found = measure.validation_losses(training.ema, *validation)
            validating += time.perf_counter() - paused
            seconds = round(time.perf_counter() - began - validating, 1)
            rows.append(about | dict(step=step, **measure.summary(found), seconds=seconds))

    state = train.about_run(cfg, source, train.Pixels()) | train.to_cpu(training.state())
    state |= dict(step=cfg.steps, opt={}, model={})                 # what sample.py needs: the averaged weights
    path.parent.mkdir(parents=True, exist_ok=True)
    with sample.atomic_write(path) as file:
        torch.save(state, file)
    return rows, found["mse"].mean(1).numpy().astype(np.float32)


def study(name, runs, args, alter=None, settings=None, keep=False):
    """Train what is not trained yet; return the rows of these runs. keep: their checkpoints are needed, too."""
    preset = vars(train.Config(**train.PRESETS["shapes"]))
    settings = preset | dict(batch_size=32, lr_decay_steps=0, device="cpu") | (settings or {}) | dict(steps=args.steps)
    lock = train.hold(SimpleNamespace(out=f"{args.out}/{name}"))    # noqa: F841  (held until the end)
    table = Table(f"{args.docs}/{name}.csv")
    made = dict(steps=args.steps, images=args.images, data=settings["data"])
    if any(not made.items() <= row.items() for row in table.rows):
        raise sample.UserError(f"{table.path} has rows of other --steps, --images or --data: name another --docs")
    known = per_image(name, args)
    left = [
        run for run in runs
        if not table.of(run) or key(run) not in known or keep and not checkpoint(name, run, args).exists()
    ]
    if left:
        plot.axes(1)                                                # refuses before the work if it cannot draw
    images, labels = measure.unseen_shapes(args.images)
    validation = images / 127.5 - 1, labels
    jobs = [(run, settings, alter, checkpoint(name, run, args), validation) for run in left]
    for (run, *_), (rows, errors) in side_by_side(train_run, jobs, args.processes, name):
        if table.of(run) and key(run) in known:                     # only its checkpoint was missing
            continue
        with sample.atomic_write(table.path.with_suffix(".npz")) as file:
            np.savez(file, **per_image(name, args) | {key(run): errors})
        table.add([row | made for row in rows], run)
    return [row for run in runs for row in table.of(run)]


def per_image(name, args):
    """{key of a run: the eps-mse of each validation image at its end}."""
    path = Path(args.docs) / f"{name}.npz"
    return dict(np.load(path)) if path.exists() else {}


def sweep(name, kinds, args, **how):
    """Each kind of run at each rate with seed 0, then at its best rate and at the common one with the other seeds.

    kinds: what the runs differ in, such as dict(block="adaln"). Returns (the rows at each kind's best rate, those at
    the common rate, all), each {the kind's values: rows}.
    """
    at_seed_0 = study(name, [kind | dict(lr=lr, seed=0) for lr in RATES for kind in kinds], args, **how)
    best = {}
    for kind, rows in grouped(at_seed_0, *kinds[0]).items():
        losses = {row["lr"]: row["mse"] for row in rows if row["step"] == args.steps}
        best[kind] = min(losses, key=lambda lr: np.nan_to_num(losses[lr], nan=np.inf))               # nan: diverged

    again = []
    for seed in range(1, args.seeds):
        for kind in kinds:
            rates = dict.fromkeys([best[tuple(kind.values())], COMMON])
            again += [kind | dict(lr=lr, seed=seed) for lr in rates]
    rows = grouped(at_seed_0 + study(name, again, args, **how), *kinds[0])
    at_best = {kind: [row for row in some if row["lr"] == best[kind]] for kind, some in rows.items()}
    at_common = {kind: [row for row in some if row["lr"] == COMMON] for kind, some in rows.items()}
    return at_best, at_common, rows


def last(rows):
    """The rows after the last step, in the order of the seeds."""
    end = max(row["step"] for row in rows)
    return sorted((row for row in rows if row["step"] == end), key=lambda row: row["seed"])


def grouped(rows, *columns):
    """{values of the columns: rows}."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[column] for column in columns)].append(row)
    return dict(groups)


def report(title, groups, column="mse", sign=1, errors=None):
    """Print each kind's values at the end, one for each seed, and what they show. sign: -1 if larger is better.

    With three seeds or more, one kind is better than another if the gap of the means exceeds twice the larger range of
    the seeds: then every seed says so, too. errors: of each image, from per_image; the gap's standard error over the
    images is printed, too.
    """
    ends = {kind: last(rows) for kind, rows in groups.items()}
    values = {kind: np.array([row[column] for row in rows]) for kind, rows in ends.items()}
    print(title)
    for kind, some in values.items():
        seeds = "  ".join(f"{value:.5f}" for value in some)
        print(f"  {' '.join(kind):36} lr {ends[kind][0]['lr']:<6g} {seeds}")

    for (better, ours), (worse, theirs) in itertools.permutations(values.items(), 2):
        gap = sign * (theirs - ours).mean()
        if len(ours) < 3 or not gap > 2 * max(np.ptp(ours), np.ptp(theirs)):
            continue
        error = ""
        if errors:
            pairs = zip(ends[better], ends[worse], strict=True)
            images = np.mean([errors[key(other)] - errors[key(one)] for one, other in pairs], axis=0)
            error = f" +- {measure.error(torch.from_numpy(images)):.5f}"
        share = f"{gap / abs(theirs.mean()):.0%}"
        print(f"  {' '.join(better)} is better than {' '.join(worse)} by {gap:.5f}{error}, {share}")
