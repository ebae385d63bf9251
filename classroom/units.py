"""The units of the class: the functions of dit.py that students write, and the one thing that is done to them.

A unit is found by the names of its functions in the syntax tree of dit.py, which carries no marks. Then it is

    blanked    its body becomes `raise NotImplementedError("unit")`            handout.py
    mutated    one piece of its text becomes another: a known mistake          mutants.py
    grafted    it takes the place of the unit in the imported dit              grade.py
"""
import __future__

import ast
import dis
import functools
import inspect
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dit
import sample

ROOT = Path(dit.__file__).parent
REFERENCE = (ROOT / "dit.py").read_text(encoding="utf-8")
OWN = {name: value for name, value in vars(dit).items() if not inspect.ismodule(value) and value is not dit.partial}
# operations of Python's bytecode
BINDS, READS = ("STORE_NAME", "STORE_GLOBAL"), ("LOAD_NAME", "LOAD_GLOBAL")
MEMBERS = "LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"


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
        "variance_is true_noise clip_denoised"),
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
    "adaln": Unit("Sec. 3.2, Figure 3", 4, 15, "AdaLNBlock.condition AdaLNBlock.forward+1",
        "block_is[adaln] model_is_embed[adaln]"),
    "adaln_zero": Unit("Sec. 3.2, Figure 3", 7, 20, "AdaLNZeroBlock.condition AdaLNZeroBlock.forward+1",
        "block_is[adaln-zero model_is_embed[adaln-zero"),
    "initialize": Unit("Sec. 4", 7, 25, "DiT.initialize_weights",
        "weights_are_initialized output_is_zero[adaln-zero only_adaln_zero_blocks[adaln-zero zero_init_learns"),
    "unpatchify": Unit("Sec. 3.2", 6, 20, "DiT.unpatchify", "unpatchify"),
    "guidance": Unit("Sec. 3.1, CFG Eq. 6", 6, 20, "DiT.forward_with_cfg+2", "guidance"),
}
EXTRA = {
    "likelihood": Unit("Sec. 3.1, DDPM Eq. 13", 6, 25, "discretized_gaussian_log_likelihood", "discretized",
        "No bin is impossible: clamp its mass at 1e-12."),
    "space_timesteps": Unit("Sec. 4", 2, 10, "space_timesteps+1", "space_timesteps respacing"),
    "tables": Unit("Sec. 3.1, DDPM Eq. 4 to 7 and 15", 7, 30, "GaussianDiffusion._tabulate",
        "schedule q_sample posterior variance_is true_noise respacing exact_denoiser",
        "The other methods use the tables by name, and _alphas_cumprod in float64. At t = 0 log variances, the fixed "
        "one's too, take the posterior's variance at t = 1, because that at 0 is 0 (with a single step: beta_0)."),
    "respaced": Unit("Sec. 3.1, iDDPM Eq. 19", 4, 20, "GaussianDiffusion.respaced", "respacing samplers_visit"),
    "bits_per_dim": Unit("Sec. 3.1, DDPM Eq. 5", 5, 25, "GaussianDiffusion.bits_per_dim",
        "bits_per_dim losses_give_the_network[bits"),
    "ddim": Unit("not in the paper: DDIM Eq. 12 and 16", 5, 20, "GaussianDiffusion.ddim_sample_loop+1",
        "samplers_visit[ddim noise_is_added[ddim exact_denoiser[ddim ddim_step"),
    "cross_attention": Unit("Sec. 3.2", 5, 15, "CrossAttention.forward+3", "cross_attention"),
    "in_context": Unit("Sec. 3.2, Figure 3", 4, 15, "InContextBlock.condition InContextBlock.forward",
        "block_is[in-context model_is_embed[in-context"),
    "cross_attention_block": Unit("Sec. 3.2, Figure 3", 4, 10,
        "CrossAttentionBlock.condition CrossAttentionBlock.forward", "block_is[cross-attention model_is_embed[cross"),
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


def expression(unit):
    """The unit's tests, for pytest's -k."""
    return " or ".join("test_" + words.replace("[", " and [") for words in UNITS[unit].tests.split())


def find(tree, dotted):
    """All definitions of a class, method or function, such as "DiT.forward": the last is the one that counts."""
    found = [tree]
    for name in filter(None, dotted.split(".")):
        found = [node for outer in found for node in outer.body if getattr(node, "name", None) == name]
    return found


parsed = functools.cache(ast.parse)


def lines_of(source, dotted, kept=0):
    """(first, last + 1): the lines of a function's body, without its docstring and the first `kept` statements."""
    node = find(parsed(source), dotted)[-1]
    statements = node.body[kept + (ast.get_docstring(node) is not None):]
    return statements[0].lineno - 1, statements[-1].end_lineno


def in_order(units):
    """The units in dit.py's order, in which each needs only those above it."""
    return sorted(units, key=lambda unit: lines_of(REFERENCE, functions(unit)[0][0]))


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
    """(dit.py with `old`, which stands exactly once in the unit's code, replaced by `new`; the function's name)."""
    lines = source.splitlines(keepends=True)
    places = [(i, dotted) for dotted, _ in functions(unit) for i in range(*lines_of(source, dotted)) if old in lines[i]]
    if len(places) != 1 or lines[places[0][0]].count(old) != 1:
        raise ValueError(f"{old!r} does not stand once in {unit}")
    (i, dotted), = places
    code, margin, shapes = lines[i].replace(old, new).partition("  #")
    lines[i] = code.rstrip(" ").ljust(lines[i].find("#") - 2 if margin else 0) + margin + shapes
    return "".join(lines), dotted


# A student's file -----------------------------------------------------------------------------------------------------

def parse(text):
    """The syntax tree of a file. If the file cannot be compiled: of those of its definitions and methods that can, each
    up to the next; `broken` has what is wrong with the others, by name, and under "" with the file."""
    lines, tree = text.split("\n"), ast.Module([], [])
    tree.broken = {}

    def add(first, last, name="", owner=""):
        text, around = "\n".join(lines[first:last]), "\n" * (first - 1) + f"class {owner}:\n" if owner else "\n" * first
        try:
            part = ast.parse(around + text)                         # the lines keep their numbers
            compile(part, "dit.py", "exec")
            tree.body += part.body
            return
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            words = getattr(error, "msg", "") or str(error) or type(error).__name__
            tree.broken[f"{owner}.{name}".strip(".")] = f"line {getattr(error, 'lineno', None) or first + 1}: {words}"
        indent = re.search(r"^([ \t]+)(?:@|async |def )|\Z", text, re.M)[1] if name else ""
        starts = [i for i in range(first, last) if re.match(f"{indent}(@|async |def |class )", lines[i])
                  and not lines[i - 1].startswith(f"{indent}@")]
        starts = [] if owner else starts if name else [first, *starts]            # a method is not cut
        for start, end in zip(starts, [*starts[1:], last] if starts else [], strict=True):
            head = re.search(r"(?:def|class) +(\w+)|\Z", "\n".join(lines[start:end]))[1]
            add(start, end, head or "imports", name)

    add(0, len(lines))
    return tree


def compiled(node, path="dit.py", owner=""):
    """The code of a statement, inside a class if `owner` names one. Annotations are not evaluated."""
    tree = ast.parse(f"class {owner}: pass" if owner else "")
    (tree.body[0] if owner else tree).body = [node]
    return compile(tree, path, "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)


def names(node, operations):
    """The names to which a statement and, but for BINDS, the functions inside it apply these operations."""
    codes = [compiled(node)]
    for code in codes:
        codes += [const for const in code.co_consts if operations != BINDS and inspect.iscode(const)]
    return {step.argval for code in codes for step in dis.get_instructions(code) if step.opname in operations}


def code_of(tree, unit):
    """[(class or "", statement)] that a unit runs: its functions in a student's tree and, found by name, what they need
    of the student's own: helpers, imports, new methods, and what these need. Ungradable if a function is missing."""
    code = [("", node) for node in tree.body if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
    for dotted, _ in functions(unit):
        node = next(reversed(find(tree, dotted)), None)
        if dotted in tree.broken:
            raise Ungradable(f"syntax error in {tree.broken[dotted]}")
        if not isinstance(node, ast.FunctionDef):
            raise Ungradable(f"there is no function {dotted}" + (f" ({tree.broken['']})" if tree.broken else ""))
        theirs = {ast.unparse(word) for word in find(parsed(REFERENCE), dotted)[-1].decorator_list}
        node.decorator_list = [word for word in node.decorator_list if ast.unparse(word) not in theirs]
        code.append((dotted.rpartition(".")[0], node))
    others = [(owner, node, names(node, BINDS) - (vars(getattr(dit, owner)) if owner else OWN).keys())
              for owner in {"", *(owner for owner, _ in code)} for outer in find(tree, owner) for node in outer.body]
    new = code
    while new:
        read, members = (set().union(*(names(node, what) for _, node in code)) for what in (READS, MEMBERS))
        new = [(owner, node) for owner, node, bound in others
               if bound & (members | read if owner else read) and (owner, node) not in code]
        code = code + new
    return sorted(code, key=lambda part: part[1].lineno)


def graft(code, unit, path="dit.py"):
    """Let the unit's functions in the imported dit run this code, see code_of. Ungradable if their parameters differ.

    The function objects stay, and with them every reference and decorator; they call the new ones, which see dit's
    names and, before its imports, the student's own.
    """
    seen, dit.grafted, taken = dict(vars(dit)), {}, {owner: {*vars(getattr(dit, owner))} for owner, _ in code if owner}
    for owner, node in code:
        holder, made = (getattr(dit, owner), {}) if owner else (dit, seen)
        inner = {name: value for name, value in vars(holder).items() if owner and name not in seen}
        seen |= inner                                               # the body of a class sees the class's own names
        exec(compiled(node, path, owner), seen, made)
        for name in inner:
            del seen[name]
        made = dict(vars(made[owner])) if owner else made
        dotted = f"{owner}.{getattr(node, 'name', '')}".strip(".")
        if dotted in dict(functions(unit)):
            old, new = inspect.unwrap(getattr(holder, node.name)), made[node.name]
            inspect.unwrap(new).__annotations__ = {}
            if inspect.signature(new) != inspect.signature(old):
                raise Ungradable(f"the parameters of {dotted} have to stay {inspect.signature(old)}, not "
                                 f"{inspect.signature(new)}")
            old.__code__ = eval(f"lambda *args, **kwargs: grafted[{dotted!r}](*args, **kwargs)").__code__
            old.__defaults__, old.__kwdefaults__, dit.grafted[dotted] = None, None, new
        for name, value in made.items() if owner else ():
            function = inspect.unwrap(getattr(value, "fget", None) or getattr(value, "__func__", value))
            if "__class__" in (free := getattr(getattr(function, "__code__", None), "co_freevars", ())):
                function.__closure__[free.index("__class__")].cell_contents = holder        # of super()
            if name not in taken[owner] and name not in ("__dict__", "__weakref__"):
                setattr(holder, name, value)
        seen |= OWN                                                 # what the reference defines, it keeps


def add_units(parser):
    parser.add_argument("--units", "--only", help="these units, separated by commas")
    parser.add_argument("--core", action="store_true", help="the core units (default)")
    parser.add_argument("--extra", action="store_true", help="the extra units; with --core, all")


def chosen_units(args):
    """The units that --units, --core and --extra name; the core units if none does."""
    if not args.units:
        return list(UNITS if args.core and args.extra else EXTRA if args.extra else CORE)
    names = args.units.split(",")
    for name in names:
        if name not in UNITS or names.count(name) > 1:
            raise sample.UserError(f"{'no' if name not in UNITS else 'more than one'} unit {name!r} in --units: choose "
                                   f"from {', '.join(UNITS)}, each once")
    return names
