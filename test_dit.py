"""Claims about dit.py, sample.py and train.py, in their order, each proved against an oracle without their code.

    pytest                  every claim about a unit: under 90 s on two CPU cores, no network
    pytest -m slow          those that train: the built-in preset from its command to a classifier's verdict

An oracle is a scalar loop in float64, torch.distributions, an analytic model, the paper's table, or diffusers. float32
tables and float64 arithmetic agree to about 1e-6 relative; float32 networks to 1e-5.
"""
import argparse
import ast
import csv
import functools
import http.server
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
import threading
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
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
        official = {name: torch.empty(shape) for name, shape in expected.items()}
        sizes = sample.official_checkpoint("x.pt", official)["model_args"]
        for model in (DiT_models["DiT-XL/2"](), DiT(**sizes)):
            state = model.state_dict()
            assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    assert len(expected) == 292 and len(model.blocks) == 28 and model.blocks[0].attn.num_heads == 16


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


GOLDEN = {                      # eps[0, 0, 0, :2], v[1, 2, 7, 7] and mean square, in float64
    "in-context": (0.454647904, 0.033529559, -0.098851289, 0.227851025),
    "cross-attention": (0.261169705, -0.197926529, -0.332878179, 0.219882274),
    "adaln": (-0.127861076, 0.458805705, -0.128616197, 0.148526889),
    "adaln-zero": (0.112485214, 0.557405030, 0.018044891, 0.776139122)}


@pytest.mark.parametrize("block", DESIGNS)
def test_float32_outputs_stay_what_they_are(block):
    """Weights that are trained today mean the same tomorrow: of weights and an image that are sines, numbers written
    down once, by the code that naive_block proves."""
    model = tiny_dit(block)
    for k, p in enumerate(model.parameters()):
        p.data = (0.2 * torch.sin(k + torch.arange(p.numel(), dtype=torch.float64)).view(p.shape)).float()
    x = torch.sin(3 * torch.arange(2 * 3 * 8 * 8, dtype=torch.float64)).view(2, 3, 8, 8).float()
    out = model(x, torch.tensor([0, 999]), torch.tensor([1, 5]))
    numbers = [*out[0, 0, 0, :2].tolist(), out[1, 5, 7, 7].item(), (out ** 2).mean().item()]
    assert numbers == pytest.approx(GOLDEN[block], rel=1e-5, abs=1e-6)


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


@pytest.mark.parametrize("clip", [False, True])
def test_dpm_solver_ends_where_ddim_ends(clip):
    """Both follow the same ODE from the same noise: 25 steps of second order against 1,000 of first, exact denoiser."""
    model, noise = GaussianData(range(1000)), torch.randn(4, 3, 8, 8)
    fine = GaussianDiffusion().ddim_sample_loop(model, noise, clip_denoised=clip)
    seen = []
    coarse = sample.dpm_solver_loop(model, noise, 25, clip_denoised=clip, on_step=lambda i, *_: seen.append(i))
    assert (coarse - fine).abs().max() < 0.03 and seen == list(range(24, -1, -1))
    assert not clip or coarse.abs().max() <= 1


# ----------------------------------------------------------------------------------------------------------------------
# Official weights and latents


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    """A tiny AutoencoderKL of Stable Diffusion's outline (8 x smaller, 4 channels), with random weights."""
    from diffusers import AutoencoderKL
    torch.manual_seed(5)
    vae = AutoencoderKL(block_out_channels=(8, 8, 8, 8), down_block_types=["DownEncoderBlock2D"] * 4,
                        up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4, norm_num_groups=4)
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


def official_state(**sizes):
    """A state dict with the official names, of a small model that says something."""
    sizes = dict(input_size=4, patch_size=2, in_channels=4, hidden_size=384, depth=1, num_heads=6) | sizes
    return tiny_dit(**sizes).state_dict()


@pytest.mark.parametrize("layout", ["weights", "training"])
def test_official_weights_are_loaded_as_they_are(layout, tmp_path):
    """The published file, a state dict, and the official train.py's, which holds an argparse.Namespace."""
    state = official_state(num_classes=1000)
    other = {name: tensor + 1 for name, tensor in state.items()}
    content = state if layout == "weights" else dict(model=other, ema=state, opt={}, args=argparse.Namespace(lr=1e-4))
    torch.save(content, tmp_path / "official.pt")
    model, info = sample.load_model(tmp_path / "official.pt")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert len(model.blocks) == 1 and model.blocks[0].attn.num_heads == 6 and model.num_classes == 1000
    assert info["space"] == "latent" and info["config"]["scale"] == 0.18215
    assert info["class_names"][207] == "golden retriever" and info["class_names"][360] == "otter"


def test_sizes_of_official_weights_follow_from_their_shapes():
    """All twelve, and other class counts, without memory: the model rebuilt has the names and shapes it came from."""
    for name, build in DiT_models.items():
        with torch.device("meta"):
            state = build(input_size=64, num_classes=10, learn_sigma=name != "DiT-B/4").state_dict()
            args = sample.official_checkpoint("x.pt", state)["model_args"]
            again = DiT(**args)
        assert {key: tensor.shape for key, tensor in again.state_dict().items()} == {
            key: tensor.shape for key, tensor in state.items()}
        assert again.blocks[0].attn.num_heads == build.keywords["num_heads"]


def test_keys_that_do_not_fit_are_named(tmp_path):
    state = official_state()
    for change, words in [(dict(extra=torch.zeros(1)), "extra is not the model's"),
                          ({"blocks.0.attn.proj.bias": None}, "blocks.0.attn.proj.bias is missing"),
                          ({"t_embedder.mlp.0.bias": torch.zeros(3)}, "t_embedder.mlp.0.bias is (3,), not (384,)"),
                          ({name: None for name in state if "mlp" in name}, "and 5 more"),
                          (dict(pos_embed=None), "it lacks 'pos_embed'"),
                          (dict(pos_embed=3), "nor an official one"), ({7: 8}, "nor an official one"),
                          (dict(pos_embed=torch.zeros(4)), "nor an official one"),
                          ({"t_embedder.mlp.0.bias": [1.0]}, "not (384,)"),
                          ({"x_embedder.proj.weight": torch.zeros(390, 4, 2, 2)}, "describes a model that cannot be")]:
        changed = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
        torch.save(changed, tmp_path / "x.pt")
        with pytest.raises(sample.UserError) as error:
            sample.load_model(tmp_path / "x.pt")
        assert words in str(error.value) and str(error.value).count(" is ") <= 3


