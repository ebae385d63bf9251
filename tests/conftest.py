"""What the tests in this folder share: pictures, a VAE, models so small that a run takes a second, and such runs."""
import contextlib
import csv
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from dit import DiT

os.environ["HF_HUB_OFFLINE"] = "1"                          # no test needs a network
ROOT = Path(__file__).parent.parent
DESIGNS = ["in-context", "cross-attention", "adaln", "adaln-zero"]
LATENT = "--image-size 32 --vae"                            # 4 x 4 x 4 latents; a VAE's folder follows
TINY = ("--image-size 8 --patch-size 2 --hidden-size 32 --depth 2 --num-heads 4 --dtype fp32 --batch-size 8 --steps 6 "
        "--log-every 1 --ckpt-every 3 --sample-every 0")
# The paper's rate, flips and label dropout, for runs that are compared. The order of sums changes a loss by < 1e-5.
RECIPE = "--steps 20 --lr 1e-4 --lr-decay-steps 0 --flip --label-drop 0.1 --ckpt-every 0"

@pytest.fixture(autouse=True)
def seeded():
    """Fixed seeds, and one thread: on busy cores, two wait for each other many times as long."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

def tiny_dit(block="adaln-zero", **sizes):
    """A DiT of two blocks on 8 x 8 x 3 images and 5 classes. No weight is zero."""
    torch.manual_seed(1)
    small = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=4, num_classes=5)
    model = DiT(**(small | sizes), block=block)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model

def official_state(**sizes):
    """The weights of a small model as official files hold them."""
    return tiny_dit(**dict(input_size=4, in_channels=4, hidden_size=384, depth=1, num_heads=6) | sizes).state_dict()

@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 3 classes with 8 pictures of 12 x 20 pixels each. A picture is grey, but for its left edge."""
    root = tmp_path_factory.mktemp("pictures")
    for c, name in enumerate(["ant", "bee", "cat"]):
        (root / name).mkdir()
        for i in range(8):
            pixels = np.where(np.arange(20)[:, None] < 5, 255, np.full((12, 20, 3), 60 * c + 5 * i))
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root

@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    """A small AutoencoderKL with random weights. Like Stable Diffusion's, it makes 4 channels of 1/8 of the size."""
    AutoencoderKL = pytest.importorskip("diffusers").AutoencoderKL
    torch.manual_seed(5)
    vae, folder = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=["DownEncoderBlock2D"] * 4, norm_num_groups=4,
        up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4), tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder

@pytest.fixture(scope="session")
def tiny_run(pictures, tmp_path_factory):
    """A finished run. Its averaged weights are replaced by random ones, because after six steps they still say 0."""
    run = Runs(pictures, tmp_path_factory.mktemp("tiny"))()
    state = run.state
    torch.manual_seed(3)
    for name in state["ema"].keys() - {"pos_embed"}:
        state["ema"][name] = torch.randn_like(state["ema"][name]) / 10
    torch.save(state, run.checkpoint)
    return run


# Runs of train.py -----------------------------------------------------------------------------------------------------

class Run:
    """A run of train.py: its folder, what it has printed (.text), and its process if it has one of its own."""

    def __init__(self, out, process=None, text=""):
        self.out, self.checkpoint, self.process, self.text = Path(out), Path(out) / "ckpt.pt", process, text

    @property
    def state(self):
        return torch.load(self.checkpoint, weights_only=True)

    @property
    def losses(self):
        """The logged (loss, mse, vb, grad_norm), one row for each step from the first on."""
        rows = list(csv.DictReader((self.out / "log.csv").read_text().splitlines()))
        assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
        return np.array([[float(row[name]) for name in ("loss", "mse", "vb", "grad_norm")] for row in rows])

    def picture(self, step):
        return np.asarray(Image.open(self.out / "samples" / f"{step:07d}.png")).astype(int)

    def is_like(self, other):
        """Whether both logs have the same numbers, up to rounding."""
        print(f"{self.out} and {other.out}: {self.losses - other.losses}")        # pytest shows it with a failure
        return np.abs(self.losses - other.losses).max() < 1e-5

    def equals(self, other):
        """Whether step, weights, average, moments and log are the same to the bit."""
        a, b = self.state, other.state
        pairs = [(a["model"], b["model"]), (a["ema"], b["ema"]),
                 *zip(a["opt"]["state"].values(), b["opt"]["state"].values(), strict=True)]
        return (a["step"] == b["step"] and np.array_equal(self.losses, other.losses) and all(
            x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x) for x, y in pairs))

    def wait(self, status=0, timeout=120):
        """Wait for the process to end with this exit status; None means any but 0. A process that hangs fails."""
        try:
            self.text = self.process.communicate(timeout=timeout)[0]
        finally:
            self.process.kill()
        assert self.process.returncode == status or (status is None and self.process.returncode), self.text
        return self

