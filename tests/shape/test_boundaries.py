"""What a file may not do behind your back: speak, read the environment, work at import, hide errors, unpickle."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

PURE_CALLS = {
    # constants and their spellings
    "frozenset", "tuple", "set", "dict", "list", "range", "len", "sorted", "object", "str", "int", "float", "bytes",
    "bytes.fromhex", "min", "max", "sum", "zip", "enumerate", "math.log", "math.log2", "math.sqrt", "float.fromhex",
    "re.compile", "re.escape", "Path", "MappingProxyType", "types.MappingProxyType", "get_args", "typing.get_args",
    "Decimal", "Fraction", "torch.finfo", "np.dtype", "string.Template", "Template", "timedelta",
    # types
    "TypeVar", "ParamSpec", "NewType", "namedtuple", "NamedTuple", "TypedDict",
    # declarations that hold no resource
    "Console", "typer.Typer", "typer.Option", "typer.Argument", "FastAPI", "APIRouter", "field", "Field", "partial",
    "functools.partial", "threading.local", "threading.Lock", "threading.RLock", "ContextVar", "contextvars.ContextVar",
    "attrgetter", "itemgetter", "operator.attrgetter", "operator.itemgetter", "enum.auto", "auto",
}  # fmt: skip
"""Calls that a module or a default argument may make: they build a value and touch nothing."""

PURE_METHODS = {"split", "splitlines", "join", "encode", "lower", "upper", "strip", "replace", "format", "items",
                "keys", "values", "union", "fromkeys", "maketrans", "removeprefix", "removesuffix"}  # fmt: skip
DECLARATIONS = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.AsyncFunctionDef,
                ast.ClassDef, ast.Pass, ast.Delete)  # fmt: skip
GUARDS = {"TYPE_CHECKING", "typing.TYPE_CHECKING", "__name__ == '__main__'"}


def test_only_the_command_line_speaks_and_reads_the_environment(source, forbid, dotted_name):
    """print, sys.argv and os.environ appear only in cli and in core/runtime.py."""
    if source.folder in ("cli", "__main__") or source.parts == ("core", "runtime.py"):
        return
    names = {"sys.argv", "os.environ", "os.getenv", "os.putenv", "os.environb"}
    imported = {("sys", "argv"), ("os", "environ"), ("os", "getenv"), ("rich", "print")}
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and dotted_name(node) in names:
            found.append(source.at(node, dotted_name(node)))
        elif isinstance(node, ast.Call) and dotted_name(node.func) == "print":
            found.append(source.at(node, "print(…)"))
        elif isinstance(node, ast.ImportFrom):
            names_here = [(node.module, alias.name) for alias in node.names]
            found += [source.at(node, ".".join(pair)) for pair in names_here if pair in imported]
    forbid(found)


def test_no_work_at_import(source, forbid, dotted_name):
    """Importing a file only declares: constants, functions, classes. It opens, computes and registers nothing."""
    forbid(_declares_only(source, source.tree.body, dotted_name))


def _declares_only(source, body: list[ast.stmt], dotted_name) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if isinstance(node, ast.If) and ast.unparse(node.test) in GUARDS:
            continue
        if not isinstance(node, DECLARATIONS):
            yield source.at(node, f"a {type(node).__name__} statement runs at import: {ast.unparse(node)[:60]}")
        elif isinstance(node, ast.ClassDef):
            yield from _declares_only(source, node.body, dotted_name)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            defaults = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
            yield from _impure_calls(source, defaults, dotted_name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
            yield from _impure_calls(source, [node.value], dotted_name)


def _impure_calls(source, values: list[ast.expr], dotted_name) -> Iterator[str]:
    for value in values:
        for call in _calls_now(value):
            if not _is_pure(call, dotted_name):
                yield source.at(call, f"this call runs at import: {ast.unparse(call)[:80]}")


def _calls_now(node: ast.AST) -> Iterator[ast.Call]:
    """The calls that run when the expression is evaluated; a lambda's body does not."""
    if isinstance(node, ast.Lambda):
        return
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _calls_now(child)


def _is_pure(call: ast.Call, dotted_name) -> bool:
    name = dotted_name(call.func)
    if name in PURE_CALLS:
        return True
    if isinstance(call.func, ast.Attribute) and call.func.attr in PURE_METHODS:
        return True
    last = name.rsplit(".", 1)[-1]  # Message(…), next_token.Settings(…): a frozen value
    is_value_type = last == "Settings" or ("." not in name and last.lstrip("_")[:1].isupper())
    return is_value_type


def test_no_broad_except(source, forbid):
    """No bare or broad except: an error is caught by its name, or cleaned up after and raised again."""
    broad = {"Exception", "BaseException"}
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {ast.unparse(kind) if kind else "everything" for kind in kinds}
            if names & {*broad, "everything"} and not isinstance(node.body[-1], ast.Raise):
                found.append(source.at(node, f"except {', '.join(sorted(names))} goes on"))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            found += [source.at(node, f"suppress({ast.unparse(a)})") for a in node.args if ast.unparse(a) in broad]
    forbid(found)


def test_nothing_is_unpickled(source, forbid, dotted_name):
    """Pickle is never loaded: no pickle module, torch.load only with weights_only=True, numpy without allow_pickle."""
    modules = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            found += [source.at(node, f"imports {a.name}") for a in node.names if a.name.split(".")[0] in modules]
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            found.append(source.at(node, f"imports {node.module}"))
        elif isinstance(node, ast.Call):
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if dotted_name(node.func) == "torch.load" and said.get("weights_only") != "True":
                found.append(source.at(node, "torch.load without weights_only=True"))
            if said.get("allow_pickle", "False") != "False":
                found.append(source.at(node, "allow_pickle"))
    forbid(found)


@pytest.mark.parametrize("line", ["import os\nos.mkdir('x')", "x = open('f')", "for i in (1, 2):\n    x = i",
                                  "def f(x=connect()): ...", "import m\nx = m.Client()"])  # fmt: skip
def test_the_import_rule_sees_work(line, dotted_name):
    """The rule about imports is able to fail."""

    class Toy:
        tree = ast.parse(line)

        @staticmethod
        def at(node, what):
            return what

    assert list(_declares_only(Toy, Toy.tree.body, dotted_name))
