"""Are the tests any good? They have to fail on every known mistake, and to pass every right alternative.

    python classroom/mutants.py                                # test_dit.py on all of them: a table
    python classroom/mutants.py --units vb,guidance
    python classroom/mutants.py --tests test_mine.py --bugs 3 --seed 7       # a student's tests, see handout.py --bugs

A line of MUTANTS: in this unit, this text becomes that one; and where that was seen. wheats.py has right alternatives.
Each is put into dit.py in a process of its own, and the unit's tests run.
"""
import ast
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from grade import in_a_process, run_tests, with_tests
from units import ROOT, UNITS, Ungradable, add_units, chosen_units, graft, in_order, mutate, tests
from wheats import WHEATS

import dit
import sample

MUTANTS = [
    ("normal_kl", "exp(logvar1 - logvar2)", "exp(logvar2 - logvar1)", "reversed"),
    ("normal_kl", "logvar2 - logvar1 - 1.0", "logvar1 - logvar2 - 1.0", "sign of the log ratio"),
    ("normal_kl", "0.5 * (", "(", "half forgotten"),
    ("likelihood", "torch.exp(-log_std)", "torch.exp(-2 * log_std)", "log variance for log std"),
    ("likelihood", "x + 1 / 255", "x + 1 / 127.5", "a whole bin for half a bin"),
    ("likelihood", "x > 0.999", "x > 1.999", "the outer bin ends"),
    ("likelihood", ".clamp(min=1e-12)", "", "log 0"),
    ("space_timesteps", "(num_timesteps - 1) / (num_steps - 1)", "num_timesteps / num_steps", "never reaches the last"),
    ("space_timesteps", "[num_timesteps - 1]", "[0]", "ADM: a single step is the first"),
    ("tables", "np.cumprod(1.0 - betas)", "np.cumprod(betas)", "LuChengTHU/dpm-solver#13"),
    ("tables", "np.cumprod(1.0 - betas)", "np.cumprod((1.0 - betas).astype(np.float32))", "float32 tables"),
    ("tables", "np.append(1.0, alphas_cumprod[:-1])", "np.append(alphas_cumprod[1:], 1.0)", "lucidrains/ddpm#18"),
    ("tables", "np.append(1.0,", "np.append(alphas_cumprod[0],", "ControlNet#587, stablediffusion#345"),
    ("tables", "np.append(at_0, posterior_variance[1:])", "np.maximum(posterior_variance, 1e-20)", "diffusers#3006"),
    ("tables", "betas * np.sqrt(alphas_cumprod_prev)", "betas * np.sqrt(alphas_cumprod)", "t for t - 1"),
    ("tables", "np.log(np.append(at_0, betas[1:]))", "np.log(betas)", "ADM's fixed variance at t = 0"),
    ("respaced", "self._alphas_cumprod[kept]", "np.cumprod(1.0 - self.betas.numpy()[kept])", "diffusers#3006"),
    ("respaced", "self.timestep_map.cpu().numpy()[kept]", "np.arange(len(kept))", "the short process's own t"),
    ("respaced", "self.timestep_map.cpu().numpy()[kept]", "np.array(kept)", "respaced twice"),
    ("q_sample", "self.sqrt_alphas_cumprod", "self.alphas_cumprod", "ermongroup/ddim#44"),
    ("q_sample", "self.sqrt_one_minus_alphas_cumprod", "self.betas.sqrt()", "one step for t steps"),
    ("q_sample", "self.sqrt_one_minus_alphas_cumprod", "(1 - self.sqrt_alphas_cumprod)", "1 - sqrt for sqrt(1 -)"),
    ("q_posterior", "self.posterior_variance", "self.betas", "beta for beta tilde"),
    ("q_posterior", "self.posterior_log_variance_clipped", "self.posterior_variance.log()", "tqch/ddpm-torch#9"),
    ("p_mean_variance", "(v + 1) / 2", "v", "v in [-1, 1] taken for a share"),
    ("p_mean_variance", "(v + 1) / 2", "(1 - v) / 2", "bounds exchanged"),
    ("p_mean_variance", "self.sqrt_recipm1_alphas_cumprod", "self.sqrt_one_minus_alphas_cumprod", "division forgotten"),
    ("p_mean_variance", "(pred_xstart, x_t, t)", "(x_t, pred_xstart, t)", "order of the arguments"),
    ("p_mean_variance", "[:, :C], model_output[:, C:]", "[:, C:], model_output[:, :C]", "v first"),
    ("p_mean_variance", "variance=log_variance.exp()", "variance=(0.5 * log_variance).exp()", "standard deviation"),
    ("vb", " / math.log(2.0)", "", "nats for bits"),
    ("vb", "t == 0", "t == 1", "off by one"),
    ("vb", '(true_mean, true_log_variance, out["mean"], out["log_variance"])',
     '(out["mean"], out["log_variance"], true_mean, true_log_variance)', "KL's direction"),
    ("vb", '0.5 * out["log_variance"]', 'out["log_variance"]', "variance for standard deviation"),
    ("vb", "likelihood(x_start,", "likelihood(x_t,", "likelihood of the noisy image"),
    ("training_losses", "eps.detach()", "eps", "the bound trains eps too"),
    ("training_losses", "mse + vb", "mse + vb / 1000", "0.001 belongs to the sum over all t"),
    ("training_losses", "(noise - eps)", "(x_start - eps)", "predicts x_0"),
    ("training_losses", "q_sample(x_start, t, noise)", "q_sample(x_start, t, torch.randn_like(noise))", "two noises"),
    ("training_losses", "(model, x_t,", "(model, x_start,", "the clean image goes in"),
    ("training_losses", "self._call(model, x_t, t, model_kwargs)", "model(x_t, t, **model_kwargs)", "the short t"),
    ("training_losses", "** 2).flatten(1).mean(1)", "** 2).mean()", "mean over the batch"),
    ("training_losses", " if v.shape[1] > 0 else torch.zeros_like(mse)", "", "a bound without learned variance"),
    ("bits_per_dim", "self.q_sample(x_start, t, noise)", "self.q_sample(x_start, t, randn(x_start))", "two noises"),
    ("bits_per_dim", "vb[::-1]", "vb", "order of the columns"),
    ("bits_per_dim", "prior + vb.sum(dim=1)", "vb.sum(dim=1)", "prior forgotten"),
    ("p_sample_loop", " * (t > 0)[:, None, None, None]", "", "noise in the last step"),
    ("p_sample_loop", "t > 0", "t > 1", "off by one"),
    ("p_sample_loop", '0.5 * out["log_variance"]', 'out["log_variance"]', "variance for standard deviation"),
    ("p_sample_loop", "self._call(model, x_t, t, model_kwargs)", "model(x_t, t, **model_kwargs)", "the short t"),
    ("ddim", "self.sqrt_alphas_cumprod_prev", "self.sqrt_alphas_cumprod", "lucidrains/ddpm#81"),
    ("ddim", "eta ** 2 * self._gather(self.posterior_variance", "eta ** 2 * self._gather(self.betas", "CoursIA#16158"),
    ("ddim", "eta ** 2", "eta", "eta scales the standard deviation"),
    ("patch_embed", "x.flatten(2).transpose(1, 2)", "x.reshape(len(x), -1, x.shape[1])", "channels and places mixed"),
    ("patch_embed", "x.flatten(2)", "x.transpose(2, 3).flatten(2)", "column by column"),
    ("pos_embed", "(column, row)", "(row, column)", "axes exchanged"),
    ("pos_embed", "(np.sin, np.cos)", "(np.cos, np.sin)", "the order of the other embedding"),
    ("timestep_embedding", "torch.cos(args), torch.sin(args)", "torch.sin(args), torch.cos(args)", "flashinfer#3819"),
    ("timestep_embedding", "/ half", "/ (half - 1)", "hojonathanho/diffusion#15, diffusers#12791"),
    ("timestep_embedding", "torch.cat([torch.cos(args), torch.sin(args)], dim=-1)",
     "torch.stack([torch.cos(args), torch.sin(args)], dim=-1).flatten(1)", "interleaved: diffusers#3981"),
    ("timestep_embedding", ".float()", ".float() / 1000", "SiT#24, REPA#40"),
    ("timestep_embedding", ".float()", ".bfloat16()", "936 is 937"),
    ("label_embedder", "(drop, self.num_classes, y)", "(drop, y, self.num_classes)", "6.S184 lab 3, 3ce71b6"),
    ("label_embedder", "self.num_classes, y", "self.num_classes - 1, y", "the last class is the null label"),
    ("label_embedder", "self.num_classes, y", "0, y", "DiffGui#5"),
    ("label_embedder", "if drop is not None", "if drop is not None and self.training", "official: only in training"),
    ("attention", "x.transpose(1, 2).reshape", "x.reshape", "jsbaan/transformer-from-scratch#6, FuxiCTR#30"),
    ("attention", "(q, k, v)", "(q, k, v, scale=D ** -0.5)", "width of all heads: TMUnet#13"),
    ("attention", "(q, k, v)", "(q, k, v, is_causal=True)", "copied from a GPT"),
    ("cross_attention", "k, v = kv", "v, k = kv", "key and value exchanged"),
    ("mlp_modulate", ', approximate="tanh"', "", "the exact GELU"),
    ("mlp_modulate", "(1 + scale[:, None])", "scale[:, None]", "1 + forgotten"),
    ("in_context", "t[:, None], y[:, None]", "y[:, None], t[:, None]", "order of the tokens"),
    ("in_context", "self.attn(self.norm1(x))", "self.norm1(self.attn(x))", "norm behind"),
    ("cross_attention_block", "torch.stack([t, y], dim=1)", "(t + y)[:, None]", "a sequence of one"),
    ("cross_attention_block", "self.norm_cross(x)", "x", "norm forgotten"),
    ("adaln", "x, t + y", "x, t", "the label does not enter"),
    ("adaln", "beta1, gamma1))", "gamma1, beta1))", "shift and scale exchanged"),
    ("adaln_zero", "beta1, gamma1))", "gamma1, beta1))", "shift and scale exchanged"),
    ("adaln_zero", "x + alpha2[:, None]", "x + (1 + alpha2[:, None])", "1 + on a gate"),
    ("adaln_zero", "x + alpha1[:, None] * self.attn", "x + self.attn", "gate forgotten"),
    ("adaln_zero", "x + alpha1[:, None] *", "x + alpha2[:, None] *", "one gate twice"),
    ("adaln_zero", "beta1, gamma1, alpha1, beta2", "gamma1, beta1, alpha1, beta2", "another order of the parts"),
    ("decoder", "beta, gamma))", "gamma, beta))", "shift and scale exchanged"),
    ("decoder", "self.linear(self.norm_final(x))", "self.linear(x)", "norm forgotten"),
    ("initialize", "zeros_(module.adaLN", "xavier_uniform_(module.adaLN", "not zero: F5-TTS#793, DDT#14"),
    ("initialize", "[*self.blocks, self.final_layer]", "self.blocks", "decoder forgotten"),
    ("initialize", "std=0.02", "std=1.0", "nn.Embedding's own"),
    ("initialize", "module.weight.view(len(module.weight), -1)", "module.weight", "patch embedding as a convolution"),
    ("unpatchify", "x.view(-1, g, g, p, p, C)", "x.view(-1, g, g, C, p, p).permute(0, 1, 2, 4, 5, 3)", "minRF#6"),
    ("unpatchify", "(0, 5, 1, 3, 2, 4)", "(0, 5, 2, 4, 1, 3)", "the image on its side"),
    ("forward", " + self.pos_embed ", " ", "no positions"),
    ("forward", "self.y_embedder(y, drop)", "self.y_embedder(y)", "no label is dropped"),
    ("forward", "t_embedder(t)", "t_embedder(torch.arange(len(t)))", "the index in the batch: gmongaras#10"),
    ("forward", ":self.pos_embed.shape[1]]", "-self.pos_embed.shape[1]:]", "keeps t and y, drops two patches"),
    ("guidance", "= uncond[:, :k] +", "= cond[:, :k] +", "scale off by one: threestudio#127"),
    ("guidance", "(y, self.num_classes)", "(y, 0)", "class 0 for the null label: DiffGui#5"),
    ("guidance", "(y, self.num_classes)", "(y, 1000)", "ImageNet's null label: DiT#108"),
    ("guidance", "[eps, cond[:, k:]]", "[eps, uncond[:, k:]]", "v of the unconditional pass"),
    ("guidance", "cfg_scale == 1", "cfg_scale <= 1", "0 taken for none: diffusers#5882"),
]


