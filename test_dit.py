"""Claims about dit.py, sample.py and train.py, in their order, each proved against an oracle without their code.

    pytest                  every claim about a unit: under 90 s on two CPU cores, no network
    pytest -m slow          those that train: the built-in preset from its command to a classifier's verdict

An oracle is a scalar loop in float64, torch.distributions, an analytic model, the paper's table, or diffusers. float32
tables and float64 arithmetic agree to about 1e-6 relative; float32 networks to 1e-5.
"""
import ast
import csv
import importlib.util
import inspect
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.distributions import Normal, kl_divergence
from torch.utils.flop_counter import FlopCounterMode

import dit
import sample
import train
from dit import DiT, DiT_models, GaussianDiffusion, space_timesteps

HERE = Path(__file__).parent
DESIGNS = ["in-context", "cross-attention", "adaln", "adaln-zero"]
LN2 = math.log(2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny_dit(block="adaln-zero", randomize=True, **kwargs):
    """A DiT of two blocks on 8 x 8 x 3 images and 5 classes; randomize leaves no weight at zero."""
    torch.manual_seed(1)
    sizes = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=4, num_classes=5)
    model = DiT(**(sizes | kwargs), block=block)
    if randomize:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(n=3, channels=3, side=8):
    return torch.randn(n, channels, side, side), torch.tensor([0, 500, 999])[:n], torch.tensor([0, 4, 2])[:n]


def full(value, *shape):
    return torch.full(shape, value, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------------------
# Sec. 3.1  Diffusion

BETAS = [1e-4 + (2e-2 - 1e-4) * i / 999 for i in range(1000)]                     # the paper: linear, 1e-4 to 2e-2
ALPHA_BAR = [math.prod(1 - b for b in BETAS[:t + 1]) for t in range(1000)]        # float64, by definition


def test_schedule_is_linear_from_1e4_to_2e2():
    diffusion = GaussianDiffusion()
    torch.testing.assert_close(diffusion.betas.double(), torch.tensor(BETAS, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(diffusion.alphas_cumprod.double(), torch.tensor(ALPHA_BAR, dtype=torch.float64),
                               rtol=1e-6, atol=0)


def test_q_sample_is_the_noising_of_one_step_repeated():
    """After t + 1 steps x = sqrt(1 - beta) x + sqrt(beta) e, factor of x_0 and variance are q_sample's, at every t."""
    diffusion, t = GaussianDiffusion(), torch.arange(1000)
    factor, variance, factors, variances = 1.0, 0.0, [], []
    for beta in BETAS:
        factor, variance = math.sqrt(1 - beta) * factor, (1 - beta) * variance + beta
        factors.append(factor)
        variances.append(variance)
    zero, one = full(0.0, 1000, 1, 1, 1), full(1.0, 1000, 1, 1, 1)
    torch.testing.assert_close(diffusion.q_sample(one, t, zero).flatten().tolist(), factors, rtol=1e-6, atol=0)
    torch.testing.assert_close((diffusion.q_sample(zero, t, one) ** 2).flatten().tolist(), variances, rtol=1e-6, atol=0)


def test_posterior_is_bayes_rule():
    """q(x_(t-1) | x_t, x_0) is proportional to q(x_t | x_(t-1)) q(x_(t-1) | x_0): the product of two Gaussians."""
    x_0, x_t, t = 0.7, -1.3, torch.arange(1, 1000)
    mean, variance, log_variance = GaussianDiffusion().q_posterior_mean_variance(
        full(x_0, 999, 1, 1, 1), full(x_t, 999, 1, 1, 1), t)
    for k in range(1, 1000):
        likelihood = (1 - BETAS[k]) / BETAS[k]                                    # precision, of mean x_t / sqrt(alpha)
        prior = 1 / (1 - ALPHA_BAR[k - 1])                                        # precision, of mean sqrt(a_bar) x_0
        v = 1 / (likelihood + prior)
        m = v * (likelihood * x_t / math.sqrt(1 - BETAS[k]) + prior * math.sqrt(ALPHA_BAR[k - 1]) * x_0)
        assert mean[k - 1].item() == pytest.approx(m, rel=2e-6)
        assert variance[k - 1].item() == pytest.approx(v, rel=2e-6)
        assert log_variance[k - 1].item() == pytest.approx(math.log(v), rel=2e-6)


def test_posterior_at_t0_is_x0_with_the_log_variance_of_t1():
    diffusion, x, zero = GaussianDiffusion(), torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.long)
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x, torch.randn_like(x), zero)
    assert torch.allclose(mean, x) and (variance == 0).all()
    assert torch.equal(log_variance, diffusion.q_posterior_mean_variance(x, x, zero + 1)[2])


def test_learned_variance_spans_the_posterior_variance_to_beta():
    """v = -1 is the posterior's variance, v = 1 is beta, v = 0 their geometric mean; all finite at t = 0."""
    diffusion, t = GaussianDiffusion(), torch.arange(1000)
    x = torch.zeros(1000, 1, 1, 1)
    low, middle, high = (diffusion.p_mean_variance(torch.cat([x, x + v], 1), x, t)["variance"].flatten().tolist()
                         for v in (-1.0, 0.0, 1.0))
    smallest = [BETAS[k] * (1 - ALPHA_BAR[k - 1]) / (1 - ALPHA_BAR[k]) for k in range(1, 1000)]
    smallest = smallest[:1] + smallest                                            # t = 0 takes the value of t = 1
    assert low == pytest.approx(smallest, rel=1e-5) and high == pytest.approx(BETAS, rel=1e-5)
    assert middle == pytest.approx([math.sqrt(a * b) for a, b in zip(smallest, BETAS, strict=True)], rel=1e-5)


def test_without_learned_variance_it_is_beta():
    x = torch.zeros(1000, 1, 1, 1)
    out = GaussianDiffusion().p_mean_variance(x, x, torch.arange(1000))
    assert out["variance"].flatten().tolist() == pytest.approx(BETAS, rel=1e-5)
    assert out["log_variance"].flatten().tolist() == pytest.approx([math.log(b) for b in BETAS], rel=1e-6)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_true_noise_predicts_the_true_x0_and_mean(t):
    diffusion, t = GaussianDiffusion(), torch.full((4,), t)
    x_0, noise = torch.rand(4, 3, 8, 8, dtype=torch.float64) * 2 - 1, torch.randn(4, 3, 8, 8, dtype=torch.float64)
    x_t = diffusion.q_sample(x_0, t, noise)
    out = diffusion.p_mean_variance(torch.cat([noise, noise], 1), x_t, t)
    torch.testing.assert_close(out["pred_xstart"], x_0, rtol=0, atol=1e-4)        # at t = 999 errors grow by 157
    torch.testing.assert_close(out["mean"], diffusion.q_posterior_mean_variance(x_0, x_t, t)[0], rtol=0, atol=1e-5)


def test_clip_denoised_holds_x0_and_the_mean_made_of_it():
    diffusion, t = GaussianDiffusion(), torch.tensor([300, 300])
    x_t, output = torch.randn(2, 3, 8, 8), torch.randn(2, 6, 8, 8)
    free, clipped = (diffusion.p_mean_variance(output, x_t, t, clip_denoised=c) for c in (False, True))
    assert free["pred_xstart"].abs().max() > 1.5
    assert torch.equal(clipped["pred_xstart"], free["pred_xstart"].clamp(-1, 1))
    assert torch.equal(clipped["mean"], diffusion.q_posterior_mean_variance(clipped["pred_xstart"], x_t, t)[0])


def test_normal_kl_is_torch_distributions():
    mean1, logvar1, mean2, logvar2 = torch.randn(4, 50, dtype=torch.float64)
    expected = kl_divergence(Normal(mean1, (logvar1 / 2).exp()), Normal(mean2, (logvar2 / 2).exp()))
    torch.testing.assert_close(dit.normal_kl(mean1, logvar1, mean2, logvar2), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mean,std", [(0.0, 0.01), (0.3, 0.1), (-1.2, 0.5), (0.99, 0.004)])
def test_discretized_likelihood_sums_to_one_and_is_the_mass_of_each_bin(mean, std):
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    p = dit.discretized_gaussian_log_likelihood(levels, full(mean, 256), full(math.log(std), 256)).exp()
    edges = Normal(full(mean, 1), full(std, 1)).cdf(torch.arange(255, dtype=torch.float64) / 127.5 - 1 + 1 / 255)
    expected = torch.cat([edges, edges.new_ones(1)]) - torch.cat([edges.new_zeros(1), edges])
    assert p.sum().item() == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-11)                # an empty bin is given 1e-12


def test_gradients_of_vb_reach_the_variance_alone_and_those_of_mse_the_mean_alone():
    output = torch.randn(4, 6, 8, 8, requires_grad=True)
    for t in (0, 700):
        losses = GaussianDiffusion().training_losses(lambda x, t: output, torch.rand(4, 3, 8, 8), torch.full((4,), t))
        grad_vb, = torch.autograd.grad(losses["vb"].sum(), output, retain_graph=True)
        grad_mse, = torch.autograd.grad(losses["mse"].sum(), output)
        assert (grad_vb[:, :3] == 0).all() and (grad_vb[:, 3:] != 0).any()
        assert (grad_mse[:, 3:] == 0).all() and (grad_mse[:, :3] != 0).any()


def loss_by_hand(t, x_0, noise, eps, v, clip=False):
    """(mse, vb) of one image, from the definitions alone: Bayes' posterior, torch's KL and CDF, bits per dimension."""
    a, a_prev, b = ALPHA_BAR[t], ALPHA_BAR[t - 1] if t else 1.0, BETAS[t]
    x_t = math.sqrt(a) * x_0 + math.sqrt(1 - a) * noise
    smallest = BETAS[max(t, 1)] * (1 - ALPHA_BAR[max(t, 1) - 1]) / (1 - ALPHA_BAR[max(t, 1)])
    log_variance = (v + 1) / 2 * math.log(b) + (1 - v) / 2 * math.log(smallest)
    guess = (x_t - math.sqrt(1 - a) * eps) / math.sqrt(a)
    guess = guess.clamp(-1, 1) if clip else guess

    def mean(x):
        return (b * math.sqrt(a_prev) * x + (1 - a_prev) * math.sqrt(1 - b) * x_t) / (1 - a)
    p = Normal(mean(guess), (log_variance / 2).exp())
    if t:
        vb = kl_divergence(Normal(mean(x_0), math.sqrt(smallest)), p)
    else:
        upper = torch.where(x_0 > 0.999, 1.0, p.cdf(x_0 + 1 / 255))
        vb = -torch.log(upper - torch.where(x_0 < -0.999, 0.0, p.cdf(x_0 - 1 / 255)))
    return ((noise - eps) ** 2).mean().item(), vb.mean().item() / LN2


def test_training_loss_is_mse_plus_vb_of_the_drawn_timestep():
    """loss = L_simple + the variational term in bits/dim with weight 1, each checked against its definition."""
    t = torch.tensor([0, 0, 1, 400, 999])
    x_0 = (torch.randint(0, 256, (5, 3, 8, 8)) / 127.5 - 1).double()
    x_0[0, :, :4] = 1.0                                                           # the open outermost bins
    x_0[1, :, :4] = -1.0
    noise = torch.randn_like(x_0)
    output = torch.cat([noise + 0.1 * torch.randn_like(x_0), torch.rand_like(x_0) * 2 - 1], 1)
    losses = GaussianDiffusion().training_losses(lambda x, t: output, x_0, t, noise)
    for k in range(5):
        mse, vb = loss_by_hand(t[k].item(), x_0[k], noise[k], *output[k].chunk(2))
        assert losses["mse"][k].item() == pytest.approx(mse, rel=1e-6)
        assert losses["vb"][k].item() == pytest.approx(vb, rel=1e-4)
        assert losses["loss"][k].item() == pytest.approx(mse + vb, rel=1e-4)


def test_training_loss_without_learned_variance_is_mse():
    x, noise = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    losses = GaussianDiffusion().training_losses(lambda x, t: torch.zeros_like(x), x, torch.tensor([0, 9]), noise)
    assert torch.equal(losses["loss"], losses["mse"]) and (losses["vb"] == 0).all()
    torch.testing.assert_close(losses["mse"], (noise ** 2).mean(dim=(1, 2, 3)))


def test_bits_per_dim_is_the_sum_of_all_terms():
    """Column t is timestep t, from the definition; the prior is KL(q(x_T | x_0) || N(0, 1)); total is their sum."""
    x_0 = (torch.randint(0, 256, (2, 3, 4, 4)) / 127.5 - 1).double()
    noises, seen = [], []

    def randn(x):
        noises.append(torch.randn_like(x))
        return noises[-1]

    def model(x_t, t):
        seen.append(t[0].item())
        return torch.cat([0.9 * noises[-1], torch.full_like(x_t, 0.3)], 1)
    out = GaussianDiffusion().bits_per_dim(model, x_0, randn=randn)
    assert seen == list(range(999, -1, -1)) and out["vb"].shape == out["mse"].shape == (2, 1000)
    for t in (0, 1, 500, 999):
        noise = noises[999 - t]
        for k in range(2):
            mse, vb = loss_by_hand(t, x_0[k], noise[k], 0.9 * noise[k], full(0.3, 3, 4, 4), clip=True)
            assert out["vb"][k, t].item() == pytest.approx(vb, rel=1e-4)
            assert out["mse"][k, t].item() == pytest.approx(mse, rel=1e-6)
    prior = kl_divergence(Normal(math.sqrt(ALPHA_BAR[999]) * x_0, math.sqrt(1 - ALPHA_BAR[999])), Normal(0.0, 1.0))
    torch.testing.assert_close(out["prior"], prior.mean(dim=(1, 2, 3)) / LN2, rtol=1e-2, atol=1e-8)   # 1e-5 in float32
    torch.testing.assert_close(out["total"], out["prior"] + out["vb"].sum(1))


def test_space_timesteps_is_adms():
    """ADM's rule by its definition, for every length; the paper's 250 steps; the first and last always there."""
    for n in range(2, 1001):
        expected, position = [], 0.0
        for _ in range(n):
            expected.append(round(position))
            position += 999 / (n - 1)
        assert space_timesteps(1000, n) == expected and expected[0] == 0 and expected[-1] == 999
    steps = space_timesteps(1000, 250)
    assert steps[:5] == [0, 4, 8, 12, 16] and steps[-3:] == [991, 995, 999] and len(set(steps)) == 250
    assert space_timesteps(1000, 1) == [999]
    for n in (0, 1001):
        with pytest.raises(ValueError, match="1 to 1000"):
            space_timesteps(1000, n)


def test_respacing_keeps_alphas_cumprod_and_recomputes_betas():
    diffusion = GaussianDiffusion().respaced(50)
    kept = space_timesteps(1000, 50)
    assert diffusion.timestep_map.tolist() == kept and diffusion.num_timesteps == 50
    assert diffusion.alphas_cumprod.tolist() == pytest.approx([ALPHA_BAR[t] for t in kept], rel=1e-6)
    previous = [1.0] + [ALPHA_BAR[t] for t in kept[:-1]]
    assert diffusion.betas.tolist() == pytest.approx(
        [1 - ALPHA_BAR[t] / a for t, a in zip(kept, previous, strict=True)], rel=1e-5)
    assert diffusion.respaced(5).timestep_map.tolist() == [kept[i] for i in space_timesteps(50, 5)]
    assert torch.isfinite(GaussianDiffusion().respaced(1).posterior_log_variance_clipped).all()


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_samplers_tell_the_model_the_original_timesteps_in_descending_order(loop):
    seen, steps, wrapped, draws = [], [], [], []

    def model(x, t, y):
        assert t.shape == (2,) and t.dtype == torch.long and (t == t[0]).all() and y == "label"
        seen.append(t[0].item())
        return torch.zeros(2, 6, 4, 4)

    def randn(x):
        draws.append(x.shape)
        return torch.randn_like(x)

    def progress(iterable):
        for i in iterable:
            wrapped.append(i)
            yield i
    start = torch.randn(2, 3, 4, 4)
    getattr(GaussianDiffusion().respaced(10), loop)(
        model, start, randn=randn, progress=progress, y="label", on_step=lambda *state: steps.append(state))
    assert seen == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0] == space_timesteps(1000, 10)[::-1]
    assert [i for i, _, _ in steps] == wrapped == list(range(9, -1, -1)) and draws == [(2, 3, 4, 4)] * 10
    assert torch.equal(steps[0][1], start)                                        # x_t is the state before the step
    torch.testing.assert_close(steps[0][2], start / math.sqrt(ALPHA_BAR[999]))    # and the x_0 guessed from it, eps = 0


