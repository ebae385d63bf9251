"""The paper's claims: Sec. 3 and Tables 1 and 4 in dit.py's order, then Sec. 4, the training step of train.py.

    pytest test_dit.py      about 25 s on two CPU cores, offline

Each claim is proved by an oracle that shares no code with it: a scalar loop, Bayes' rule, torch's distributions, a
model with a known answer, the paper's tables, diffusers. The tolerance follows from the dtype: rounding to float32
changes a number by 6e-8 of it, so float32 tables agree to 1e-6, float32 networks to 1e-5, float64 arithmetic to 1e-10.
"""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence
from torch.utils.flop_counter import FlopCounterMode

import dit
import train
from dit import DiT, DiT_models, GaussianDiffusion, space_timesteps


@pytest.fixture(params=["in-context", "cross-attention", "adaln", "adaln-zero"])
def design(request):
    return request.param

@pytest.fixture(autouse=True)
def seeded():
    """Fixed seeds, and one thread: on busy cores, two wait for each other many times as long."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

def assert_close(actual, expected, rtol, atol=None):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol if atol is None else atol, check_dtype=False)

def randomize(module, std=0.2):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module

def exact(module):
    return randomize(module).double().requires_grad_(False)

def new_dit(block="adaln-zero", **sizes):
    """A DiT of two blocks for 8 x 8 x 3 images and 5 classes, as it is initialized."""
    torch.manual_seed(1)
    small = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=4, num_classes=5)
    return DiT(**(small | sizes), block=block)

def inputs(channels=3):
    return torch.randn(3, channels, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 2])

def randn64(*shape):
    return torch.randn(shape, dtype=torch.float64)


# Sec. 3.1  The diffusion process --------------------------------------------------------------------------------------

TIMES = torch.arange(1000)
BETAS = (1e-4 + (2e-2 - 1e-4) * TIMES.double() / 999)[:, None, None, None]        # the paper's schedule, in float64
ALPHA_BAR = torch.cumprod(1 - BETAS, dim=0)
A_PREV = torch.cat([torch.ones(1, 1, 1, 1), ALPHA_BAR[:-1]])
POSTERIOR = BETAS * (1 - A_PREV) / (1 - ALPHA_BAR)                                # the posterior's variance, DDPM Eq. 7
POSTERIOR[0] = POSTERIOR[1]                                                       # at t = 0 it is 0: ADM takes t = 1's
ZERO = torch.zeros(1000, 1, 1, 1)
KL = dict(rtol=1e-4, atol=1e-6)       # tolerance of a KL: a small sum of terms near 1, and float32 rounds each


def test_schedule_is_linear_from_1e4_to_2e2():
    assert_close(GaussianDiffusion().betas, BETAS.flatten(), 1e-6, 0)
    assert_close(GaussianDiffusion().alphas_cumprod, ALPHA_BAR.flatten(), 1e-6, 0)


def test_q_sample_is_the_noising_of_one_step_repeated():
    """x = sqrt(1 - beta) x + sqrt(beta) noise, t + 1 times, has q_sample's factor of x_0 and its variance."""
    factor, variance, moments = 1.0, 0.0, []
    for beta in BETAS.flatten().tolist():
        factor, variance = math.sqrt(1 - beta) * factor, (1 - beta) * variance + beta
        moments.append([factor, variance])
    factors, variances = torch.tensor(moments, dtype=torch.float64).T
    one = ZERO + 1
    of_x_0 = GaussianDiffusion().q_sample(one, TIMES, ZERO)
    of_noise = GaussianDiffusion().q_sample(ZERO, TIMES, one)
    assert_close(of_x_0.flatten(), factors, 1e-6, 0)
    assert_close(of_noise.flatten() ** 2, variances, 1e-6, 1e-7)                  # 1 - alphas_cumprod, rounded at 1
    assert (of_noise > 0).all()
    assert (one == 1).all()                                                       # nothing was changed in place


def test_posterior_is_bayes_rule():
    """q(x_(t-1) | x_t, x_0) is proportional to q(x_t | x_(t-1)) q(x_(t-1) | x_0): the product of two Gaussians."""
    x_0, x_t = 0.7, -1.3
    likelihood = (1 - BETAS) / BETAS                                              # precision; mean x_t / sqrt(alpha)
    prior = 1 / (1 - A_PREV)                                                      # precision; mean sqrt(a_bar) x_0
    variance = 1 / (likelihood + prior)
    mean = variance * (likelihood * x_t / (1 - BETAS).sqrt() + prior * A_PREV.sqrt() * x_0)
    ours = GaussianDiffusion().q_posterior_mean_variance(ZERO + x_0, ZERO + x_t, TIMES)
    for actual, expected in zip(ours, (mean, variance, variance.log()), strict=True):
        assert_close(actual[1:], expected[1:], 2e-6, 0)


