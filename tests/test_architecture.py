"""Rules of the package layout, checked on the source: imports, forbidden calls, and einsum equations.

Each checker takes a path in the repository and the source text, so that tests with planted violations can
check that it fails.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from einsum_transformer import _HOMES
from einsum_transformer.engine.equation import LEGEND, Equation
from einsum_transformer.models.families import FAMILIES

ROOT = Path(__file__).parent.parent
PACKAGE = "einsum_transformer"
HOME = f"src/{PACKAGE}/"
RANKS = {
    **dict.fromkeys(("displays", "errors", "notes", "tables"), -2),
    "arguments": -1,
    **dict.fromkeys(("choices", "engine", "numerics", "formats", "text", "tree"), 0),
    **dict.fromkeys(("components", "leaves"), 1),
    "models": 2,
    **dict.fromkeys(("loading", "generation", "quantization", "training"), 3),
    **dict.fromkeys(("analysis", "cluster"), 4),
    "reports": 5,
    "api": 6,
    "cli": 7,
    "__init__": 8,
}
HEAVY = {"torch", "transformers", "peft", "llama_cpp"}
PRODUCTS = {"dot", "matmul", "tensordot", "einsum", "inner", "vdot"}
FORBIDDEN = {"hasattr", "eval", "exec", "compile", "__import__"}
UNPICKLERS = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib"}
ARCHITECTURES = {
    *FAMILIES,
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
    "mpt",
    "mixtral",
}


def files(*folders: str) -> list[tuple[str, str]]:
    """(path in the repository, source) of every Python file in the folders."""
    found = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    found += sorted(ROOT.glob("*.py")) if folders != ("src",) else []
    return [(str(file.relative_to(ROOT)), file.read_text(encoding="utf-8")) for file in found]


SOURCE = files("src")
LEAF_KINDS = {
    node.name
    for path, source in SOURCE
    if path.startswith(f"{HOME}leaves/")
    for node in ast.parse(source).body
    if isinstance(node, ast.ClassDef) and node.bases
}
EVERYTHING = files("src", "tests", "tools", "benchmarks", "examples")
MODULES = {path.removeprefix(HOME).removesuffix(".py").removesuffix("/__init__") for path, _ in SOURCE}


def imports(path: str, source: str) -> Iterator[str]:
    """Every imported module, `a.b` for `from a import b`, with absolute names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.removeprefix("src/").split("/")[: -node.level]
                base = ".".join([*package, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def modules_of(path: str, source: str) -> Iterator[str]:
    """The modules of the package that a file imports: `engine/blas`, `tree`, or `engine` for a name in
    engine/__init__."""
    for name in imports(path, source):
        head, *rest = name.split(".")
        if head == PACKAGE:
            inside = "/".join(rest)
            yield inside if inside in MODULES else inside.rpartition("/")[0] or "__init__"


def check_ranks(path: str, source: str) -> Iterator[str]:
    own = path.removeprefix(HOME).removesuffix(".py").split("/")[0]
    if own not in RANKS:
        yield f"{path}: {own} has no rank"
        return
    for module in modules_of(path, source):
        other = module.split("/")[0]
        if other != own and not RANKS.get(other, 99) < RANKS[own]:
            yield f"{path}: {own} (rank {RANKS[own]}) imports {module} (rank {RANKS.get(other)})"


def check_third_party(path: str, source: str) -> Iterator[str]:
    for name in imports(path, source):
        head = name.split(".")[0]
        if head in HEAVY and not path.startswith(("tools/", "benchmarks/")):
            yield f"{path}: imports {head}"
        if head == "ray" and not path.startswith(f"{HOME}cluster/"):
            yield f"{path}: imports ray"
        if head in UNPICKLERS:
            yield f"{path}: imports {head}"


def check_products(path: str, source: str) -> Iterator[str]:
    """Only engine/ may use matrix products; every other contraction is an einsum."""
    if path.startswith(f"{HOME}engine/"):
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.MatMult):
            yield f"{path}:{node.lineno}: @"
        if (
            isinstance(node, ast.Attribute)
            and node.attr in PRODUCTS
            and ast.unparse(node.value) in ("np", "numpy")
        ):
            yield f"{path}:{node.lineno}: {ast.unparse(node)}"
    yield from (
        f"{path}: {name}" for name in imports(path, source) if name in {f"numpy.{p}" for p in PRODUCTS}
    )


def check_builtins(path: str, source: str) -> Iterator[str]:
    """No dispatch by hasattr or getattr, and no code from strings.

    text/sandbox.py may use getattr, because jinja marks its own functions with attributes only.
    """
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        literal = (
            len(node.args) > 1 and isinstance(node.args[1], ast.Constant) and path != f"{HOME}text/sandbox.py"
        )
        if node.func.id in FORBIDDEN or (node.func.id == "getattr" and literal):
            yield f"{path}:{node.lineno}: {ast.unparse(node)}"


def check_architecture_names(path: str, source: str) -> Iterator[str]:
    """Only models/families/ may contain architecture names, and text/ names of tokenizers."""
    if path.startswith((f"{HOME}models/families/", f"{HOME}text/")):
        return
    for node in ast.walk(ast.parse(source)):
        name = (
            node.value if isinstance(node, ast.Constant) else node.name if isinstance(node, _NAMED) else None
        )
        if isinstance(name, str) and name.lower() in ARCHITECTURES:
            yield f"{path}:{getattr(node, 'lineno', 0)}: {name!r}"


_NAMED = (ast.FunctionDef, ast.ClassDef, ast.alias)


def check_import_side_effects(path: str, source: str) -> Iterator[str]:
    """A module may only import, define and assign its own names, except for the effect in `_NAMED_EFFECT`."""
    for node in ast.parse(source).body:
        docstring = (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        )
        guard = ast.unparse(node.test) if isinstance(node, ast.If) else ""
        targets = node.targets if isinstance(node, ast.Assign) else []
        own = all(isinstance(name, (ast.Name, ast.Tuple)) for target in targets for name in ast.walk(target)
                  if not isinstance(name, (ast.Store, ast.Starred)))  # fmt: skip
        named = path == f"{HOME}__init__.py" and ast.unparse(node).startswith(_NAMED_EFFECT)
        if not (
            docstring
            or (isinstance(node, _DEFINITIONS) and (own or named))
            or guard in ("TYPE_CHECKING", "__name__ == '__main__'")
        ):
            yield f"{path}:{node.lineno}: {ast.unparse(node)[:60]}"


_DEFINITIONS = (
    *(ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef),
    *(ast.ClassDef, ast.Assign, ast.AnnAssign),
)
_NAMED_EFFECT = "os.environ['OPENBLAS_THREAD_TIMEOUT'] = "


def equations(tree: ast.AST) -> Iterator[tuple[int, ast.expr]]:
    """(line, equation) of every call of einsum, weight_grad and einsums."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).split(".")[-1]
            if name in _EQUATION_AT and len(node.args) > _EQUATION_AT[name]:
                yield node.lineno, node.args[_EQUATION_AT[name]]
            if name == "einsums":
                for term in node.args[1:]:
                    yield node.lineno, term.elts[0] if isinstance(term, ast.Tuple) and term.elts else term


_EQUATION_AT = {"einsum": 0, "weight_grad": 1}
"""Function -> index of its equation argument."""


def check_legend(path: str, source: str) -> Iterator[str]:
    """Equations are literals with letters of the legend; engine, leaves and analysis may pass on others."""
    passed_on = path.startswith((f"{HOME}engine/", f"{HOME}leaves/", f"{HOME}analysis/"))
    for line, argument in equations(ast.parse(source)):
        if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
            if not passed_on:
                yield f"{path}:{line}: the equation is not a literal: {ast.unparse(argument)}"
        elif unknown := set(argument.value) - set(LEGEND) - set(",->. "):
            yield f"{path}:{line}: {argument.value!r}: {sorted(unknown)}"


def check_backward_equations(path: str, source: str) -> Iterator[str]:
    """A contraction in a backward function has the same three terms as one in a forward function of the class
    (or, outside of classes, of the file).

    A sum of products of two arrays of equal shape (`btd,btd->bt`) is a reduction without a forward equation.
    """
    body = ast.parse(source).body
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    others = ast.Module([node for node in body if node not in classes], [])
    for scope in (*classes, others):
        yield from _without_forward(path, scope)


def _without_forward(path: str, scope: ast.AST) -> Iterator[str]:
    backward = {line for f in ast.walk(scope) if isinstance(f, ast.FunctionDef) and "backward" in f.name
                for line, _ in equations(f)}  # fmt: skip
    forward, contractions = set(), []
    for line, argument in equations(scope):
        if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
            continue
        parsed = Equation.parse(argument.value)
        terms = tuple(sorted((*parsed.inputs, parsed.output)))
        if line not in backward:
            forward.add(terms)
        elif len(set(parsed.inputs)) == 2 and set("".join(parsed.inputs)) - set(parsed.output):
            contractions.append((line, argument.value, terms))
    yield from (
        f"{path}:{line}: {text!r} has no forward equation"
        for line, text, terms in contractions
        if terms not in forward
    )


def check_leaf_kinds(path: str, source: str) -> Iterator[str]:
    """Only leaves/ may distinguish kinds of leaves with isinstance."""
    if path.startswith(f"{HOME}leaves/"):
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance" and len(node.args) == 2:
            names = {each.id for each in ast.walk(node.args[1]) if isinstance(each, ast.Name)}
            yield from (f"{path}:{node.lineno}: isinstance of {kind}" for kind in names & LEAF_KINDS)


def components() -> list[tuple[str, str]]:
    return [(path, source) for path, source in SOURCE if path.startswith(f"{HOME}components/")]


RULES = {
    check_ranks: SOURCE,
    check_third_party: EVERYTHING,
    check_products: SOURCE,
    check_builtins: SOURCE,
    check_architecture_names: SOURCE,
    check_import_side_effects: SOURCE,
    check_legend: SOURCE,
    check_backward_equations: components(),
    check_leaf_kinds: SOURCE,
}


@pytest.mark.parametrize("check", RULES, ids=lambda check: check.__name__)
def test_rule(check) -> None:
    assert RULES[check]
    assert [problem for path, source in RULES[check] for problem in check(path, source)] == []


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of import cycles: those that remain after repeatedly removing modules without imports."""
    left = dict(graph)
    while free := [module for module, imported in left.items() if not imported & left.keys()]:
        for module in free:
            del left[module]
    return sorted(left)


def test_public_modules_are_checked_strictly() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    strict = pyproject["tool"]["pyright"]["strict"]
    assert {f"{HOME}{module.replace('.', '/')}.py" for module in _HOMES.values()} <= set(strict)
    assert all((ROOT / path).is_file() for path in strict)


def test_no_import_cycles() -> None:
    graph = {}
    for path, source in SOURCE:
        own = path.removeprefix(HOME).removesuffix(".py").removesuffix("/__init__")
        graph[own] = set(modules_of(path, source)) - {own}
    assert cycle(graph) == []


def test_a_cycle_is_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == []


COMPONENT, MODEL = f"{HOME}components/x.py", f"{HOME}models/x.py"
PLANTED = [
    (check_import_side_effects, f"{HOME}cli/x.py", "os.environ['OPENBLAS_THREAD_TIMEOUT'] = '22'"),
    (check_import_side_effects, f"{HOME}__init__.py", "os.environ['OMP_NUM_THREADS'] = '1'"),
    (check_backward_equations, COMPONENT,
     "class A:\n    def forward():\n        einsum('btd,fd->btf', x, w)\n"
     "class B:\n    def backward():\n        einsum('btf,fd->btd', dy, w)"),
    (check_leaf_kinds, MODEL, "if isinstance(weight, (Frozen, LoRA)): pass"),
    (check_ranks, COMPONENT, "from einsum_transformer.models.config import ModelConfig"),
    (check_ranks, COMPONENT, "def f():\n    import einsum_transformer.cli.app"),
    (check_ranks, COMPONENT, "from einsum_transformer.leaves import lazy"),
    (check_ranks, COMPONENT, "from ..models import decoder"),
    (check_ranks, COMPONENT, "import einsum_transformer"),
    (check_ranks, f"{HOME}engine/x.py", "from einsum_transformer.tree import tree_map"),
    (check_ranks, f"{HOME}formats/x.py", "from einsum_transformer.numerics import softmax"),
    (check_ranks, f"{HOME}errors.py", "from einsum_transformer import tree"),
    (check_ranks, MODEL, "from einsum_transformer.loading.load import load"),
    (check_ranks, f"{HOME}loading/x.py", "from einsum_transformer.generation.decode import generate"),
    (check_ranks, f"{HOME}generation/x.py", "from einsum_transformer.training import loop"),
    (check_ranks, f"{HOME}new/x.py", ""),
    (check_third_party, f"{HOME}training/x.py", "import ray"),
    (check_third_party, "tests/x.py", "def f():\n    from torch import nn"),
    (check_third_party, "examples/x.py", "import transformers.models"),
    (check_third_party, "tools/x.py", "import pickle"),
    (check_products, COMPONENT, "y = x @ w"),
    (check_products, COMPONENT, "x @= w"),
    (check_products, MODEL, "y = np.einsum('ij,jk', x, w)"),
    (check_products, MODEL, "from numpy import dot"),
    (check_products, MODEL, "product = numpy.matmul"),
    (check_builtins, COMPONENT, "if hasattr(x, 'forward'): pass"),
    (check_builtins, COMPONENT, "y = getattr(x, 'array', None)"),
    (check_builtins, f"{HOME}cli/x.py", "exec(open('config.py').read())"),
    (check_builtins, f"{HOME}cli/x.py", "compile(text, 'f', 'exec')"),
    (check_architecture_names, MODEL, "if model_type == 'llama': pass"),
    (check_architecture_names, COMPONENT, "class Mistral: pass"),
    (check_architecture_names, COMPONENT, "from einsum_transformer.models.families import llama"),
    (check_import_side_effects, COMPONENT, "print('loaded')"),
    (check_import_side_effects, COMPONENT, "for name in THREADS:\n    os.environ[name] = '1'"),
    (check_import_side_effects, COMPONENT, "try:\n    import mkl\nexcept ImportError: pass"),
    (check_legend, COMPONENT, "einsum('xj,jk->xk', a, b)"),
    (check_legend, COMPONENT, "weight_grad(w, 'btD,btf->fD', dy, x)"),
    (check_legend, COMPONENT, "einsum(text, a, b)"),
    (check_backward_equations, COMPONENT,
     "def forward():\n    einsum('btd,fd->btf', x, w)\ndef backward():\n    einsum('btf,btd->df', dy, x)"),
    (check_backward_equations, COMPONENT, "def _mix_backward():\n    weight_grad(w, 'btv,btd->vd', dy, x)"),
]  # fmt: skip
FINE = [
    (check_leaf_kinds, MODEL, "if isinstance(weight, Leaf): pass"),
    (check_ranks, COMPONENT, "from einsum_transformer.components.rope import Rotation\nimport numpy"),
    (check_ranks, f"{HOME}loading/x.py", "from einsum_transformer.loading import hub"),
    (check_ranks, f"{HOME}engine/x.py", "from einsum_transformer.errors import InputError"),
    (check_third_party, "tools/x.py", "import torch, transformers"),
    (check_third_party, f"{HOME}cluster/x.py", "import ray"),
    (check_products, f"{HOME}engine/x.py", "y = np.matmul(a, b) + a @ b"),
    (check_builtins, COMPONENT, "p = re.compile('x')\nv = getattr(x, name)"),
    (check_architecture_names, COMPONENT, "kind = 'llama3'"),
    (check_import_side_effects, MODEL, '"""Doc."""\nx: int = 1\nif TYPE_CHECKING:\n    import y'),
    (check_legend, COMPONENT, "einsum('btd,fd->btf', x, w)"),
    (check_backward_equations, COMPONENT,
     "def forward():\n    einsum('btd,fd->btf', x, w)\n"
     "def backward():\n    weight_grad(w, 'btf,btd->fd', dy, x)\n    einsum('btf,fd->btd', dy, w)\n"
     "    einsum('btd->d', x)"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "path", "source"), PLANTED)
def test_planted_source_is_found(check, path: str, source: str) -> None:
    assert list(check(path, source))


@pytest.mark.parametrize(("check", "path", "source"), FINE)
def test_allowed_source_passes(check, path: str, source: str) -> None:
    assert list(check(path, source)) == []
