"""What must be said (types, docstrings) and what must not (drawers, stubs, promises)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

DRAWERS = {"util", "utils", "helper", "helpers", "misc", "common", "stuff"}
PROMISE = re.compile("|".join((r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b", r"\bX" + r"XX\b")))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
UNDECIDED = {"abstractmethod", "overload", "abc.abstractmethod", "typing.overload"}


def public(source) -> Iterator[tuple[ast.AST, ast.ClassDef | None]]:
    """Classes, functions and methods that others may call, each with the class that it is in."""
    for node in source.tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            yield node, None
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            members = (m for m in node.body if isinstance(m, (*FUNCTIONS, ast.ClassDef)))
            yield from ((m, node) for m in members if not m.name.startswith("_") or m.name in ("__init__", "__call__"))


def test_a_module_states_its_purpose(source, forbid):
    """Every file begins with a docstring that states its one purpose."""
    forbid([] if ast.get_docstring(source.tree) else [source.name])


def test_public_names_are_documented(source, sources, forbid):
    """Public functions, methods and classes have a docstring; a method may leave it to its interface."""
    classes = {n.name: n for s in sources for n in ast.walk(s.tree) if isinstance(n, ast.ClassDef)}
    forbid(
        source.at(node, f"{node.name} has no docstring")
        for node, owner in public(source)
        if node.name != "__init__" and not ast.get_docstring(node) and not _inherits_words(node, owner, classes)
    )


def _inherits_words(node: ast.AST, owner: ast.ClassDef | None, classes: dict[str, ast.ClassDef]) -> bool:
    """A base class of this project documents a method of this name, or the function is a property's setter."""
    if any(isinstance(d, ast.Attribute) and d.attr == "setter" for d in getattr(node, "decorator_list", [])):
        return True
    for base in owner.bases if owner else ():
        above = classes.get(ast.unparse(base).split("[")[0].rsplit(".", 1)[-1])
        if above is None or above is owner:
            continue
        named = [m for m in above.body if isinstance(m, FUNCTIONS) and m.name == node.name]
        if any(ast.get_docstring(m) for m in named) or _inherits_words(node, above, classes):
            return True
    return False


def test_public_functions_are_annotated(source, forbid):
    """Public functions and methods annotate every parameter and what they return."""
    found = []
    for node, owner in public(source):
        if isinstance(node, FUNCTIONS):
            found += [source.at(node, f"{node.name}({name}) has no type") for name in _untyped(node, owner)]
            if node.returns is None and node.name != "__init__":
                found.append(source.at(node, f"{node.name} does not say what it returns"))
    forbid(found)


def _untyped(node: ast.FunctionDef, owner: ast.ClassDef | None) -> list[str]:
    arguments = [*node.args.posonlyargs, *node.args.args]
    is_static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
    arguments = arguments[1:] if owner and not is_static else arguments  # self, cls
    arguments += [*node.args.kwonlyargs, *filter(None, (node.args.vararg, node.args.kwarg))]
    return [argument.arg for argument in arguments if argument.annotation is None]


def test_no_stub_is_left(source, forbid):
    """Every function does something: no stub, no placeholder; only an abstract method may be empty."""
    forbid(
        source.at(node, f"{node.name} is a stub")
        for node, owner in _with_owners(source.tree)
        if _is_empty(node) and not _may_be_empty(node, owner)
    )


def _with_owners(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, ast.ClassDef | None]]:
    owners = {m: c for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for m in c.body}
    return ((node, owners.get(node)) for node in ast.walk(tree) if isinstance(node, FUNCTIONS))


def _is_empty(node: ast.FunctionDef) -> bool:
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return all(_says_nothing(statement) for statement in body) and (bool(body) or not ast.get_docstring(node))


def _says_nothing(node: ast.stmt) -> bool:
    is_ellipsis = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is ...
    is_unfinished = isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node)
    return isinstance(node, ast.Pass) or is_ellipsis or is_unfinished


def _may_be_empty(node: ast.FunctionDef, owner: ast.ClassDef | None) -> bool:
    is_protocol = owner is not None and any("Protocol" in ast.unparse(base) for base in owner.bases)
    return is_protocol or any(ast.unparse(decorator) in UNDECIDED for decorator in node.decorator_list)


def test_no_drawer(source, forbid):
    """No file or folder is a drawer ("utils", "helpers", "misc"): a file is named after the one thing that it does."""
    stems = (part.removesuffix(".py").strip("_") for part in source.parts)
    forbid(f"{source.name} is named {stem!r}" for stem in stems if stem in DRAWERS)


def test_no_promise_is_left_in_the_code(any_source, forbid):
    """Nothing is left for later in a comment: it is done, or it stands in the tracker."""
    lines = enumerate(any_source.text.splitlines(), start=1)
    forbid(f"{any_source.name}:{number} {line.strip()}" for number, line in lines if PROMISE.search(line))
