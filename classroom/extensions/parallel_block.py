"""A fifth block: attention and MLP side by side, as in ViT-22B (arXiv 2302.05442, Sec. 2).

    python classroom/extensions/parallel_block.py                    # trains on the built-in shapes; flags of train.py
    python classroom/extensions/parallel_block.py runs/parallel/ckpt.pt           # draws samples; flags of sample.py

A design is a class with condition(x, t, y) and forward(x, c). DESIGNS names it, and its decoder.
"""
import sys
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dit
import sample


class ParallelBlock(nn.Module):
    """x + alpha (attn(h) + mlp(h)), with h = (1 + gamma) norm(x) + beta: three parts of modulation, adaLN-Zero has six.
    They are small at the start because t + y is; "adaln-zero" alone has them at 0."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = dit.Attention(hidden_size, num_heads)
        self.mlp = dit.Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 3 * hidden_size))

    condition = staticmethod(dit.AdaLNBlock.condition)                            # c = t + y

    def forward(self, x, c):                                                      # (N, T, D), (N, D)
        beta, gamma, alpha = self.adaLN_modulation(c).chunk(3, dim=1)             # (N, D) each
        h = dit.modulate(self.norm(x), beta, gamma)                               # (N, T, D)
        return x + alpha[:, None] * (self.attn(h) + self.mlp(h))                  # (N, T, D)


dit.DESIGNS["parallel"] = (ParallelBlock, dit.FinalLayer)


def main(argv):
    import train  # now it knows the new design

    if argv and not argv[0].startswith("-"):
        return sample.main(argv)
    train.main(["--block", "parallel", "--out", "runs/parallel", *argv])


if __name__ == "__main__":
    sample.run(main, less_memory="lower --batch-size")