def test_posterior_at_t0_is_x0_with_the_log_variance_of_t1():
    x_0, x_t = torch.rand(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    ours = GaussianDiffusion().q_posterior_mean_variance(x_0, x_t, torch.tensor([0, 0]))
    for actual, expected in zip(ours, (x_0, 0, POSTERIOR[1].log()), strict=True):
        assert_close(actual, 0 * x_0 + expected, 1e-6)


@pytest.mark.parametrize("v", [-1, 0, 1, None])
def test_variance_is_learned_between_posterior_and_beta_or_fixed(v):
    """v = 0 is their geometric mean. A network that predicts eps alone has ADM's "fixed large". Finite at t = 0 too."""
    x = ZERO.expand(1000, 1, 2, 2)
    fixed = torch.cat([POSTERIOR[:1], BETAS[1:]])
    variances = {-1: POSTERIOR, 0: (POSTERIOR * BETAS).sqrt(), 1: BETAS, None: fixed}
    variance = variances[v].expand_as(x)
    output = x if v is None else torch.cat([x, x + v], dim=1)
    out = GaussianDiffusion().p_mean_variance(output, x, TIMES)
    assert_close(out["log_variance"], variance.log(), 1e-6, 0)
    assert_close(out["variance"], variance, 1e-5, 0)                              # log and exp lose a digit


def test_true_noise_predicts_the_true_x0_and_mean():
    diffusion, t = GaussianDiffusion(), torch.tensor([0, 1, 500, 999])
    noise = torch.randn(4, 3, 8, 8)
    x_0 = torch.rand_like(noise) * 2 - 1
    x_t = diffusion.q_sample(x_0, t, noise)
    out = diffusion.p_mean_variance(torch.cat([noise, noise], dim=1), x_t, t)
    log_variance = ((1 + noise) * BETAS[t].log() + (1 - noise) * POSTERIOR[t].log()) / 2
    assert_close(out["log_variance"], log_variance, 1e-5)
    assert_close(out["pred_xstart"], x_0, 2e-4)                                   # at t = 999 errors grow by 157
    assert_close(out["mean"], diffusion.q_posterior_mean_variance(x_0, x_t, t)[0], 1e-5)


def test_clip_denoised_clamps_x0_and_the_mean_made_of_it():
    diffusion, t = GaussianDiffusion(), torch.tensor([300, 300])
    x_t, output = torch.randn(2, 3, 8, 8), torch.randn(2, 6, 8, 8)
    x_0 = diffusion.p_mean_variance(output, x_t, t)["pred_xstart"]
    clipped = diffusion.p_mean_variance(output, x_t, t, clip_denoised=True)
    assert x_0.abs().max() > 1.5
    x_0 = x_0.clamp(-1, 1)
    mean, _, _ = diffusion.q_posterior_mean_variance(x_0, x_t, t)
    assert_close(clipped["pred_xstart"], x_0, 1e-6)
    assert_close(clipped["mean"], mean, 1e-6)


# Sec. 3.1  The losses -------------------------------------------------------------------------------------------------

def test_normal_kl_is_torch_distributions():
    mean1, logvar1, mean2, logvar2 = randn64(4, 50)
    expected = kl_divergence(Normal(mean1, (logvar1 / 2).exp()), Normal(mean2, (logvar2 / 2).exp()))
    assert_close(dit.normal_kl(mean1, logvar1, mean2, logvar2), expected, 1e-10)


@pytest.mark.parametrize("mean,std", [(0.0, 0.01), (0.3, 0.1), (-1.2, 0.5), (0.99, 0.004)])
def test_discretized_likelihood_is_the_mass_of_each_bin(mean, std):
    """A bin reaches 1/255 to both sides of its grey level; the first and last are open. No bin is impossible."""
    levels = torch.arange(256).double() / 127.5 - 1
    mean, std = torch.full_like(levels, mean), torch.full_like(levels, std)
    log_p = dit.discretized_gaussian_log_likelihood(levels, mean, std.log())
    cdf = Normal(mean, std).cdf(levels + 1 / 255)                                 # at the upper edges
    cdf[255] = 1
    assert_close(log_p.exp(), cdf.diff(prepend=torch.zeros(1)), 1e-8)             # an empty bin has a little more
    assert log_p.isfinite().all()


def loss_by_hand(t, x_0, noise, eps, v, clip=math.inf):
    """(mse, vb), each (N,), by their definitions: posterior, torch's KL and CDF, bits per dimension."""
    a, a_prev = ALPHA_BAR[t], A_PREV[t]
    beta, smallest = BETAS[t], POSTERIOR[t]
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * noise
    guess = ((x_t - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-clip, clip)

    def posterior_mean(x):
        return (beta * a_prev.sqrt() * x + (1 - a_prev) * (1 - beta).sqrt() * x_t) / (1 - a)

    variance = beta ** ((1 + v) / 2) * smallest ** ((1 - v) / 2)
    p = Normal(posterior_mean(guess), variance.sqrt())
    kl = kl_divergence(Normal(posterior_mean(x_0), smallest.sqrt()), p)
    upper = torch.where(x_0 > 0.999, 1.0, p.cdf(x_0 + 1 / 255))
    lower = torch.where(x_0 < -0.999, 0.0, p.cdf(x_0 - 1 / 255))
    vb = torch.where(a_prev == 1, -torch.log(upper - lower), kl) / math.log(2)    # a_prev is 1 at t = 0
    mse = (noise - eps) ** 2
    return mse.flatten(1).mean(1), vb.flatten(1).mean(1)

def noised_images():
    """(t, x_0, noise, output): 8-bit images, and the output of a network that errs by half the noise."""
    x_0 = (torch.randint(0, 256, (5, 3, 8, 8)) / 127.5 - 1).double()
    x_0[0, :, :4] = 1                                                             # the two open bins
    x_0[1, :, :4] = -1
    noise, error = torch.randn_like(x_0), torch.randn_like(x_0)
    output = torch.cat([noise + 0.5 * error, torch.rand_like(x_0) * 2 - 1], dim=1)
    return torch.tensor([0, 0, 1, 400, 999]), x_0, noise, output


def test_bound_term_is_a_kl_and_at_t0_the_likelihood():
    diffusion, (t, x_0, noise, output) = GaussianDiffusion(), noised_images()
    x_t = diffusion.q_sample(x_0, t, noise)
    for clip in (math.inf, 1):
        _, expected = loss_by_hand(t, x_0, noise, *output.chunk(2, dim=1), clip=clip)
        assert_close(diffusion._vb_terms_bpd(output.float(), x_0.float(), x_t.float(), t, clip == 1), expected, **KL)


def test_training_loss_is_mse_plus_the_bound_term():
    """Both with weight 1; the bound's term is that of the drawn timestep. Without learned variance it is mse alone."""
    t, x_0, noise, output = noised_images()
    mse, vb = loss_by_hand(t, x_0, noise, *output.chunk(2, dim=1))
    losses = GaussianDiffusion().training_losses(lambda x, t: output, x_0, t, noise)
    assert_close(losses["mse"], mse, 1e-6)
    assert_close(losses["vb"], vb, **KL)
    assert_close(losses["loss"], mse + vb, **KL)
    losses = GaussianDiffusion().training_losses(lambda x, t: output[:, :3], x_0, t, noise)
    assert_close(losses["loss"], mse, 1e-6)
    assert_close(losses["vb"], 0 * mse, 0)


def test_bound_trains_the_variance_alone_and_mse_eps_alone():
    output = torch.randn(4, 6, 8, 8, requires_grad=True)
    x_0, t = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 700, 999])
    losses = GaussianDiffusion().training_losses(lambda x, t: output, x_0, t)
    assert losses["mse"].mean() > 1.5                                             # 2: noise is drawn if none is given
    for name, trained in [("vb", [False, True]), ("mse", [True, False])]:
        grad, = torch.autograd.grad(losses[name].sum(), output, retain_graph=True)
        for half, expected in zip(grad.chunk(2, dim=1), trained, strict=True):
            assert half.flatten(1).any(1).tolist() == [expected] * 4