def test_official_weights_are_downloaded_once(tmp_path, monkeypatch):
    """From a server on this machine; what is not there, or no server at all, is one line and leaves no file."""
    (tmp_path / "files").mkdir()
    path, requests = tmp_path / "files" / "DiT-XL-2-256x256.pt", []
    torch.save(official_state(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "files")

        def log_request(self, code="-", size="-"):
            requests.append(self.path)

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}/"
    for name, url in sample.OFFICIAL.items():
        monkeypatch.setitem(sample.OFFICIAL, name, here + url.rpartition("/")[2])
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    with pytest.raises(sample.UserError, match="broke off"):
        sample.load_model("DiT-XL/2-256")
    path.write_bytes(whole)
    for _ in range(2):
        model, info = sample.load_model("DiT-XL/2-256")
    assert requests == ["/DiT-XL-2-256x256.pt"] * 2 and model.num_classes == 5 and len(info["class_names"]) == 5
    with pytest.raises(sample.UserError, match="cannot download .*512x512.pt"):
        sample.load_model("DiT-XL/2-512")
    server.shutdown()
    server.server_close()
    with pytest.raises(sample.UserError, match="give the file's path"):
        sample.load_model("DiT-XL/2-512")
    left = [path.name for path in (tmp_path / "hub" / "checkpoints").iterdir() if path.suffix != ".lock"]
    assert left == ["DiT-XL-2-256x256.pt"]


def test_latents_are_decoded_with_the_scale_taken_off(vae_folder):
    """A picture of the latents times 0.18215 is the VAE's of the latents, also when there are more than go at once."""
    from diffusers import AutoencoderKL
    vae, z = sample.load_vae(vae_folder), torch.randn(9, 4, 4, 4)
    reference = AutoencoderKL.from_pretrained(vae_folder).eval()
    with torch.no_grad():
        expected = torch.cat([reference.decode(z[k:k + 1]).sample for k in range(9)])
    torch.testing.assert_close(sample.decode(vae, 0.18215 * z, 0.18215), expected, rtol=1e-4, atol=1e-5)
    assert expected.shape == (9, 3, 32, 32) and sample.SCALE == 0.18215


@pytest.fixture
def threads():
    """Sets are drawn in one thread; the other tests are not."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.mark.parametrize("name", ["stabilityai/sd-vae-ft-mse", "CompVis/stable-diffusion-v1-4/vae"])
def test_a_vae_comes_from_the_hub_by_its_name(name, vae_folder, tmp_path, monkeypatch):
    """From the hub's own cache, which is filled by hand: there is no network."""
    owner, repository, *folder = name.split("/")
    cache = tmp_path / f"models--{owner}--{repository}"
    shutil.copytree(vae_folder, cache / "snapshots" / ("a" * 40) / "/".join(folder))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expected = sample.load_vae(vae_folder).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in sample.load_vae(name).state_dict().items())


def test_sample_decodes_latents_and_guides_the_channels_asked_for(vae_folder, tmp_path, threads):
    torch.save(official_state(num_classes=10), tmp_path / "official.pt")
    flags = [str(tmp_path / "official.pt"), "--classes", "3,7", "--per-class", "2", "--vae", str(vae_folder),
             "--device", "cpu", "--sampler", "dpm++", "--steps", "4"]
    grids = []
    for channels in ([], ["--cfg-channels", "3"]):
        sample.main([*flags, *channels, "--out", str(tmp_path / "x.png"), "--gif", str(tmp_path / "x.gif")])
        grids.append(np.asarray(Image.open(tmp_path / "x.png")).astype(int))
    model, _ = sample.load_model(tmp_path / "official.pt")
    latents = sample.sample_images(model, [3, 3, 7, 7], steps=4, sampler="dpm++", cfg_channels=3, clip_denoised=False)
    images = sample.to_uint8(sample.decode(sample.load_vae(vae_folder), latents, sample.SCALE))
    expected = np.asarray(sample.grid_image(images, 2)).astype(int)
    assert np.abs(grids[1] - expected).max() <= 1 and np.abs(grids[0] - expected).max() > 1
    assert Image.open(tmp_path / "x.gif").n_frames == 4
    shutil.copytree(vae_folder, tmp_path / "vae")
    flags = [flags[0], "--num-samples", "1", "--steps", "1", "--out", str(tmp_path / "set"), "--vae"]
    sample.main([*flags, str(vae_folder)])
    assert Image.open(tmp_path / "set" / "000000.png").size == (32, 32)
    with pytest.raises(sample.UserError, match="another set, of vae"):
        sample.main([*flags, str(tmp_path / "vae")])


def test_a_vae_of_2022_is_loaded_whole_and_one_with_a_gap_is_not(vae_folder, tmp_path):
    """The hub's files have the attention's names of then; diffusers would fill gaps with whatever is in memory."""
    import safetensors.torch
    for folder in ("old", "gap"):
        shutil.copytree(vae_folder, tmp_path / folder)
    path = "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(vae_folder / path)
    then = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    renamed = {functools.reduce(lambda name, new: name.replace(new, then[new]), then, name): tensor
               for name, tensor in weights.items()}
    assert renamed.keys() != weights.keys()
    safetensors.torch.save_file(renamed, tmp_path / "old" / path, metadata={"format": "pt"})
    loaded = sample.load_vae(tmp_path / "old").state_dict()
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)
    kept = {name: tensor for name, tensor in weights.items() if "quant_conv" not in name}
    safetensors.torch.save_file(kept, tmp_path / "gap" / path, metadata={"format": "pt"})
    with pytest.raises(sample.UserError, match="missing or not its own: .*quant_conv"):
        sample.load_vae(tmp_path / "gap")


@pytest.mark.parametrize("flags,words", [
    ("--vae no/such/vae", "no VAE 'no/such/vae'"), ("--vae EMPTY", "AutoencoderKL"),
    ("--vae OTHER", "3 channels of 1/4 of the size"), ("--cfg-channels 5", "1 to 4"), ("--cfg-channels 0", "1 to 4")])
def test_what_is_no_vae_is_refused(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "EMPTY").mkdir()
    from diffusers import AutoencoderKL
    AutoencoderKL(block_out_channels=(8, 8, 8), down_block_types=["DownEncoderBlock2D"] * 3, norm_num_groups=4,
                  up_block_types=["UpDecoderBlock2D"] * 3, latent_channels=3).save_pretrained("OTHER")
    torch.save(official_state(num_classes=10), "official.pt")
    with pytest.raises(sample.UserError) as error:
        sample.main(["official.pt", *flags.split(), "--device", "cpu"])
    assert words in str(error.value) and "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Sample sets


