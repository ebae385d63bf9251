"""Real processes: many make the run of one, signals and deaths lose nothing, mistakes end in one line."""
import inspect
import re
import signal
import socket
import sys
import time

import filelock
import pytest
import torch
from conftest import DESIGNS, LATENT, RECIPE, ROOT, Run, popen, refusal, tiny_dit

import sample
import train

# The same run ---------------------------------------------------------------------------------------------------------

def test_two_processes_make_the_run_of_one_with_every_design(run):
    """One start for all four, because starting takes the time."""
    four_runs = f"""rt, main = it.open_runtime(it.Config(dtype="fp32")), it.main
it.open_runtime, rt.close = lambda cfg: rt, lambda: None
it.main = lambda argv: [main([*argv, "--block", block, "--out", block]) for block in {DESIGNS}]"""
    text = run(RECIPE, processes=2, patch=four_runs).text
    for block in DESIGNS:
        assert run(RECIPE, "--block", block).is_like(Run(run.folder / block)), block
    assert text.count("done: ") == 4 and text.count("2 x cpu") == 4               # one process speaks

@pytest.mark.slow
@pytest.mark.parametrize("processes,flags", [(4, ""), (2, "--accum 2"), (4, "--accum 2"), (2, "--grad-checkpoint"),
                                             (2, "--compile --accum 2")])
def test_many_processes_and_parts_make_the_run_of_one(processes, flags, run):
    assert run(RECIPE, flags, processes=processes).is_like(run(RECIPE))

@pytest.mark.slow
def test_a_run_continues_in_another_number_of_processes(run):
    whole, a, b = run(RECIPE), run(RECIPE, "--steps 10", processes=2), run(RECIPE, "--steps 10")
    assert run("--steps 20", resume=a).is_like(whole)
    assert run("--steps 20", resume=b, processes=2).is_like(whole)

@pytest.mark.slow
def test_two_machines_with_a_common_disk_make_the_run_of_one(run):
    """Two launchers that meet: each has a local rank 0, one has rank 0."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out, argv = run.argv(RECIPE)
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
                f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=1"]
    command = [sys.executable, *launcher, *run.command()[1:], *argv]
    machines = [Run(out, popen(command, run.folder)) for _ in range(2)]
    assert sum(machine.wait().text.count("done: ") for machine in machines) == 1
    assert machines[0].is_like(run(RECIPE))

@pytest.mark.slow
def test_processes_share_the_encoding_and_train_on_the_same_latents(run, vae_folder):
    """Few parts are encoded twice: each process starts with its own share, then looks for what is missing."""
    small_parts = """it.IMAGES_PER_PART, encode = 2, it.Latents.encode
def counted(self, images):
    print(f"encoded {len(images)} of rank {os.environ['RANK']}\\n", end="", flush=True)
    return encode(self, images)
it.Latents.encode = counted"""
    two = run(RECIPE, LATENT, vae_folder, processes=2, patch=small_parts)
    counts = [two.text.count(f"of rank {rank}") for rank in (0, 1)]
    assert min(counts) >= 1 and 12 <= sum(counts) <= 14, two.text
    assert two.is_like(run(RECIPE, LATENT, vae_folder))

def test_the_loop_names_no_backend():
    source = "".join(map(inspect.getsource, (train.train, train.train_step, train.Training))).replace("to_cpu", "")
    assert not re.search(r"xla|tpu|cuda|mps|cpu|nccl|gloo|ddp|dist\.|isinstance|world", source, re.IGNORECASE)

def test_attention_by_its_formula_is_dits():
    """In float64, with its gradient."""
    attn, x = tiny_dit().double().blocks[0].attn, torch.randn(2, 16, 32, dtype=torch.float64, requires_grad=True)
    out, expected = train.attention(attn, x), attn(x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(y, x, torch.ones_like(y).cumsum(1)) for y in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)

@pytest.mark.parametrize("affine", [False, True])
def test_layer_norm_by_its_formula_is_torchs(affine):
    x, norm = torch.randn(4, 7, 32) * 3 + 1, torch.nn.LayerNorm(32, eps=1e-6, elementwise_affine=affine)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    torch.testing.assert_close(train.layer_norm(norm, x), norm(x), rtol=1e-5, atol=1e-5)


# Signals --------------------------------------------------------------------------------------------------------------

SIGNALS = """step, grid, crop, calls = it.train_step, it.sample_grid, it.center_crop, iter(range(30))
def at(moment, rank):
    if os.environ.get("RANK", "0") == rank and moment == "MOMENT":
        for pid in dict(itself=[os.getpid()], launcher=[os.getppid()], both=[os.getppid(), os.getpid()])["TARGET"]:
            os.kill(pid, signal.SIGNAL)