@pytest.mark.parametrize("method", ["training_losses", "bits_per_dim"])
def test_losses_give_the_network_x_t_and_the_original_t(method):
    """In a process of 10 steps, its t = 4 is the original 444."""
    diffusion, seen = GaussianDiffusion().respaced(10), set()
    x_0, noise = torch.randn(2, 3, 3, 4, 4)

    def model(x_t, t, y):
        a = ALPHA_BAR[t]
        assert y == "label"
        assert_close(x_t, a.sqrt() * x_0 + (1 - a).sqrt() * noise, 1e-5)
        seen.update(t.tolist())
        return torch.zeros(3, 6, 4, 4)

    if method == "training_losses":
        diffusion.training_losses(model, x_0, torch.tensor([9, 4, 0]), noise, y="label")
    else:
        diffusion.bits_per_dim(model, x_0, randn=lambda x: noise, y="label")
    assert {999, 444, 0} <= seen


@pytest.mark.parametrize("learned", [True, False])
def test_bits_per_dim_is_the_sum_of_all_terms(learned):
    """Column t is the term of timestep t; the prior is KL(q(x_T | x_0) || N(0, 1))."""
    x_0 = (torch.randint(0, 256, (2, 3, 4, 4)) / 127.5 - 1).double()
    noises, calls = randn64(1000, 2, 3, 4, 4), iter(range(999, -1, -1))

    def model(x_t, t):
        eps = 0.9 * noises[t[0]]
        v = torch.full_like(eps, 0.3)
        return torch.cat([eps, v], dim=1) if learned else eps

    out = GaussianDiffusion().bits_per_dim(model, x_0, randn=lambda x: noises[next(calls)])
    v = 0.3 if learned else torch.where(A_PREV == 1, -1, 1)                       # beta, at t = 0 the posterior's
    for k in (0, 1):
        mse, vb = loss_by_hand(TIMES, x_0[k], noises[:, k], 0.9 * noises[:, k], v, clip=1)
        assert_close(out["mse"][k], mse, 1e-6)
        assert_close(out["vb"][k], vb, **KL)
    a = (1 - torch.linspace(1e-4, 2e-2, 10).double()).prod()                      # 10 noisings leave a prior above 0
    prior = kl_divergence(Normal(a.sqrt() * x_0, (1 - a).sqrt()), Normal(0.0, 1.0))
    prior = prior.flatten(1).mean(1) / math.log(2)
    out = GaussianDiffusion(10).bits_per_dim(model, x_0, randn=torch.zeros_like)
    assert_close(out["prior"], prior, 1e-5)
    assert_close(out["total"], prior + out["vb"].sum(1), 1e-5)


# Sec. 3.1  Sampling ---------------------------------------------------------------------------------------------------

def test_space_timesteps_are_even_from_first_to_last():
    """At lengths where a sum of strides, as in ADM, and their product round alike. A single step is the last."""
    for n in (2, 10, 50, 250, 1000):
        assert space_timesteps(1000, n) == [round(k * 999 / (n - 1)) for k in range(n)]
    assert space_timesteps(1000, 250)[-4:] == [987, 991, 995, 999]                # the paper's 250 steps
    assert space_timesteps(1000, 1) == [999]
    for n in (0, 1001):
        with pytest.raises(ValueError, match="1 to 1000"):
            space_timesteps(1000, n)


def test_respacing_keeps_alphas_cumprod_and_recomputes_betas():
    diffusion, kept = GaussianDiffusion().respaced(50), space_timesteps(1000, 50)
    bars = ALPHA_BAR[kept].flatten()
    previous = torch.cat([torch.ones(1), bars[:-1]])
    assert diffusion.timestep_map.tolist() == kept and diffusion.num_timesteps == 50
    assert_close(diffusion.alphas_cumprod, bars, 1e-6, 0)
    assert_close(diffusion.betas, 1 - bars / previous, 1e-6, 0)
    assert diffusion.respaced(5).timestep_map.tolist() == [kept[i] for i in space_timesteps(50, 5)]
    assert GaussianDiffusion().respaced(1).posterior_log_variance_clipped.isfinite().all()
    elsewhere = GaussianDiffusion().to("meta")                                    # as on a GPU
    elsewhere.timestep_map = TIMES                                                # meta has no values
    assert elsewhere.respaced(5).betas.is_meta


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_samplers_visit_the_original_timesteps_downwards(loop):
    """Each step is one of `progress`, calls the network, and tells on_step the predicted x_0, clipped if asked to."""
    events, states = [], []

    def model(x, t, y):
        assert y == "label"
        events.append(t.tolist())
        states.append(x)
        return torch.zeros(2, 6, 4, 4)

    getattr(GaussianDiffusion().respaced(10), loop)(model, torch.randn(2, 3, 4, 4), y="label", clip_denoised=True,
        progress=lambda steps: (events.append(i) or i for i in steps),
        on_step=lambda i, x, x_0: events.append((i, torch.equal(x, states[-1]) and x_0.abs().max() <= 1)))
    assert events == [event for i in range(9, -1, -1) for event in (i, [111 * i] * 2, (i, True))]


@pytest.mark.parametrize("loop,options", [("p_sample_loop", {}), ("ddim_sample_loop", {"eta": 1.0})])
def test_noise_is_added_at_every_step_but_the_last(loop, options):
    def sampled(noisy_call):
        calls = iter(range(4))
        return getattr(GaussianDiffusion().respaced(4), loop)(
            lambda x, t: torch.cat([x, x], dim=1) / 2, torch.ones(1, 3, 2, 2),
            randn=lambda x: torch.full_like(x, next(calls) == noisy_call), **options)

    quiet = sampled(None)
    assert [torch.equal(sampled(call), quiet) for call in range(4)] == [False, False, False, True]


