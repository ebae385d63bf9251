"""Scalable Diffusion Models with Transformers (DiT), Peebles & Xie, arXiv 2212.09748: the whole method in one file.

Read it beside the paper, from the top: every section names the part of the paper that it implements.

    Sec. 3.1  diffusion            GaussianDiffusion: q_sample, q_posterior_mean_variance, p_mean_variance
              the two losses       GaussianDiffusion: training_losses, bits_per_dim
              sampling             GaussianDiffusion: p_sample_loop, ddim_sample_loop, respaced; space_timesteps
    Sec. 3.2  patchify             PatchEmbed, get_2d_sincos_pos_embed                                       (Figure 4)
              t and the label      TimestepEmbedder, LabelEmbedder
              the four blocks      InContextBlock, CrossAttentionBlock, AdaLNBlock, AdaLNZeroBlock           (Figure 3)
              decoder and model    FinalLayer, PlainFinalLayer, DiT;  guidance: DiT.forward_with_cfg
    Table 1   model sizes          DiT_models

    x_0 --q_sample--> x_t --PatchEmbed + pos_embed--> tokens --blocks(c from t, y)--> FinalLayer --unpatchify--> eps, v
                                                                                 --p_mean_variance--> x_(t-1) ... x_0

Notation    N batch, C channels, H = W = I image side, p patch size, T = (I/p)^2 tokens, D width, h heads
            x_0 = x_start (images or latents), eps noise, t timestep in 0..num_timesteps-1, y label, c condition
            beta_t noise variance of one step, alpha_t = 1 - beta_t, alphas_cumprod[t] = alpha_0 ... alpha_t
Sources     DDPM arXiv 2006.11239, iDDPM 2102.09672, ADM 2105.05233, DDIM 2010.02502, CFG 2207.12598. Of its diffusion
            the paper says only that it is ADM's, so the equation numbers in Sec. 3.1 are those of these papers.

Where this differs from the paper (P) or the official code (O), and why. Parameters have O's names: its weights load.
    blocks       O has adaLN-Zero only; P describes four. What P leaves open is decided at the block that it concerns.
    guidance     O guides 3 of 4 latent channels, which its authors call unintended; here all, or cfg_channels=3.
    null label   O samples with label 1000; here the null label is model.num_classes.
    dropout      O drops labels if model.training; here the caller draws `drop`, so sampling cannot drop any.
    t = 0 NLL    O approximates the normal CDF by a tanh; here it is exact (DDPM Eq. 13).
    pos_embed    O stores a frozen parameter; here it is a buffer of the same name, out of the optimizer's reach.
"""
import copy
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# Sec. 3.1  Diffusion formulation --------------------------------------------------------------------------------------

