"""The units of the class: the functions of dit.py that students write, and the one thing that is done to them.

A unit is found by the names of its functions in the syntax tree of dit.py, which carries no marks. Then it is

    blanked    its body becomes `raise NotImplementedError("unit")`            handout.py
    mutated    one piece of its text becomes another: a known mistake          mutants.py
    grafted    it takes the place of the unit in the imported dit              grade.py
"""
import ast
import contextlib
import functools
import inspect
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sample

ROOT = Path(sample.__file__).parent


class Unit(NamedTuple):
    paper: str                  # section and equation
    points: int
    minutes: int                # of a student who has read the section
    functions: str              # of dit.py; forward+1: its first statement stays, a convention that nobody can guess
    tests: str                  # of test_dit.py, by the first words of their names, and the case if only one
    hint: str = ""              # a convention that the docstring does not say


CORE = {
    "normal_kl": Unit("Sec. 3.1", 3, 10, "normal_kl", "normal_kl"),
    "q_sample": Unit("Sec. 3.1, DDPM Eq. 4", 4, 10, "GaussianDiffusion.q_sample", "q_sample"),
    "q_posterior": Unit("Sec. 3.1, DDPM Eq. 6, 7", 7, 25, "GaussianDiffusion.q_posterior_mean_variance", "posterior"),
    "p_mean_variance": Unit("Sec. 3.1, iDDPM Eq. 15", 9, 35, "GaussianDiffusion.p_mean_variance",
        "learned_variance fixed_variance true_noise clip_denoised"),
    "vb": Unit("Sec. 3.1, DDPM Eq. 5", 6, 20, "GaussianDiffusion._vb_terms_bpd", "bound_term"),
    "training_losses": Unit("Sec. 3.1, DDPM Eq. 14, iDDPM Eq. 16", 9, 30, "GaussianDiffusion.training_losses",
        "training_loss bound_trains losses_give_the_network[training zero_init_learns"),
    "p_sample_loop": Unit("Sec. 3.1 and 4, DDPM Algorithm 2", 5, 20, "GaussianDiffusion.p_sample_loop+1",
        "samplers_visit[p_sample noise_is_added[p_sample exact_denoiser[p_sample_loop-50"),
    "patch_embed": Unit("Sec. 3.2, Figure 4", 3, 10, "PatchEmbed.forward", "patch_embed"),
    "pos_embed": Unit("Sec. 3.2", 6, 25, "get_2d_sincos_pos_embed", "pos_embed"),
    "timestep_embedding": Unit("Appendix A", 5, 15, "timestep_embedding", "timestep_embedding neighbouring_timesteps"),
    "label_embedder": Unit("Sec. 3.1, guidance", 3, 10, "LabelEmbedder.forward",
        "dropped_labels model_is_embed[adaln-zero zero_init_learns"),
    "attention": Unit("Sec. 3.2", 7, 25, "Attention.forward+2", "attention_is_softmax"),
    "mlp_modulate": Unit("Sec. 3.2", 3, 10, "Mlp.forward modulate", "mlp_has modulate"),
    "adaln": Unit("Sec. 3.2, Figure 3", 4, 15, "AdaLNBlock.condition AdaLNBlock.forward+1", "block_is[adaln]"),
    "adaln_zero": Unit("Sec. 3.2, Figure 3", 7, 20, "AdaLNZeroBlock.condition AdaLNZeroBlock.forward+1",
        "block_is[adaln-zero only_adaln_zero_blocks[adaln-zero"),
    "initialize": Unit("Sec. 4", 7, 25, "DiT.initialize_weights",
        "weights_are_initialized output_is_zero only_adaln_zero_blocks zero_init_learns"),
    "unpatchify": Unit("Sec. 3.2", 6, 20, "DiT.unpatchify", "unpatchify"),
    "guidance": Unit("Sec. 3.1, CFG Eq. 6", 6, 20, "DiT.forward_with_cfg+2", "guidance"),
}
EXTRA = {
    "likelihood": Unit("Sec. 3.1, DDPM Eq. 13", 6, 25, "discretized_gaussian_log_likelihood", "discretized",
        "No bin is impossible: clamp its mass at 1e-12."),
    "space_timesteps": Unit("Sec. 4", 2, 10, "space_timesteps+1", "space_timesteps"),
    "tables": Unit("Sec. 3.1, DDPM Eq. 4 to 7 and 15", 7, 30, "GaussianDiffusion._tabulate",
        "schedule q_sample posterior learned_variance fixed_variance true_noise respacing exact_denoiser",
        "The other methods use the tables by name, and _alphas_cumprod in float64. At t = 0 log variances, the fixed "
        "one's too, take the posterior's variance at t = 1, because that at 0 is 0 (with a single step: beta_0)."),
    "respaced": Unit("Sec. 3.1, iDDPM Eq. 19", 4, 20, "GaussianDiffusion.respaced", "respacing samplers_visit"),
    "bits_per_dim": Unit("Sec. 3.1, DDPM Eq. 5", 5, 25, "GaussianDiffusion.bits_per_dim",
        "bits_per_dim losses_give_the_network[bits"),
    "ddim": Unit("not in the paper: DDIM Eq. 12 and 16", 5, 20, "GaussianDiffusion.ddim_sample_loop+1",
        "samplers_visit[ddim noise_is_added[ddim exact_denoiser[ddim ddim_step"),
    "cross_attention": Unit("Sec. 3.2", 5, 15, "CrossAttention.forward+3", "cross_attention"),
    "in_context": Unit("Sec. 3.2, Figure 3", 4, 15, "InContextBlock.condition InContextBlock.forward",
        "block_is[in-context"),
    "cross_attention_block": Unit("Sec. 3.2, Figure 3", 4, 10,
        "CrossAttentionBlock.condition CrossAttentionBlock.forward", "block_is[cross-attention"),
    "decoder": Unit("Sec. 3.2", 3, 10, "PlainFinalLayer.forward FinalLayer.forward+1", "decoder"),
    "forward": Unit("Sec. 3.2, Figure 3", 5, 20, "DiT.forward+1", "model_is_embed"),
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
    proofs = [f"test_{words}".partition("[") for words in UNITS[unit].tests.split()]
    return [case for case in cases if any(
        case.startswith(words) and case.partition("[")[2].startswith(which) for words, _, which in proofs)]


def find(tree, dotted):
    """The definition of a class, method or function, such as "DiT.forward"; None if there is none."""
    for name in dotted.split("."):
        bodies = reversed(getattr(tree, "body", []))                # the last definition is the one that counts
        tree = next((node for node in bodies if getattr(node, "name", None) == name), None)
    return tree


parsed = functools.cache(ast.parse)


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
    lines = source.splitlines(keepends=True)
    places = [i for dotted, _ in functions(unit) for i in range(*lines_of(source, dotted)) if old in lines[i]]
    if len(places) != 1 or lines[places[0]].count(old) != 1:
        raise ValueError(f"{old!r} does not stand once in {unit}")
    line = lines[places[0]]
    code, margin, shapes = line.replace(old, new).partition("  #")
    lines[places[0]] = code.rstrip(" ").ljust(line.find("#") - 2 if margin else 0) + margin + shapes
    return "".join(lines)


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
        node.decorator_list = []
        old, new = inspect.unwrap(old), define(node, vars(module), path)[name]
        theirs, ours = inspect.signature(new), inspect.signature(old)
        if parameters(theirs) != parameters(ours):
            raise Ungradable(f"the parameters of {dotted} have to stay {ours}, not {theirs}")
        if new.__code__.co_freevars:
            raise Ungradable(f"{dotted} cannot use {', '.join(new.__code__.co_freevars)}")
        old.__code__, old.__defaults__, old.__kwdefaults__ = new.__code__, new.__defaults__, new.__kwdefaults__


def parameters(signature):
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


def define(node, names, path):
    """{name: object} that a statement makes, with these global names."""
    exec(compile(ast.Module([node], []), path, "exec"), names, made := {})
    return made


def bring_helpers(owner, tree, names, path):
    """Set what the tree defines and the owner, a module or a class, does not have."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign | ast.Import | ast.ImportFrom):
            with contextlib.suppress(BaseException):                # then the unit that uses it fails, and no other
                for name, value in define(node, names, path).items():
                    if not hasattr(owner, name):
                        setattr(owner, name, value)


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