class GaussianData:
    """The exact denoiser of data N(m, s^2): E[eps | x_t], and the v that makes the reverse step's variance exact."""
    m, s = 0.6, 0.3

    def __init__(self, kept):
        bars = ALPHA_BAR[kept].flatten().tolist()
        self.steps = dict(zip(kept, zip(bars, [1.0] + bars[:-1], strict=True), strict=True))

    def __call__(self, x, t):
        a, a_prev = self.steps[t[0].item()]
        eps = math.sqrt(1 - a) * (x - math.sqrt(a) * self.m) / (a * self.s ** 2 + 1 - a)
        if a_prev == 1.0:
            return torch.cat([eps, torch.zeros_like(x)], dim=1)
        beta = 1 - a / a_prev
        smallest = beta * (1 - a_prev) / (1 - a)
        variance = 1 / ((1 - beta) / beta + 1 / (a_prev * self.s ** 2 + 1 - a_prev))   # of x_(t-1) given x_t: Bayes
        v = 2 * math.log(variance / smallest) / math.log(beta / smallest) - 1
        assert -1 <= v <= 1                                                       # the interpolation can express it
        return torch.cat([eps, torch.full_like(x, v)], dim=1)


@pytest.mark.parametrize("loop,steps,tolerance", [
    ("p_sample_loop", 1000, 1e-4), ("p_sample_loop", 50, 1e-4), ("ddim_sample_loop", 1000, 1e-2)])    # an ODE by Euler
def test_exact_denoiser_gives_the_data_back(loop, steps, tolerance):
    """Samples have the data's mean and variance. A loop is affine in x_T and the noises, so unit vectors show both."""
    model, diffusion = GaussianData(space_timesteps(1000, steps)), GaussianDiffusion().respaced(steps)
    _, x_T, *noises = torch.eye(steps + 2, dtype=torch.float64)[..., None, None, None]   # row 0 has only zeros
    x = getattr(diffusion, loop)(model, x_T, randn=lambda x: noises.pop(0))
    mean = x[0].item()
    variance = ((x[1:] - x[0]) ** 2).sum().item()
    if loop == "p_sample_loop":                                                   # the last step adds no noise, so add
        a = ALPHA_BAR[0].item()                                                   # Var[x_0 | x_1], which is exact
        variance += 1 / (1 / model.s ** 2 + a / (1 - a))
    assert mean == pytest.approx(model.m, rel=3e-3)                               # x_T keeps 0.6 % of m
    assert variance == pytest.approx(model.s ** 2, rel=tolerance)

def curved(x, t):
    return torch.cat([torch.tanh(x * (1 + t[0] / 1000)), torch.sin(x)], dim=1)


def test_ddpm_step_is_diffusers():
    """Each of 20 steps with the same noise: learned range of variance, even ("linspace") spacing."""
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(
        beta_start=1e-4, beta_end=2e-2, variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")
    scheduler.set_timesteps(20)
    diffusion, states = GaussianDiffusion().respaced(20), []
    assert scheduler.timesteps.tolist() == diffusion.timestep_map.tolist()[::-1]
    states.append(diffusion.p_sample_loop(
        curved, torch.randn(2, 3, 4, 4), on_step=lambda i, x_t, x_0: states.append(x_t),
        randn=lambda x: torch.randn(x.shape, generator=torch.Generator().manual_seed(5))))
    for t, x_t, x_prev in zip(scheduler.timesteps, states, states[1:], strict=False):
        step = scheduler.step(curved(x_t, t[None]), t, x_t, generator=torch.Generator().manual_seed(5))
        assert_close(x_prev, step.prev_sample, 1e-4)                              # an error of eps grows by up to 157


@pytest.mark.parametrize("clip,eta", [(False, 0.0), (True, 0.0), (False, 1.0), (True, 0.5)])
def test_ddim_step_is_diffusers(clip, eta):
    """In 1000 steps, where its spacing is ours; the step to x_0 too."""
    scheduler = pytest.importorskip("diffusers").DDIMScheduler(
        beta_start=1e-4, beta_end=2e-2, clip_sample=clip, set_alpha_to_one=True)
    scheduler.set_timesteps(1000)
    states, noise = {}, torch.randn(2, 3, 4, 4)
    states[-1] = GaussianDiffusion().ddim_sample_loop(
        curved, torch.randn(2, 3, 4, 4), eta=eta, clip_denoised=clip, randn=lambda x: noise,
        on_step=lambda i, x_t, x_0: states.update({i: x_t}))
    for t in (999, 998, 500, 3, 1, 0):
        eps = curved(states[t], torch.tensor([t]))[:, :3]
        step = scheduler.step(eps, t, states[t], eta=eta, use_clipped_model_output=True, variance_noise=noise)
        assert_close(states[t - 1], step.prev_sample, 1e-4)


# Sec. 3.2  Tokens and conditions --------------------------------------------------------------------------------------

def patches(x, p):
    """(C, H, W) -> a list of patches, row by row; each is a list of (row, column, values of the C channels)."""
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
            assert_close(tokens[n, k], expected, 1e-5)


def test_unpatchify_undoes_patchify():
    """Tokens made by a loop, in the order p, p, channel, of images without any symmetry."""
    model = new_dit(input_size=6, patch_size=3)
    x = torch.arange(2 * 6 * 6 * 6.0).view(2, 6, 6, 6)                            # 6 channels: eps and v
    tokens = [torch.stack([torch.cat([values for _, _, values in patch]) for patch in patches(image, 3)])
              for image in x]
    assert torch.equal(model.unpatchify(torch.stack(tokens)), x)


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
    for t in (0, 1, 500.5, 999):
        for period in (100, 10000):
            expected = [f(t * period ** (-i / 128)) for f in (math.cos, math.sin) for i in range(128)]
            ours = dit.timestep_embedding(torch.tensor([t]), 256, period)[0].tolist()
            assert ours == pytest.approx(expected, abs=2e-4)                      # float32 holds the angle 999 to 6e-5


def test_neighbouring_timesteps_differ_in_bfloat16():
    embedder, t = dit.TimestepEmbedder(64), torch.tensor([936, 937])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [dit.timestep_embedding(t, 256), embedder(t)]
    for out in (*outputs, embedder.bfloat16()(t)):
        assert (out[0] != out[1]).float().mean() > 0.5


def test_dropped_labels_take_the_null_row():
    embedder, y = dit.LabelEmbedder(5, 32), torch.tensor([0, 4, 2])
    table = embedder.embedding_table.weight
    assert len(table) == 6
    assert torch.equal(embedder(y), table[y])
    assert torch.equal(embedder(y, torch.tensor([True, False, True])), table[[5, 4, 5]])
    assert y.tolist() == [0, 4, 2]


# Sec. 3.2  The parts of a block and the four designs, against naive arithmetic in float64 -----------------------------

def naive_linear(x, layer):
    return torch.einsum("...i,oi->...o", x, layer.weight.flatten(1)) + layer.bias

def naive_norm(x, norm):
    centered = x - x.mean(-1, keepdim=True)
    x = centered / torch.sqrt((centered ** 2).mean(-1, keepdim=True) + 1e-6)
    return x if norm.weight is None else x * norm.weight + norm.bias

def naive_attention(q, k, v, heads=4):
    """Softmax attention, one image, head and query at a time; (N, T, D), (N, S, D), (N, S, D)."""
    out, width = torch.empty_like(q), q.shape[-1] // heads
    for n in range(q.shape[0]):
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            for i in range(q.shape[1]):
                weights = torch.exp(k[n, :, part] @ q[n, i, part] / math.sqrt(width))
                out[n, i, part] = weights / weights.sum() @ v[n, :, part]
    return out

def naive_self_attention(x, attn):
    return naive_linear(naive_attention(*naive_linear(x, attn.qkv).chunk(3, dim=-1)), attn.proj)

def naive_cross_attention(x, c, attn):
    return naive_linear(naive_attention(naive_linear(x, attn.q), *naive_linear(c, attn.kv).chunk(2, dim=-1)), attn.proj)

def naive_mlp(x, mlp):
    h = naive_linear(x, mlp.fc1)
    return naive_linear(0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3))), mlp.fc2)