@pytest.mark.parametrize("loop,eta", [("p_sample_loop", None), ("ddim_sample_loop", 1.0)])
def test_noise_is_added_at_every_step_but_the_last(loop, eta):
    def sampled(noisy_call):
        calls = []

        def randn(x):
            calls.append(0)
            return torch.ones_like(x) if len(calls) - 1 == noisy_call else torch.zeros_like(x)
        options = {} if eta is None else {"eta": eta}
        return getattr(GaussianDiffusion().respaced(4), loop)(
            lambda x, t: torch.cat([x, x], 1) * 0.5, torch.ones(1, 3, 2, 2), randn=randn, **options)
    quiet = sampled(None)
    assert [torch.equal(sampled(call), quiet) for call in range(4)] == [False, False, False, True]


class GaussianData:
    """The exact denoiser of data N(m, s^2): E[eps | x_t], and the v for which the reverse step's variance is exact."""
    m, s = 0.6, 0.3

    def __init__(self, kept):
        bars = [ALPHA_BAR[t] for t in kept]
        self.steps = dict(zip(kept, zip(bars, [1.0] + bars[:-1], strict=True), strict=True))

    def __call__(self, x, t):
        a, a_prev = self.steps[t[0].item()]
        variance = a * self.s ** 2 + 1 - a                                        # of x_t
        eps = math.sqrt(1 - a) * (x - math.sqrt(a) * self.m) / variance
        beta = 1 - a / a_prev
        if a_prev == 1.0:
            return torch.cat([eps, torch.zeros_like(x)], 1)
        smallest = beta * (1 - a_prev) / (1 - a)
        exact = 1 / ((1 - beta) / beta + 1 / (a_prev * self.s ** 2 + 1 - a_prev))    # of x_(t-1) given x_t: Bayes
        v = 2 * math.log(exact / smallest) / math.log(beta / smallest) - 1
        assert -1 <= v <= 1                                                       # the interpolation can express it
        return torch.cat([eps, torch.full_like(x, v)], 1)


@pytest.mark.parametrize("loop,steps", [("p_sample_loop", 1000), ("p_sample_loop", 50), ("ddim_sample_loop", 1000)])
def test_exact_denoiser_gives_the_data_back(loop, steps):
    """Samples have the data's mean and variance, to 1e-4: with this denoiser the loop is affine in x_T and in each
    step's noise, so one run with a unit impulse in each of them, row by row, gives the moments without sampling."""
    model, calls = GaussianData(space_timesteps(1000, steps)), []

    def impulse(x):                                                               # row 2 + k has noise in call k alone
        calls.append(0)
        return (torch.arange(len(x)) == 1 + len(calls)).to(x)[:, None, None, None]
    start = torch.zeros(steps + 2, 1, 1, 1, dtype=torch.float64)
    start[1] = 1.0                                                                # row 1: a unit of x_T, row 0: nothing
    x = getattr(GaussianDiffusion().respaced(steps), loop)(model, start, randn=impulse).flatten()
    variance = ((x[1:] - x[0]) ** 2).sum().item()
    if loop == "p_sample_loop":                                                   # the last step adds no noise, so that
        variance += 1 / (1 / model.s ** 2 + ALPHA_BAR[0] / (1 - ALPHA_BAR[0]))    # Var[x_0 | x_1] is missing: exact
    tolerance = 1e-4 if loop == "p_sample_loop" else 1e-2                         # DDIM: an ODE in 1000 Euler steps
    assert x[0].item() == pytest.approx(model.m, rel=3e-3)                        # x_T keeps 0.6 % of m
    assert variance == pytest.approx(model.s ** 2, rel=tolerance)


def test_ddpm_step_is_diffusers():
    """Each of 20 steps against diffusers' DDPMScheduler, same noise: learned range, even ("linspace") spacing."""
    from diffusers import DDPMScheduler
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=2e-2, variance_type="learned_range", clip_sample=False,
                              timestep_spacing="linspace")
    scheduler.set_timesteps(20)
    diffusion, states = GaussianDiffusion().respaced(20), []
    assert scheduler.timesteps.tolist() == diffusion.timestep_map.tolist()[::-1]

    def model(x, t):
        return torch.cat([torch.tanh(x * (1 + t[0] / 1000)), torch.sin(x)], 1)
    last = diffusion.p_sample_loop(model, torch.randn(2, 3, 4, 4), on_step=lambda i, x_t, pred: states.append(x_t),
                                   randn=lambda x: torch.randn(x.shape, generator=torch.Generator().manual_seed(5)))
    for t, x_t, x_prev in zip(scheduler.timesteps, states, states[1:] + [last], strict=True):
        step = scheduler.step(model(x_t, t[None]), t, x_t, generator=torch.Generator().manual_seed(5))
        torch.testing.assert_close(x_prev, step.prev_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clip,eta", [(False, 0.0), (True, 0.0), (False, 1.0), (True, 0.5)])
def test_ddim_step_is_diffusers(clip, eta):
    """Against DDIMScheduler at 1,000 steps, where its spacing and ours are the same; also the step to x_0."""
    from diffusers import DDIMScheduler
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=2e-2, clip_sample=clip, set_alpha_to_one=True)
    scheduler.set_timesteps(1000)
    states, noise = {}, torch.randn(2, 3, 4, 4)

    def model(x, t):
        return torch.cat([torch.tanh(x * (1 + t[0] / 1000)), x], 1)
    states[-1] = GaussianDiffusion().ddim_sample_loop(
        model, torch.randn(2, 3, 4, 4), eta=eta, clip_denoised=clip, randn=lambda x: noise,
        on_step=lambda i, x_t, pred: states.update({i: x_t}))
    for t in (999, 998, 500, 3, 1, 0):
        step = scheduler.step(model(states[t], torch.tensor([t]))[:, :3], t, states[t], eta=eta,
                              use_clipped_model_output=True, variance_noise=noise)
        torch.testing.assert_close(states[t - 1], step.prev_sample, rtol=1e-4, atol=1e-4)


def test_to_moves_a_copy():
    diffusion = GaussianDiffusion()
    moved = diffusion.to("meta")
    assert moved.betas.is_meta and moved.timestep_map.is_meta and not diffusion.betas.is_meta
    assert diffusion.betas.dtype == torch.float32 and diffusion.respaced(10).betas.dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# Sec. 3.2  Tokens and conditions