def normal_kl(mean1, logvar1, mean2, logvar2):
    """KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)) in nats, elementwise."""
    return 0.5 * (logvar2 - logvar1 - 1.0
                  + torch.exp(logvar1 - logvar2)
                  + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def discretized_gaussian_log_likelihood(x, mean, log_std):
    """log p(x) in nats, elementwise, of 8-bit images x in [-1, 1]: a Gaussian integrated over each of the 256 bins
    of width 2/255, the outer two reaching to infinity (DDPM Eq. 13)."""
    def cdf(edge):
        return 0.5 * (1.0 + torch.erf((edge - mean) * torch.exp(-log_std) / math.sqrt(2.0)))

    upper = torch.where(x > 0.999, torch.ones_like(x), cdf(x + 1 / 255))
    lower = torch.where(x < -0.999, torch.zeros_like(x), cdf(x - 1 / 255))
    return torch.log((upper - lower).clamp(min=1e-12))        # no bin is impossible: log 0 would end the training


def space_timesteps(num_timesteps, num_steps):
    """The timesteps that a sampler of num_steps visits, ascending: 250 of 1000 is 0, 4, 8, ..., 995, 999.

    ADM's even spacing from first to last, with the stride summed up as there (a product rounds differently). A single
    step is the last one, pure noise (ADM takes the first). ValueError unless 1 <= num_steps <= num_timesteps.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"cannot take {num_steps} of {num_timesteps} timesteps: choose 1 to {num_timesteps}")
    if num_steps == 1:
        return [num_timesteps - 1]
    stride = (num_timesteps - 1) / (num_steps - 1)
    return np.cumsum([0.0] + [stride] * (num_steps - 1)).round().astype(int).tolist()


class GaussianDiffusion:
    """The diffusion process: noising, its reversal by a network, the loss, and two samplers (Sec. 3.1).

    Images or latents are (N, C, H, W), pixels in [-1, 1]; timesteps t are (N,) integers in 0..num_timesteps-1. `model`
    is any callable model(x_t, t, **model_kwargs) that returns (N, 2C, H, W): eps, then v for the learned variance; or
    (N, C, H, W): eps alone, and the variance is beta_t (at t = 0 the posterior's of t = 1, as in ADM).
    """

    def __init__(self, num_timesteps=1000, beta_start=1e-4, beta_end=2e-2):
        self._tabulate(np.linspace(beta_start, beta_end, num_timesteps), np.arange(num_timesteps))

    def _tabulate(self, betas, timestep_map):
        """Fill the tables: computed in float64 (1 - alphas_cumprod cancels), kept as float32 tensors."""
        alphas_cumprod = np.cumprod(1.0 - betas)
        alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
        posterior_variance = betas * (1.0 - alphas_cumprod_prev) / (1.0 - alphas_cumprod)            # DDPM Eq. 7
        # At t = 0 that is 0 and its logarithm -inf: ADM takes the value at t = 1 (a one-step process has only beta_0).
        at_0 = np.append(posterior_variance, betas)[1]
        tables = dict(
            betas=betas,
            log_betas=np.log(betas),
            log_fixed_variance=np.log(np.append(at_0, betas[1:])),                           # ADM's "fixed large"
            alphas_cumprod=alphas_cumprod,
            one_minus_alphas_cumprod_prev=1.0 - alphas_cumprod_prev,
            sqrt_alphas_cumprod=np.sqrt(alphas_cumprod),
            sqrt_alphas_cumprod_prev=np.sqrt(alphas_cumprod_prev),
            sqrt_one_minus_alphas_cumprod=np.sqrt(1.0 - alphas_cumprod),
            sqrt_recip_alphas_cumprod=np.sqrt(1.0 / alphas_cumprod),
            sqrt_recipm1_alphas_cumprod=np.sqrt(1.0 / alphas_cumprod - 1.0),
            posterior_variance=posterior_variance,
            posterior_log_variance_clipped=np.log(np.append(at_0, posterior_variance[1:])),
            posterior_mean_coef1=betas * np.sqrt(alphas_cumprod_prev) / (1.0 - alphas_cumprod),
            posterior_mean_coef2=(1.0 - alphas_cumprod_prev) * np.sqrt(1.0 - betas) / (1.0 - alphas_cumprod),
        )
        for name, table in tables.items():
            setattr(self, name, torch.tensor(table, dtype=torch.float32))
        self.timestep_map = torch.tensor(timestep_map, dtype=torch.long)
        self.num_timesteps = len(betas)
        self._alphas_cumprod = alphas_cumprod                                     # float64, for respaced()

    def to(self, device):
        """A copy whose tables are on `device`."""
        moved = copy.copy(self)
        vars(moved).update({name: table.to(device) for name, table in vars(self).items() if torch.is_tensor(table)})
        return moved

    def respaced(self, num_steps):
        """The process that visits only space_timesteps(num_timesteps, num_steps) (iDDPM Sec. 4, Eq. 19).

        The kept steps keep their alphas_cumprod, from which their betas follow. `timestep_map` holds their original t:
        the network is always given that one."""
        kept = space_timesteps(self.num_timesteps, num_steps)
        alphas_cumprod = self._alphas_cumprod[kept]
        shorter = copy.copy(self)
        shorter._tabulate(betas=1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]),
                          timestep_map=self.timestep_map.cpu().numpy()[kept])
        return shorter.to(self.betas.device)

    @staticmethod
    def _gather(table, t):
        """table[t], shaped (N, 1, 1, 1) to multiply images."""
        return table[t][:, None, None, None]

    def _call(self, model, x_t, t, model_kwargs):
        """Call the network with the original timestep and return its output in x_t's dtype."""
        return model(x_t, self.timestep_map[t], **model_kwargs).to(x_t.dtype)

    def q_sample(self, x_start, t, noise):
        """x_t ~ q(x_t | x_0) = N(sqrt(alphas_cumprod) x_0, (1 - alphas_cumprod) I) for a given noise (DDPM Eq. 4)."""
        return (self._gather(self.sqrt_alphas_cumprod, t) * x_start
                + self._gather(self.sqrt_one_minus_alphas_cumprod, t) * noise)

    def q_posterior_mean_variance(self, x_start, x_t, t):
        """(mean, variance, log_variance_clipped) of q(x_(t-1) | x_t, x_0) (DDPM Eq. 6 and 7), each (N, C, H, W)."""
        mean = (self._gather(self.posterior_mean_coef1, t) * x_start
                + self._gather(self.posterior_mean_coef2, t) * x_t)
        variance = self._gather(self.posterior_variance, t).expand_as(x_t)
        log_variance_clipped = self._gather(self.posterior_log_variance_clipped, t).expand_as(x_t)
        return mean, variance, log_variance_clipped

    def p_mean_variance(self, model_output, x_t, t, clip_denoised=False):
        """p(x_(t-1) | x_t) from the network's output for x_t: dict(mean, variance, log_variance, pred_xstart).

        v in [-1, 1] moves the log-variance between its smallest and largest possible values: the posterior's (x_0 known
        exactly) and beta_t (x_0 pure noise) (iDDPM Eq. 15). clip_denoised clamps pred_xstart to [-1, 1], which is right
        for pixels and wrong for latents, which are not bounded.
        """
        C = x_t.shape[1]
        eps, v = model_output[:, :C], model_output[:, C:]
        if v.shape[1] == 0:
            log_variance = self._gather(self.log_fixed_variance, t).expand_as(x_t)
        else:
            frac = (v + 1) / 2
            log_variance = (frac * self._gather(self.log_betas, t)
                            + (1 - frac) * self._gather(self.posterior_log_variance_clipped, t))
        pred_xstart = (self._gather(self.sqrt_recip_alphas_cumprod, t) * x_t
                       - self._gather(self.sqrt_recipm1_alphas_cumprod, t) * eps)                        # DDPM Eq. 15
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x_t, t)
        return dict(mean=mean, variance=log_variance.exp(), log_variance=log_variance, pred_xstart=pred_xstart)

    def _vb_terms_bpd(self, model_output, x_start, x_t, t, clip_denoised=False):
        """(N,): the term L_t of the variational bound in bits/dim; at t = 0 the decoder's likelihood (DDPM Eq. 5)."""
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self.p_mean_variance(model_output, x_t, t, clip_denoised)
        kl = normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"])
        nll = -discretized_gaussian_log_likelihood(x_start, out["mean"], 0.5 * out["log_variance"])
        return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2.0)

    def training_losses(self, model, x_start, t, noise=None, **model_kwargs):
        """dict(loss, mse, vb), each (N,). L_simple = mse trains eps (DDPM Eq. 14), the full bound trains the variance.

        loss = mse + vb, with vb in bits/dim of the drawn t alone. With 1000 timesteps it is iDDPM's L_hybrid (Eq. 16),
        whose 0.001 multiplies the sum over all t. Without learned variance vb is 0.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        model_output = self._call(model, x_t, t, model_kwargs)
        C = x_start.shape[1]
        eps, v = model_output[:, :C], model_output[:, C:]
        mse = ((noise - eps) ** 2).flatten(1).mean(1)                             # (N,), like vb and loss
        frozen_eps = torch.cat([eps.detach(), v], dim=1)                          # the bound trains the variance only
        vb = self._vb_terms_bpd(frozen_eps, x_start, x_t, t) if v.shape[1] > 0 else torch.zeros_like(mse)
        return dict(loss=mse + vb, mse=mse, vb=vb)

    @torch.no_grad()
    def bits_per_dim(self, model, x_start, randn=torch.randn_like, clip_denoised=True, **model_kwargs):
        """The whole bound on -log2 p(x_0) in bits/dim: dict(total (N,), prior (N,), vb, mse (N, num_timesteps)).

        Column t belongs to timestep t; total = prior + sum of vb. `randn(x)` is called once a step, last t first."""
        vb, mse = [], []
        for i in reversed(range(self.num_timesteps)):
            t = torch.full((len(x_start),), i, device=x_start.device)
            noise = randn(x_start)
            x_t = self.q_sample(x_start, t, noise)
            model_output = self._call(model, x_t, t, model_kwargs)
            vb.append(self._vb_terms_bpd(model_output, x_start, x_t, t, clip_denoised))
            mse.append(((noise - model_output[:, :x_start.shape[1]]) ** 2).flatten(1).mean(1))
        vb, mse = torch.stack(vb[::-1], dim=1), torch.stack(mse[::-1], dim=1)
        mean, log_variance = self.sqrt_alphas_cumprod[-1] * x_start, 2 * self.sqrt_one_minus_alphas_cumprod[-1].log()
        zero = torch.zeros_like(x_start)
        prior = normal_kl(mean, log_variance, zero, zero).flatten(1).mean(1) / math.log(2.0)          # L_T, DDPM Eq. 5
        return dict(total=prior + vb.sum(dim=1), prior=prior, vb=vb, mse=mse)

    @torch.no_grad()
    def p_sample_loop(self, model, noise, clip_denoised=False, randn=torch.randn_like, progress=None, on_step=None,
                      **model_kwargs):
        """Ancestral sampling (DDPM Algorithm 2), the paper's sampler: images (N, C, H, W) from noise of that shape.

        `randn(x)` returns noise shaped like x, once a step. `progress` wraps the list of steps (tqdm, say).
        `on_step(i, x_t, pred_xstart)` is called at step i = num_timesteps-1 .. 0 with its x_t and the predicted x_0."""
        x_t, steps = noise, range(self.num_timesteps)[::-1]
        for i in steps if progress is None else progress(steps):
            t = torch.full((len(x_t),), i, device=x_t.device)                     # (N,)
            out = self.p_mean_variance(self._call(model, x_t, t, model_kwargs), x_t, t, clip_denoised)
            if on_step is not None:
                on_step(i, x_t, out["pred_xstart"])
            z = randn(x_t) * (t > 0)[:, None, None, None]                         # no noise in the last step
            x_t = out["mean"] + torch.exp(0.5 * out["log_variance"]) * z
        return x_t

    @torch.no_grad()
    def ddim_sample_loop(self, model, noise, eta=0.0, clip_denoised=False, randn=torch.randn_like, progress=None,
                         on_step=None, **model_kwargs):
        """DDIM sampling (DDIM Eq. 12), not in the paper but good in fewer steps; arguments as for p_sample_loop.

        eta = 0 is deterministic; eta = 1 adds noise of the posterior's variance (Eq. 16). eps is recomputed from the
        predicted x_0, which may have been clipped."""
        x_t, steps = noise, range(self.num_timesteps)[::-1]
        for i in steps if progress is None else progress(steps):
            t = torch.full((len(x_t),), i, device=x_t.device)                     # (N,)
            out = self.p_mean_variance(self._call(model, x_t, t, model_kwargs), x_t, t, clip_denoised)
            if on_step is not None:
                on_step(i, x_t, out["pred_xstart"])
            x_0 = out["pred_xstart"]
            eps = ((x_t - self._gather(self.sqrt_alphas_cumprod, t) * x_0)
                   / self._gather(self.sqrt_one_minus_alphas_cumprod, t))
            sigma2 = eta ** 2 * self._gather(self.posterior_variance, t)          # 0 at t = 0
            x_t = (self._gather(self.sqrt_alphas_cumprod_prev, t) * x_0
                   + (self._gather(self.one_minus_alphas_cumprod_prev, t) - sigma2).clamp(min=0).sqrt() * eps
                   + sigma2.sqrt() * randn(x_t))
        return x_t


# Sec. 3.2  Patchify (Figure 4) and positions --------------------------------------------------------------------------

class PatchEmbed(nn.Module):
    """Each p x p patch becomes a token by one linear layer, written as a convolution (Figure 4)."""

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):                             # (N, C, H, W)
        x = self.proj(x)                              # (N, D, H/p, W/p)
        return x.flatten(2).transpose(1, 2)           # (N, T, D), row by row


def get_2d_sincos_pos_embed(dim, grid_size):
    """(grid_size^2, dim) float32: the ViT's fixed frequency-based positions, in the tokens' row-by-row order. The first
    half of the channels encodes the column, the second the row. Each half is sines, then cosines, so 4 divides dim."""
    omega = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))                        # (D/4,)
    row, column = np.divmod(np.arange(grid_size ** 2), grid_size)                 # (T,) each
    angles = [np.outer(position, omega) for position in (column, row)]            # (T, D/4) each
    table = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
    return torch.tensor(table, dtype=torch.float32)                               # (T, D)


# Sec. 3.2 and Appendix A  The condition: embeddings of the timestep t and the label y ---------------------------------

def timestep_embedding(t, dim, max_period=10000):
    """(N,) timesteps, whole or fractional, -> (N, dim) float32: cosines, then sines, of t at dim/2 frequencies.
    Always in float32: bfloat16 cannot tell 936 from 937."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    args = t[:, None].float() * freqs                 # (N, dim/2)
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