def naive_modulate(x, shift, scale):
    return torch.stack([x[n] * (1 + scale[n]) + shift[n] for n in range(len(x))])

def naive_modulation(module, c, parts):
    return naive_linear(F.silu(c), module.adaLN_modulation[1]).chunk(parts, dim=-1)

def naive_block(name, block, x, t, y):
    """Figure 3 from the paper's sentences. The order of the regressed parts is the official checkpoints'."""
    if name in ("in-context", "cross-attention"):
        x = x + naive_self_attention(naive_norm(x, block.norm1), block.attn)
        if name == "cross-attention":
            x = x + naive_cross_attention(naive_norm(x, block.norm_cross), torch.stack([t, y], 1), block.cross_attn)
        return x + naive_mlp(naive_norm(x, block.norm2), block.mlp)
    if name == "adaln":
        shift1, scale1, shift2, scale2 = naive_modulation(block, t + y, 4)
        gate1 = gate2 = torch.ones_like(t)
    else:
        shift1, scale1, gate1, shift2, scale2, gate2 = naive_modulation(block, t + y, 6)
    h = naive_modulate(naive_norm(x, block.norm1), shift1, scale1)
    x = x + gate1[:, None] * naive_self_attention(h, block.attn)
    h = naive_modulate(naive_norm(x, block.norm2), shift2, scale2)
    return x + gate2[:, None] * naive_mlp(h, block.mlp)

def naive_decoder(name, layer, x, c):
    x = naive_norm(x, layer.norm_final)
    if name.startswith("adaln"):
        x = naive_modulate(x, *naive_modulation(layer, c, 2))
    return naive_linear(x, layer.linear)


def test_attention_is_softmax_attention_in_each_head():
    attn, x = exact(dit.Attention(32, 4)), randn64(2, 5, 32)
    assert_close(attn(x), naive_self_attention(x, attn), 1e-6)                    # a softmax in float32 is right, too


def test_cross_attention_asks_the_condition():
    attn, x, c = exact(dit.CrossAttention(32, 4)), randn64(2, 5, 32), randn64(2, 3, 32)
    assert_close(attn(x, c), naive_cross_attention(x, c, attn), 1e-10)


def test_mlp_has_a_tanh_gelu_between_two_linear_layers():
    mlp, x = exact(dit.Mlp(32, 48)), randn64(2, 5, 32)
    assert_close(mlp(x), naive_mlp(x, mlp), 1e-10)


def test_modulate_scales_and_shifts_every_token_alike():
    x, shift, scale = randn64(2, 5, 32), randn64(2, 32), randn64(2, 32)
    assert_close(dit.modulate(x, shift, scale), naive_modulate(x, shift, scale), 1e-10)


def test_decoder_is_a_norm_and_a_linear_layer(design):
    """The norm is adaptive in the adaLN designs only."""
    layer = exact(dit.DESIGNS[design][1](32, 2, 6))
    x, c = randn64(2, 5, 32), randn64(2, 32)
    assert_close(layer(x, c), naive_decoder(design, layer, x, c), 1e-10)


def test_block_is_its_description(design):
    """From the design's rule for how t and y enter, DiT.condition, to the image's tokens."""
    model, x, t, y = exact(new_dit(design)), randn64(2, 5, 32), randn64(2, 32), randn64(2, 32)
    ours = model.blocks[0](*model.condition(x, t, y))
    x = torch.cat([x, t[:, None], y[:, None]], dim=1) if design == "in-context" else x
    assert_close(ours[:, :5], naive_block(design, model.blocks[0], x, t, y)[:, :5], 1e-10)


# Sec. 3.2  The model --------------------------------------------------------------------------------------------------

