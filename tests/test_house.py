"""The rules that hold the code together, read from the source: sizes, the direction of imports, and a few habits."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import PROJECT

MAX_MODULE_LINES, MAX_FUNCTION_LINES = 400, 60
FOLDERS = ("blip3o_ds", "kernels", "scripts")

# From the bottom up: a module may import from its own layer and those below. Longer names come before shorter ones.
LAYERS = (
    ("errors",),
    ("files", "progress", "settings", "slurm"),
    ("config",),
    ("data.format", "model"),
    ("data.reading", "data.normalization", "flow"),
    ("data.tools", "baselines", "planning"),
    ("runs",),
    ("evaluation", "encoders"),
    ("training",),
    ("api", "commands"),
    ("cli", ""),
)


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((PROJECT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def imported(tree: ast.AST) -> Iterator[str]:
    """The full names of imported modules, without those for annotations only and those that a `__getattr__` defers."""
    deferred: list[ast.AST] = [function for function in functions(tree) if function.name == "__getattr__"]
    deferred += [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    skipped = {id(node) for block in deferred for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(module: str) -> int:
    """The layer of `blip3o_ds.<module>`."""
    for number, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return number
    raise AssertionError(f"blip3o_ds.{module} is in no layer of this test")


def library() -> dict[str, ast.Module]:
    """The modules of blip3o_ds by their name in it; a package is named by its folder."""
    root = PROJECT / "blip3o_ds"
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = parse(path)
    return found


def test_no_module_is_longer_than_400_lines():
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_MODULE_LINES} == {}


def test_no_function_but_a_kernel_is_longer_than_60_lines():
    long = [
        f"{name_of(path)}: {function.name} has {lines} lines"
        for path in sources()
        for function in functions(parse(path))
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION_LINES and not is_kernel(function)
    ]
    assert long == []


def test_imports_of_the_library_go_one_way():
    modules = library()
    packages = {module for module in modules if any(other.startswith(f"{module}.") for other in modules)}
    against = []
    for module, tree in modules.items():
        if module in packages and module:
            continue  # an __init__ that only describes its package
        for name in imported(tree):
            target = name.removeprefix("blip3o_ds").lstrip(".")
            is_module = name.startswith("blip3o_ds.") and target in modules and target not in packages
            if is_module and layer_of(target) > layer_of(module):
                against.append(f"blip3o_ds.{module} imports {name}")
    assert against == []


def test_modules_of_a_package_do_not_import_each_other_in_a_circle():
    modules = library()
    edges = {
        module: {name.removeprefix("blip3o_ds.") for name in imported(tree)} & modules.keys()
        for module, tree in modules.items()
    }
    visited: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in visited:
            for target in edges[module]:
                visit(target, (*path, module))
            visited.add(module)

    for module in modules:
        visit(module, ())


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("kernels/blip3o_kernels", ("blip3o_ds", "benchmarks", "deepspeed")),
        ("blip3o_ds/model", ("deepspeed", "blip3o_ds.training", "blip3o_ds.flow", "blip3o_ds.data")),
        ("blip3o_ds/flow", ("deepspeed",)),
        ("blip3o_ds/data", ("deepspeed", "blip3o_ds.config")),
    ],
)
def test_a_folder_knows_nothing_of_what_stands_above_it(folder, forbidden):
    found = [
        f"{name_of(path)} imports {name}"
        for path in sorted((PROJECT / folder).rglob("*.py"))
        for name in imported(parse(path))
        if name.startswith(forbidden)
    ]
    assert found == []


def test_only_the_engine_touches_deepspeeds_engine():
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in sources()
        if name_of(path) != "blip3o_ds/training/engine.py"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and node.attr == "deepspeed"
    ]
    assert found == []


def test_docstrings_are_sentences():
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        f"{name_of(path)}: {docstring.splitlines()[0]}"
        for path in sources()
        for node in ast.walk(parse(path))
        if isinstance(node, documented) and (docstring := ast.get_docstring(node) or "").startswith("Of ")
    ]
    assert found == []


def test_a_module_says_what_it_is_for():
    silent = [name_of(path) for path in sources() if not ast.get_docstring(parse(path))]
    assert silent == []