def read_set(out):
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


def test_a_set_is_shared_by_processes_and_goes_on_after_any_stop(tiny_run, tmp_path, threads):
    """Its images are those of sample_images, its labels uniform; the npz is what numpy reads from what numpy writes."""
    flags = [str(tiny_run / "ckpt.pt"), "--num-samples", "11", "--batch-size", "3", "--steps", "4", "--device", "cpu"]
    torch.set_num_threads(2)
    sample.main([*flags, "--out", str(tmp_path / "one")])
    assert torch.get_num_threads() == 1                                           # as torchrun's: sums keep their order
    patch = """draw, write = it.sample_images, sys.stdout.write
it.sample_images = lambda *args, **kwargs: (write(f"a batch of {os.environ['RANK']}\\n"), draw(*args, **kwargs))[1]"""
    status, text = finish(launch("sample", tmp_path, patch, processes=2), *flags, "--out", tmp_path / "two")
    assert status == 0 and text.count("samples.npz for ADM") == 1, text
    assert text.count("a batch of 0") == text.count("a batch of 1") == 2
    one = read_set(tmp_path / "one")
    assert sorted(one) == [f"{i:06d}.png" for i in range(11)] and read_set(tmp_path / "two") == one
    assert (tmp_path / "two" / "samples.npz").read_bytes() == (tmp_path / "one" / "samples.npz").read_bytes()
    array = np.load(tmp_path / "one" / "samples.npz")["arr_0"]
    assert array.shape == (11, 8, 8, 3) and array.dtype == np.uint8
    labels = sample.set_labels(argparse.Namespace(labels=None, seed=0, num_samples=11), ["ant", "bee", "cat"])
    model, _ = sample.load_model(tiny_run / "ckpt.pt")
    images = sample.to_uint8(sample.sample_images(model, labels[3:6], range(3, 6), steps=4, cfg_scale=2.0))
    assert np.abs(array[3:6] - images.permute(0, 2, 3, 1).numpy().astype(int)).max() <= 1
    for name in ("000001.png", "000002.png", "samples.npz"):                      # a stop: some images are missing
        (tmp_path / "two" / name).unlink()
    (tmp_path / "two" / "000001.png.part").write_bytes(b"half")
    sample.main([*flags, "--out", str(tmp_path / "two")])
    assert read_set(tmp_path / "two") == one and not list((tmp_path / "two").glob("*.part"))
    before = (tmp_path / "two" / "settings.json").read_bytes()
    for other, words in [("--seed 1", "seed 0"), ("--dtype bf16", "dtype fp32"), ("--compile", "compile False")]:
        with pytest.raises(sample.UserError, match=f"another set, of {words}"):
            sample.main([*flags, *other.split(), "--out", str(tmp_path / "two")])
    state = torch.load(tiny_run / "ckpt.pt", weights_only=True)                   # trained anew, under the same name
    state["ema"]["x_embedder.proj.bias"] += 1e-3
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(sample.UserError, match="another set, of weights"):
        sample.main([str(tmp_path / "other.pt"), *flags[1:], "--out", str(tmp_path / "two")])
    (tmp_path / "labels.txt").write_text("cat\n" * 11)
    with pytest.raises(sample.UserError, match="another set, of labels"):
        sample.main([*flags, "--labels", str(tmp_path / "labels.txt"), "--out", str(tmp_path / "two")])
    assert (tmp_path / "two" / "settings.json").read_bytes() == before
    older = {name: value for name, value in json.loads(before).items() if name not in ("dtype", "compile")}
    (tmp_path / "two" / "settings.json").write_text(json.dumps(older))            # begun before there were these
    sample.main([*flags, "--out", str(tmp_path / "two")])
    (tmp_path / "two" / "settings.json").unlink()
    with pytest.raises(sample.UserError, match="another origin"):
        sample.main([*flags, "--out", str(tmp_path / "two")])


@pytest.mark.parametrize("broken", [0, 8])
def test_a_picture_that_cannot_be_written_ends_the_set(broken, tiny_run, tmp_path, threads, monkeypatch):
    """The first or the last batch fails in the thread that writes: it is told, and no set looks whole."""
    whole = sample.write_pngs

    def write_pngs(paths, images):
        if any(path.name == f"{broken:06d}.png" for path in paths):
            raise OSError("no space left on device")
        whole(paths, images)

    monkeypatch.setattr(sample, "write_pngs", write_pngs)
    flags = "--num-samples 9 --batch-size 3 --steps 2 --device cpu".split()
    with pytest.raises(sample.UserError, match="no space left"):
        sample.main([str(tiny_run), *flags, "--out", str(tmp_path)])
    assert not (tmp_path / "samples.npz").exists()


def test_labels_of_a_set_are_uniform_or_of_a_file(tmp_path):
    names = ["ant", "bee", "cat"]
    args = argparse.Namespace(labels=None, seed=0, num_samples=3000)
    labels = sample.set_labels(args, names)
    counts = [labels.count(c) for c in range(3)]
    assert sum((n - 1000) ** 2 / 1000 for n in counts) < 13.8                      # chi squared, 2 degrees: 1 in 1000
    assert sample.set_labels(argparse.Namespace(**vars(args) | dict(num_samples=10)), names) == labels[:10]
    assert sample.set_labels(argparse.Namespace(**vars(args) | dict(seed=1)), names) != labels
    (tmp_path / "labels.txt").write_text("cat\n0\nbee\n")
    args = argparse.Namespace(labels=tmp_path / "labels.txt", seed=0, num_samples=3)
    assert sample.set_labels(args, names) == [2, 0, 1]
    assert sample.set_labels(args, ["0,1", "cat", "bee"]) == [1, 0, 2]             # a line is one class
    for number, words in [(5, "has 4 lines: it needs 5"), (4, "no class ''")]:
        args.num_samples = number
        with pytest.raises(sample.UserError, match=words):
            sample.set_labels(args, names)


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


def prepare(cfg, source):
    """(images, labels) of a plain process, of pixels or of latents as cfg says."""
    rt = train.Runtime(cfg)
    return train.prepare_data(cfg, rt, source, train.Latents(cfg, rt) if cfg.vae else train.Pixels(cfg))