def test_model_is_embed_blocks_decode(design):
    """The whole forward pass, made of the parts that are proved above. Labels are dropped by `drop` alone."""
    model, (x, t, y), drop = exact(new_dit(design)), inputs(), torch.tensor([True, False, False])
    tokens = F.unfold(x.double(), 2, stride=2).transpose(1, 2)
    tokens = naive_linear(tokens, model.x_embedder.proj) + model.pos_embed
    h = naive_linear(dit.timestep_embedding(t, 256).double(), model.t_embedder.mlp[0])
    t_emb = naive_linear(F.silu(h), model.t_embedder.mlp[2])
    y_emb = model.y_embedder.embedding_table.weight[[5, 4, 2]]
    if design == "in-context":
        tokens = torch.cat([tokens, t_emb[:, None], y_emb[:, None]], dim=1)
    for block in model.blocks:
        tokens = naive_block(design, block, tokens, t_emb, y_emb)
    tokens = naive_decoder(design, model.final_layer, tokens[:, :16], t_emb + y_emb)
    for mode in (model.train(), model.eval()):
        assert_close(mode(x.double(), t, y, drop), model.unpatchify(tokens), 1e-9)


def test_output_is_zero_at_init(design):
    assert (new_dit(design)(*inputs()) == 0).all()


def test_only_adaln_zero_blocks_are_the_identity_at_init(design):
    model = new_dit(design)
    x, c = model.condition(torch.randn(2, 16, 32), torch.randn(2, 32), torch.randn(2, 32))
    assert all(torch.equal(block(x, c), x) for block in model.blocks) == (design == "adaln-zero")


def test_weights_are_initialized_as_documented():
    """0.02 for the embedders, 0 for biases, modulations and the last layer, Xavier for the rest; 5 % for chance."""
    for name, p in new_dit(hidden_size=256, num_classes=100).named_parameters():
        if "y_embedder" in name or "t_embedder" in name and name.endswith("weight"):
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        elif name.endswith("bias") or "adaLN" in name or "final_layer.linear" in name:
            assert (p == 0).all(), name
        else:
            bound = math.sqrt(6 / (p.shape[0] + p[0].numel()))                    # the convolution as a linear layer
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
            assert p.abs().max() <= bound, name
    model = new_dit("adaln")
    for module, out in ((model.blocks[0], 128), (model.final_layer, 64)):
        assert module.adaLN_modulation[1].weight.std().item() == pytest.approx(math.sqrt(2 / (32 + out)), rel=0.1)


def test_zero_init_learns():
    """At the first step only the last layer has a gradient; at the second its neighbours; then everything."""
    model, (x, t, _), learning = new_dit(), inputs(), []
    for _ in range(3):
        loss = GaussianDiffusion().training_losses(model, x, t, y=torch.tensor([0, 4, 5]))["loss"].mean()
        model.zero_grad()
        loss.backward()
        learning.append({name for name, p in model.named_parameters() if p.grad.abs().max() > 0})
        for p in model.parameters():
            p.data -= 0.1 * p.grad
    assert learning[0] == {"final_layer.linear.weight", "final_layer.linear.bias"}
    second = {"x_embedder.proj.weight", "final_layer.adaLN_modulation.1.bias", "blocks.0.adaLN_modulation.1.weight"}
    assert second <= learning[1] and "blocks.0.attn.qkv.weight" not in learning[1]
    assert learning[2] == set(dict(model.named_parameters()))


def test_other_shapes_and_channels_are_refused():
    model, (x, t, y) = new_dit(), inputs()
    for shape in [(3, 4, 8, 8), (3, 3, 9, 9), (3, 3, 10, 10)]:
        with pytest.raises(ValueError, match="3, 8, 8"):
            model(torch.zeros(shape), t, y)
    for cfg_channels in (-1, 0, 4):
        with pytest.raises(ValueError, match="1 to 3"):
            model.forward_with_cfg(x, t, y, 4.0, cfg_channels)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-4), (torch.bfloat16, 0.1)])    # 16 and 3 digits
def test_a_model_in_another_dtype_takes_float32_images(dtype, tolerance):
    diffusion, model = GaussianDiffusion().respaced(4), randomize(new_dit(), std=0.14)
    x, _, y = inputs()
    x, options = x.clamp(-1, 1), dict(y=y, randn=torch.zeros_like, clip_denoised=True)

    def results(model):
        yield diffusion.training_losses(model, x, torch.tensor([0, 1, 3]), torch.ones_like(x), y=y)["loss"]
        yield diffusion.bits_per_dim(model, x, **options)["total"]
        yield diffusion.p_sample_loop(model, x, **options)
        yield diffusion.ddim_sample_loop(model, x, **options)

    other = copy.deepcopy(model).to(dtype)
    for ours, expected in zip(results(other), results(model), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - expected).norm() < tolerance * expected.norm()


# Sec. 3.1  Classifier-free guidance -----------------------------------------------------------------------------------

def test_guidance_of_1_is_conditional_and_costs_one_pass():
    model, (x, t, y), sizes = randomize(new_dit()), inputs(), []
    expected, forward = model(x, t, y), model.forward
    model.forward = lambda x, *args, **kwargs: sizes.append(len(x)) or forward(x, *args, **kwargs)
    assert_close(model.forward_with_cfg(x, t, y, 1.0), expected, 1e-5)
    assert sizes == [3]


@pytest.mark.parametrize("scale,cfg_channels,guided", [(4.0, None, 4), (4.0, 3, 3), (0.0, None, 4)])
def test_guidance_extrapolates_eps_and_nothing_else(scale, cfg_channels, guided):
    """The other channels are the conditional pass's. A scale of 0 is unconditional."""
    model, (x, t, y) = randomize(new_dit(in_channels=4)), inputs(channels=4)
    cond = model(x, t, y)
    uncond = model(x, t, torch.tensor([5, 5, 5]))
    eps = (uncond + scale * (cond - uncond))[:, :guided]
    expected = torch.cat([eps, cond[:, guided:]], dim=1)
    assert_close(model.forward_with_cfg(x, t, y, scale, cfg_channels), expected, 1e-4)    # errors grow by 7
    assert y.tolist() == [0, 4, 2]


# Tables 1 and 4, the official checkpoints, diffusers ------------------------------------------------------------------

TABLE_1 = {  # layers, width, heads
    "S": (12, 384, 6), "B": (12, 768, 12),
    "L": (24, 1024, 16), "XL": (28, 1152, 16)}