def train_step(*args):
    at(f"step {args[-1]}", "1" if "RANK" in os.environ else "0")
    return step(*args)
def sample_grid(*args):
    at("sampling", "0")
    return grid(*args)
def center_crop(*args):
    if next(calls, None) == 29:                                                   # the first 20 are the fingerprint
        at("preparation", os.environ.get("RANK", "0"))                            # whichever process makes the part
    return crop(*args)
it.train_step, it.sample_grid, it.center_crop = train_step, sample_grid, center_crop
"""

def signalled(processes, target, moment, name):
    """The arguments of a long run in which a signal is sent."""
    patch = SIGNALS.replace("TARGET", target).replace("MOMENT", moment).replace("SIGNAL", name)
    return dict(processes=processes, patch=patch, status=None if target != "itself" else 0, timeout=60)

def test_sigterm_ends_the_step_saves_and_says_how_to_resume(run):
    started = run.start("--steps 10000000")
    while not started.checkpoint.exists():
        assert started.process.poll() is None
        time.sleep(0.1)
    started.process.send_signal(signal.SIGTERM)
    text = started.wait(timeout=60).text
    assert f"saved at step {started.state['step']}; resume with: python train.py --resume {started.out}" in text

@pytest.mark.slow
@pytest.mark.parametrize("processes,target,moment,name", [
    (1, "itself", "step 4", "SIGINT"), (1, "itself", "sampling", "SIGTERM"), (2, "itself", "step 4", "SIGTERM"),
    (2, "launcher", "step 4", "SIGTERM"), (2, "both", "step 4", "SIGINT"), (2, "launcher", "sampling", "SIGTERM")])
def test_a_signal_to_any_process_stops_all_at_the_same_step(processes, target, moment, name, run):
    stopped = run(RECIPE, "--steps 100000 --sample-every 4", **signalled(processes, target, moment, name))
    step, text = stopped.state["step"], stopped.text
    assert text.count("stopped and saved") == 1 and f"saved at step {step};" in text, text
    assert "Traceback" not in text.split("torch/distributed")[0], text
    launcher = re.search(r"resume with: (.*) --resume", text)[1]
    assert launcher == ("python train.py" if processes == 1 else "torchrun --nproc_per_node=2 train.py")
    run(f"--steps {step + 2} --sample-every 0", resume=stopped)
    assert stopped.is_like(run(RECIPE, f"--steps {step + 2}"))

@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_in_the_preparation_ends_it_and_the_next_run_finishes_it(processes, name, run):
    ended = run(RECIPE, **signalled(processes, "itself", "preparation", name) | dict(status=None))
    assert not ended.out.exists() and "Traceback" not in ended.text.split("torch/distributed")[0], ended.text
    assert run(RECIPE).is_like(run(RECIPE, "--cache", run.folder / "other"))


# Deaths and mistakes --------------------------------------------------------------------------------------------------

DIES = """step = it.train_step
def dies(cfg, rt, *args):
    if rt.rank == 1 and args[-1] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(cfg, rt, *args)