def test_a_folder_of_images_is_prepared_once_into_arrays(folder, tmp_path, monkeypatch):
    cfg = train.Config(data=str(folder), image_size=6, cache=str(tmp_path / "c"))
    source = train.open_source(cfg)
    images, labels = prepare(cfg, source)
    assert images.shape == (24, 3, 6, 6) and images.dtype == np.uint8 and isinstance(images, np.memmap)
    assert labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8 and source.class_names == ["ant", "bee", "cat"]
    for i in range(24):                                                           # each its own colour in the middle
        assert abs(int(images[i, 0, 3, 3]) - (60 * (i // 8) + 5 * (i % 8))) <= 2
    reads = []
    again, _ = prepare(cfg, source._replace(load=lambda i: reads.append(i) or source.load(i)))
    assert np.array_equal(images, again) and len(reads) == 20                     # a sample, to know the code by
    other, _ = prepare(cfg, source._replace(load=lambda i: 255 - source.load(i)))   # code has changed
    assert np.array_equal(other, 255 - images)
    monkeypatch.setattr(cfg, "image_size", 4)                                     # another size: other arrays
    assert prepare(cfg, train.open_source(cfg))[0].shape == (24, 3, 4, 4)


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
    images, labels = prepare(cfg, train.open_source(cfg))
    assert np.array_equal(images.transpose(0, 2, 3, 1), Downloaded.data) and labels.tolist() == [1, 0, 1, 0]
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(sample.UserError, match="--data"):
        train.open_source(cfg)


def prepared(cache):
    """The data sets in a cache that are whole."""
    return [path.parent.name for path in cache.glob("*/labels.npy")]


def test_interrupted_preparation_leaves_nothing_to_be_taken_for_whole(folder, tmp_path, monkeypatch):
    cfg = train.Config(data=str(folder), image_size=6, cache=str(tmp_path / "c"))
    source = train.open_source(cfg)

    def load(i):
        reads.append(i)
        if i == 22 and len(reads) > 20:                           # beyond the sample
            raise KeyboardInterrupt
        return source.load(i)
    reads, loaded = [], source._replace(load=load)
    monkeypatch.setattr(train, "PART", 8)
    with pytest.raises(KeyboardInterrupt):
        prepare(cfg, loaded)
    assert len(list((tmp_path / "c").glob("*/images.npy"))) == 1 and prepared(tmp_path / "c") == []
    again = []
    images, _ = prepare(cfg, source._replace(load=lambda i: again.append(i) or source.load(i)))
    assert sorted(again[20:]) == list(range(16, 24))              # what was done is not done again
    assert all((images[i] == source.load(i).transpose(2, 0, 1)).all() for i in range(24))
    [whole] = prepared(tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c" / whole).iterdir()) == [
        "images.npy", "labels.npy", "settings.json"]


LATENT = ["--image-size", "32"]                                                   # 4 x 4 x 4 latents


def test_latents_are_the_posterior_of_each_image_and_of_its_mirror_image(folder, vae_folder, tmp_path):
    """Means and deviations are diffusers', of one image at a time, rounded to float16."""
    from diffusers import AutoencoderKL
    cfg = train.Config(data=str(folder), image_size=32, vae=str(vae_folder), cache=str(tmp_path), device="cpu")
    source, vae = train.open_source(cfg), AutoencoderKL.from_pretrained(vae_folder).eval()
    moments, labels = prepare(cfg, source)
    assert moments.shape == (24, 2, 8, 4, 4) and moments.dtype == np.float16 and isinstance(moments, np.memmap)
    assert labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    for i in (0, 9, 23):
        image = torch.from_numpy(source.load(i).copy()).permute(2, 0, 1)[None] / 255 * 2 - 1
        for mirrored, ours in zip((False, True), moments[i].astype(np.float32), strict=True):
            with torch.no_grad():
                posterior = vae.encode(image.flip(-1) if mirrored else image).latent_dist
            expected = torch.cat([posterior.mean, (posterior.logvar / 2).exp()], dim=1)[0].numpy()
            np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-5)
    assert np.abs(moments[0, 0, :, :, ::-1].astype(float) - moments[0, 1]).max() > 0.01    # not the mirrored latent


def test_a_step_samples_the_flip_and_the_posterior_afresh():
    """A deviation of 0 shows whose mean it is, a mean of 0 that what is added is standard normal, and new each step."""
    cfg = train.Config(batch_size=64, vae="vae", seed=3)
    moments = np.zeros((64, 2, 8, 4, 4), np.float16)
    moments[:, :, :4] = (np.arange(64)[:, None] + 0.5 * np.arange(2))[:, :, None, None, None]      # mean: image, flip
    x, *_ = train.draw_batch(cfg, moments, np.arange(64), 1)
    values = (x.unique() / 0.18215).round(decimals=3)
    assert x.shape == (64, 4, 4, 4) and x.dtype == torch.float32 and values.numel() == 64
    flips = values % 1
    assert set(flips.tolist()) == {0.0, 0.5} and 16 < (flips > 0).sum() < 48
    moments[:, :, :4], moments[:, :, 4:] = 0, 1
    draws = []
    for step in range(1, 21):
        x, _, _, noise, _ = train.draw_batch(cfg, moments, np.arange(64), step)
        share = train.draw_batch(cfg, moments, np.arange(64), step, slice(16, 32))
        assert torch.equal(share[0], x[16:32]) and torch.equal(share[3], noise[16:32])
        draws += [x / 0.18215, noise]
    draws = torch.stack(draws).flatten(1).double()                                # 40 rows of 4096 numbers
    correlation = draws @ draws.T / draws.shape[1] - torch.eye(len(draws))
    assert correlation.abs().max() < 5 * 2 ** 0.5 / draws.shape[1] ** 0.5         # five sigmas, also of the variances


def test_another_vae_or_size_makes_another_cache_and_is_no_way_to_resume(folder, vae_folder, tmp_path):
    from diffusers import AutoencoderKL
    flags = [*LATENT, "--steps", "2", "--vae"]
    state = train_tiny(folder, tmp_path / "run", *flags, str(vae_folder))
    assert state["config"]["scale"] == 0.18215 and state["config"]["vae"] == str(vae_folder)
    assert state["model_args"]["in_channels"] == 4 and state["model_args"]["input_size"] == 4
    other = AutoencoderKL.from_pretrained(vae_folder)
    torch.nn.init.normal_(other.encoder.conv_in.weight)
    other.save_pretrained(tmp_path / "other")
    shutil.copytree(vae_folder, tmp_path / "moved")
    resume = ["--resume", str(tmp_path / "run"), "--steps", "4", "--vae"]
    with pytest.raises(sample.UserError, match="is not the VAE"):
        train.main([*resume, str(tmp_path / "other")])
    with pytest.raises(sample.UserError, match="--vae +.the run has .*vae"):      # pixels
        train.main([*resume, ""])
    train.main([*resume, str(tmp_path / "moved")])                                # the same one elsewhere
    [whole] = prepared(tmp_path / "cache")
    assert json.loads((tmp_path / "cache" / whole / "settings.json").read_text())["scale"] == 0.18215
    train_tiny(folder, tmp_path / "two", *flags, str(tmp_path / "other"))
    train_tiny(folder, tmp_path / "three", *flags, str(vae_folder), "--image-size", "48")
    assert len(prepared(tmp_path / "cache")) == 3


def test_latents_far_from_a_deviation_of_1_are_noted(folder, vae_folder, tmp_path, capsys, monkeypatch):
    flags = [*LATENT, "--steps", "1", "--vae", str(vae_folder)]
    train_tiny(folder, tmp_path / "run", *flags)
    spread = float(re.search(r"standard deviation is ([0-9.]+), far from 1", capsys.readouterr().out)[1])
    [whole] = prepared(tmp_path / "cache")
    mean, std = np.split(np.load(tmp_path / "cache" / whole / "images.npy")[:, 0].astype(float), 2, axis=1)
    z = 0.18215 * (mean + std * np.random.default_rng(0).standard_normal((100, *mean.shape)))
    assert abs(spread - z.std()) < 0.01
    monkeypatch.setattr(train, "SCALE", 0.18215 / spread)
    train_tiny(folder, tmp_path / "two", *flags)
    assert "far from 1" not in capsys.readouterr().out and len(prepared(tmp_path / "cache")) == 2


@pytest.mark.slow
def test_processes_share_the_encoding_and_train_on_the_same_latents(folder, vae_folder, tmp_path, monkeypatch):
    """Each encodes some parts, none is encoded twice, the cache is that of one process, and so are the losses."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    patch = """it.PART, encode, met = 2, it.Latents.encode, []
def counted(self, images):
    met or it.dist.barrier()                              # so that both are there
    met.append(print(f"encoded {len(images)} of rank {os.environ['RANK']}\\n", end="", flush=True))
    return encode(self, images)
it.Latents.encode = counted"""
    flags = [*RECIPE, *LATENT, "--vae", str(vae_folder)]
    status, text = finish(launch("train", tmp_path, patch, processes=2), *tiny_flags(folder, tmp_path / "two", *flags))
    assert status == 0, text
    assert text.count("encoded 2 of rank") == 12 and text.count("of rank 0") in range(1, 12), text
    monkeypatch.setattr(train, "PART", 2)
    train_tiny(folder, tmp_path / "one", *flags)
    assert len(prepared(tmp_path / "cache")) == 1
    assert np.abs(numbers_of(tmp_path / "one") - numbers_of(tmp_path / "two")).max() < 1e-5
    train_tiny(folder, tmp_path / "alone", *flags, "--cache", str(tmp_path / "new"))
    shared, own = (np.load(next(cache.glob("*/images.npy"))) for cache in (tmp_path / "cache", tmp_path / "new"))
    np.testing.assert_allclose(own.astype(float), shared.astype(float), rtol=1e-3, atol=1e-5)


def test_a_run_on_latents_ends_in_pictures(folder, vae_folder, tmp_path):
    """Its own grid, and sample.py's from its checkpoint, are images, eight times as large as the latents."""
    state = train_tiny(folder, tmp_path / "run", *LATENT, "--steps", "2", "--sample-every", "2", "--vae",
                       str(vae_folder))
    assert Image.open(tmp_path / "run" / "samples" / "000002.png").size == (8 * 68 + 4, 3 * 68 + 4)     # enlarged to 64
    sample.main([str(tmp_path / "run" / "ckpt.pt"), "--classes", "bee", "--per-class", "2", "--steps", "3", "--device",
                 "cpu", "--out", str(tmp_path / "x.png")])
    assert Image.open(tmp_path / "x.png").size == (2 * 68 + 4, 68 + 4)
    model, info = sample.load_model(tmp_path / "run" / "ckpt.pt")
    latents = sample.sample_images(model, [0, 1, 2], [0, 8, 16], steps=25, sampler="ddim", clip_denoised=False)
    images = sample.to_uint8(sample.decode(sample.load_vae(vae_folder), latents, 0.18215))
    first = np.asarray(Image.open(tmp_path / "run" / "samples" / "000002.png"))[:, :68 + 4].astype(int)
    assert np.abs(first - np.asarray(sample.grid_image(images, 1))).max() <= 1 and info["space"] == "latent"
    assert state["class_names"] == ["ant", "bee", "cat"]


def test_unconditional_training_is_one_class(folder, tmp_path):
    """One folder of images; without label dropout there is no null class, and guidance is refused."""
    shutil.copytree(folder / "bee", tmp_path / "data" / "mine")
    state = train_tiny(tmp_path / "data", tmp_path / "run", "--label-drop", "0")
    flags = [str(tmp_path / "run" / "ckpt.pt"), "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "x.png")]
    sample.main(flags)
    assert state["class_names"] == ["mine"] and Image.open(tmp_path / "x.png").size == (8 * 68 + 4, 68 + 4)
    with pytest.raises(sample.UserError, match="without label dropout"):
        sample.main([*flags, "--cfg-scale", "4"])
    with pytest.raises(sample.UserError, match="without label dropout"):
        sample.main([*flags, "--cfg-scale", "0"])


@pytest.mark.parametrize("source", ["run", "other classes", "official", "official file"])
def test_a_run_starts_from_the_averaged_weights_of_another(source, folder, tiny_run, tmp_path, capsys):
    """At a rate of 0 they are what it ends with; with other classes all but the label table."""
    table, flags, path = "y_embedder.embedding_table.weight", [], tmp_path / "init.pt"
    state = torch.load(tiny_run / "ckpt.pt", weights_only=True)
    if source.startswith("official"):
        flags = ["--hidden-size", "384", "--depth", "1", "--num-heads", "6"]
        state = dict(ema=official_state(input_size=8, in_channels=3, num_classes=3))
        if source == "official file":
            state = dict(model={}, opt={}, args=argparse.Namespace(model="DiT-S/2"), ema=state["ema"])
    if source == "other classes":
        state["ema"][table] = torch.randn(8, 32)
    torch.save(state["ema"] if source == "official" else state, path)
    ours = train_tiny(folder, tmp_path / "out", *flags, "--lr", "0", "--steps", "1", "--init", str(path))
    for name, weight in state["ema"].items():
        if source == "other classes" and name == table:
            assert ours["ema"][name].shape == (4, 32) and 0.01 < ours["ema"][name].std() < 0.03
        else:
            assert torch.equal(ours["ema"][name], weight) and torch.equal(ours["model"][name], weight)
    said = "all but the label table" if source == "other classes" else "all weights"
    assert f"{said} taken from {path}" in capsys.readouterr().out
    path.unlink()                                                                 # not needed to go on
    train.main(["--resume", str(tmp_path / "out"), "--steps", "2"])


def test_a_start_from_another_model_names_what_does_not_fit(folder, tiny_run, tmp_path):
    with pytest.raises(sample.UserError, match="x_embedder.proj.bias is .32,., not .48,.") as error:
        train_tiny(folder, tmp_path / "out", "--hidden-size", "48", "--init", str(tiny_run / "ckpt.pt"))
    assert "more" in str(error.value) and not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_whoever_prepares_waits_for_what_another_is_at(folder, tmp_path, monkeypatch):
    """One thread is held up in its first part until the other has come to the lock of that part."""
    cfg = train.Config(data=str(folder), image_size=6, cache=str(tmp_path), device="cpu")
    source, holds, waits, begun = train.open_source(cfg), threading.Event(), threading.Event(), []

    class Lock(train.FileLock):
        def acquire(self, *args, **kwargs):
            if Path(self.lock_file).name == "0.lock" and holds.is_set():
                waits.set()
            return super().acquire(*args, **kwargs)

    def slow(i):
        begun.append(i)
        if len(begun) > 20:                                                       # beyond the sample
            holds.set()
            waits.wait()
        return source.load(i)
    monkeypatch.setattr(train, "PART", 8)
    monkeypatch.setattr(train, "FileLock", Lock)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(prepare, cfg, source._replace(load=slow))
        holds.wait()
        try:
            reads = []
            images, _ = prepare(cfg, source._replace(load=lambda i: reads.append(i) or source.load(i)))
            assert all((images[i] == source.load(i).transpose(2, 0, 1)).all() for i in range(24))
            assert not {*reads[20:]} & {*range(8)}                                # that is the other's
        finally:
            waits.set()
        first.result()


def test_what_another_has_finished_in_the_meantime_is_left_as_it_is(folder, tmp_path, monkeypatch):
    """A process that comes to the last lock finds the data set whole, and neither writes nor removes anything."""
    cfg = train.Config(data=str(folder), image_size=6, cache=str(tmp_path), device="cpu")
    source, locks = train.open_source(cfg), []

    def lock(path):
        locks.append(Path(path).parent)
        if locks.count(tmp_path) == 2:                                            # beside the folder: first and last
            locks.append(tmp_path)
            expected = prepare(cfg, source)[0].copy()
            [whole] = prepared(tmp_path)
            inodes.update({file: file.stat().st_ino for file in (tmp_path / whole).iterdir()}, images=expected)
        return FileLock(path)
    inodes = {}
    monkeypatch.setattr(train, "FileLock", lock)
    images, _ = prepare(cfg, source)
    assert np.array_equal(images, inodes.pop("images")) and len(inodes) == 3
    assert {file: file.stat().st_ino for file in next(iter(inodes)).parent.iterdir()} == inodes


def test_a_damaged_cache_is_named_or_made_again(folder, tmp_path):
    cfg = train.Config(data=str(folder), image_size=6, cache=str(tmp_path), device="cpu")
    source = train.open_source(cfg)
    before = prepare(cfg, source)[0].copy()
    [whole] = prepared(tmp_path)
    with open(tmp_path / whole / "images.npy", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(sample.UserError, match=f"{whole} is damaged .*: remove it"):
        prepare(cfg, source)
    for name in ("images.npy", "labels.npy"):
        (tmp_path / whole / name).unlink()
    (tmp_path / whole / "0.done").touch()                                         # without the file it speaks of
    assert np.array_equal(prepare(cfg, source)[0], before)


def test_a_broken_image_is_told_before_any_is_encoded(folder, vae_folder, tmp_path, monkeypatch):
    cfg = train.Config(data=str(folder), image_size=32, vae=str(vae_folder), cache=str(tmp_path), device="cpu")
    source, loads = train.open_source(cfg), []

    def load(i):
        loads.append(i)
        if i == 23 and len(loads) > 20:                                           # beyond the sample
            raise sample.UserError("cannot read the image 23")
        return source.load(i)
    monkeypatch.setattr(train, "PART", 8)
    monkeypatch.setattr(train.Latents, "encode", None)
    with pytest.raises(sample.UserError, match="image 23"):
        prepare(cfg, source._replace(load=load))


def test_latents_that_are_no_numbers_are_not_kept(folder, vae_folder, tmp_path):
    from diffusers import AutoencoderKL
    vae = AutoencoderKL.from_pretrained(vae_folder)
    vae.quant_conv.weight.data *= 1e9                                             # beyond float16
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(sample.UserError, match="makes latents that are no numbers"):
        train_tiny(folder, tmp_path / "run", *LATENT, "--vae", str(tmp_path / "vae"))
    assert prepared(tmp_path / "cache") == []


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


def setup_step(accum=1, dtype="fp32", **settings):
    cfg = train.Config(batch_size=4, accum=accum, label_drop=0.5, device="cpu", dtype=dtype, image_size=8,
                       patch_size=2, hidden_size=32, depth=2, num_heads=4, **settings)
    rt = train.Runtime(cfg)
    training = train.Training(cfg, rt, 5)
    training.original.load_state_dict(tiny_dit(cfg.block).state_dict())
    training.ema.load_state_dict(tiny_dit(cfg.block).state_dict())
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
# Speed: the same numbers on the fast paths, and --bench


def test_attention_in_train_is_dits():
    """The formula by which CPUs train in bfloat16, in float64, and its gradient."""
    attn, x = tiny_dit().double().blocks[0].attn, torch.randn(2, 16, 32, dtype=torch.float64, requires_grad=True)
    out, expected = train.attention(attn, x), attn(x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(y, x, torch.ones_like(y).cumsum(1)) for y in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def loss_and_gradient(block, **settings):
    """Of the first of two steps as train.py makes them, and how many programs torch.compile made for the second."""
    model, _, opt, step = setup_step(block=block, lr=0.0, **settings)
    for p in model.parameters():
        p.data.mul_(0.5)                                                          # a loss of about 1
    gradient = []
    opt.register_step_pre_hook(lambda *_: gradient.append(torch.cat([p.grad.flatten() for p in model.parameters()])))
    loss = step(1)[0][0].item()
    torch._dynamo.utils.counters.clear()
    step(2)
    return loss, gradient[0], sum(torch._dynamo.utils.counters["frames"].values())


@pytest.mark.parametrize("block", DESIGNS)
def test_bf16_steps_are_float32s_within_its_rounding(block, monkeypatch):
    """Loss within 1e-2; gradient within 2 %, some five roundings of 2^-8. Attention by the formula, in every block."""
    exact, gradient, _ = loss_and_gradient(block)
    calls, whole = [], train.attention
    monkeypatch.setattr(train, "attention", lambda module, x: calls.append(1) or whole(module, x))
    rough, rough_gradient, _ = loss_and_gradient(block, dtype="bf16")
    assert rough == pytest.approx(exact, abs=1e-2) and rough != exact and len(calls) == 4
    assert 1e-4 < (rough_gradient - gradient).norm() / gradient.norm() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("block", DESIGNS)
def test_compiled_steps_are_eager_ones_and_compile_once(block):
    """Gradient to 1e-5 in float32 (sums in another order), within 2 % in bfloat16; nothing is compiled in step 2."""
    exact, gradient, _ = loss_and_gradient(block)
    for dtype, loss_tolerance, tolerance in [("fp32", 1e-5, 1e-5), ("bf16", 1e-2, 0.02)]:
        torch._dynamo.reset()
        loss, compiled_gradient, frames = loss_and_gradient(block, dtype=dtype, compile=True)
        assert loss == pytest.approx(exact, abs=loss_tolerance) and frames == 0
        assert (compiled_gradient - gradient).norm() / gradient.norm() < tolerance


def test_batches_are_drawn_one_ahead(monkeypatch):
    """While the loop is at step k, k + 1 is drawn already; what fails there is told where it is asked for."""
    cfg = train.Config(batch_size=4, steps=5, image_size=8, device="cpu", dtype="fp32")
    rt, images = train.Runtime(cfg), np.random.default_rng(0).integers(256, size=(6, 3, 8, 8), dtype=np.uint8)
    drawn, whole = {step: threading.Event() for step in range(1, 8)}, train.draw_batch

    def draw_batch(cfg, images, labels, step, share):
        drawn[step].set()
        if step == 5:
            raise OSError("the disk is gone")
        return whole(cfg, images, labels, step, share)

    monkeypatch.setattr(train, "draw_batch", draw_batch)
    steps = train.batches(cfg, rt, images, np.arange(6), 2)
    number, batch = next(steps)
    assert number == 3 and not drawn[1].is_set() and drawn[4].wait(timeout=10) and not drawn[5].is_set()
    assert all(map(torch.equal, batch, whole(cfg, images, np.arange(6), 3)))
    assert next(steps)[0] == 4
    with pytest.raises(OSError, match="the disk is gone"):
        next(steps)


def test_forward_flops_are_table_4s():
    assert sample.forward_flops(DiT_models["DiT-XL/2"].keywords) / 2e9 == pytest.approx(118.64, rel=2e-4)


def test_the_line_of_bench_is_made_of_medians():
    """Eleven steps of which one was slow, 2e9 flops each, 3 images, on a device that reaches 8e9 flop/s."""
    line = sample.speed(3, [0.5] * 10 + [50], 2e9, 5e9, (64, 8e9))
    assert line == ("6 images/s; 500 ms a step (500 to 500 for 80 % of 11); 5 GB at the most; 0.004 TFLOP/s a device, "
                    "50% of 0.008 in a product of 64 x 64 matrices")


BENCH = re.compile(r"(\S+) images/s; (\S+) ms a step \((\S+) to (\S+) for 80 % of (\d+)\); (\S+) GB at the most; (\S+) "
                   r"TFLOP/s a device, (\d+)% of (\S+) in a product of \d+ x \d+ matrices")


def test_train_bench_times_the_real_steps_and_leaves_no_run(folder, tmp_path, monkeypatch, capsys):
    """images/s and TFLOP/s belong together by the flops of three forward passes; it may be asked of a finished run."""
    steps, whole = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *args: steps.append(args[-1]) or whole(*args))
    monkeypatch.setattr(train, "matrix_rate", lambda *_: (64, 1e9))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ckpt.pt").touch()
    with pytest.raises(train.UserError, match="--resume"):
        train.main(["--resume", str(tmp_path / "out"), "--bench"])
    train.main(tiny_flags(folder, tmp_path / "out", "--bench", "--accum", "2"))
    speed, ms, low, high, n, _, tflops, share, _ = map(float, BENCH.search(capsys.readouterr().out).groups())
    flops = 3 * sample.forward_flops(dict(
        input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=4))
    assert low <= ms <= high and speed == pytest.approx(8 / ms * 1000, rel=2e-3) and n == 6
    assert tflops == pytest.approx(speed * flops / 1e12, rel=0.01)
    assert share == pytest.approx(tflops * 1e5, rel=0.01, abs=0.6)
    assert steps == list(range(1, 10)) and [path.name for path in (tmp_path / "out").iterdir()] == ["ckpt.pt"]
    new = tmp_path / "new"
    train.main([*TINY, "--bench", "--data", "", "--vae", "nowhere", "--image-size", "64", "--out", str(new)])
    assert BENCH.search(capsys.readouterr().out) and not new.exists()
    assert train.parse_args(["--bench"]).steps == 50 and train.parse_args(["--bench", "--steps", "20"]).steps == 20


def test_sample_bench_takes_the_largest_batch_that_fits(tmp_path, monkeypatch, capsys):
    """Sizes of Table 1 need no checkpoint. More than 5 images do not fit here: 8 becomes 4, and that is it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "matrix_rate", lambda *_: (64, 1e12))
    monkeypatch.setitem(sample.DiT_models, "DiT-S/2", functools.partial(DiT, hidden_size=32, depth=1, num_heads=2))
    sizes, whole = [], sample.step_times

    def step_times(args, model, n, **kwargs):
        sizes.append(n)
        if n > 5:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return whole(args, model, n, **kwargs)

    monkeypatch.setattr(sample, "step_times", step_times)
    sample.main("DiT-S/2 --bench --steps 50 --batch-size 100 --device cpu".split())
    out = capsys.readouterr().out
    lines = [tuple(map(float, found)) for found in BENCH.findall(out)]
    assert sizes == [1, 8, 4] and "guidance 4; cpu, fp32" in out and not list(tmp_path.iterdir())
    flops = 2 * sample.forward_flops(dict(hidden_size=32, depth=1, num_heads=2))  # two passes, by guidance
    assert [line[0] for line in lines] == pytest.approx([n / line[1] * 1000 / 50 for n, line in zip(
        (1, 4), lines, strict=True)], rel=1e-2)
    assert [line[6] for line in lines] == pytest.approx([line[0] * 50 * flops / 1e12 for line in lines], rel=1e-2)
    for words, error in [("out of memory", sample.UserError), ("a bug", RuntimeError)]:
        def fails(args, model, n, words=words, **kwargs):
            if n > 1 or words == "out of memory":
                raise RuntimeError(words)
            return np.ones(3)

        monkeypatch.setattr(sample, "step_times", fails)
        with pytest.raises(error, match="--batch-size|a bug"):
            sample.main("DiT-S/2 --bench --device cpu".split())


def test_bf16_pictures_are_float32s_but_for_a_few_grey_levels(tiny_run, tmp_path, capsys):
    pictures = []
    for dtype in ("fp32", "bf16"):
        out = str(tmp_path / f"{dtype}.png")
        sample.main([str(tiny_run), "--steps", "20", "--dtype", dtype, "--out", out, "--device", "cpu"])
        pictures.append(np.asarray(Image.open(out)).astype(int))
    assert 0 < np.abs(pictures[1] - pictures[0]).mean() < 3


@pytest.mark.slow
def test_compiled_pictures_are_eager_ones_and_a_set_compiles_two_programs(tiny_run, tmp_path):
    """One for all timesteps of the batches of four, one for the last of three."""
    flags = [str(tiny_run / "ckpt.pt"), "--num-samples", "11", "--batch-size", "4", "--steps", "5", "--device", "cpu"]
    sample.main([*flags, "--out", str(tmp_path / "eager")])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    sample.main([*flags, "--compile", "--out", str(tmp_path / "compiled")])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    eager, compiled = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("eager", "compiled"))
    assert np.abs(compiled - eager).max() <= 1


@pytest.mark.skipif(sys.platform != "linux", reason="counts the kernel's page faults")
def test_freed_memory_is_used_again():
    """A step's tensors come from what the step before gave back: 120 MB, 20 times, are not 20 times 30,000 pages. In a
    process of its own, because glibc adapts itself to what came before."""
    code = """import resource, torch, sample
sample.keep_freed_memory()
for step in range(20):
    tensors = [torch.ones(768, 1024) for _ in range(40)]
    del tensors
    if step == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    out = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True).stdout
    assert int(out) < 10_000


def test_nothing_is_imported_that_can_wait():
    """dit.py needs what torch itself needs; --help and a run's first step on shapes do not wait for these libraries."""
    code = """import sys, torch, numpy
before = set(sys.modules)
import dit
print(*{name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
import train
print(*{'torchvision', 'diffusers', 'torch._inductor', 'torch_xla'} & set(sys.modules))"""
    out = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True).stdout
    assert out == "dit\n\n"


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
    ("--seed 18446744073709551616", "--seed"), ("--data DEEP", "deep.png"), ("--cfg-scale inf", "--cfg-scale"),
    ("--preset imagenet256", "--data FOLDER"), ("--vae VAE --image-size 36", "divisible by 8"),
    ("--vae no/such/vae --image-size 32", "no VAE 'no/such/vae'"), ("--init no/such.pt", "no checkpoint no/such.pt"),
    ("--init BROKEN/dog/bad.png", "not a checkpoint")])
