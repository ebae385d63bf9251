"""Text as the condition: "red star". adaLN-Zero sees the mean of its words, cross-attention the sequence.

    python classroom/extensions/text_condition.py                    # trains on the built-in shapes, draws text.png
    python classroom/extensions/text_condition.py --block cross-attention         # any flags of train.py

A text is a row of word numbers where a label was one number. All the rest works as for labels, guidance too: the null
text is the null word, number num_classes, in every place.
"""
import colorsys
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dit
import sample
import train

COLOURS = ["red", "yellow", "green", "cyan", "blue", "magenta"]                   # hues 0, 1/6, ... 5/6
WORDS = COLOURS + list(train.SHAPES)


def colour_of(image):
    """The number of the colour word that is nearest to the brightest pixel of a uint8 image (I, I, 3)."""
    pixels = image.reshape(-1, 3) / 255
    hue, _, _ = colorsys.rgb_to_hsv(*pixels[pixels.max(1).argmax()])
    return round(6 * hue) % 6


class WordEmbedder(dit.LabelEmbedder):
    def forward(self, y, drop=None):                                              # (N, S), (N,) bool
        if drop is not None:
            y = torch.where(drop[:, None], self.num_classes, y)
        return self.embedding_table(y)                                            # (N, S, D)


class TextDiT(dit.DiT):
    """A DiT whose y is a text, (N, S) numbers of words; num_classes is the number of words."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.y_embedder = WordEmbedder(self.num_classes, sizes["hidden_size"])
        torch.nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        self.condition = sequence if self.block == "cross-attention" else mean


def sequence(x, t, y):                                                            # (N, T, D), (N, D), (N, S, D)
    return x, torch.cat([t[:, None], y], dim=1)                                   # (N, T, D), (N, 1 + S, D)


def mean(x, t, y):
    return x, t + y.mean(dim=1)                                                   # (N, T, D), (N, D)


def main(argv):
    cfg = train.parse_args(["--out", "runs/text", *argv])
    if cfg.resume:
        raise sample.UserError("this script keeps no checkpoint to resume: leave --resume out")
    images = np.stack([train.draw_shape(i, 16) for i in range(20_000)])
    texts = np.array([[colour_of(image), 6 + i % 10] for i, image in enumerate(images)])

    train.DiT = TextDiT
    rt = train.Runtime(cfg)
    training = train.Training(cfg, rt, num_classes=len(WORDS))
    for step, batch in tqdm(train.batches(cfg, rt, images.transpose(0, 3, 1, 2), texts, start=0), total=cfg.steps):
        train.train_step(cfg, rt, training, dit.GaussianDiffusion(), batch, step)

    asked = [[colour, WORDS.index(shape)] for shape in ("star", "heart", "ring", "arrow") for colour in range(6)]
    drawn = sample.to_uint8(sample.sample_images(training.ema, asked, steps=50, sampler="ddim", cfg_scale=2.0))
    sample.grid_image(drawn, 6).save("text.png")
    seen = [colour_of(image.permute(1, 2, 0).numpy()) for image in drawn]
    right = sum(colour == text[0] for colour, text in zip(seen, asked, strict=True))
    print(f"text.png: stars, hearts, rings, arrows in {', '.join(COLOURS)}; {right} of 24 have the colour asked for")


if __name__ == "__main__":
    sample.run(main, less_memory="lower --batch-size")
