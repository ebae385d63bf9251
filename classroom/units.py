"""The units of the class: the functions of dit.py that students write, and the one thing that is done to them.

A unit is found by the names of its functions in the syntax tree of dit.py, which carries no marks. Then it is

    blanked    its body becomes `raise NotImplementedError("unit")`            handout.py
    mutated    one piece of its text becomes another: a known mistake          mutants.py
    grafted    it takes the place of the unit in the imported dit              grade.py

CORE and EXTRA are the only tables that are kept by hand.
"""
import ast
import functools
import inspect
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import sample


class Unit(NamedTuple):
    section: str                # of the paper, and the equation
    points: int
    minutes: int                # of a student who has read the section
    functions: str              # of dit.py; forward+1: its first statement stays, a convention that nobody can guess
    tests: str                  # of test_dit.py, without "test_"; [case] if only that one
    hint: str = ""              # a convention that the docstring does not say


CORE = {
    "normal_kl": Unit("3.1", 3, 10, "normal_kl", "normal_kl_is_torch_distributions"),
    "q_sample": Unit("3.1, DDPM Eq. 4", 4, 10, "GaussianDiffusion.q_sample",
        "q_sample_is_the_noising_of_one_step_repeated",
        "Use the tables: they were computed in float64. 1 - alphas_cumprod[t] in float32 has lost digits."),
    "q_posterior": Unit("3.1, DDPM Eq. 6 and 7", 7, 25, "GaussianDiffusion.q_posterior_mean_variance",
        "posterior_is_bayes_rule posterior_at_t0_is_x0_with_the_log_variance_of_t1"),
    "p_mean_variance": Unit("3.1, iDDPM Eq. 15", 9, 35, "GaussianDiffusion.p_mean_variance",
        "learned_variance_lies_between_posterior_and_beta fixed_variance_is_beta_and_at_t0_the_posterior_of_t1 "
        "true_noise_predicts_the_true_x0_and_mean clip_denoised_clamps_x0_and_the_mean_made_of_it"),
    "vb": Unit("3.1, DDPM Eq. 5", 6, 20, "GaussianDiffusion._vb_terms_bpd",
        "bound_term_is_a_kl_and_at_t0_the_likelihood"),
    "training_losses": Unit("3.1, DDPM Eq. 14, iDDPM Eq. 16", 9, 30, "GaussianDiffusion.training_losses",
        "training_loss_is_mse_plus_the_bound_term bound_trains_the_variance_alone_and_mse_eps_alone "
        "losses_give_the_network_x_t_and_the_original_t[training_losses] zero_init_learns"),
    "p_sample_loop": Unit("3.1 and 4, DDPM Algorithm 2", 5, 20, "GaussianDiffusion.p_sample_loop+1",
        "samplers_visit_the_original_timesteps_downwards[p_sample_loop] "
        "noise_is_added_at_every_step_but_the_last[p_sample_loop-options0] "
        "exact_denoiser_gives_the_data_back[p_sample_loop-50-0.0001]"),
    "patch_embed": Unit("3.2, Figure 4", 3, 10, "PatchEmbed.forward", "patch_embed_is_one_linear_map_of_each_patch"),
    "pos_embed": Unit("3.2", 6, 25, "get_2d_sincos_pos_embed", "pos_embed_is_the_scalar_formula"),
    "timestep_embedding": Unit("Appendix A", 5, 15, "timestep_embedding",
        "timestep_embedding_is_the_scalar_formula neighbouring_timesteps_differ_in_bfloat16"),
    "label_embedder": Unit("3.1, guidance", 3, 10, "LabelEmbedder.forward",
        "dropped_labels_take_the_null_row model_is_embed_blocks_decode[adaln-zero] zero_init_learns"),
    "attention": Unit("3.2", 7, 25, "Attention.forward+2", "attention_is_softmax_attention_in_each_head"),
    "mlp_modulate": Unit("3.2", 3, 10, "Mlp.forward modulate",
        "mlp_has_a_tanh_gelu_between_two_linear_layers modulate_scales_and_shifts_every_token_alike"),
    "adaln": Unit("3.2, Figure 3", 4, 15, "AdaLNBlock.condition AdaLNBlock.forward+1",
        "block_is_its_description[adaln]"),
    "adaln_zero": Unit("3.2, Figure 3", 7, 20, "AdaLNZeroBlock.condition AdaLNZeroBlock.forward+1",
        "block_is_its_description[adaln-zero] only_adaln_zero_blocks_are_the_identity_at_init[adaln-zero]"),
    "initialize": Unit("4", 7, 25, "DiT.initialize_weights",
        "weights_are_initialized_as_documented output_is_zero_at_init only_adaln_zero_blocks_are_the_identity_at_init "
        "zero_init_learns"),
    "unpatchify": Unit("3.2", 6, 20, "DiT.unpatchify", "unpatchify_undoes_patchify"),
    "guidance": Unit("3.1, CFG Eq. 6", 6, 20, "DiT.forward_with_cfg+2",
        "guidance_of_1_is_conditional_and_costs_one_pass guidance_extrapolates_eps_and_nothing_else"),
}
EXTRA = {
    "likelihood": Unit("3.1, DDPM Eq. 13", 6, 25, "discretized_gaussian_log_likelihood",
        "discretized_likelihood_is_the_mass_of_each_bin", "No bin is impossible: clamp its mass at 1e-12."),
    "space_timesteps": Unit("4", 2, 10, "space_timesteps+1", "space_timesteps_are_even_from_first_to_last"),
    "tables": Unit("3.1, DDPM Eq. 4 to 7 and 15", 7, 30, "GaussianDiffusion._tabulate",
        "schedule_is_linear_from_1e4_to_2e2 q_sample_is_the_noising_of_one_step_repeated posterior_is_bayes_rule "
        "posterior_at_t0_is_x0_with_the_log_variance_of_t1 learned_variance_lies_between_posterior_and_beta "
        "fixed_variance_is_beta_and_at_t0_the_posterior_of_t1 true_noise_predicts_the_true_x0_and_mean "
        "respacing_keeps_alphas_cumprod_and_recomputes_betas exact_denoiser_gives_the_data_back",
        "The names of the tables are those that the other methods use; also num_timesteps, timestep_map, and "
        "_alphas_cumprod in float64. At t = 0 the posterior's variance is 0: its logarithm, and the variance without "
        "a learned one, take the posterior's variance at t = 1 (a process of one step: beta_0)."),
    "respaced": Unit("3.1, iDDPM Eq. 19", 4, 20, "GaussianDiffusion.respaced",
        "respacing_keeps_alphas_cumprod_and_recomputes_betas samplers_visit_the_original_timesteps_downwards"),
    "bits_per_dim": Unit("3.1, DDPM Eq. 5", 5, 25, "GaussianDiffusion.bits_per_dim",
        "bits_per_dim_is_the_sum_of_all_terms losses_give_the_network_x_t_and_the_original_t[bits_per_dim]"),
    "ddim": Unit("not in the paper: DDIM Eq. 12 and 16", 5, 20, "GaussianDiffusion.ddim_sample_loop+1",
        "samplers_visit_the_original_timesteps_downwards[ddim_sample_loop] ddim_step_is_diffusers "
        "noise_is_added_at_every_step_but_the_last[ddim_sample_loop-options1] "
        "exact_denoiser_gives_the_data_back[ddim_sample_loop-1000-0.01]"),
    "cross_attention": Unit("3.2", 5, 15, "CrossAttention.forward+3", "cross_attention_asks_the_condition"),
    "in_context": Unit("3.2, Figure 3", 4, 15, "InContextBlock.condition InContextBlock.forward",
        "block_is_its_description[in-context]"),
    "cross_attention_block": Unit("3.2, Figure 3", 4, 10, "CrossAttentionBlock.condition CrossAttentionBlock.forward",
        "block_is_its_description[cross-attention]"),
    "decoder": Unit("3.2", 3, 10, "PlainFinalLayer.forward FinalLayer.forward+1",
        "decoder_is_a_norm_and_a_linear_layer"),
    "forward": Unit("3.2, Figure 3", 5, 20, "DiT.forward+1", "model_is_embed_blocks_decode"),
}
UNITS = CORE | EXTRA