class Runs:
    """Starts runs of train.py on the pictures, each in a folder of its own."""

    def __init__(self, pictures, folder):
        self.pictures, self.folder, self.cache, self.count = pictures, folder, folder / "cache", 0

    def argv(self, *flags, resume=None, xla=0):
        """(folder, arguments) of a new run, or of one that continues the Run `resume`."""
        words = ["--device", "xla" if xla else "cpu", *shlex.split(" ".join(map(str, flags)))]
        if resume:
            return resume.out, ["--resume", str(resume.out), *words]
        self.count += 1
        out = self.folder / f"run{self.count}"
        return out, [*f"{TINY} --data {self.pictures} --cache {self.cache} --out {out}".split(), *words]

    def command(self, script="train", processes=1, patch=""):
        """The command that starts train.py or sample.py, after the Python code `patch`, which knows it as `it`."""
        self.count += 1
        path = self.folder / f"process{self.count}" / f"{script}.py"
        path.parent.mkdir()
        start = (f"import os, signal, sys, torch\nsys.path.insert(0, {str(ROOT)!r})\nimport sample, {script} as it\n"
                 "signal.signal(signal.SIGINT, signal.default_int_handler)\n")            # a background job ignores it
        path.write_text(f"{start}{patch}\nsample.run(it.main, less_memory='use less')\n")
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return [sys.executable, *torchrun * (processes > 1), str(path)]

    def start(self, *flags, processes=1, resume=None, xla=0, patch="", env=None):
        """A Run in real processes: do not forget to .wait() for it."""
        out, argv = self.argv(*flags, resume=resume, xla=xla)
        devices = dict(PJRT_DEVICE="CPU", CPU_NUM_DEVICES=str(xla)) if xla else {}
        return Run(out, popen([*self.command("train", processes, patch), *argv], self.folder, devices | (env or {})))

    def __call__(self, *flags, resume=None, status=0, timeout=120, **options):
        """The finished Run: in this process, or in real ones with processes=2, xla=2, patch="code" or env=dict(...)."""
        if any(options[name] for name in options if (name, options[name]) != ("processes", 1)):
            return self.start(*flags, resume=resume, **options).wait(status, timeout)
        (out, argv), ended = self.argv(*flags, resume=resume), 0
        with contextlib.redirect_stdout(io.StringIO()) as said:
            try:
                train.main(argv)
            except sample.UserError as error:
                print(error)
                ended = error.status
        assert ended == status, said.getvalue()
        return Run(out, text=said.getvalue())

    def sample(self, *argv, processes=1, patch="", status=0):
        """What sample.py printed in so many real processes."""
        command = self.command("sample", processes, patch) + shlex.split(" ".join(map(str, argv)))
        return Run(self.folder, popen(command, self.folder)).wait(status).text

def popen(command, folder, env=None):
    """The command in a process with one thread, whose stdout and stderr are one text."""
    return subprocess.Popen(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

@pytest.fixture
def run(pictures, tmp_path):
    """run("--steps 3") is a finished Run. See Runs.__call__ for resume=that_run, processes=2, status=2 and more."""
    return Runs(pictures, tmp_path)

def full_disk(*args):
    raise OSError("disk full")

def refusal(main, *argv, folder=".", status=2):
    """The message of the UserError in which main(argv) ends: one line, and nothing new is in the folder."""
    before = sorted(Path(folder).rglob("*"))
    with pytest.raises(sample.UserError) as error:
        main(shlex.split(" ".join(map(str, argv))))
    assert "\n" not in str(error.value) and error.value.status == status and sorted(Path(folder).rglob("*")) == before
    return str(error.value)
