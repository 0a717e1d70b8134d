"""Who may know whom: the order of the folders, no cycles, and collectives in two places only."""

from __future__ import annotations

import ast
from collections.abc import Iterator

FOLDERS = (
    "core",
    "world",
    "corpus",
    "tokenizer",
    "loading",
    "model",
    "planning",
    "training",
    "tools",
    "generation",
    "tasks",
    "objectives",
    "synthesis",
    "evaluation",
    "report",
    "serving",
    "interop",
    "lineage",
    "stages",
    "cli",
)
"""The road: reading order, life-cycle order and dependency order are this one order."""


def imported_names(source) -> Iterator[tuple[ast.AST, str]]:
    """Every dotted name that a file imports, anywhere in it; `from a import b` gives "a.b"."""
    package = ("nestling", *source.parts[:-1])
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _imports_by_string(node):
            yield node, node.args[0].value


def _imports_by_string(node: ast.Call) -> bool:
    called = getattr(node.func, "attr", getattr(node.func, "id", ""))
    first = getattr(node.args[0], "value", None) if node.args else None
    return called in ("import_module", "__import__") and isinstance(first, str)


def own_imports(source) -> Iterator[tuple[ast.AST, str]]:
    """The imports from this project, as dotted names below `nestling`."""
    for node, name in imported_names(source):
        if name.startswith("nestling."):
            yield node, name.removeprefix("nestling.")


def test_every_folder_stands_in_the_tuple(sources, forbid):
    """Every folder of src/nestling is listed in the one tuple that orders them."""
    folders = {source.folder for source in sources if len(source.parts) > 1}
    forbid(f"src/nestling/{folder} is not in FOLDERS" for folder in sorted(folders - set(FOLDERS)))


def test_a_folder_imports_only_folders_before_it(source, forbid):
    """A folder imports only itself and folders before it in the order of the road, lazy imports included."""
    beside = {"__init__": 0, "__main__": len(FOLDERS)}
    reach = beside.get(source.folder, FOLDERS.index(source.folder) if source.folder in FOLDERS else 0)
    allowed = {*FOLDERS[:reach], source.folder, "__version__"}
    forbid(
        source.at(node, f"{source.folder} imports {name}, which comes later")
        for node, name in own_imports(source)
        if name.split(".")[0] not in allowed
    )


def test_files_import_each_other_without_cycles(sources, forbid):
    """Files form no import cycle, lazy imports included: each can be read after those that it needs."""
    known = {source.module: source for source in sources}
    needs = {module: sorted(_modules(source, known)) for module, source in known.items()}
    done: set[str] = set()
    cycles: list[str] = []

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            cycles.append(" → ".join((*path[path.index(module) :], module)))
        elif module not in done:
            for needed in needs[module]:
                visit(needed, (*path, module))
            done.add(module)

    for module in known:
        visit(module, ())
    forbid(cycles)


def _modules(source, known) -> set[str]:
    """The modules that a file's imports name: the longest prefix that is a file of the project."""
    found = set()
    for _, name in own_imports(source):
        parts = name.split(".")
        prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        found.update(filter(None, [next((prefix for prefix in prefixes if prefix in known), None)]))
    return found - {source.module}


def test_collectives_stay_in_two_places(source, forbid, dotted_name):
    """torch.distributed is used only in core and in training/parallel.py; everything else is single-device code."""
    if source.folder == "core" or source.parts == ("training", "parallel.py"):
        return
    named = [(node, name) for node, name in imported_names(source) if _is_distributed(name)]
    used = [(n, dotted_name(n)) for n in ast.walk(source.tree) if isinstance(n, ast.Attribute)]
    named += [(node, name) for node, name in used if name == "torch.distributed"]
    forbid(source.at(node, name) for node, name in named)


def _is_distributed(name: str) -> bool:
    return name == "torch.distributed" or name.startswith("torch.distributed.")