class Ungradable(Exception):
    """A unit that cannot be put into dit, in one line."""


def functions(unit):
    """[(dotted name, number of first statements that stay)]."""
    parts = (word.partition("+") for word in UNITS[unit].functions.split())
    return [(name, int(kept or 0)) for name, _, kept in parts]


def tests(unit, cases):
    """Those of the test cases, such as "test_output_is_zero_at_init[adaln]", that prove the unit."""
    named = {f"test_{name}" for name in UNITS[unit].tests.split()}
    return [case for case in cases if case in named or case.partition("[")[0] in named]


def find(tree, dotted):
    """The definition of a class, method or function, such as "DiT.forward"; None if there is none."""
    for name in dotted.split("."):
        tree = next((node for node in tree.body if getattr(node, "name", None) == name), None)
        if tree is None:
            return None
    return tree


parsed = functools.lru_cache(ast.parse)


def lines_of(source, dotted, kept=0):
    """(first, last + 1): the lines of a function's body, without its docstring and the first `kept` statements."""
    node = find(parsed(source), dotted)
    statements = node.body[kept + (ast.get_docstring(node) is not None):]
    return statements[0].lineno - 1, statements[-1].end_lineno


def in_order(units):
    """The units in dit.py's order, in which each needs only those above it."""
    source = (ROOT / "dit.py").read_text()
    return sorted(units, key=lambda unit: lines_of(source, functions(unit)[0][0]))