def bugs(units, count, seed):
    """`count` mutants, each of another one of the units."""
    if count > len(units):
        raise sample.UserError(f"{count} bugs need as many units: there are only {', '.join(units)}")
    rng = random.Random(seed)
    return [rng.choice([mutant for mutant in MUTANTS if mutant[0] == unit]) for unit in rng.sample(units, count)]


def verdict(unit, old, new, items, cases):
    """What the first test says that fails with this change of dit.py; "" if all pass."""
    tree = ast.parse(mutate((ROOT / "dit.py").read_text(), unit, old, new))

    def work():
        graft(dit, tree, unit)
        return run_tests([items[case] for case in cases], stop=True)

    try:
        found, _ = in_a_process(work, limit=120)
        return next((f"{name}: {message}" for name, message in found.items() if message), "")
    except Ungradable as error:
        return str(error)


def main(argv):
    parser = sample.Parser(prog="mutants.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add_units(parser)
    parser.add_argument("--tests", help="a student's tests, to be judged instead of test_dit.py")
    parser.add_argument("--bugs", type=int, help="only these mistakes: the number given to handout.py")
    parser.add_argument("--seed", type=int, default=0, help="the seed given to handout.py")
    args = parser.parse_args(argv)
    some = args.units or args.core or args.extra or args.bugs
    units, right, wrong = chosen_units(args) if some else list(UNITS), [], []
    mistakes = bugs(in_order(units), args.bugs, args.seed) if args.bugs else MUTANTS

    def work(items):
        for unit, old, new, *seen in [line for line in [*mistakes, *WHEATS] if line[0] in units]:
            began = time.perf_counter()
            failed = verdict(unit, old, new, items, list(items) if args.tests else tests(unit, items))
            (right if bool(failed) == bool(seen) else wrong).append(unit)
            word = ("killed" if failed else "SURVIVES") if seen else ("REJECTED" if failed else "accepted")
            print(f"{word:9}{time.perf_counter() - began:5.1f} s  {unit}: {old} -> {new}", *seen, sep="   ", flush=True)
            if failed and (args.tests or not seen):
                print(f"{'':18}{failed[:150]}")
        print(f"{len(right)} of {len(right) + len(wrong)} judged rightly")

    with_tests(args.tests or ROOT / "test_dit.py", work)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    sample.run(main, less_memory="judge fewer units")
