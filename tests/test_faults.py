"""kill -9 at any moment: a run that is continued ends like one that was never killed."""
import multiprocessing
import os
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
from conftest import RECIPE, Run

import train


def killed_run(argv, place, count):
    """train.main(argv), which kills itself after `count` calls of `place`: inside a write or the preparation."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    torch.set_num_threads(1)
    train.IMAGES_PER_PART, calls = 8, iter(range(count))

    def dying(function):
        def die_or_go_on(*args, **kwargs):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return die_or_go_on

    class Halves:                                                                 # writes each block in two halves
        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(data[:len(data) // 2])
            self.second_half(data[len(data) // 2:])

        def second_half(self, data):
            self.file.write(data)

    if place == "write":
        Halves.second_half, save = dying(Halves.second_half), torch.save
        torch.save = lambda state, file: save(state, Halves(file))
    elif place:
        owner = train if place == "center_crop" else os
        setattr(owner, place, dying(getattr(owner, place)))
    train.main(argv)

@pytest.mark.slow
def test_killed_runs_end_like_one_that_was_not_killed(run):
    """Runs save at every step and are killed at random moments, a third of them inside the writing of a checkpoint or
    of a part of the data. KILLS=100 in the environment makes it a hundred."""
    processes = multiprocessing.get_context("forkserver")                         # imports torch once
    processes.set_forkserver_preload(["test_faults"])
    rng, goal, kills, runs = np.random.default_rng(0), int(os.environ.get("KILLS", 12)), [], 0
    flags = [RECIPE, "--ckpt-every 1"]

    def attempt(argv, place="", count=0, seconds=None):
        """Whether the run was killed, by itself or after so many seconds."""
        process = processes.Process(target=killed_run, args=(argv, place, count))
        process.start()
        process.join(timeout=seconds)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0

    attempt(run.argv(*flags)[1])                                                  # the first one starts the forkserver
    out, argv = run.argv(*flags)
    began = time.perf_counter()
    attempt(argv)
    duration, whole = time.perf_counter() - began, Run(out)
    while len(kills) < goal:
        runs += 1
        cache, killed = run.folder / f"cache{runs}", True
        out, argv = run.argv(*flags, "--cache", cache)
        ours = Run(out)
        while killed:
            place, count, seconds = "", 0, rng.uniform(0, duration)
            if len(kills) == goal:
                seconds = None
            elif len(kills) % 6 == 0:                                             # while the data are prepared
                shutil.rmtree(cache, ignore_errors=True)
                place, count = [("center_crop", rng.integers(20, 44)), ("fsync", rng.integers(3)),
                                ("replace", rng.integers(3))][rng.integers(3)]
            elif len(kills) % 6 == 3 and cache.exists():                          # while a checkpoint is saved
                place, count = [("fsync", 5), ("replace", 4), ("write", 20)][rng.integers(3)]
            arguments = run.argv(resume=ours)[1] if ours.checkpoint.exists() else argv
            killed = attempt(arguments, place, int(count), None if place else seconds)
            kills += [place or "anywhere"] * killed
        assert ours.equals(whole) and len(list(cache.glob("*/*.npy"))) == 3
    print(f"\n{len(kills)} kills in {runs} runs: {({place: kills.count(place) for place in kills})}")