class TimestepEmbedder(nn.Module):
    """t -> a 256-dimensional frequency embedding -> a two-layer MLP with SiLU (Appendix A)."""

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):                                                         # (N,)
        t_freq = timestep_embedding(t, 256)                                       # (N, 256)
        return self.mlp(t_freq.to(self.mlp[0].weight.dtype))                      # (N, D)


class LabelEmbedder(nn.Module):
    """A table with a row for each class and one more, number num_classes: the learned null embedding (Sec. 3.1)."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y, drop=None):                                              # (N,), (N,) bool
        if drop is not None:
            y = torch.where(drop, self.num_classes, y)
        return self.embedding_table(y)                                            # (N, D)


# Sec. 3.2  The parts of a ViT block, and adaptive layer norm's modulation ---------------------------------------------

class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):                                                         # (N, T, D)
        N, T, D = x.shape
        qkv = self.qkv(x).view(N, T, 3, self.num_heads, D // self.num_heads)      # (N, T, 3, h, D/h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                      # (N, h, T, D/h) each
        x = F.scaled_dot_product_attention(q, k, v)                               # (N, h, T, D/h)
        return self.proj(x.transpose(1, 2).reshape(N, T, D))                      # (N, T, D)


class CrossAttention(nn.Module):
    """Multi-head attention of the tokens x over the S tokens of a condition c."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, c):                                                      # (N, T, D), (N, S, D)
        N, T, D = x.shape
        q = self.q(x).view(N, T, self.num_heads, D // self.num_heads)             # (N, T, h, D/h)
        kv = self.kv(c).view(N, c.shape[1], 2, self.num_heads, D // self.num_heads)   # (N, S, 2, h, D/h)
        k, v = kv.permute(2, 0, 3, 1, 4)                                          # (N, h, S, D/h) each
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k, v)               # (N, h, T, D/h)
        return self.proj(x.transpose(1, 2).reshape(N, T, D))                      # (N, T, D)


class Mlp(nn.Module):
    """The pointwise feed-forward network, with tanh-approximated GELU."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):                                                         # (N, T, D)
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))                  # (N, T, D)


def modulate(x, shift, scale):
    """(1 + gamma) x + beta, the same for all tokens: adaptive layer norm's affine part. (N, T, D), (N, D), (N, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


# Sec. 3.2  DiT block design (Figure 3): the paper's four, in its order ------------------------------------------------
#
# Each design's condition(x, t, y) says how t and y, (N, D) each, enter. It runs once, before the first block; then each
# block maps (x, c) to x. The paper leaves open and we decide: the appended or attended tokens are t, then y, without
# position or type embeddings (they come from different embedders); cross-attention has a layer norm before it, like the
# other two branches; layer norms are affine where nothing else scales and shifts.

class InContextBlock(nn.Module):
    """In-context conditioning: t and y are two more tokens of the sequence, and the block is a standard ViT block."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))

    @staticmethod
    def condition(x, t, y):                                                       # (N, T, D), (N, D), (N, D)
        return torch.cat([x, t[:, None], y[:, None]], dim=1), None                # (N, T+2, D); DiT removes them again

    def forward(self, x, c):                                                      # (N, T+2, D), nothing
        x = x + self.attn(self.norm1(x))                                          # (N, T+2, D)
        return x + self.mlp(self.norm2(x))                                        # (N, T+2, D)


class CrossAttentionBlock(nn.Module):
    """Cross-attention: after self-attention the tokens attend to the sequence of length two (t, y)."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm_cross = nn.LayerNorm(hidden_size, eps=1e-6)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))

    @staticmethod
    def condition(x, t, y):                                                       # (N, T, D), (N, D), (N, D)
        return x, torch.stack([t, y], dim=1)                                      # (N, T, D), (N, 2, D)

    def forward(self, x, c):                                                      # (N, T, D), (N, 2, D)
        x = x + self.attn(self.norm1(x))                                          # (N, T, D)
        x = x + self.cross_attn(self.norm_cross(x), c)                            # (N, T, D)
        return x + self.mlp(self.norm2(x))                                        # (N, T, D)


class AdaLNBlock(nn.Module):
    """Adaptive layer norm (adaLN): scale gamma and shift beta of both norms are regressed from t + y."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 4 * hidden_size))

    @staticmethod
    def condition(x, t, y):                                                       # (N, T, D), (N, D), (N, D)
        return x, t + y                                                           # (N, T, D), (N, D)

    def forward(self, x, c):                                                      # (N, T, D), (N, D)
        beta1, gamma1, beta2, gamma2 = self.adaLN_modulation(c).chunk(4, dim=1)   # (N, D) each
        x = x + self.attn(modulate(self.norm1(x), beta1, gamma1))                 # (N, T, D)
        return x + self.mlp(modulate(self.norm2(x), beta2, gamma2))               # (N, T, D)


class AdaLNZeroBlock(nn.Module):
    """adaLN-Zero: adaLN, and a gate alpha on each residual branch. All six start at 0: the block is the identity."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    @staticmethod
    def condition(x, t, y):                                                       # (N, T, D), (N, D), (N, D)
        return x, t + y                                                           # (N, T, D), (N, D)

    def forward(self, x, c):                                                      # (N, T, D), (N, D)
        beta1, gamma1, alpha1, beta2, gamma2, alpha2 = self.adaLN_modulation(c).chunk(6, dim=1)   # (N, D) each
        x = x + alpha1[:, None] * self.attn(modulate(self.norm1(x), beta1, gamma1))               # (N, T, D)
        return x + alpha2[:, None] * self.mlp(modulate(self.norm2(x), beta2, gamma2))             # (N, T, D)


# Sec. 3.2  Transformer decoder: "the final layer norm (adaptive if using adaLN)" and a linear layer -------------------

class PlainFinalLayer(nn.Module):
    """Decoder of the in-context and cross-attention designs."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)

    def forward(self, x, c):                                                      # (N, T, D), unused
        return self.linear(self.norm_final(x))                                    # (N, T, p*p*2C)


class FinalLayer(nn.Module):
    """Decoder of the adaLN designs."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):                                                      # (N, T, D), (N, D)
        beta, gamma = self.adaLN_modulation(c).chunk(2, dim=1)                    # (N, D) each
        return self.linear(modulate(self.norm_final(x), beta, gamma))             # (N, T, p*p*2C)


# Sec. 3.2  The whole model (Figure 3, left) ---------------------------------------------------------------------------

DESIGNS = {
    "in-context": (InContextBlock, PlainFinalLayer),
    "cross-attention": (CrossAttentionBlock, PlainFinalLayer),
    "adaln": (AdaLNBlock, FinalLayer),
    "adaln-zero": (AdaLNZeroBlock, FinalLayer),
}


class DiT(nn.Module):
    """Diffusion transformer: (x_t, t, y) -> (eps, v).

    input_size: side I of the square image or latent; block: one of DESIGNS; learn_sigma: predict v beside eps.
    ValueError if sizes do not divide or the block is unknown.
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, num_classes=1000, learn_sigma=True, block="adaln-zero"):
        super().__init__()
        if block not in DESIGNS:
            raise ValueError(f"unknown block {block!r}: choose from {', '.join(DESIGNS)}")
        if input_size % patch_size:
            raise ValueError(f"the input size {input_size} is not divisible by the patch size {patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"the hidden size {hidden_size} is not divisible by {num_heads} heads and by 4")
        self.block, self.num_classes = block, num_classes
        self.in_channels, self.out_channels = in_channels, 2 * in_channels if learn_sigma else in_channels
        self.input_size, self.patch_size, self.grid_size = input_size, patch_size, input_size // patch_size

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.register_buffer("pos_embed", get_2d_sincos_pos_embed(hidden_size, self.grid_size)[None])   # (1, T, D)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        Block, Decoder = DESIGNS[block]
        self.blocks = nn.ModuleList([Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.condition = Block.condition                                          # how t and y enter this design
        self.final_layer = Decoder(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self):
        """"We initialize the final linear layer with zeros and otherwise use standard weight initialization
        techniques from ViT" (Sec. 4), and the official code's 0.02 for the embedders. In this order, later lines win:

            every linear layer, the patch embedding (as a linear layer)     Xavier uniform, bias 0
            label table, both layers of the timestep MLP                    normal, standard deviation 0.02
            adaLN-Zero: all modulations, the decoder's too                  0 (plain adaLN: Xavier like the rest)
            the last linear layer                                           0: the first prediction is eps = 0, v = 0
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                nn.init.zeros_(module.bias)
        for module in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(module.weight, std=0.02)
        if self.block == "adaln-zero":
            for module in [*self.blocks, self.final_layer]:
                nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def unpatchify(self, x):                                                      # (N, T, p*p*2C)
        """The tokens, each p x p pixels of 2C channels, laid out as an image."""
        g, p, C = self.grid_size, self.patch_size, self.out_channels
        x = x.view(-1, g, g, p, p, C)                                             # (N, rows, columns, p, p, 2C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, C, g * p, g * p)           # (N, 2C, H, W)

    def forward(self, x, t, y, drop=None):                                        # (N, C, H, W), (N,), (N,), (N,) bool
        """(N, 2C, H, W): eps, then v (only eps without learn_sigma). `drop` marks labels to replace by the null label.
        Another condition, such as text, would replace y by its embedding (N, D). ValueError for another shape of x."""
        if x.shape[1:] != (self.in_channels, self.input_size, self.input_size):
            raise ValueError(f"the model takes (N, {self.in_channels}, {self.input_size}, {self.input_size}), not "
                             f"{tuple(x.shape)}")
        x = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed          # (N, T, D), in the weights' dtype
        t = self.t_embedder(t)                                                    # (N, D)
        y = self.y_embedder(y, drop)                                              # (N, D)
        x, c = self.condition(x, t, y)                                            # Figure 3
        for block in self.blocks:
            x = block(x, c)                                                       # (N, T, D), in-context (N, T+2, D)
        x = x[:, :self.pos_embed.shape[1]]                                        # (N, T, D): in-context's two removed
        x = self.final_layer(x, c)                                                # (N, T, p*p*2C)
        return self.unpatchify(x)                                                 # (N, 2C, H, W)

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_channels=None):
        """Classifier-free guidance (Sec. 3.1): eps = eps(null) + s (eps(y) - eps(null)), shapes as for forward.

        s = cfg_scale: 1 is no guidance and costs one pass, 0 is unconditional. All channels of eps are guided, or the
        first cfg_channels: 3 reproduces the paper's numbers (Appendix A). Everything else, including v, comes from the
        conditional pass. ValueError if cfg_channels is not in 1..C.
        """
        k = self.in_channels if cfg_channels is None else cfg_channels
        if not 1 <= k <= self.in_channels:
            raise ValueError(f"cannot guide {k} channels: choose 1 to {self.in_channels}")
        if cfg_scale == 1:
            return self(x, t, y)
        null = torch.full_like(y, self.num_classes)
        out = self(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))    # (2N, 2C, H, W)
        cond, uncond = out.chunk(2)                                               # (N, 2C, H, W) each
        eps = uncond[:, :k] + cfg_scale * (cond[:, :k] - uncond[:, :k])
        return torch.cat([eps, cond[:, k:]], dim=1)                               # (N, 2C, H, W)


# Table 1  Model sizes: layers, width and heads; each at patch size 2, 4 and 8 -----------------------------------------

DiT_models = {
    f"DiT-{size}/{patch_size}": partial(DiT, depth=depth, hidden_size=width, num_heads=heads, patch_size=patch_size)
    for size, depth, width, heads in [("S", 12, 384, 6), ("B", 12, 768, 12), ("L", 24, 1024, 16), ("XL", 28, 1152, 16)]
    for patch_size in (8, 4, 2)
}