it.train_step = dies"""
LEAVES = "if os.environ['RANK'] == '1': it.prepare_data = lambda *args: sys.exit(7)"

@pytest.mark.slow
@pytest.mark.parametrize("patch,saved", [(DIES, 3), (LEAVES, None)])
def test_when_one_process_dies_the_others_end(patch, saved, run):
    """Killed in a step, or gone while the others wait for it: nothing hangs, and the last checkpoint is unchanged."""
    ended = run(processes=2, patch=patch, status=None, timeout=60)
    assert "gloo/transport" not in ended.text, ended.text
    told = "another process of this run has ended" in ended.text
    assert told or re.search(r"exitcode +: (143|-15)", ended.text), ended.text    # or the launcher was faster
    assert ended.state["step"] == saved if saved else not ended.out.exists()

def test_a_run_holds_its_folder_until_it_ends_or_is_killed(run):
    """Two writers would leave the checkpoint of one beside the log of the other."""
    first = run.start("--steps 10000000")
    while not first.checkpoint.exists():
        assert first.process.poll() is None
        time.sleep(0.1)
    second = run("--steps 20000000", resume=first, patch=" ", status=2)
    third = run("--out", first.out, patch="it.refuse_a_second_run = lambda cfg: None", status=2)    # started together
    for refused in (second, third):
        assert f"another run is writing into {first.out}" in refused.text and "Traceback" not in refused.text
    first.process.kill()
    first.process.wait()
    step = first.state["step"]
    assert run(f"--steps {step + 1}", resume=first).state["step"] == step + 1

def test_a_resumed_run_is_held_before_its_checkpoint_is_read(run, monkeypatch):
    """Or it could go on from a step that the other run has left behind."""
    begun, held = run("--steps 2"), []

    def load_checkpoint(path, check=True):
        other = filelock.FileLock(begun.out / ".lock", timeout=0)
        held.append(pytest.raises(filelock.Timeout, other.acquire))
        return whole(path, check)
    whole = train.load_checkpoint
    monkeypatch.setattr(train, "resumed_config", lambda flags: train.Config(**resumed | flags))
    resumed = {key: value for key, value in begun.state["config"].items() if key in vars(train.Config())} | dict(
        steps=3, out=str(begun.out))
    monkeypatch.setattr(train, "load_checkpoint", load_checkpoint)
    run("--steps 3", resume=begun)
    assert held and begun.state["step"] == 3

@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(37, "No locks available")])
def test_a_disk_without_locks_is_used_without(error, run, monkeypatch):
    begun = run("--steps 1")

    def acquire(*args, **kwargs):
        raise error
    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    assert run("--steps 2", resume=begun).state["step"] == 2

def test_a_run_that_came_and_went_in_the_meantime_is_not_overwritten(run, monkeypatch):
    """Its folder was free when this run was started, and is free again."""
    prepare, other = train.prepare_data, []

    def slow(*args):
        monkeypatch.setattr(train, "prepare_data", prepare)
        other.append(run("--steps 2 --out", run.folder / "run1"))
        return prepare(*args)
    monkeypatch.setattr(train, "prepare_data", slow)
    assert "already holds a run" in run("--steps 4", status=2).text
    assert torch.load(run.folder / "run1" / "ckpt.pt")["step"] == 2

def test_all_processes_have_read_their_data_before_one_builds_its_model(run, monkeypatch):
    """DDP's first exchange waits for minutes; listing a folder or loading a VAE may take longer on one machine."""
    events = []
    for owner, name in ((train, "open_source"), (train.Runtime, "barrier"), (train, "Training")):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, name=name, call=call: events.append(name) or call(*args))
    run("--steps 1")
    assert events[:3] == ["open_source", "barrier", "Training"]

@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_that_torchrun_has_not_started_are_refused(name, run, tiny_run, monkeypatch):
    monkeypatch.setenv(name, "8")
    assert "8 processes" in run(status=2).text and not list(run.folder.iterdir())
    assert "8 processes" in refusal(sample.main, tiny_run.out)
    monkeypatch.setenv(name, "1")
    assert run("--steps 1").state["step"] == 1

@pytest.mark.slow
def test_processes_with_other_settings_do_not_train_together(run):
    ended = run(processes=2, patch="sys.argv += ['--seed', os.environ['RANK']]", status=None)
    assert ended.text.count("do not have the same flags") == 2 and not ended.out.exists(), ended.text

TORCHRUN = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")

@pytest.mark.parametrize("variables,flags,words", [
    (3, "--device xla", "without torchrun"), (3, "--device mps", "under torchrun"), (1, "", "WORLD_SIZE"),
    (3, "--batch-size 9", "not divisible by 2 devices"), (0, "--device xla", "torch_xla"),
    (0, "--device xla --compile", "--no-compile")])
def test_what_cannot_run_in_many_processes_is_refused(variables, flags, words, run, monkeypatch):
    for name in list(TORCHRUN)[:variables]:
        monkeypatch.setenv(name, TORCHRUN[name])
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    assert words in run(flags, status=2).text and not list(run.folder.iterdir())

def test_processes_of_a_mac_share_its_cpu_not_its_gpu(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    for kind, here in [(torch.cuda, False), (torch.backends.mps, True)]:
        monkeypatch.setattr(kind, "is_available", lambda here=here: here)
    rt = train.Runtime.__new__(train.Runtime)
    rt.find_devices(train.Config())
    assert rt.device.type == "cpu" and rt.rank == 1

def test_commands_end_a_mistake_in_one_line_and_status_2(tmp_path):
    for script, argv in [("train.py", ["--preset", "mnist"]), ("sample.py", ["nothing.pt"])]:
        text = Run(tmp_path, popen([sys.executable, str(ROOT / script), *argv], tmp_path)).wait(status=2).text
        assert len(text.splitlines()) == 1 and text.startswith(script)

@pytest.mark.slow
@pytest.mark.parametrize("patch,flags,words", [
    ("os.environ['CXX'] = '/no/compiler'", "--compile", "--no-compile"),
    ("""def full(*args):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
it.train_step = full""", "", "out of memory: use less")])
def test_what_the_machine_lacks_is_said_in_one_line(patch, flags, words, run):
    text = run(flags, patch=patch, status=2).text
    assert "Traceback" not in text and words in text.splitlines()[-1]
