"""XLA: the same run, compiled for 1, 2 and 4 virtual devices, each run in a process of its own."""
import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import LATENT, RECIPE

pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None,
                                                   reason="torch_xla is not installed")]

COUNTED = """mark_step, counts = it.XLARuntime.mark_step, []
def counted(self):
    import torch_xla.debug.metrics as metrics
    mark_step(self)
    counts.append(metrics.counter_value("UncachedCompile"))
    fallbacks = [name for name in metrics.counter_names() if name.startswith("aten::") and "_local_scalar" not in name]
    open("counts.json", "w").write(it.json.dumps([counts, fallbacks]))
it.XLARuntime.mark_step = counted
"""

def on_xla(run, devices, *flags, **kwargs):
    """(Run, programs compiled until each step, operations that XLA lacks, the largest program before and after
    optimization)."""
    dump = run.folder / f"hlo{run.count}"
    finished = run(*flags, xla=devices, patch=COUNTED, timeout=400,
                   env=dict(XLA_FLAGS=f"--xla_dump_to={dump} --xla_dump_hlo_as_text"), **kwargs)
    programs = [max((path.read_text() for path in dump.glob(f"*{when}_optimizations.txt")), key=len)
                for when in ("before", "after")]
    return finished, *json.loads((run.folder / "counts.json").read_text()), *programs

@pytest.mark.parametrize("devices,flags", [
    (1, "--block adaln-zero"), (2, "--block in-context"), (2, "--block cross-attention --accum 2"),
    (2, "--block adaln"), (2, "--block adaln-zero --accum 2"), (4, "--block adaln-zero --lr-decay-steps 30")])
def test_xla_makes_the_run_of_the_cpu_and_compiles_twice(devices, flags, run):
    """The first step is compiled, and all others. No device asks for another's activations: the step has no
    all-gather, only an all-reduce."""
    xla, compiled, fallbacks, _, step = on_xla(run, devices, RECIPE, flags)
    assert xla.is_like(run(RECIPE, flags))
    assert compiled[1:] == [compiled[1]] * 19 and compiled[1] - compiled[0] <= 2 and not fallbacks
    assert f"num_partitions={devices}" in step or devices == 1
    assert "all-gather" not in step and ("all-reduce" in step) == (devices > 1)

def test_a_checkpoint_goes_from_xla_to_a_machine_without_and_back(run):
    whole, b = run(RECIPE, "--sample-every 20"), run(RECIPE, "--steps 10")
    a, *_ = on_xla(run, 2, RECIPE, "--steps 10")
    load = "import sys, torch; torch.load(sys.argv[1], weights_only=True); assert 'torch_xla' not in sys.modules"
    subprocess.run([sys.executable, "-c", load, a.checkpoint], check=True)
    assert b"xla:0" not in a.checkpoint.read_bytes()
    assert run("--steps 20", resume=a).is_like(whole)
    b, *_ = on_xla(run, 2, "--steps 20 --sample-every 20", resume=b)
    assert b.is_like(whole)
    assert np.abs(whole.picture(20) - b.picture(20)).max() <= 2 and b.picture(20).std() > 20

@pytest.mark.parametrize("flags,tolerance,sign,times", [
    ("--grad-checkpoint", 1e-5, r" opt-barrier\(", 2), ("--dtype bf16", 1e-2, r"= bf16\[[\d,]*\]\S* dot\(", 12)])
def test_xla_checkpoints_blocks_and_multiplies_in_bfloat16(flags, tolerance, sign, times, run):
    xla, _, _, program, _ = on_xla(run, 2, RECIPE, flags)
    assert len(re.findall(sign, program)) >= times
    assert np.abs(xla.losses - run(RECIPE).losses)[:, :3].max() < tolerance

def test_xla_trains_on_the_latents_that_it_encodes(run, vae_folder):
    """The latents, the losses on them and the decoded grid are the CPU's."""
    flags = [RECIPE, LATENT, vae_folder, "--sample-every 20"]
    xla, *_ = on_xla(run, 2, *flags)
    cpu, own = run(*flags), run(*flags, "--cache", run.folder / "own")
    assert xla.is_like(cpu)
    assert np.abs(xla.picture(20) - cpu.picture(20)).max() <= 2 and cpu.picture(20).std() > 20
    there, here = (np.load(next(cache.glob("*/*.npy"))).astype(float) for cache in (run.cache, run.folder / "own"))
    np.testing.assert_allclose(there, here, rtol=2e-3, atol=1e-4)
    assert own.out.exists()