def test_train_refuses(flags, words, tmp_path, monkeypatch):
    (tmp_path / "EMPTY" / "dog").mkdir(parents=True)
    (tmp_path / "BROKEN" / "dog").mkdir(parents=True)
    (tmp_path / "BROKEN" / "dog" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "DEEP" / "dog").mkdir(parents=True)
    Image.new("I;16", (20, 20)).save(tmp_path / "DEEP" / "dog" / "deep.png")      # would be clipped to white
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
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
    ("--gif x.mp4", ".gif"), ("--device tpu", "--device auto"), ("--frames 2", "--frames"),
    ("--vae x", "makes pixels"), ("--num-samples 0", "--num-samples"), ("--num-samples 2 --gif x.gif", "--gif"),
    ("--num-samples 2 --labels no.txt", "no.txt"), ("--bench --out x.png", "--bench"),
    ("--bench --steps 2", "--steps"), ("--dtype fp16", "bf16")])
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    train.PART, calls = 8, iter(range(count))

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
                place, count, seconds = *[("center_crop", rng.integers(20, 44)), ("fsync", rng.integers(6)),
                                          ("replace", rng.integers(3))][rng.integers(3)], None
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


@needs_xla
@pytest.mark.slow
def test_xla_trains_on_the_latents_that_it_encodes(folder, vae_folder, tmp_path):
    """The latents, the losses on them and the decoded grid are the CPU's."""
    flags = [*RECIPE, *LATENT, "--vae", str(vae_folder), "--sample-every", "20"]
    on_xla(2, tmp_path, *tiny_flags(folder, tmp_path / "xla", *flags, "--cache", str(tmp_path / "there")))
    train_tiny(folder, tmp_path / "cpu", *flags, "--cache", str(tmp_path / "there"))
    assert np.abs(numbers_of(tmp_path / "cpu") - numbers_of(tmp_path / "xla")).max() < 1e-5
    grids = [np.asarray(Image.open(tmp_path / out / "samples" / "000020.png")).astype(int) for out in ("cpu", "xla")]
    assert np.abs(grids[0] - grids[1]).max() <= 2 and grids[0].std() > 20
    train_tiny(folder, tmp_path / "own", *flags, "--cache", str(tmp_path / "here"))
    there, here = (np.load(next((tmp_path / cache).glob("*/images.npy"))).astype(float) for cache in ("there", "here"))
    np.testing.assert_allclose(there, here, rtol=2e-3, atol=1e-4)


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