def patches(x, p):
    """(C, H, W) -> a list of patches, row by row, each a list of (row, column, values of the C channels)."""
    C, H, W = x.shape
    return [[(i, j, x[:, r * p + i, c * p + j]) for i in range(p) for j in range(p)]
            for r in range(H // p) for c in range(W // p)]


def test_patch_embed_is_one_linear_map_of_each_patch():
    x, embed = torch.randn(2, 3, 6, 6), dit.PatchEmbed(2, 3, 8)
    tokens = embed(x)
    assert tokens.shape == (2, 9, 8)
    for n in range(2):
        for k, patch in enumerate(patches(x[n], 2)):
            expected = embed.proj.bias + sum(embed.proj.weight[:, :, i, j] @ values for i, j, values in patch)
            torch.testing.assert_close(tokens[n, k], expected)


def test_unpatchify_undoes_patchify():
    """Tokens made by a loop, in the order p, p, channel, of images without any symmetry."""
    model = tiny_dit(input_size=6, patch_size=3)
    x = torch.arange(2 * 6 * 6 * 6.0).view(2, 6, 6, 6)                            # 6 channels: eps and v
    tokens = torch.stack([torch.stack([torch.cat([values for _, _, values in patch]) for patch in patches(image, 3)])
                          for image in x])
    assert torch.equal(model.unpatchify(tokens), x)


def test_pos_embed_is_the_scalar_formula():
    """Of token (row, column): first half from the column, second from the row; sines, then cosines."""
    D, side = 24, 5
    table = dit.get_2d_sincos_pos_embed(D, side)
    assert table.shape == (25, 24) and table.dtype == torch.float32
    for row in range(side):
        for column in range(side):
            expected = [f(position / 10000 ** (i / (D // 4)))
                        for position in (column, row) for f in (math.sin, math.cos) for i in range(D // 4)]
            assert table[row * side + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_timestep_embedding_is_the_scalar_formula():
    """Cosines, then sines, also of fractional times. (float32 holds the angle 999 to 6e-5.)"""
    for t in (0, 1, 500.5, 999):
        expected = [f(t * 10000 ** (-i / 128)) for f in (math.cos, math.sin) for i in range(128)]
        assert dit.timestep_embedding(torch.tensor([t]), 256)[0].tolist() == pytest.approx(expected, abs=2e-4)
    distinct = dit.timestep_embedding(torch.tensor([0, 999]), 256)
    assert ((distinct[0] - distinct[1]).abs() > 1e-2).float().mean() > 0.9        # t is in 0..999, not in 0..1


@pytest.mark.parametrize("how", ["autocast", "bfloat16 model"])
def test_neighbouring_timesteps_differ_in_bfloat16(how):
    embedder = dit.TimestepEmbedder(64)
    t = torch.tensor([936, 937])
    if how == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, embedding = embedder(t), dit.timestep_embedding(t, 256)
    else:
        out, embedding = embedder.bfloat16()(t), dit.timestep_embedding(t, 256)
    assert embedding.dtype == torch.float32 and out.dtype == torch.bfloat16
    assert (out[0] != out[1]).float().mean() > 0.5


def test_dropped_labels_take_the_null_row_and_dropping_depends_on_nothing_else():
    model, (x, t, y) = tiny_dit(), inputs()
    embedder, drop = model.y_embedder, torch.tensor([True, False, True])
    assert embedder.embedding_table.weight.shape[0] == 6
    expected = [embedder.embedding_table.weight[row] for row in (5, 4, 5)]
    assert torch.equal(embedder(y, drop), torch.stack(expected))
    assert torch.equal(model.train()(x, t, y), model.eval()(x, t, y))
    assert torch.equal(model(x, t, y, drop), model(x, t, torch.tensor([5, 4, 5])))


# ----------------------------------------------------------------------------------------------------------------------
# Sec. 3.2  The parts of a block, in naive arithmetic


def naive_linear(x, linear):
    return torch.einsum("...i,oi->...o", x, linear.weight) + linear.bias


def naive_norm(x, norm):
    centered = x - x.mean(-1, keepdim=True)
    x = centered / torch.sqrt((centered ** 2).mean(-1, keepdim=True) + 1e-6)
    return x if norm.weight is None else x * norm.weight + norm.bias


def naive_attention(q, k, v, heads):
    """Softmax attention, one image, head and query at a time; (N, T, D), (N, S, D), (N, S, D)."""
    out, width = torch.empty_like(q), q.shape[-1] // heads
    for n in range(q.shape[0]):
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            for i in range(q.shape[1]):
                scores = [(q[n, i, part] @ k[n, j, part]) / math.sqrt(width) for j in range(k.shape[1])]
                weights = [math.exp(s) for s in scores]
                out[n, i, part] = sum(w / sum(weights) * v[n, j, part] for j, w in enumerate(weights))
    return out


def naive_self_attention(x, attn, heads=4):
    q, k, v = naive_linear(x, attn.qkv).chunk(3, dim=-1)
    return naive_linear(naive_attention(q, k, v, heads), attn.proj)


def naive_cross_attention(x, c, attn, heads=4):
    k, v = naive_linear(c, attn.kv).chunk(2, dim=-1)
    return naive_linear(naive_attention(naive_linear(x, attn.q), k, v, heads), attn.proj)


def naive_mlp(x, mlp):
    h = naive_linear(x, mlp.fc1)
    return naive_linear(0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3))), mlp.fc2)


def naive_modulation(module, t, y):
    c = t + y
    return naive_linear(c / (1 + torch.exp(-c)), module.adaLN_modulation[1])[:, None]


def naive_block(name, block, x, t, y):
    """Figure 3, from the paper's sentences; the order of the regressed parts is the official checkpoints'."""
    if name in ("in-context", "cross-attention"):
        x = x + naive_self_attention(naive_norm(x, block.norm1), block.attn)
        if name == "cross-attention":
            x = x + naive_cross_attention(naive_norm(x, block.norm_cross), torch.stack([t, y], 1), block.cross_attn)
        return x + naive_mlp(naive_norm(x, block.norm2), block.mlp)
    modulation = naive_modulation(block, t, y)
    if name == "adaln":
        shift1, scale1, shift2, scale2 = modulation.chunk(4, dim=-1)
        gate1 = gate2 = 1
    else:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
    x = x + gate1 * naive_self_attention(naive_norm(x, block.norm1) * (1 + scale1) + shift1, block.attn)
    return x + gate2 * naive_mlp(naive_norm(x, block.norm2) * (1 + scale2) + shift2, block.mlp)


@pytest.mark.parametrize("name", DESIGNS)
@torch.no_grad()
def test_block_is_its_description(name):
    """One block of each design against the naive arithmetic above, in float64, from the condition to the tokens."""
    block = tiny_dit(name).double().blocks[0]
    x, t, y = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 5, 32), (2, 32), (2, 32)))
    entered, c = block.condition(x, t, y)
    if name == "in-context":
        assert torch.equal(entered, torch.stack([torch.cat([x[n], t[n:n + 1], y[n:n + 1]]) for n in range(2)]))
    else:
        assert torch.equal(entered, x)
    torch.testing.assert_close(block(entered, c), naive_block(name, block, entered, t, y), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", DESIGNS)
@torch.no_grad()
def test_model_is_embed_blocks_decode(name):
    """The whole forward pass from parts: conv and positions, embedders, naive blocks, the two tokens off, decoder."""
    model, (x, t, y) = tiny_dit(name).double(), inputs()
    x = x.double()
    tokens = naive_linear(F.unfold(x, 2, stride=2).transpose(1, 2), type("", (), dict(
        weight=model.x_embedder.proj.weight.flatten(1), bias=model.x_embedder.proj.bias))) + model.pos_embed
    h = naive_linear(dit.timestep_embedding(t, 256).double(), model.t_embedder.mlp[0])
    t_emb = naive_linear(h / (1 + torch.exp(-h)), model.t_embedder.mlp[2])
    y_emb = model.y_embedder.embedding_table.weight[y]
    if name == "in-context":
        tokens = torch.cat([tokens, t_emb[:, None], y_emb[:, None]], 1)
    for block in model.blocks:
        tokens = naive_block(name, block, tokens, t_emb, y_emb)
    tokens = naive_norm(tokens[:, :16], model.final_layer.norm_final)
    if name.startswith("adaln"):
        shift, scale = naive_modulation(model.final_layer, t_emb, y_emb).chunk(2, dim=-1)
        tokens = tokens * (1 + scale) + shift
    expected = model.unpatchify(naive_linear(tokens, model.final_layer.linear))
    torch.testing.assert_close(model(x, t, y), expected, rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Sec. 3.2  The model


@pytest.mark.parametrize("name", DESIGNS)
def test_output_is_zero_at_init(name):
    assert (tiny_dit(name, randomize=False)(*inputs()) == 0).all()


def test_adaln_zero_blocks_are_the_identity_at_init_and_only_they():
    for name in DESIGNS:
        model = tiny_dit(name, randomize=False)
        x, c = model.blocks[0].condition(torch.randn(2, 16, 32), torch.randn(2, 32), torch.randn(2, 32))
        assert all(torch.equal(block(x, c), x) for block in model.blocks) == (name == "adaln-zero")


def test_weights_are_initialized_as_documented():
    model = DiT(input_size=8, patch_size=2, in_channels=4, hidden_size=256, depth=2, num_heads=4, num_classes=100)
    for name, p in model.named_parameters():
        if "y_embedder" in name or "t_embedder" in name and name.endswith("weight"):
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        elif name.endswith("bias") or "adaLN" in name or "final_layer.linear" in name:
            assert (p == 0).all(), name
        else:
            bound = math.sqrt(6 / (p.shape[0] + p[0].numel()))                    # Xavier uniform, conv as linear
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05) and p.abs().max() <= bound, name
    modulation = tiny_dit("adaln", randomize=False).blocks[0].adaLN_modulation[1].weight
    assert modulation.std().item() == pytest.approx(math.sqrt(2 / (32 + 128)), rel=0.1)


def test_zero_init_learns():
    """At the first step only the last layer has a gradient; at the second its neighbours; then everything."""
    model, opt_lr = tiny_dit(randomize=False), 0.1
    learning = []
    for _ in range(3):
        loss = GaussianDiffusion().training_losses(model, *inputs()[:2], y=torch.tensor([0, 4, 5]))["loss"].mean()
        model.zero_grad()
        loss.backward()
        learning.append({name for name, p in model.named_parameters() if p.grad.abs().max() > 0})
        with torch.no_grad():
            for p in model.parameters():
                p -= opt_lr * p.grad
    assert learning[0] == {"final_layer.linear.weight", "final_layer.linear.bias"}
    assert {"x_embedder.proj.weight", "final_layer.adaLN_modulation.1.bias"} <= learning[1]
    assert "blocks.0.adaLN_modulation.1.weight" in learning[1]
    assert "blocks.0.attn.qkv.weight" not in learning[1] and learning[2] == set(dict(model.named_parameters()))


@pytest.mark.parametrize("name", DESIGNS)
def test_conditions_reach_the_output_and_positions_matter(name):
    model, (x, t, y) = tiny_dit(name), inputs()
    out = model(x, t, y)
    assert out.shape == (3, 6, 8, 8)
    assert not torch.allclose(out, model(x, t + 1, y), atol=1e-5)
    assert not torch.allclose(out, model(x, t, (y + 1) % 5), atol=1e-4)
    assert not torch.allclose(out.roll(2, 2), model(x.roll(2, 2), t, y), atol=1e-3)
    model.pos_embed.zero_()                                                       # without positions: a set of patches
    torch.testing.assert_close(model(x, t, y).roll(2, 2), model(x.roll(2, 2), t, y), rtol=1e-4, atol=1e-4)


PAPER = {  # Table 4: Gflops (multiply-adds, forward), parameters in millions
    "DiT-S/8": (0.36, 33), "DiT-S/4": (1.41, 33), "DiT-S/2": (6.06, 33), "DiT-B/8": (1.42, 131), "DiT-B/4": (5.56, 130),
    "DiT-B/2": (23.01, 130), "DiT-L/8": (5.01, 459), "DiT-L/4": (19.70, 458), "DiT-L/2": (80.71, 458),
    "DiT-XL/8": (7.39, 676), "DiT-XL/4": (29.05, 675)}
PAPER_XL2 = {"in-context": (119.37, 449), "cross-attention": (137.62, 598), "adaln": (118.56, 600),
             "adaln-zero": (118.64, 675)}


def gflops_and_params(model_name, side=32, **kwargs):
    with torch.device("meta"):
        model = DiT_models[model_name](input_size=side, **kwargs)
        x, label = torch.empty(1, 4, side, side), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(x, label, label)
    return counter.get_total_flops() / 2e9, sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize("name", PAPER)
def test_sizes_are_table_4(name):
    """To the printed two decimals, +-0.01: the paper counts some elementwise products that torch's counter does not."""
    gflops, params = gflops_and_params(name)
    assert round(gflops, 2) == pytest.approx(PAPER[name][0], abs=0.0101) and round(params) == PAPER[name][1]


@pytest.mark.parametrize("block", DESIGNS)
def test_designs_are_table_4(block):
    gflops, params = gflops_and_params("DiT-XL/2", block=block)
    assert gflops == pytest.approx(PAPER_XL2[block][0], rel=2e-4) and round(params) == PAPER_XL2[block][1]


def test_xl2_at_512_is_table_4():
    assert gflops_and_params("DiT-XL/2", side=64)[0] == pytest.approx(524.60, rel=2e-4)


def test_names_and_shapes_are_the_official_checkpoints():
    """The 292 tensors of DiT-XL-2-256x256.pt, written out from its layout."""
    D = 1152
    expected = {
        "pos_embed": (1, 256, D), "x_embedder.proj.weight": (D, 4, 2, 2), "x_embedder.proj.bias": (D,),
        "t_embedder.mlp.0.weight": (D, 256), "t_embedder.mlp.0.bias": (D,),
        "t_embedder.mlp.2.weight": (D, D), "t_embedder.mlp.2.bias": (D,),
        "y_embedder.embedding_table.weight": (1001, D),
        "final_layer.linear.weight": (32, D), "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2 * D, D), "final_layer.adaLN_modulation.1.bias": (2 * D,)}
    for i in range(28):
        for name, rows, columns in [("attn.qkv", 3 * D, D), ("attn.proj", D, D), ("mlp.fc1", 4 * D, D),
                                    ("mlp.fc2", D, 4 * D), ("adaLN_modulation.1", 6 * D, D)]:
            expected |= {f"blocks.{i}.{name}.weight": (rows, columns), f"blocks.{i}.{name}.bias": (rows,)}
    with torch.device("meta"):
        state = DiT_models["DiT-XL/2"]().state_dict()
    assert len(expected) == 292 and {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


def test_pos_embed_is_a_buffer_that_training_cannot_move():
    model = tiny_dit()
    assert "pos_embed" in model.state_dict() and "pos_embed" not in dict(model.named_parameters())


def test_diffusers_computes_the_same_from_the_same_weights():
    """DiTTransformer2DModel, key by key, to 1e-5, once its time embedding divides by 128 and not by 127."""
    from diffusers import DiTTransformer2DModel
    theirs = DiTTransformer2DModel(num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8,
                                   num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_eps=1e-6)
    theirs.eval()
    ours = tiny_dit(in_channels=4, num_classes=10).eval()
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    weights = ours.state_dict()
    for kind in ("weight", "bias"):
        renamed = {f"pos_embed.proj.{kind}": f"x_embedder.proj.{kind}",
                   f"proj_out_1.{kind}": f"final_layer.adaLN_modulation.1.{kind}",
                   f"proj_out_2.{kind}": f"final_layer.linear.{kind}"}
        for i in range(2):
            to, of = f"transformer_blocks.{i}.", f"blocks.{i}."
            for their_name, our_name in [("norm1.linear", "adaLN_modulation.1"), ("attn1.to_out.0", "attn.proj"),
                                         ("ff.net.0.proj", "mlp.fc1"), ("ff.net.2", "mlp.fc2")]:
                renamed[f"{to}{their_name}.{kind}"] = f"{of}{our_name}.{kind}"
            renamed[f"{to}norm1.emb.timestep_embedder.linear_1.{kind}"] = f"t_embedder.mlp.0.{kind}"
            renamed[f"{to}norm1.emb.timestep_embedder.linear_2.{kind}"] = f"t_embedder.mlp.2.{kind}"
            renamed[f"{to}norm1.emb.class_embedder.embedding_table.weight"] = "y_embedder.embedding_table.weight"
            for k, part in enumerate("qkv"):
                weights[f"{of}{part}.{kind}"] = weights[f"{of}attn.qkv.{kind}"].chunk(3)[k]
                renamed[f"{to}attn1.to_{part}.{kind}"] = f"{of}{part}.{kind}"
        missing, unexpected = theirs.load_state_dict({a: weights[b] for a, b in renamed.items()}, strict=False)
        assert not unexpected
    x, t, y = inputs(channels=4)
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=y).sample
        torch.testing.assert_close(ours(x, t, y), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_guidance_of_1_is_conditional_and_costs_one_pass_and_0_is_unconditional():
    model, (x, t, y) = tiny_dit(), inputs()
    sizes = []
    model.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    assert torch.equal(model.forward_with_cfg(x, t, y, 1.0), model(x, t, y)) and sizes == [3, 3]
    null = torch.full_like(y, 5)
    torch.testing.assert_close(model.forward_with_cfg(x, t, y, 0.0)[:, :3], model(x, t, null)[:, :3])


@pytest.mark.parametrize("cfg_channels,guided", [(None, 4), (3, 3)])
def test_guidance_extrapolates_eps_and_leaves_the_rest_conditional(cfg_channels, guided):
    model, (x, t, y) = tiny_dit(in_channels=4), inputs(channels=4)
    cond, uncond = model(x, t, y), model(x, t, torch.full_like(y, 5))
    out = model.forward_with_cfg(x, t, y, 4.0, cfg_channels)
    for channel in range(8):
        expected = uncond[:, channel] + 4 * (cond - uncond)[:, channel] if channel < guided else cond[:, channel]
        torch.testing.assert_close(out[:, channel], expected, rtol=1e-4, atol=1e-4)


def test_learn_sigma_false_predicts_eps_alone_from_loss_to_sample():
    model, (x, t, y) = tiny_dit(learn_sigma=False), inputs()
    assert model(x, t, y).shape == x.shape
    assert (GaussianDiffusion().training_losses(model, x, t, y=y)["vb"] == 0).all()
    assert GaussianDiffusion().respaced(3).p_sample_loop(model, x, y=y).shape == x.shape


@pytest.mark.parametrize("kwargs,message", [
    (dict(block="adaln-one"), "adaln-zero"), (dict(input_size=9), "9 is not divisible by the patch size 2"),
    (dict(hidden_size=30), "30 is not divisible by 4 heads")])
def test_sizes_that_do_not_fit_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DiT(**(dict(input_size=8, patch_size=2, hidden_size=32, depth=1, num_heads=4) | kwargs))


def test_dit_imports_torch_numpy_and_the_standard_library_only():
    nodes = list(ast.walk(ast.parse((HERE / "dit.py").read_text())))
    modules = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert modules - set(sys.stdlib_module_names) == {"torch", "numpy"}


def test_bf16_autocast_stays_near_float32():
    """The loss of a bf16 network within 1e-2, computed in float32 outside it."""
    model, (x, t, y) = tiny_dit(), inputs()
    for p in model.parameters():
        p.data.mul_(0.5)
    noise = torch.randn_like(x)
    exact = GaussianDiffusion().training_losses(model, x, t, noise, y=y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = GaussianDiffusion().training_losses(model, x, t, noise, y=y)
    assert rough["loss"].dtype == torch.float32
    torch.testing.assert_close(rough["mse"], exact["mse"], rtol=1e-2, atol=1e-2)


# ----------------------------------------------------------------------------------------------------------------------
# sample.py


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """An ImageFolder of 3 classes x 8 images of 12 x 20 pixels, each image of one colour but for its left edge."""
    root = tmp_path_factory.mktemp("pictures")
    for c, name in enumerate(["ant", "bee", "cat"]):
        (root / name).mkdir()
        for i in range(8):
            pixels = np.full((12, 20, 3), 60 * c + 5 * i, np.uint8)
            pixels[:, :5] = 255
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


TINY = ("--image-size 8 --patch-size 2 --hidden-size 32 --depth 2 --num-heads 4 --device cpu --dtype fp32 "
        "--batch-size 8 --steps 6 --log-every 1 --ckpt-every 3 --sample-every 0").split()


def tiny_flags(folder, out, *flags):
    return [*TINY, "--data", str(folder), "--cache", str(out.parent / "cache"), "--out", str(out), *flags]


def train_tiny(folder, out, *flags):
    """A run of six steps; returns its checkpoint."""
    train.main(tiny_flags(folder, out, *flags))
    return torch.load(out / "ckpt.pt", weights_only=True)


@pytest.fixture(scope="session")
def tiny_run(folder, tmp_path_factory):
    """A finished run and its checkpoint, whose network is then made to say something: trained so briefly it says 0."""
    out = tmp_path_factory.mktemp("run") / "out"
    state = train_tiny(folder, out)
    torch.manual_seed(3)
    for name, tensor in state["ema"].items():
        if name != "pos_embed":
            tensor.normal_(std=0.1)
    torch.save(state, out / "ckpt.pt")
    return out


def test_load_model_gives_the_averaged_weights_in_eval_mode(tiny_run):
    model, info = sample.load_model(tiny_run / "ckpt.pt")
    state = torch.load(tiny_run / "ckpt.pt", weights_only=True)
    assert not model.training and all(torch.equal(p, state["ema"][name]) for name, p in model.state_dict().items())
    assert not all(torch.equal(state["model"][name], p) for name, p in state["ema"].items())
    assert info["class_names"] == ["ant", "bee", "cat"] and info["space"] == "pixel" and info["config"]["seed"] == 0
    assert model.num_classes == 3 and model.y_embedder.embedding_table.weight.shape[0] == 4


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_image_i_depends_on_its_class_the_seed_and_i_alone(tiny_run, sampler):
    model, _ = sample.load_model(tiny_run / "ckpt.pt")

    def images(labels, indices, seed=0):
        return sample.to_uint8(sample.sample_images(model, labels, indices, seed=seed, steps=5, sampler=sampler)).int()
    together = images([0, 1, 2, 2], [0, 1, 2, 3])
    for i, label in enumerate([0, 1, 2, 2]):                                      # alone, to one grey level
        assert (images([label], [i])[0] - together[i]).abs().max() <= 1
    assert (together[2] != together[3]).any() and (images([0], [0], seed=1)[0] != together[0]).any()
    assert (images([1], [0])[0] != together[0]).any()


def test_sampling_clips_pixels(tiny_run):
    model, _ = sample.load_model(tiny_run / "ckpt.pt")
    x = sample.sample_images(model, [0, 1], steps=5, sampler="ddim")
    assert x.abs().max() <= 1 and x.shape == (2, 3, 8, 8)


def test_to_uint8_is_adms_rounding():
    x = torch.tensor([-1.2, -1.0, -0.999, 0.0, 0.9999, 1.0, 3.0])
    assert sample.to_uint8(x).tolist() == [min(255, max(0, int(127.5 * v + 128))) for v in x.tolist()]
    levels = torch.arange(256)
    assert torch.equal(sample.to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))   # undoes train.py's scaling


def test_sample_writes_a_grid_with_a_row_a_class_and_a_film(tiny_run, tmp_path, capsys):
    sample.main([str(tiny_run / "ckpt.pt"), "--classes", "cat,0", "--per-class", "3", "--steps", "6", "--device", "cpu",
                 "--out", str(tmp_path / "x.png"), "--gif", str(tmp_path / "x.gif")])
    model, _ = sample.load_model(tiny_run / "ckpt.pt")
    expected = sample.to_uint8(sample.sample_images(model, [2, 2, 2, 0, 0, 0], steps=6, cfg_scale=2.0))   # the run's
    picture = np.asarray(Image.open(tmp_path / "x.png"))
    assert picture.shape == (2 * 68 + 4, 3 * 68 + 4, 3)                           # 64 pixels each, 4 between
    for k in range(6):
        row, column = divmod(k, 3)
        cell = picture[4 + 68 * row:, 4 + 68 * column:][:64:8, :64:8]
        assert np.abs(cell.astype(int) - expected[k].permute(1, 2, 0).numpy()).max() <= 1
    film, half = Image.open(tmp_path / "x.gif"), 3 * 68 + 4
    assert film.n_frames == 6 and film.size == (2 * half, 2 * 68 + 4)
    frames = []
    for k in (0, 5):                                                              # noise, a guess; the picture twice
        film.seek(k)
        frames += [np.asarray(film.convert("RGB").crop((x, 0, x + half, 140))).astype(int) for x in (0, half)]
    assert np.abs(frames[3] - picture).mean() < 20 < np.abs(frames[0] - frames[1]).mean()   # a GIF has 256 colours
    assert "a row each of cat, ant" in capsys.readouterr().out


def test_classes_go_by_name_or_number():
    names = ["ant", "bee", "2", "dog"]
    assert sample.parse_classes("dog, 0,bee", names) == [3, 0, 1] and sample.parse_classes(None, names) == [0, 1, 2, 3]
    assert len(sample.parse_classes(None, [str(i) for i in range(1000)])) == 10


# ----------------------------------------------------------------------------------------------------------------------
# train.py: data


def test_shapes_are_determined_by_their_number_and_all_different():
    images = [train.draw_shape(i, 16) for i in range(200)]
    assert all(np.array_equal(image, train.draw_shape(i, 16)) for i, image in enumerate(images))
    assert len({image.tobytes() for image in images}) == 200 and len(train.SHAPES) == 10
    assert images[0].shape == (16, 16, 3) and images[0].dtype == np.uint8


def test_center_crop_keeps_the_middle():
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, 10:50] = 200                                                        # the middle square
    cropped = train.center_crop(Image.fromarray(pixels), 10)
    assert cropped.shape == (10, 10, 3) and (abs(cropped.astype(int) - 200) <= 2)[:, 1:-1].all()
    small = train.center_crop(Image.new("L", (5, 7), 90), 8)                      # enlarged, and made RGB
    assert small.shape == (8, 8, 3) and (small == 90).all()


def test_a_folder_of_images_is_prepared_once_into_arrays(folder, tmp_path, monkeypatch):
    cfg = train.Config(data=str(folder), image_size=6, cache=str(tmp_path / "c"))
    source = train.open_source(cfg)
    images, labels = train.prepare_data(cfg, source)
    assert images.shape == (24, 3, 6, 6) and images.dtype == np.uint8 and isinstance(images, np.memmap)
    assert labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8 and source.class_names == ["ant", "bee", "cat"]
    for i in range(24):                                                           # each its own colour in the middle
        assert abs(int(images[i, 0, 3, 3]) - (60 * (i // 8) + 5 * (i % 8))) <= 2
    reads = []
    again, _ = train.prepare_data(cfg, source._replace(load=lambda i: reads.append(i) or source.load(i)))
    assert np.array_equal(images, again) and len(reads) == 20                     # a sample, to know the code by
    other, _ = train.prepare_data(cfg, source._replace(load=lambda i: 255 - source.load(i)))   # code has changed
    assert np.array_equal(other, 255 - images)
    monkeypatch.setattr(cfg, "image_size", 4)                                     # another size: other arrays
    assert train.prepare_data(cfg, train.open_source(cfg))[0].shape == (24, 3, 4, 4)


def test_cifar10_comes_from_torchvision_or_ends_in_one_line(tmp_path, monkeypatch):
    import torchvision
    cfg = train.Config(data="cifar10", image_size=32, cache=str(tmp_path))

    class Downloaded:
        data = np.random.default_rng(0).integers(256, size=(4, 32, 32, 3), dtype=np.uint8)
        targets, classes = [1, 0, 1, 0], ["a", "b"]

        def __init__(self, root, download):
            pass

    def offline(root, download):
        raise urllib.error.URLError("no\nnetwork")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Downloaded)
    images, labels = train.prepare_data(cfg, train.open_source(cfg))
    assert np.array_equal(images.transpose(0, 2, 3, 1), Downloaded.data) and labels.tolist() == [1, 0, 1, 0]
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(sample.UserError, match="--data"):
        train.open_source(cfg)


def prepared(cache):
    """What lies in a cache beside locks, whole or not."""
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def test_interrupted_preparation_leaves_nothing_to_be_taken_for_whole(folder, tmp_path):
    cfg = train.Config(data=str(folder), image_size=6, cache=str(tmp_path / "c"))
    source = train.open_source(cfg)

    def load(i):
        if i == 22:
            raise KeyboardInterrupt
        return source.load(i)
    with pytest.raises(KeyboardInterrupt):
        train.prepare_data(cfg, source._replace(load=load))
    assert prepared(tmp_path / "c") == []
    assert train.prepare_data(cfg, source)[0][23].any()


def test_batches_are_a_function_of_seed_and_step():
    """The same again for the same seed and step, another for any other; every epoch has each image once."""
    images = np.arange(10, dtype=np.uint8)[:, None, None, None].repeat(3, 1).repeat(4, 2).repeat(4, 3)
    cfg = train.Config(batch_size=4, seed=7)
    batches = [train.draw_batch(cfg, images, np.arange(10), step) for step in range(1, 6)]
    for a, b in zip(batches[2], train.draw_batch(cfg, images, np.arange(10), 3), strict=True):
        assert torch.equal(a, b)
    for other in (train.draw_batch(cfg, images, np.arange(10), 4), train.draw_batch(train.Config(batch_size=4, seed=8),
                                                                                     images, np.arange(10), 3)):
        assert not torch.equal(other[3], batches[2][3]) and not torch.equal(other[2], batches[2][2])
    y = torch.cat([batch[1] for batch in batches]).tolist()                       # 5 batches of 4: two epochs of 10
    assert sorted(y[:10]) == sorted(y[10:]) == list(range(10)) and y[:10] != y[10:]
    assert all((batch[0][k] == batch[1][k]).all() for batch in batches for k in range(4))   # labels stay with images


def test_timesteps_drops_flips_and_noise_have_the_paper_s_distributions():
    images = np.zeros((1000, 3, 2, 2), np.uint8)
    images[..., 0] = 1
    x, y, t, noise, drop = train.draw_batch(train.Config(batch_size=20_000), images, np.zeros(1000, np.int64), 1)
    assert t.min() == 0 and t.max() == 999 and abs(t.double().mean() - 499.5) < 5 * 289 / math.sqrt(20_000)
    assert abs(drop.double().mean() - 0.1) < 5 * 0.3 / math.sqrt(20_000)
    flipped = x[:, 0, 0, 1] == 1
    assert abs(flipped.double().mean() - 0.5) < 5 * 0.5 / math.sqrt(20_000) and (x[flipped, :, :, 0] == 0).all()
    assert abs(noise.mean()) < 5 / math.sqrt(noise.numel()) and abs(noise.std() - 1) < 5 / math.sqrt(noise.numel())
    unflipped, *_ = train.draw_batch(train.Config(batch_size=1000, flip=False), images, np.zeros(1000, np.int64), 1)
    assert (unflipped[..., 0] == 1).all()


# ----------------------------------------------------------------------------------------------------------------------
# train.py: the loop


def setup_step(accum=1, **settings):
    cfg = train.Config(batch_size=4, accum=accum, label_drop=0.5, device="cpu", dtype="fp32", image_size=8,
                       patch_size=2, hidden_size=32, depth=2, num_heads=4, **settings)
    rt = train.Runtime(cfg)
    training = train.Training(cfg, rt, 5)
    training.original.load_state_dict(tiny_dit().state_dict())
    training.ema.load_state_dict(tiny_dit().state_dict())
    images = np.random.default_rng(0).integers(256, size=(12, 3, 8, 8), dtype=np.uint8)

    def step(k):
        batch = train.draw_batch(cfg, images, np.arange(12) % 5, k)
        return train.train_step(cfg, rt, training, GaussianDiffusion(), batch, k), batch
    return training.original, training.ema, training.opt, step


def test_step_is_adamw_on_the_mean_loss_of_the_batch():
    """Loss, gradient norm and weights after a step against plain autograd and Adam's formula, one example at a time."""
    model, _, _, step = setup_step(lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (loss, mse, vb, grad_norm), (x, y, t, noise, drop) = step(2)
    assert drop.any() and not drop.all()
    reference = tiny_dit()
    x, y = x.float() / 255 * 2 - 1, torch.where(drop, 5, y)
    losses = [GaussianDiffusion().training_losses(reference, x[k:k + 1], t[k:k + 1], noise[k:k + 1], y=y[k:k + 1])
              for k in range(4)]
    mean = sum(one["loss"] for one in losses).squeeze() / 4
    grads = dict(zip(before, torch.autograd.grad(mean, list(reference.parameters())), strict=True))
    assert [loss.item(), (mse + vb).item()] == pytest.approx([mean.item()] * 2, rel=1e-5)
    assert grad_norm.item() == pytest.approx(math.sqrt(sum((g.double() ** 2).sum() for g in grads.values())), rel=1e-4)
    for name, p in model.named_parameters():                                      # the first step: g / (|g| + 1e-8)
        expected = before[name] - 1e-2 * grads[name] / (grads[name].abs() + 1e-8)
        sure = grads[name].abs() > 1e-4
        torch.testing.assert_close(p[sure], expected[sure], rtol=1e-4, atol=1e-5)


def test_accumulated_parts_make_the_same_step():
    whole, in_parts = setup_step(), setup_step(accum=4)
    for k in (1, 2):
        torch.testing.assert_close(whole[3](k)[0], in_parts[3](k)[0], rtol=1e-5, atol=1e-5)


def test_ema_is_its_closed_form():
    """After each step ema = d ema + (1 - d) new weights, d = min(decay, (1 + n) / (10 + n)); pos_embed stays."""
    model, ema, _, step = setup_step(lr=1e-2, ema_decay=0.25)
    pos_embed, expected = ema.pos_embed.clone(), [p.detach().clone() for p in ema.parameters()]
    for n, decay in [(1, 2 / 11), (2, 3 / 12), (3, 0.25)]:
        step(n)
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, model.parameters(), strict=True)]
        for e, average in zip(expected, ema.parameters(), strict=True):
            torch.testing.assert_close(average, e, rtol=1e-5, atol=1e-6)
    assert torch.equal(ema.pos_embed, pos_embed)


def test_learning_rate_is_constant_or_falls_to_zero_over_its_own_steps():
    model, _, opt, step = setup_step(lr=1e-2)
    step(1000)
    assert opt.param_groups[0]["lr"] == 1e-2
    model, _, opt, step = setup_step(lr=1e-2, lr_decay_steps=10)
    for k, expected in [(1, 1e-2), (6, 5e-3), (11, 0.0), (50, 0.0)]:
        step(k)
        assert opt.param_groups[0]["lr"] == pytest.approx(expected)


def test_defaults_and_optimizer_are_the_papers(tiny_run):
    cfg = train.Config()
    assert (cfg.lr, cfg.lr_decay_steps, cfg.beta2, cfg.batch_size, cfg.ema_decay, cfg.label_drop, cfg.block) == (
        1e-4, 0, 0.999, 256, 0.9999, 0.1, "adaln-zero")
    group, = torch.load(tiny_run / "ckpt.pt", weights_only=True)["opt"]["param_groups"]
    assert group["weight_decay"] == 0 and group["betas"][0] == 0.9 and group["eps"] == 1e-8 and not group["amsgrad"]


@pytest.mark.parametrize("block", DESIGNS)
def test_a_run_leaves_checkpoint_log_config_and_resumes_to_the_same_bits(block, folder, tmp_path):
    """6 steps are 3 steps, a stop and 3 more: weights, average, optimizer and log, with accumulation and flips."""
    flags = ["--block", block, "--accum", "2"]
    whole = train_tiny(folder, tmp_path / "whole", *flags)
    train_tiny(folder, tmp_path / "parts", *flags, "--steps", "3")
    shutil.rmtree(tmp_path / "cache")
    train.main(["--resume", str(tmp_path / "parts" / "ckpt.pt"), "--steps", "6"])    # the folder or the file in it
    parts = torch.load(tmp_path / "parts" / "ckpt.pt", weights_only=True)
    assert set(parts) == {"model", "ema", "opt", "step", "config", "model_args", "class_names"} and parts["step"] == 6
    for key in ("model", "ema"):
        assert all(torch.equal(parts[key][name], tensor) for name, tensor in whole[key].items())
    for i, state in whole["opt"]["state"].items():
        assert all(torch.equal(parts["opt"]["state"][i][name], tensor) for name, tensor in state.items())
    logs = [list(csv.DictReader(open(tmp_path / out / "log.csv"))) for out in ("whole", "parts")]
    assert [row["step"] for row in logs[1]] == list("123456")
    for ours, theirs in zip(*logs, strict=True):
        assert all(ours[name] == theirs[name] for name in ("loss", "mse", "vb", "grad_norm"))
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["block"] == block


def test_resuming_cuts_the_rows_after_the_checkpoint(tmp_path):
    cfg = train.Config(out=str(tmp_path))
    folder = train.Folder(cfg, 0)
    for step in range(1, 6):
        folder.row(step, 0.1, 1 / 3, 0.0, 1.0, 2.0)
    with open(tmp_path / "log.csv", "ab") as file:                                # half of row 10, and worse
        file.write(b"1\n\xff\xfe\x00,1,1,1,1,1\n\n1")
    train.Folder(cfg, 3)
    rows = list(csv.DictReader(open(tmp_path / "log.csv")))
    assert [row["step"] for row in rows] == ["1", "2", "3"] and float(rows[0]["mse"]) == 1 / 3


def test_a_run_draws_its_samples_row_by_class(folder, tmp_path, monkeypatch):
    save, pictures = train.Folder.save, []                         # drawn before the save: a crash repeats both

    def look(self, state):
        pictures.append([path.name for path in (self.out / "samples").iterdir()])
        save(self, state)
    monkeypatch.setattr(train.Folder, "save", look)
    train_tiny(folder, tmp_path / "run", "--sample-every", "3")
    assert [len(names) for names in pictures] == [1, 2]
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == ["000003.png", "000006.png"]
    assert Image.open(tmp_path / "run" / "samples" / "000006.png").size == (8 * 68 + 4, 3 * 68 + 4)


@pytest.mark.parametrize("what", [0, 3])
def test_a_loss_or_gradient_that_is_no_number_stops_the_run_and_touches_no_file(what, folder, tmp_path, monkeypatch):
    """Also if it is one again in the next step: seen at the next save, exit status 3, the last checkpoint untouched."""
    original, calls = train.train_step, []

    def poisoned(*args):
        calls.append(original(*args))
        calls[-1][what] = math.nan if len(calls) == 5 else calls[-1][what]
        return calls[-1]
    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(train.Diverged) as error:
        train_tiny(folder, tmp_path / "run", "--log-every", "0")
    assert error.value.status == 3 and len(calls) == 6
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] == 3


def test_grad_checkpoint_computes_blocks_twice_and_changes_no_bit(folder, tmp_path, monkeypatch):
    original, calls = dit.AdaLNZeroBlock.forward, []
    monkeypatch.setattr(dit.AdaLNZeroBlock, "forward", lambda *args: calls.append(0) or original(*args))
    a = train_tiny(folder, tmp_path / "a")
    once = len(calls)
    b = train_tiny(folder, tmp_path / "b", "--grad-checkpoint")
    assert len(calls) - once == 2 * once == 2 * 6 * 2
    assert all(torch.equal(a["model"][name], tensor) for name, tensor in b["model"].items())


def test_a_checkpoint_is_replaced_only_by_a_whole_one(tmp_path, monkeypatch):
    folder = train.Folder(train.Config(out=str(tmp_path)), 0)
    folder.save({"step": 1})

    def cut_off(state, file):
        file.write(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(torch, "save", cut_off)
    with pytest.raises(sample.UserError, match="disk full.*--resume"):
        folder.save({"step": 2})
    with pytest.raises(sample.UserError, match="disk full.*start again"):
        train.Folder(train.Config(out=str(tmp_path / "new")), 0).save({"step": 1})
    assert torch.load(tmp_path / "ckpt.pt") == {"step": 1} and not list(tmp_path.glob("*.part"))


def test_a_run_goes_on_only_with_the_images_it_began_with(folder, tmp_path):
    pictures = shutil.copytree(folder, tmp_path / "pictures")
    train_tiny(pictures, tmp_path / "run", "--steps", "3")
    moved = pictures.rename(tmp_path / "moved")
    with pytest.raises(sample.UserError, match="pictures"):
        train.main(["--resume", str(tmp_path / "run"), "--steps", "6"])
    train.main(["--resume", str(tmp_path / "run"), "--steps", "4", "--data", str(moved)])
    (moved / "ant").rename(moved / "zebra")
    with pytest.raises(sample.UserError, match="does not hold the images"):
        train.main(["--resume", str(tmp_path / "run"), "--steps", "6"])


def test_a_short_run_learns():
    """150 steps on shapes beat the best that is possible for white noise of the same variance."""
    torch.manual_seed(0)
    cfg = train.Config(**train.PRESETS["shapes"] | dict(lr_decay_steps=0, device="cpu", hidden_size=64, depth=2))
    images = np.stack([train.draw_shape(i, 16) for i in range(500)]).transpose(0, 3, 1, 2)
    rt, diffusion = train.Runtime(cfg), GaussianDiffusion()
    training = train.Training(cfg, rt, 10)
    batches = (train.draw_batch(cfg, images, np.arange(500) % 10, k) for k in range(1, 151))
    mse = [train.train_step(cfg, rt, training, diffusion, batch, k)[1].item()
           for k, batch in enumerate(batches, start=1)]
    variance = (images / 127.5 - 1).var()
    bound = np.mean([a * variance / (a * variance + 1 - a) for a in ALPHA_BAR])
    assert mse[0] == pytest.approx(1, abs=0.05) and np.mean(mse[-20:]) < bound


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes: one line that says what is wrong and what to do, and nothing written


@pytest.mark.parametrize("flags,words", [
    ("--stepps 3", "--stepps"), ("--step 3", "--step"), ("--preset mnist", "shapes, cifar10"), ("--dtype fp16", "bf16"),
    ("--block adaln-one", "adaln-zero"), ("--model DiT-M/2", "DiT-S/2"), ("--steps 0", "at least 1"),
    ("--lr nan", "--lr"), ("--steps many", "--steps"), ("--data no/such/folder", "no/such/folder"),
    ("--patch-size 3", "patch size 3"),
    ("--hidden-size 30", "hidden size 30"), ("--num-heads 5", "5 heads"), ("--accum 3", "--accum 3"),
    ("--device tpu", "--device auto"), ("--label-drop 1", "--label-drop"), ("--resume no/such/run", "no/such/run"),
    ("--data EMPTY", "EMPTY"), ("--data BROKEN", "dog/bad.png"),
    ("--cache BROKEN/dog/bad.png", "--cache"), ("--out BROKEN/dog/bad.png", "--out"), ("--device cpu:x", "cpu:x"),
    ("--seed 18446744073709551616", "--seed"), ("--data DEEP", "deep.png"), ("--cfg-scale inf", "--cfg-scale")])
def test_train_refuses(flags, words, tmp_path, monkeypatch):
    (tmp_path / "EMPTY" / "dog").mkdir(parents=True)
    (tmp_path / "BROKEN" / "dog").mkdir(parents=True)
    (tmp_path / "BROKEN" / "dog" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "DEEP" / "dog").mkdir(parents=True)
    Image.new("I;16", (20, 20)).save(tmp_path / "DEEP" / "dog" / "deep.png")      # would be clipped to white
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sample.UserError) as error:
        train.main(flags.split())
    assert words in str(error.value) and "\n" not in str(error.value) and error.value.status == 2
    assert not list(tmp_path.rglob("*.npy")) and not (tmp_path / "runs" / "shapes").exists()


def test_a_folder_that_holds_a_run_is_refused_and_a_resumed_run_keeps_its_settings(tiny_run, folder):
    before = (tiny_run / "ckpt.pt").read_bytes()
    with pytest.raises(sample.UserError, match="holds a run already"):
        train_tiny(folder, tiny_run)
    for flags, words in [("--block adaln", "--block adaln .the run has adaln-zero."), ("--lr 1", "--lr 1.0"),
                         ("--steps 7 --data shapes", "--data shapes"), ("--steps 6", "has done 6 steps")]:
        with pytest.raises(sample.UserError, match=words):
            train.main(["--resume", str(tiny_run), *flags.split()])
    assert (tiny_run / "ckpt.pt").read_bytes() == before


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


@pytest.mark.parametrize("flags,words", [
    ("--classes zebra", "ant, bee, cat"), ("--classes 3", "0..2"), ("--classes=-1", "-1"), ("--steps 1001", "1000"),
    ("--steps 0", "--steps"), ("--sampler euler", "ddpm"), ("--per-class 0", "--per-class"), ("--seed -1", "--seed"),
    ("--cfg-scale nan", "--cfg-scale"), ("--out x.txt", ".png"), ("--out no/x.png", "no folder no"),
    ("--gif x.mp4", ".gif"), ("--device tpu", "--device auto"), ("--frames 2", "--frames")])
def test_sample_refuses(flags, words, tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sample.UserError) as error:
        sample.main([str(tiny_run / "ckpt.pt"), *flags.split()])
    assert words in str(error.value) and "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["missing", "text", "empty", "truncated", "bit", "other", "types", "malicious"])
def test_what_is_no_checkpoint_is_refused_and_not_run(content, tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, whole = tmp_path / "c.pt", (tiny_run / "ckpt.pt").read_bytes()
    if content == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    elif content == "types":
        torch.save(dict.fromkeys(["model", "ema", "opt", "step", "config", "model_args", "class_names"], 1), path)
    elif content == "malicious":
        torch.save({"model": Malicious()}, path)
    elif content != "missing":
        half = len(whole) // 2
        flipped = whole[:half] + bytes([whole[half] ^ 4]) + whole[half + 1:]
        path.write_bytes({"text": b"hello", "empty": b"", "truncated": whole[:half], "bit": flipped}[content])
    with pytest.raises(sample.UserError, match="c.pt"):
        sample.load_model(path)
    assert not (tmp_path / "touched").exists()


def test_guidance_needs_a_null_class(folder, tmp_path):
    train_tiny(folder, tmp_path / "run", "--label-drop", "0")
    with pytest.raises(sample.UserError, match="--cfg-scale 1"):
        sample.main([str(tmp_path / "run" / "ckpt.pt"), "--cfg-scale", "2", "--out", str(tmp_path / "x.png")])
    sample.main([str(tmp_path / "run" / "ckpt.pt"), "--steps", "2", "--out", str(tmp_path / "x.png")])


# ----------------------------------------------------------------------------------------------------------------------
# Real processes


def start(script, *argv, **kwargs):
    return subprocess.Popen([sys.executable, HERE / script, *map(str, argv)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def test_commands_end_a_mistake_in_one_line_and_status_2(tmp_path):
    for script, argv in [("train.py", ["--preset", "mnist"]), ("sample.py", ["nothing.pt"])]:
        process = start(script, *argv, cwd=tmp_path)
        out, err = process.communicate()
        assert process.returncode == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith(script)


def test_what_the_machine_lacks_is_said_in_one_line(folder, tmp_path, monkeypatch):
    process = start("train.py", *TINY, "--compile", "--data", folder, "--cache", tmp_path / "c", "--out", tmp_path,
                    env=os.environ | {"CXX": "/no/compiler"})
    _, err = process.communicate()
    assert process.returncode == 2 and "Traceback" not in err and "--no-compile" in err.splitlines()[-1]

    def full(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(train, "train_step", full)
    with pytest.raises(sample.UserError, match="--accum"):
        train_tiny(folder, tmp_path / "run")


def test_a_signal_ends_the_run_whole(folder, tmp_path):
    """SIGTERM in the loop: the step is finished and saved, exit 0 with the command that goes on."""
    process = start("train.py", *TINY, "--steps", "10000000", "--data", folder, "--cache", tmp_path / "c",
                    "--out", tmp_path / "run")
    while not (tmp_path / "run" / "ckpt.pt").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    state = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    assert process.returncode == 0, err
    assert f"--resume {tmp_path / 'run'}" in out and f"step {state['step']}" in out


# ----------------------------------------------------------------------------------------------------------------------
# Many processes: the same run


def launch(script, tmp_path, patch="", processes=1):
    """A file to start that is script.py but for `patch`, and the command to do so in so many processes."""
    path = tmp_path / f"{script}.py"
    path.write_text(f"import os, signal, sys, torch\nsys.path.insert(0, {str(HERE)!r})\nimport {script} as it, sample\n"
                    "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it\n"
                    f"{patch}\nsample.run(it.main)\n")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *torchrun * (processes > 1), str(path)]


def finish(command, *argv, timeout=120, **kwargs):
    """(exit status, what it printed) of a command; it hangs if it takes longer than so many seconds."""
    done = subprocess.run([*command, *map(str, argv)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=timeout, **kwargs)
    return done.returncode, done.stdout


def numbers_of(out):
    """The logged (loss, mse, vb, grad_norm) of a run, a row a step."""
    rows = list(csv.DictReader(open(out / "log.csv")))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return np.array([[float(row[name]) for name in ("loss", "mse", "vb", "grad_norm")] for row in rows])


# The paper's rate, flips, label dropout. The same sums in another order: 1e-5 is some 80 roundings of a loss of 1.
RECIPE = "--steps 20 --lr 1e-4 --lr-decay-steps 0 --flip --label-drop 0.1 --ckpt-every 0".split()


def test_two_processes_make_the_run_of_one_with_every_design(folder, tmp_path):
    four_runs = f"""rt, main = it.open_runtime(it.Config(dtype="fp32")), it.main  # one start for all
it.open_runtime, rt.close = lambda cfg: rt, lambda: None
it.main = lambda argv: [main([*argv, "--block", block, "--out", block]) for block in {DESIGNS}]"""
    for block in DESIGNS:
        train_tiny(folder, tmp_path / "one" / block, *RECIPE, "--block", block)
    status, text = finish(launch("train", tmp_path, four_runs, processes=2),
                          *tiny_flags(folder, tmp_path / "two", *RECIPE), cwd=tmp_path)
    assert status == 0, text
    for block in DESIGNS:
        one, two = numbers_of(tmp_path / "one" / block), numbers_of(tmp_path / block)
        assert len(one) == 20 and np.abs(one - two).max() < 1e-5, block
    assert text.count("done: ") == 4 and text.count("2 x cpu") == 4               # one process speaks


@pytest.mark.slow
@pytest.mark.parametrize("processes,flags", [(4, ""), (2, "--accum 2"), (4, "--accum 2"), (2, "--grad-checkpoint"),
                                             (2, "--compile --accum 2")])
def test_four_processes_and_accumulated_parts_make_it_too(processes, flags, folder, tmp_path):
    train_tiny(folder, tmp_path / "one", *RECIPE)
    status, text = finish(launch("train", tmp_path, processes=processes),
                          *tiny_flags(folder, tmp_path / "many", *RECIPE, *flags.split()))
    assert status == 0, text
    assert np.abs(numbers_of(tmp_path / "one") - numbers_of(tmp_path / "many")).max() < 1e-5


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes(folder, tmp_path):
    """10 steps in two processes and 10 in one, and the other way round, are 20 in one."""
    train_tiny(folder, tmp_path / "whole", *RECIPE)
    two = launch("train", tmp_path, processes=2)
    status, text = finish(two, *tiny_flags(folder, tmp_path / "a", *RECIPE, "--steps", "10"))
    assert status == 0, text
    train.main(["--resume", str(tmp_path / "a"), "--steps", "20"])
    train_tiny(folder, tmp_path / "b", *RECIPE, "--steps", "10")
    status, text = finish(two, "--resume", tmp_path / "b", "--steps", 20)
    assert status == 0, text
    for out in ("a", "b"):
        assert np.abs(numbers_of(tmp_path / "whole") - numbers_of(tmp_path / out)).max() < 1e-5


@pytest.mark.slow
def test_two_machines_make_it_too_and_prepare_the_data_once_each_at_the_most(folder, tmp_path):
    """Two launchers that meet, as on two machines with a common disk: each has a local rank 0, one has rank 0."""
    train_tiny(folder, tmp_path / "one", *RECIPE)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
               f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=1", *launch("train", tmp_path)[1:]]
    flags = tiny_flags(folder, tmp_path / "many", *RECIPE, "--cache", str(tmp_path / "new"))
    other = subprocess.Popen([*command, *flags], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    status, text = finish(command, *flags)
    text += other.communicate(timeout=120)[0]
    assert status == other.returncode == 0 and text.count("done: ") == 1, text
    assert np.abs(numbers_of(tmp_path / "one") - numbers_of(tmp_path / "many")).max() < 1e-5
    assert len(prepared(tmp_path / "new")) == 1


def test_shares_are_the_global_batch():
    """What the processes of a run load is, one after the other, what a single one loads: no two share noise or t."""
    cfg = train.Config(batch_size=12, device="cpu")
    images = np.random.default_rng(0).integers(256, size=(30, 3, 4, 4), dtype=np.uint8)
    whole, rt = train.draw_batch(cfg, images, np.arange(30), 5), train.Runtime(cfg)
    for world in (2, 3, 12):
        shares = []
        for rank in range(world):
            rt.rank, rt.world = rank, world
            shares.append(train.draw_batch(cfg, images, np.arange(30), 5, rt.share(12)))
        assert all(torch.equal(torch.cat(parts), x) for parts, x in zip(zip(*shares, strict=True), whole, strict=True))


def test_the_loop_names_no_backend():
    source = "".join(map(inspect.getsource, (train.train, train.train_step, train.Training))).replace("to_cpu", "")
    assert not re.search(r"xla|tpu|cuda|mps|cpu|nccl|gloo|ddp|dist\.|isinstance|world", source, re.IGNORECASE)


@pytest.mark.parametrize("patch,words", [
    ("if os.environ['RANK'] == '1': it.prepare_data = lambda *args: sys.exit(7)", "another process of this run"),
    ("""step = it.train_step
def dies(cfg, rt, *args):
    if rt.rank == 1 and args[-1] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(cfg, rt, *args)
it.train_step = dies""", "another process of this run")])
@pytest.mark.slow
def test_when_one_process_dies_the_others_end(patch, words, folder, tmp_path):
    """Killed in a step, or gone while the others wait for it: nothing hangs, and the last checkpoint is as it was."""
    command = launch("train", tmp_path, patch, processes=2)
    status, text = finish(command, *tiny_flags(folder, tmp_path / "out"), timeout=60)
    assert status != 0 and "gloo/transport" not in text, text
    assert words in text or re.search(r"exitcode +: (143|-15)", text), text       # or the launcher was faster
    if "dies" in patch:
        assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"] == 3


SIGNALS = """step, grid, draw = it.train_step, it.sample_grid, it.center_crop
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
def center_crop(*args, calls=iter(range(30))):
    if next(calls, None) == 29:                                                   # 20 are a probe before the writing
        at("preparation", os.environ.get("RANK", "0"))                            # of the one who does it
    return draw(*args)
it.train_step, it.sample_grid, it.center_crop = train_step, sample_grid, center_crop
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes,target,moment,name", [
    (1, "itself", "step 4", "SIGINT"), (1, "itself", "sampling", "SIGTERM"), (1, "itself", "preparation", "SIGTERM"),
    (1, "itself", "preparation", "SIGINT"), (2, "itself", "step 4", "SIGTERM"), (2, "launcher", "step 4", "SIGTERM"),
    (2, "both", "step 4", "SIGINT"), (2, "launcher", "sampling", "SIGTERM"),
    (2, "itself", "preparation", "SIGTERM")])
def test_a_signal_in_a_step_a_picture_or_the_preparation_ends_all_and_loses_nothing(
        processes, target, moment, name, folder, tmp_path):
    """To one worker or to the launcher: all stop at the same step, which is saved; in preparation, nothing is left."""
    patch = SIGNALS.replace("TARGET", target).replace("MOMENT", moment).replace("SIGNAL", name)
    status, text = finish(launch("train", tmp_path, patch, processes), *tiny_flags(
        folder, tmp_path / "out", *RECIPE, "--steps", "100000", "--sample-every", "4"), timeout=60)
    if moment == "preparation":
        number = 128 + getattr(signal, name)
        assert status == number if processes == 1 else status != 0 and f"exitcode  : {number}" in text, text
        assert not list((tmp_path / "cache").glob("*.part")) and not (tmp_path / "out").exists()
        return
    step = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"]
    assert text.count("stopped and saved") == 1 and f"saved at step {step};" in text and "Traceback" not in text.split(
        "torch/distributed")[0], text
    assert status == 0 or target != "itself"
    resume = re.search(r"go on with: (.*train.py) --resume (.*)", text)
    assert resume[1] == ("python train.py" if processes == 1 else "torchrun --nproc_per_node=2 train.py")
    train.main(["--resume", resume[2], "--steps", str(step + 2), "--sample-every", "0"])
    train_tiny(folder, tmp_path / "whole", *RECIPE, "--steps", str(step + 2))
    assert np.abs(numbers_of(tmp_path / "whole") - numbers_of(tmp_path / "out")).max() < 1e-5


@pytest.mark.parametrize("variables,flags,words", [
    ("4", "--device xla", "without torchrun"), ("4", "--device mps", "under torchrun"), ("1", "", "WORLD_SIZE"),
    ("4", "--batch-size 9", "not divisible by 2 devices"), ("0", "--device xla", "torch_xla"),
    ("0", "--device xla --compile", "--no-compile")])
def test_what_cannot_run_in_many_processes_is_refused(variables, flags, words, folder, tmp_path, monkeypatch):
    torchrun_s = dict(LOCAL_RANK="1", RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    for name in list(torchrun_s)[:int(variables)]:
        monkeypatch.setenv(name, torchrun_s[name])
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(sample.UserError, match=words):
        train_tiny(folder, tmp_path / "run", *flags.split())
    assert not list(tmp_path.iterdir())


def test_processes_of_other_settings_do_not_train_together(folder, tmp_path):
    """As when two machines are given two command lines: all of them end, in one line."""
    status, text = finish(launch("train", tmp_path, "sys.argv += ['--seed', os.environ['RANK']]", processes=2),
                          *tiny_flags(folder, tmp_path / "out"))
    assert status != 0 and text.count("do not have the same flags") == 2 and not (tmp_path / "out").exists(), text


def test_layer_norm_by_its_formula_is_torch_s():
    """What Runtime puts in the place of nn.LayerNorm on XLA, affine or not."""
    x = torch.randn(4, 7, 32) * 3 + 1
    for affine in (False, True):
        norm = torch.nn.LayerNorm(32, eps=1e-6, elementwise_affine=affine)
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)
        torch.testing.assert_close(train.layer_norm(norm, x), norm(x), rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Faults


def killed_run(argv, place, count):
    """train.main(argv), quietly, which kills itself after `count` calls of `place`: inside a write or a preparation."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    torch.set_num_threads(1)
    calls = iter(range(count))

    def dying(function):
        def die_or_go_on(*args, **kwargs):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return die_or_go_on

    class Halves:                                                                 # a file that is written half by half
        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(data[:len(data) // 2])
            self.rest(data[len(data) // 2:])

        def rest(self, data):
            self.file.write(data)
    if place == "write":
        Halves.rest, save = dying(Halves.rest), torch.save
        torch.save = lambda state, file: save(state, Halves(file))
    elif place:
        owner = train if place == "center_crop" else os
        setattr(owner, place, dying(getattr(owner, place)))
    train.main(argv)


@pytest.mark.slow
def test_runs_that_are_killed_end_like_one_that_was_not(folder, tmp_path, monkeypatch):
    """kill -9 at random moments of runs that save at every step, every third of them inside the writing of a checkpoint
    or of the cache: a run goes on and ends with the weights, average, moments and log of an undisturbed one, to the
    bit. KILLS=100 in the environment makes it a hundred."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    processes = multiprocessing.get_context("forkserver")                         # torch is imported once
    processes.set_forkserver_preload(["test_dit"])
    rng, goal, kills, runs = np.random.default_rng(0), int(os.environ.get("KILLS", 12)), [], 0
    flags = [*RECIPE, "--ckpt-every", "1"]

    def attempt(argv, place="", count=0, seconds=None):
        """Whether the run was killed, by itself or after so many seconds."""
        process = processes.Process(target=killed_run, args=([*map(str, argv)], place, count))
        process.start()
        process.join(timeout=seconds)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0
    attempt(tiny_flags(folder, tmp_path / "warm", *flags))
    began = time.perf_counter()
    attempt(tiny_flags(folder, tmp_path / "whole", *flags))
    duration, whole = time.perf_counter() - began, torch.load(tmp_path / "whole" / "ckpt.pt", weights_only=True)
    while len(kills) < goal:
        runs += 1
        out, cache, killed = tmp_path / f"run{runs}", tmp_path / f"cache{runs}", True
        while killed:
            argv = ["--resume", out] if (out / "ckpt.pt").exists() else [
                *tiny_flags(folder, out, *flags), "--cache", cache]
            place, count, seconds = "", 0, rng.uniform(0, duration)
            if len(kills) == goal:
                seconds = None
            elif len(kills) % 6 == 0:
                shutil.rmtree(cache, ignore_errors=True)
                place, count, seconds = *[("center_crop", rng.integers(20, 44)), ("fsync", rng.integers(2)),
                                          ("replace", rng.integers(2)), ("rename", 0)][rng.integers(4)], None
            elif len(kills) % 6 == 3 and cache.exists():
                place, count, seconds = [("fsync", 5), ("replace", 4), ("write", 20)][rng.integers(3)] + (None,)
            killed = attempt(argv, place, int(count), seconds)
            kills += [place or "anywhere"] * killed
        state = torch.load(out / "ckpt.pt", weights_only=True)
        assert state["step"] == 20 and len(prepared(cache)) == 1
        for key in ("model", "ema"):
            assert all(torch.equal(state[key][name], tensor) for name, tensor in whole[key].items())
        for i, moments in whole["opt"]["state"].items():
            assert all(torch.equal(state["opt"]["state"][i][name], tensor) for name, tensor in moments.items())
        assert np.array_equal(numbers_of(out), numbers_of(tmp_path / "whole"))
    print(f"\n{len(kills)} kills in {runs} runs: {({place: kills.count(place) for place in kills})}")


# ----------------------------------------------------------------------------------------------------------------------
# XLA: the same run, compiled for 1, 2 and 4 virtual devices, each run in a process of its own

needs_xla = pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="torch_xla is not installed")

COUNTED = """finish, counts = it.XLARuntime.finish_step, []
def finish_step(self):
    import torch_xla.debug.metrics as metrics
    finish(self)
    counts.append(metrics.counter_value("UncachedCompile"))
    fallbacks = [name for name in metrics.counter_names() if name.startswith("aten::") and "_local_scalar" not in name]
    open("counts.json", "w").write(it.json.dumps([counts, fallbacks]))
it.XLARuntime.finish_step = finish_step
"""


def on_xla(devices, tmp_path, *argv):
    """train.py on so many devices: (programs compiled until each step, operations that XLA lacks, the step as HLO)."""
    env = os.environ | dict(PJRT_DEVICE="CPU", CPU_NUM_DEVICES=str(devices),
                            XLA_FLAGS=f"--xla_dump_to={tmp_path / 'hlo'} --xla_dump_hlo_as_text")
    status, text = finish(launch("train", tmp_path, COUNTED), *argv, "--device", "xla", env=env, cwd=tmp_path)
    assert status == 0, text
    programs = [path.read_text() for path in (tmp_path / "hlo").glob("*cpu_after_optimizations.txt")]
    return *json.loads((tmp_path / "counts.json").read_text()), max(programs, key=len)


@needs_xla
@pytest.mark.slow
@pytest.mark.parametrize("devices,block,flags", [
    (1, "adaln-zero", ""), (2, "in-context", ""), (2, "cross-attention", "--accum 2"), (2, "adaln", ""),
    (2, "adaln-zero", "--accum 2"), (4, "adaln-zero", "--lr-decay-steps 30")])
def test_xla_makes_the_run_of_the_cpu(devices, block, flags, folder, tmp_path):
    """Losses to 1e-5; two compilations, of the first step and of all others; and no device asks for another's
    activations: there is no all-gather in the step, but an all-reduce."""
    flags = [*RECIPE, "--block", block, *flags.split()]
    train_tiny(folder, tmp_path / "cpu", *flags)
    compiled, fallbacks, step = on_xla(devices, tmp_path, *tiny_flags(folder, tmp_path / "xla", *flags))
    assert np.abs(numbers_of(tmp_path / "cpu") - numbers_of(tmp_path / "xla")).max() < 1e-5
    assert compiled[1:] == [compiled[1]] * 19 and compiled[1] - compiled[0] <= 2 and not fallbacks
    assert f"num_partitions={devices}" in step or devices == 1
    assert "all-gather" not in step and ("all-reduce" in step) == (devices > 1)


@needs_xla
@pytest.mark.slow
def test_a_checkpoint_goes_from_xla_to_a_machine_without_and_back(folder, tmp_path):
    """10 steps there and 10 here, and 10 here and 10 there, are 20 here; samples are drawn there, too."""
    train_tiny(folder, tmp_path / "whole", *RECIPE, "--sample-every", "20")
    on_xla(2, tmp_path, *tiny_flags(folder, tmp_path / "a", *RECIPE, "--steps", "10"))
    path = tmp_path / "a" / "ckpt.pt"
    without = f"import sys, torch; torch.load({str(path)!r}, weights_only=True); assert 'torch_xla' not in sys.modules"
    assert finish([sys.executable, "-c", without]) == (0, "") and b"xla:0" not in path.read_bytes()
    train.main(["--resume", str(tmp_path / "a"), "--steps", "20", "--device", "cpu"])
    train_tiny(folder, tmp_path / "b", *RECIPE, "--steps", "10")
    on_xla(2, tmp_path, "--resume", tmp_path / "b", "--steps", "20", "--sample-every", "20")
    for out in ("a", "b"):
        assert np.abs(numbers_of(tmp_path / "whole") - numbers_of(tmp_path / out)).max() < 1e-5
    grids = [np.asarray(Image.open(tmp_path / out / "samples" / "000020.png")).astype(int) for out in ("whole", "b")]
    assert np.abs(grids[0] - grids[1]).max() <= 2 and grids[0].std() > 20


@needs_xla
@pytest.mark.slow
@pytest.mark.parametrize("flags,tolerance,sign,times", [
    ("--grad-checkpoint", 1e-5, r" opt-barrier\(", 2), ("--dtype bf16", 1e-2, r"= bf16\[[\d,]*\]\S* dot\(", 12)])
def test_xla_checkpoints_blocks_and_multiplies_in_bfloat16(flags, tolerance, sign, times, folder, tmp_path):
    train_tiny(folder, tmp_path / "cpu", *RECIPE)
    flags = tiny_flags(folder, tmp_path / "xla", *RECIPE, *flags.split())
    on_xla(2, tmp_path, *flags)
    before = max(((tmp_path / "hlo").glob("*before_optimizations.txt")), key=lambda path: path.stat().st_size)
    assert len(re.findall(sign, before.read_text())) >= times
    cpu, xla = numbers_of(tmp_path / "cpu"), numbers_of(tmp_path / "xla")
    assert np.abs(cpu - xla)[:, :3].max() < tolerance


# ----------------------------------------------------------------------------------------------------------------------
# Slow: the first run that a newcomer makes


def judge(images, labels):
    """A small classifier of 16 x 16 images, trained for 1,500 steps: its guesses as a function of uint8 images."""
    nn = torch.nn
    layers = [layer for a, b, stride in [(3, 32, 1), (32, 64, 2), (64, 128, 2)]
              for layer in (nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU())]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 10))
    opt = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(1500):
        i = torch.randint(len(images), (128,))
        opt.zero_grad()
        F.cross_entropy(network(images[i] / 127.5 - 1), labels[i]).backward()
        opt.step()
    network.eval()
    return torch.no_grad()(lambda x: network(x / 127.5 - 1).argmax(1))


def real_shapes(numbers):
    images = np.stack([train.draw_shape(i, 16) for i in numbers]).transpose(0, 3, 1, 2).copy()
    return torch.from_numpy(images), torch.tensor([i % 10 for i in numbers])


@pytest.mark.slow
def test_the_first_run_ends_in_pictures_of_what_was_asked_for(tmp_path):
    """`python train.py`: a classifier of real shapes recognizes at least 95 % of 1,000 guided samples, which are no
    nearer to the training images than real ones that it never saw."""
    began = time.perf_counter()
    process = start("train.py", cwd=tmp_path)
    out, err = process.communicate()
    minutes = (time.perf_counter() - began) / 60
    run = tmp_path / "runs" / "shapes"
    assert process.returncode == 0, err
    assert {path.name for path in run.iterdir()} == {"ckpt.pt", "log.csv", "config.json", "samples"}
    seen, seen_labels = real_shapes(range(20_000))
    unseen, unseen_labels = real_shapes(range(20_000, 22_000))
    guess = judge(seen, seen_labels)
    real = (guess(unseen) == unseen_labels).double().mean().item()
    model, _ = sample.load_model(run / "ckpt.pt")
    labels = torch.arange(1000) % 10
    samples = sample.to_uint8(sample.sample_images(model, labels, steps=50, sampler="ddim", cfg_scale=2.0))
    hits = (guess(samples) == labels).sum().item()
    p, z, n = hits / 1000, 1.96, 1000                                             # Wilson's 95 % interval
    middle, half = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    near, real_near = (torch.cdist(x.flatten(1).float(), seen.flatten(1).float()).amin(1).median().item() / 768 ** 0.5
                       for x in (samples, unseen))
    print(f"\n{minutes:.1f} minutes; {hits} of {n} recognized, 95 % interval {low:.3f} to {high:.3f} "
          f"(real shapes {real:.3f}); nearest training image {near:.1f} grey levels away (real shapes {real_near:.1f})")
    assert real > 0.99 and hits >= 950 and near > 0.5 * real_near
