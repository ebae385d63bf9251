"""What a newcomer does first, to its end: `python train.py`, judged by a classifier. And studies/speed.py."""
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import train

sys.path.insert(0, str(ROOT / "studies"))


@pytest.mark.slow
def test_the_first_run_ends_in_pictures_of_the_classes_asked_for(tmp_path):
    """98 % of them are recognized (measured: over 99 %). They are no nearer to the training images than real shapes
    that the model never saw."""
    from judge import judge

    began = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "train.py"], cwd=tmp_path, check=True)
    minutes, out = (time.perf_counter() - began) / 60, tmp_path / "runs" / "shapes"
    assert {path.name for path in out.iterdir()} == {"ckpt.pt", "log.csv", "config.json", "samples", ".lock"}
    samples, real = judge(out)
    print(f"\n{minutes:.1f} minutes; {samples}; {real}")
    assert real["recognized"] > 0.99 and samples["recognized"] >= 0.98 and samples["nearest"] > 0.5 * real["nearest"]


@pytest.mark.slow
@pytest.mark.parametrize("argv,size,images,passes", [
    ("train --preset cifar10 --image-size 16 --batch-size 4 --timed 5", dict(input_size=16, in_channels=3), 4, 3),
    ("sample DiT-S/4 --batch-size 2 --timed 5 --steps 50", {}, 2, 2)])
def test_speeds_belong_together(argv, size, images, passes):
    """images/s and TFLOP/s by the model's flops: three forward passes for a training step, two with guidance."""
    from speed import forward_flops

    assert forward_flops(train.DiT_models["DiT-XL/2"].keywords) / 2e9 == pytest.approx(118.64, rel=2e-4)     # Table 4
    text = subprocess.run([sys.executable, ROOT / "studies" / "speed.py", *argv.split(), "--device", "cpu"],
                          capture_output=True, text=True, check=True).stdout
    pattern = r"(\S+) images/s; (\S+) ms .* (\S+) TFLOP/s a device, (\d+)% of (\S+) in a product"
    rate, ms, tflops, share, limit = map(float, re.search(pattern, text).groups())
    flops = passes * images * forward_flops(train.DiT_models["DiT-S/4"].keywords | size)
    assert rate == pytest.approx(images / (1 if passes == 3 else 50) / ms * 1000, rel=5e-3)
    assert tflops == pytest.approx(flops / ms / 1e9, rel=0.01)
    assert share == pytest.approx(100 * tflops / limit, rel=0.01, abs=0.6)
    assert ("400,000 steps" in text) == (passes == 3)