TABLE_4 = [  # model, Gflops (multiply-adds of a forward pass), parameters in millions
    ("S/8", 0.36, 33), ("S/4", 1.41, 33), ("S/2", 6.06, 33),
    ("B/8", 1.42, 131), ("B/4", 5.56, 130), ("B/2", 23.01, 130),
    ("L/8", 5.01, 459), ("L/4", 19.70, 458), ("L/2", 80.71, 458),
    ("XL/8", 7.39, 676), ("XL/4", 29.05, 675), ("XL/2", 118.64, 675),
    ("XL/2 in-context", 119.37, 449), ("XL/2 cross-attention", 137.62, 598),
    ("XL/2 adaln", 118.56, 600), ("XL/2 at-512", 524.60, 675)]


@pytest.mark.parametrize("name,gflops,params", TABLE_4)
def test_sizes_and_designs_are_tables_1_and_4(name, gflops, params):
    """To the last printed digit, or 0.02 %: the paper counts some elementwise products, which torch does not."""
    size, _, option = name.partition(" ")
    side, block = (64, "adaln-zero") if option == "at-512" else (32, option or "adaln-zero")
    with torch.device("meta"):
        model = DiT_models[f"DiT-{size}"](input_size=side, block=block)
        x, label = torch.empty(1, 4, side, side), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(x, label, label)
    assert round(counter.get_total_flops() / 2e9, 2) == pytest.approx(gflops, abs=0.0101, rel=2e-4)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == params
    attn = model.blocks[0].attn
    assert (len(model.blocks), attn.proj.in_features, attn.num_heads) == TABLE_1[size.split("/")[0]]


def test_names_and_shapes_are_the_official_checkpoints():
    """The 292 tensors of DiT-XL-2-256x256.pt, written out from its layout."""
    D = 1152
    layers = {
        "x_embedder.proj": (D, 4, 2, 2), "t_embedder.mlp.0": (D, 256), "t_embedder.mlp.2": (D, D),
        "final_layer.linear": (32, D), "final_layer.adaLN_modulation.1": (2 * D, D)}
    for i in range(28):
        layers |= {
            f"blocks.{i}.attn.qkv": (3 * D, D), f"blocks.{i}.attn.proj": (D, D),
            f"blocks.{i}.mlp.fc1": (4 * D, D), f"blocks.{i}.mlp.fc2": (D, 4 * D),
            f"blocks.{i}.adaLN_modulation.1": (6 * D, D)}
    expected = {"pos_embed": (1, 256, D), "y_embedder.embedding_table.weight": (1001, D)}
    for name, shape in layers.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    with torch.device("meta"):
        model = DiT_models["DiT-XL/2"]()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == expected
    assert [name for name, _ in model.named_buffers()] == ["pos_embed"]           # out of the optimizer's reach


def test_diffusers_computes_the_same_from_the_same_weights():
    """DiTTransformer2DModel, once its time embedding divides by 128 and not by 127."""
    theirs = pytest.importorskip("diffusers").DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_eps=1e-6)
    ours, state = randomize(new_dit(in_channels=4, num_classes=10)), {}
    weights = ours.state_dict()
    for kind in ("weight", "bias"):
        names = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1",
                 "proj_out_2": "final_layer.linear"}
        for i, block in enumerate(theirs.transformer_blocks):
            block.norm1.emb.time_proj.downscale_freq_shift = 0
            to, of = f"transformer_blocks.{i}", f"blocks.{i}"
            names |= {
                f"{to}.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
                f"{to}.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
                f"{to}.norm1.linear": f"{of}.adaLN_modulation.1", f"{to}.attn1.to_out.0": f"{of}.attn.proj",
                f"{to}.ff.net.0.proj": f"{of}.mlp.fc1", f"{to}.ff.net.2": f"{of}.mlp.fc2"}
            for part, tensor in zip("qkv", weights[f"{of}.attn.qkv.{kind}"].chunk(3), strict=True):
                state[f"{to}.attn1.to_{part}.{kind}"] = tensor
            table = f"{to}.norm1.emb.class_embedder.embedding_table.weight"
            state[table] = weights["y_embedder.embedding_table.weight"]
        state |= {f"{a}.{kind}": weights[f"{b}.{kind}"] for a, b in names.items()}
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    x, t, y = inputs(channels=4)
    expected = theirs.eval()(x, timestep=t, class_labels=y).sample
    assert_close(ours(x, t, y), expected, 1e-5, atol=1e-5 * expected.abs().max().item())


# Sec. 4  The training step of train.py --------------------------------------------------------------------------------

IMAGES = 25 * np.arange(10, dtype=np.uint8).repeat(48).reshape(10, 3, 4, 4)       # image i is all 25 i, its label is i

def draw(step, images=IMAGES, share=slice(None), **settings):
    return train.draw_batch(train.Config(**settings), images, np.arange(10), step, share)


def test_each_epoch_has_each_image_once_in_a_new_order():
    batches = [draw(step, batch_size=4) for step in range(1, 6)]                  # 5 batches of 4: two epochs of 10
    x, y, *_ = map(torch.cat, zip(*batches, strict=True))
    first, second = y[:10].tolist(), y[10:].tolist()
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert (x == 25 * y[:, None, None, None]).all()


def test_batches_are_a_function_of_seed_step_and_example():
    """Not of the number of examples beside it."""
    settings = dict(batch_size=8, seed=7, label_drop=0.5)
    batch = draw(3, **settings)
    assert all(map(torch.equal, batch, draw(3, **settings)))
    larger = draw(3, **settings | dict(batch_size=16))
    assert all(torch.equal(a, b[:8]) for a, b in zip(batch[2:], larger[2:], strict=True))
    for other in (draw(4, **settings), draw(3, **settings | dict(seed=8))):
        assert not any(map(torch.equal, batch, other))


def test_shares_are_the_global_batch():
    rt = train.Runtime(train.Config(batch_size=12, device="cpu"))
    whole = draw(5, batch_size=12)
    for world in (2, 3, 12):
        shares = []
        for rank in range(world):
            rt.rank, rt.world = rank, world
            shares.append(draw(5, batch_size=12, share=rt.share(12)))
        assert all(map(torch.equal, map(torch.cat, zip(*shares, strict=True)), whole))


