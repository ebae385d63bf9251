"""Right alternatives: other ways to write a unit, which its tests have to accept. See mutants.py.

ONE_LINE: in this unit, this text may become that one. Then whole functions; their bodies are put into dit.py.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ONE_LINE = [
    ("normal_kl", "torch.exp(logvar1 - logvar2)", "logvar1.exp() / logvar2.exp()"),
    ("likelihood", ".clamp(min=1e-12)", ".clamp(min=1e-10)"),
    ("space_timesteps", "np.cumsum([0.0] + [stride] * (num_steps - 1)).round().astype(int).tolist()",
     "[round(k * stride) for k in range(num_steps)]"),
    ("space_timesteps", "np.cumsum([0.0] + [stride] * (num_steps - 1))", "np.linspace(0, num_timesteps - 1, num_steps)"),
    ("tables", "np.cumprod(1.0 - betas)", "np.exp(np.cumsum(np.log1p(-betas)))"),
    ("q_sample", "self._gather(self.sqrt_alphas_cumprod, t)", "self.sqrt_alphas_cumprod[t].view(-1, 1, 1, 1)"),
    ("q_posterior", ".posterior_variance, t).expand_as(x_t)", ".posterior_variance, t) + torch.zeros_like(x_t)"),
    ("training_losses", "((noise - eps) ** 2).flatten(1).mean(1)", 'F.mse_loss(eps, noise, reduction="none").mean((1, 2, 3))'),
    ("vb", "torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1))",
     "torch.where((t == 0).view(-1, 1, 1, 1), nll, kl).mean((1, 2, 3))"),
    ("p_sample_loop", 'torch.exp(0.5 * out["log_variance"])', 'out["variance"].sqrt()'),
    ("patch_embed", "x.flatten(2).transpose(1, 2)", "x.permute(0, 2, 3, 1).flatten(1, 2)"),
    ("timestep_embedding", "torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)",
     "max_period ** -(torch.arange(half, device=t.device) / half)"),
    ("label_embedder", "torch.where(drop, self.num_classes, y)", "y.masked_fill(drop, self.num_classes)"),
    ("mlp_modulate", "x * (1 + scale[:, None]) + shift[:, None]", "x + scale.unsqueeze(1) * x + shift.unsqueeze(1)"),
    ("cross_attention_block", "[t, y]", "[y, t]"),                  # attention does not see the order of what it attends to
    ("adaln_zero", "self.norm2(x)", "self.norm1(x)"),               # neither norm has parameters
    ("forward", "self.pos_embed.shape[1]", "self.grid_size ** 2"),
    ("guidance", "uncond[:, :k] + cfg_scale * (cond[:, :k] - uncond[:, :k])", "torch.lerp(uncond, cond, cfg_scale)[:, :k]"),
    ("guidance", "uncond[:, :k] + cfg_scale * (cond[:, :k] - uncond[:, :k])",
     "(1 - cfg_scale) * uncond[:, :k] + cfg_scale * cond[:, :k]"),
]
FUNCTIONS = {}                                                      # name: (unit, the function in dit.py)


def wheat(unit, dotted):
    return lambda function: FUNCTIONS.setdefault(function.__name__, (unit, dotted))


@wheat("likelihood", "discretized_gaussian_log_likelihood")
def by_torch_distributions(x, mean, log_std):
    p = torch.distributions.Normal(mean, log_std.exp())
    mass = p.cdf(x + 1 / 255) - p.cdf(x - 1 / 255)
    mass = torch.where(x < -0.999, p.cdf(x + 1 / 255), torch.where(x > 0.999, 1 - p.cdf(x - 1 / 255), mass))
    return mass.clamp(min=1e-12).log()


@wheat("p_mean_variance", "GaussianDiffusion.p_mean_variance")
def by_its_definition(self, model_output, x_t, t, clip_denoised=False):
    eps, v = model_output.split([x_t.shape[1], model_output.shape[1] - x_t.shape[1]], dim=1)
    low, high = self._gather(self.posterior_log_variance_clipped, t), self._gather(self.log_betas, t)
    log_variance = low + (high - low) * (v + 1) / 2 if v.numel() else self._gather(self.log_fixed_variance, t)
    log_variance = log_variance.expand_as(x_t)
    noise = self._gather(self.sqrt_one_minus_alphas_cumprod, t) * eps
    x_0 = (x_t - noise) / self._gather(self.sqrt_alphas_cumprod, t)
    x_0 = x_0.clip(-1, 1) if clip_denoised else x_0
    mean = self.q_posterior_mean_variance(x_0, x_t, t)[0]
    return dict(mean=mean, variance=log_variance.exp(), log_variance=log_variance, pred_xstart=x_0)


@wheat("p_sample_loop", "GaussianDiffusion.p_sample_loop")
def draws_no_last_noise(self, model, noise, clip_denoised=False, randn=torch.randn_like, progress=None, on_step=None,
                        **model_kwargs):
    x, steps = noise, list(range(self.num_timesteps - 1, -1, -1))
    for i in progress(steps) if progress else steps:
        t = torch.full((x.shape[0],), i, device=x.device)
        out = self.p_mean_variance(self._call(model, x, t, model_kwargs), x, t, clip_denoised)
        if on_step:
            on_step(i, x, out["pred_xstart"])
        x = out["mean"]
        if i > 0:
            x = x + out["variance"].sqrt() * randn(x)
    return x


@wheat("patch_embed", "PatchEmbed.forward")
def by_unfold(self, x):
    p = self.proj.kernel_size[0]
    return F.linear(F.unfold(x, p, stride=p).transpose(1, 2), self.proj.weight.flatten(1), self.proj.bias)


@wheat("pos_embed", "get_2d_sincos_pos_embed")
def by_meshgrid(dim, grid_size):
    omega = 10000.0 ** (torch.arange(dim // 4, dtype=torch.float64) * -4 / dim)
    places = torch.arange(grid_size, dtype=torch.float64)
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (columns, rows)]
    return torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1).float()


@wheat("attention", "Attention.forward")
def by_softmax(self, x):
    N, T, D = x.shape
    q, k, v = (part.view(N, T, self.num_heads, -1) for part in self.qkv(x).chunk(3, dim=-1))
    scores = torch.einsum("nihd,njhd->nhij", q, k) / math.sqrt(D // self.num_heads)
    return self.proj(torch.einsum("nhij,njhd->nihd", scores.softmax(-1), v).flatten(2))


@wheat("mlp_modulate", "Mlp.forward")
def by_the_formula_of_gelu(self, x):
    h = self.fc1(x)
    return self.fc2(h / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h.pow(3)))))


@wheat("initialize", "DiT.initialize_weights")
def by_apply(self):
    def xavier(module):
        if isinstance(module, nn.Linear | nn.Conv2d):
            fans = module.weight.shape[0] + module.weight[0].numel()
            nn.init.uniform_(module.weight, -(6 / fans) ** 0.5, (6 / fans) ** 0.5)
            nn.init.constant_(module.bias, 0)

    self.apply(xavier)
    for name, p in self.named_parameters():
        if name.startswith(("t_embedder", "y_embedder")) and p.dim() == 2:
            nn.init.normal_(p, std=0.02)
        if "final_layer.linear" in name or "adaLN_modulation" in name and self.block == "adaln-zero":
            nn.init.zeros_(p)


@wheat("unpatchify", "DiT.unpatchify")
def by_einsum(self, x):
    g, p, C = self.grid_size, self.patch_size, self.out_channels
    return torch.einsum("nhwpqc->nchpwq", x.reshape(-1, g, g, p, p, C)).reshape(-1, C, g * p, g * p)


@wheat("unpatchify", "DiT.unpatchify")
def by_fold(self, x):
    N, T, _ = x.shape
    x = x.view(N, T, -1, self.out_channels).transpose(2, 3).reshape(N, T, -1).transpose(1, 2)
    return F.fold(x, self.input_size, self.patch_size, stride=self.patch_size)


@wheat("guidance", "DiT.forward_with_cfg")
def by_two_passes(self, x, t, y, cfg_scale, cfg_channels=None):
    out = self.forward(x, t, y)
    if cfg_scale == 1:
        return out
    k = cfg_channels or self.in_channels
    null = self.forward(x, t, np.int64(self.num_classes) + 0 * y)
    out[:, :k] = null[:, :k] + cfg_scale * (out[:, :k] - null[:, :k])
    return out
