"""Right alternatives, which the tests have to accept (see mutants.py): in this unit, this text may become that one."""
WHEATS = [
    ("normal_kl", "torch.exp(logvar1 - logvar2)", "logvar1.exp() / logvar2.exp()"),
    ("tables", "np.cumprod(1.0 - betas)", "np.exp(np.cumsum(np.log1p(-betas)))"),
    ("q_sample", "(self.sqrt_one_minus_alphas_cumprod, t)", "(1 - self.alphas_cumprod, t).sqrt()"),
    ("p_mean_variance", "self.sqrt_recip_alphas_cumprod, t) *", "self.alphas_cumprod, t) ** -0.5 *"),
    ("p_mean_variance", "frac * self._gather(self.log_betas, t)",
     "torch.lerp(torch.zeros_like(self._gather(self.betas, t)), self._gather(self.log_betas, t), frac)"),
    ("vb", "torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1))",
     "torch.zeros(len(t)).masked_scatter(t == 0, nll[t == 0].flatten(1).mean(1)).masked_scatter(t > 0, "
     "kl[t > 0].flatten(1).mean(1))"),
    ("training_losses", "((noise - eps) ** 2).flatten(1)", 'F.mse_loss(eps, noise, reduction="none").flatten(1)'),
    ("p_sample_loop", 'torch.exp(0.5 * out["log_variance"])', 'out["variance"].sqrt()'),
    ("p_sample_loop", "randn(x_t) * (t > 0)[:, None, None, None]", "randn(x_t) if i > 0 else 0"),
    ("ddim", "+ sigma2.sqrt() * randn(x_t)", "+ eta * self._gather(self.posterior_variance, t).sqrt() * randn(x_t)"),
    ("pos_embed", "np.divmod(np.arange(grid_size ** 2), grid_size)", "np.indices([grid_size] * 2).reshape(2, -1)"),
    ("timestep_embedding", "torch.exp(-math.log(max_period) *", "torch.pow(max_period, -1.0 *"),
    ("label_embedder", "torch.where(drop, self.num_classes, y)", "y.masked_fill(drop, self.num_classes)"),
    ("attention", "F.scaled_dot_product_attention(q, k, v)", "(q @ k.mT / k.shape[-1] ** 0.5).softmax(-1) @ v"),
    ("attention", "F.scaled_dot_product_attention(q, k, v)",        # as ADM writes it
     "(q @ k.mT / k.shape[-1] ** 0.5).float().softmax(-1).type(v.dtype) @ v"),
    ("mlp_modulate", "x * (1 + scale[:, None]) + shift[:, None]", "x + scale.unsqueeze(1) * x + shift.unsqueeze(1)"),
    ("cross_attention_block", "[t, y]", "[y, t]"),                  # attention ignores the order of what it attends to
    ("in_context", "t[:, None], y[:, None]", "y[:, None], t[:, None]"),           # so does self-attention
    ("adaln_zero", "self.norm2(x)", "self.norm1(x)"),               # neither norm has parameters
    ("initialize", "module.weight.view(len(module.weight), -1)", "module.weight.data.flatten(1)"),
    ("unpatchify", "x.permute(0, 5, 1, 3, 2, 4)", 'torch.einsum("nhwpqc->nchpwq", x)'),
    ("forward", "self.pos_embed.shape[1]", "self.grid_size ** 2"),
    ("guidance", "self(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))",
     "torch.cat([self(x, t, y), self.forward(x, t, null)])"),
]