def test_t_drops_flips_and_noise_have_the_papers_distributions():
    """Means within five standard errors, also where one draw could follow another."""
    n, images = 10_000, np.zeros((10, 3, 2, 2), np.uint8)
    images[..., 0] = 1
    x, _, t, noise, drop = draw(1, images, batch_size=n)
    flip = x[:, 0, 0, 1] == 1
    assert (x == torch.stack([~flip, flip], dim=1)[:, None, None]).all()
    assert t.min() == 0 and t.max() == 999
    assert len(noise.flatten(1).unique(dim=0)) == n
    for values, mean, std in [
            (t, 499.5, 288.7), (drop, 0.1, 0.3), (drop[flip], 0.1, 0.3), (drop[t < 500], 0.1, 0.3),
            (flip, 0.5, 0.5), (flip[t < 500], 0.5, 0.5), (noise, 0, 1), (noise.abs() < 1, 0.6827, 0.4654)]:
        assert abs(values.double().mean() - mean) < 5 * std / math.sqrt(values.numel())
    assert (draw(1, images, batch_size=100, flip=False)[0][..., 0] == 1).all()


class Steps:
    """train.py's step, called with its number: of a small model on batches of four."""

    def __init__(self, **settings):
        self.cfg = train.Config(
            batch_size=4, label_drop=0.5, device="cpu", dtype="fp32", image_size=4, patch_size=2, hidden_size=32,
            depth=2, num_heads=4, **settings)
        self.rt = train.Runtime(self.cfg)
        self.training = train.Training(self.cfg, self.rt, num_classes=10)
        self.model, self.ema, self.opt = self.training.model, self.training.ema, self.training.opt

    def __call__(self, k):
        batch = train.draw_batch(self.cfg, IMAGES, np.arange(10), k)
        return train.train_step(self.cfg, self.rt, self.training, GaussianDiffusion(), batch, k)

def vector(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def test_step_is_adamw_on_the_mean_loss_of_the_batch():
    """Two steps: autograd in float64, one example at a time, and Adam's formula without weight decay."""
    step, m, v, sure = Steps(lr=1e-2), 0, 0, True
    randomize(step.model)
    for k in (1, 2):
        x, y, t, noise, drop = draw(k, batch_size=4, label_drop=0.5)
        x = x.double() / 255 * 2 - 1
        y = torch.where(drop, 10, y)
        examples = zip(*(tensor.split(1) for tensor in (x, y, t, noise.double())), strict=True)
        reference = copy.deepcopy(step.model).double()
        losses = [GaussianDiffusion().training_losses(reference, x, t, noise, y=y) for x, y, t, noise in examples]
        means = [sum(one[name] for one in losses) / 4 for name in ("loss", "mse", "vb")]
        means[0].backward()
        g = torch.cat([p.grad.flatten() for p in reference.parameters()])
        assert_close(step(k), torch.cat([*means, g.norm()[None]]), 1e-5)
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g ** 2
        update = 1e-2 * m / (1 - 0.9 ** k) / ((v / (1 - 0.999 ** k)).sqrt() + 1e-8)
        sure &= g.abs() > 1e-4                                                    # smaller ones may be all rounding
        expected = vector(reference) - update
        assert_close(vector(step.model)[sure], expected[sure], 1e-5)


def test_accumulated_parts_make_the_same_step():
    whole, in_parts = Steps(lr=1e-2), Steps(lr=1e-2, accum=4)
    for k in (1, 2, 3):
        assert_close(in_parts(k), whole(k), 1e-5)


def test_ema_is_its_closed_form():
    """It starts as the weights. After step n ema = d ema + (1 - d) weights, d = min(decay, (1 + n) / (10 + n))."""
    step = Steps(lr=1e-2, ema_decay=0.28)
    expected = vector(step.model)
    for n, decay in [(1, 2 / 11), (2, 3 / 12), (3, 0.28)]:
        step(n)
        expected = decay * expected + (1 - decay) * vector(step.model)
        assert_close(vector(step.ema), expected, 1e-6)
    assert torch.equal(step.ema.pos_embed, step.model.pos_embed)


def test_learning_rate_is_constant_or_falls_linearly_to_0():
    for decay_steps, rates in [(0, {1: 1e-2, 1000: 1e-2}), (10, {1: 1e-2, 6: 5e-3, 11: 0, 50: 0})]:
        step = Steps(lr=1e-2, lr_decay_steps=decay_steps)
        for k, rate in rates.items():
            before = vector(step.model)
            step(k)
            assert step.opt.param_groups[0]["lr"] == pytest.approx(rate)
            assert torch.equal(vector(step.model), before) == (rate == 0)


def test_defaults_and_optimizer_are_the_papers():
    cfg = train.Config(**train.PRESETS["imagenet256"])
    assert (cfg.model, cfg.block) == ("DiT-XL/2", "adaln-zero")
    assert (cfg.batch_size, cfg.steps, cfg.lr, cfg.lr_decay_steps) == (256, 400_000, 1e-4, 0)
    assert (cfg.ema_decay, cfg.label_drop, cfg.flip) == (0.9999, 0.1, True)
    group, = Steps().opt.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0)


def test_a_short_run_learns():
    """150 steps on shapes beat the best that is possible for white noise of the same variance."""
    cfg = train.Config(**train.PRESETS["shapes"] | dict(lr_decay_steps=0, device="cpu", hidden_size=64, depth=2))
    images = np.stack([train.draw_shape(i, 16) for i in range(500)])
    images = images.transpose(0, 3, 1, 2)
    rt, diffusion, mse = train.Runtime(cfg), GaussianDiffusion(), []
    training = train.Training(cfg, rt, num_classes=10)
    for k in range(1, 151):
        batch = train.draw_batch(cfg, images, np.arange(500) % 10, k)
        mse.append(train.train_step(cfg, rt, training, diffusion, batch, k)[1].item())
    variance = (images / 127.5 - 1).var()
    bound = (ALPHA_BAR * variance / (ALPHA_BAR * variance + 1 - ALPHA_BAR)).mean()
    assert mse[0] == pytest.approx(1, abs=0.05)
    assert np.mean(mse[-20:]) < bound