def blank(source, units):
    """dit.py with the bodies of these units replaced; all else stays to the letter."""
    lines = source.splitlines(keepends=True)
    for unit in units:
        for dotted, kept in functions(unit):
            first, last = lines_of(source, dotted, kept)
            indent = re.match(" *", lines[first])[0]
            lines[first:last] = [f'{indent}raise NotImplementedError("{unit}")\n'] + [""] * (last - first - 1)
    return "".join(lines)


def mutate(source, unit, old, new):
    """dit.py with `old`, which stands exactly once in the unit's code, replaced by `new`."""
    lines, places = source.splitlines(keepends=True), []
    for dotted, _ in functions(unit):
        first, last = lines_of(source, dotted)
        text, before = "".join(lines[first:last]), len("".join(lines[:first]))
        places += [before + match.start() for match in re.finditer(re.escape(old), text)]
    if len(places) != 1:
        raise ValueError(f"{old!r} stands {len(places)} times in {unit}, not once")
    return source[:places[0]] + new + source[places[0] + len(old):]


def graft(module, tree, unit, path="dit.py"):
    """Let the unit's functions in the imported module run the code that a syntax tree has for them.

    The function objects stay, and with them every reference and decorator. What the tree defines beside the module's
    own names (helpers, imports, new methods) comes along; other changes are left out. Ungradable if a function is
    missing or has other parameters.
    """
    bring_helpers(module, tree, vars(module), path)
    for dotted, _ in functions(unit):
        owner, _, name = dotted.rpartition(".")
        node, old = find(tree, dotted), module
        for part in dotted.split("."):
            old = getattr(old, part)
        if not isinstance(node, ast.FunctionDef):
            raise Ungradable(f"there is no function {dotted}")
        if owner:
            bring_helpers(getattr(module, owner), find(tree, owner), vars(module), path)
        old, new = inspect.unwrap(old), define(node, vars(module), path, decorated=False)[name]
        if parameters(new) != parameters(old):
            raise Ungradable(f"the parameters of {dotted} have to stay {inspect.signature(old)}, not {inspect.signature(new)}")
        if new.__code__.co_freevars:
            raise Ungradable(f"{dotted} cannot use {', '.join(new.__code__.co_freevars)}")
        old.__code__, old.__defaults__, old.__kwdefaults__ = new.__code__, new.__defaults__, new.__kwdefaults__


def parameters(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def define(node, names, path, decorated=True):
    """{name: object} that a definition makes, with these global names."""
    made, decorators = {}, getattr(node, "decorator_list", None)
    if decorators and not decorated:
        node.decorator_list = []
    exec(compile(ast.Module([node], []), path, "exec"), names, made)
    return made


def bring_helpers(owner, tree, names, path):
    """Set what the tree defines and the owner, a module or a class, does not have."""
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            new = [alias.asname or alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.Assign):
            new = [target.id for target in node.targets if isinstance(target, ast.Name)]
        else:
            new = [getattr(node, "name", None)]
        if new and not any(name is None or hasattr(owner, name) for name in new):
            try:
                made = define(node, names, path)
            except Exception:                                       # then the unit that uses it fails, and no other
                continue
            for name, value in made.items():
                setattr(owner, name, value)


# The command line's way to name units ---------------------------------------------------------------------------------

def add_units(parser):
    parser.add_argument("--units", help="these units, separated by commas")
    parser.add_argument("--core", action="store_true", help="the core units (default)")
    parser.add_argument("--extra", action="store_true", help="the extra units; with --core, all")


def chosen_units(args):
    """The units that --units, --core and --extra name; the core units if none does."""
    if args.units:
        names = args.units.split(",")
        if unknown := [name for name in names if name not in UNITS]:
            raise sample.UserError(f"no unit {unknown[0]!r}: choose from {', '.join(UNITS)}")
        return names
    return list(UNITS if args.core and args.extra else EXTRA if args.extra else CORE)
