"""Are samples of the built-in set recognized as the classes that were asked for, and are they no copies?

    python studies/judge.py runs/shapes/ckpt.pt

Prints how many of 1,000 guided samples (guidance 2, 50 DDIM steps) a classifier of real shapes recognizes, and how far
the nearest training image is. Both have the value of unseen real shapes beside them.
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sample
import train


def real_shapes(numbers):
    """(uint8 (N, 3, 16, 16), classes (N,)) of these images of the built-in set. A run trains on 0 to 19,999."""
    images = np.stack([train.draw_shape(i, 16) for i in numbers]).transpose(0, 3, 1, 2).copy()
    return torch.from_numpy(images), torch.tensor([i % 10 for i in numbers])


def shape_classifier(images, labels):
    """A small convolutional network, trained for 1,500 steps: its guesses as a function of uint8 (N, 3, 16, 16)."""
    layers = []
    for c_in, c_out, stride in [(3, 32, 1), (32, 64, 2), (64, 128, 2)]:
        layers += [
            nn.Conv2d(c_in, c_out, 3, stride, padding=1),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
        ]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 10))
    opt = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(1500):
        i = torch.randint(len(images), (128,))
        opt.zero_grad()
        F.cross_entropy(network(images[i] / 127.5 - 1), labels[i]).backward()
        opt.step()
    network.eval()
    return torch.no_grad()(lambda x: network(x / 127.5 - 1).argmax(1))


def wilson(hits, n, z=1.96):
    """The 95 % interval of a share (Wilson's)."""
    p = hits / n
    middle = p + z * z / 2 / n
    half = z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5
    scale = 1 + z * z / n
    return (middle - half) / scale, (middle + half) / scale


def distance(images, others):
    """Grey levels to the nearest of the others: root mean square over an image, median over the images."""
    images, others = images.flatten(1).float(), others.flatten(1).float()
    nearest = torch.cdist(images, others).amin(dim=1)
    return nearest.median().item() / images.shape[1] ** 0.5


def judge(checkpoint):
    """The numbers that this script prints, as a dictionary."""
    torch.manual_seed(0)
    seen, seen_classes = real_shapes(range(20_000))
    unseen, unseen_classes = real_shapes(range(20_000, 22_000))
    guess = shape_classifier(seen, seen_classes)
    model, _ = sample.load_model(checkpoint)
    classes = torch.arange(1000) % 10
    samples = sample.to_uint8(sample.sample_images(model, classes, steps=50, sampler="ddim", cfg_scale=2.0))
    recognized = (guess(samples) == classes).sum().item()
    low, high = wilson(recognized, 1000)
    return dict(
        recognized=recognized,
        low=low,
        high=high,
        real=(guess(unseen) == unseen_classes).double().mean().item(),
        nearest=distance(samples, seen),
        nearest_real=distance(unseen, seen),
    )


def main(argv):
    if len(argv) != 1:
        raise sample.UserError("usage: python studies/judge.py CKPT")
    found = judge(*argv)
    print("{recognized} of 1000 samples recognized, 95 % interval {low:.3f} to {high:.3f} (real shapes {real:.3f});\n"
          "nearest training image {nearest:.1f} grey levels away (real shapes {nearest_real:.1f})".format(**found))


if __name__ == "__main__":
    sample.run(main, less_memory="use a machine with more memory")
