"""The structure of the package: imports, sizes, the public names, and that it knows no model family."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import megacore

PACKAGE = Path(megacore.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
PLUGINS = sorted(Path(__file__).parent.parent.glob("plugins/*/megacore_*"))

MAY_IMPORT = {
    "errors": set(),
    "config": {"errors"},
    "hookspecs": {"config", "errors"},
    "plugins": {"hookspecs", "config", "errors"},
    "signals": set(),
    "atomic_output": {"errors"},
    "parallel": {"signals", "config", "errors"},
    "checkpoint": {"data", "atomic_output", "parallel", "config", "errors"},
    "model": {"checkpoint", "parallel", "plugins", "hookspecs", "config", "errors"},
    "weights": {"atomic_output", "model", "checkpoint", "parallel", "plugins", "hookspecs", "config", "errors"},
    "data": {"atomic_output", "parallel", "config", "errors"},
    "runs": {"atomic_output", "errors"},
}
"""What each part of the package may import while it runs; imports for type checkers alone are free."""

MAY_IMPORT["training"] = MAY_IMPORT["verification"] = MAY_IMPORT["generation"] = set(MAY_IMPORT)
MAY_IMPORT["testing"] = set(MAY_IMPORT) - {"training"}
MAY_IMPORT["cli"] = set(MAY_IMPORT) | {""}
MAY_IMPORT["__main__"] = {"cli"}
MAY_IMPORT[""] = set()
"""``megacore`` itself: its public names are imported on first use."""


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def part_of(module: str) -> str:
    """The part of the package that ``megacore.part.module`` is in; that of ``megacore`` itself is empty."""
    return module.partition(".")[2].partition(".")[0]


def runtime_imports(tree: ast.AST) -> Iterator[str]:
    """The modules that code imports, within functions too; not what stands under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            # `from megacore import errors` imports a module, if there is one of that name.
            yield from (f"{module}.{alias.name}" if module == "megacore" else module for alias in node.names)
        yield from runtime_imports(node)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path):
    part = part_of(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"))

    imported = {part_of(module) for module in runtime_imports(ast.parse(path.read_text())) if module == "megacore"
                or module.startswith("megacore.")}  # fmt: skip

    assert imported - {part} <= MAY_IMPORT[part]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_core_imports_no_library_of_a_model_family(path):
    imported = {module.partition(".")[0] for module in runtime_imports(ast.parse(path.read_text()))}

    assert not imported & {"transformers", "megacore_llama", "megacore_llama2", "megacore_falcon"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_core_names_no_model_family_outside_of_documentation(path):
    code = path.read_text()
    lines = code.splitlines()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)

    named = [line for line in lines if re.search("llama|falcon|mistral", line, re.IGNORECASE)]

    assert named == []


def modules_of(package: Path) -> dict[str, Path]:
    """The modules of ``package``, by their full names; that of a package is its ``__init__``."""
    dotted = {path: ".".join(path.relative_to(package.parent).with_suffix("").parts) for path in package.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in dotted.items()}


def imported_names(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """Every ``from module import name as alias`` anywhere in the code, and ``import module`` without a name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name, alias.asname or alias.name) for alias in node.names)


def import_graph(modules: Mapping[str, Path]) -> dict[str, set[str]]:
    """For each of ``modules``, those that it imports.

    Imports count wherever they stand: at the top, in a function, and under ``if TYPE_CHECKING``. A name that a package
    only hands on, by an import in its ``__init__``, counts as an import of the module that defines the name. That
    importing ``a.b`` also runs ``a/__init__.py`` does not count.
    """
    imports = {name: list(imported_names(ast.parse(path.read_text()))) for name, path in modules.items()}

    @cache
    def definer(module: str, name: str) -> str:
        """The module of ``from module import name``: a submodule, the one that defines the name, or ``module``."""
        if f"{module}.{name}" in modules:
            return f"{module}.{name}"
        if modules.get(module, Path()).name == "__init__.py":
            for origin, original, alias in imports[module]:
                if alias == name and origin in modules:
                    return definer(origin, original)
        return module

    return {
        module: {definer(origin, name) for origin, name, _ in found if origin in modules} - {module}
        for module, found in imports.items()
    }


@pytest.mark.parametrize("package", [PACKAGE, *PLUGINS], ids=lambda package: package.name)
def test_no_modules_import_each_other_in_a_circle(package):
    circle: list[str] = []
    try:
        TopologicalSorter(import_graph(modules_of(package))).prepare()
    except CycleError as error:
        circle = list(reversed(error.args[1]))

    assert not circle, f"these modules import each other in a circle: {' -> '.join(circle)}"


MOST_MODULES, MOST_LINES, FEWEST_LINES = 12, 500, 40

SMALL_MODULES = {
    "megacore/training/config/section.py": "the base class of all sections, which every module beside it imports",
    "megacore/training/loggers/tensorboard.py": "each logger is a module, which imports its own optional library",
    "megacore/training/loggers/trackio.py": "each logger is a module, which imports its own optional library",
}
"""Modules with fewer than ``FEWEST_LINES`` lines, each with the reason why it is not part of a larger one.

Those of ``cli`` are not listed: there each command is a module.
"""


def test_no_package_has_more_modules_than_a_reader_takes_in_at_a_glance():
    levels = {path.parent for path in MODULES} - {PACKAGE / "cli"}  # where each command is a module
    sizes = {name_of(level): len(list(level.glob("[!_]*.py"))) for level in levels}

    assert {name: size for name, size in sizes.items() if size > MOST_MODULES} == {}


def test_no_module_is_too_long_to_read_or_too_short_to_stand_alone():
    lines = {name_of(path): len(path.read_text().splitlines()) for path in MODULES}
    small = {
        name_of(path)
        for path in MODULES
        if lines[name_of(path)] < FEWEST_LINES and path.stem[0] != "_" and path.parent != PACKAGE / "cli"
    }

    assert {name: size for name, size in lines.items() if size > MOST_LINES} == {}
    assert small == set(SMALL_MODULES), "each needs its reason in SMALL_MODULES, which has no others"


def test_every_public_name_resolves_to_what_type_checkers_see():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    [for_type_checkers] = [node for node in tree.body if isinstance(node, ast.If)]
    homes = {
        alias.asname: (node.module, alias.name)
        for node in for_type_checkers.body if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }  # fmt: skip

    assert sorted(homes) == megacore.__all__
    for name, (module, original) in homes.items():
        assert getattr(megacore, name) is getattr(importlib.import_module(module), original)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'megacore' has no attribute 'nonsense'"):
        _ = megacore.nonsense


@pytest.mark.parametrize(
    "what", ["import megacore", "import megacore.cli", "import megacore; megacore.list_families()"]
)
def test_neither_importing_nor_looking_for_plugins_imports_torch_or_transformers(what):
    check = f"{what}\nimport sys; sys.exit(not not {{'torch', 'transformers'}} & set(sys.modules))"

    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
