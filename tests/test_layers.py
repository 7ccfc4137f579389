"""The order of the package's rooms: nothing imports upwards, and no modules import each other in a circle."""

import ast
import collections
import graphlib
import pathlib
from collections.abc import Iterator

import pytest

PACKAGE = "llmeraser_jax"
ROOT = pathlib.Path(__file__).parents[1] / PACKAGE
# A room may import the rooms of lines above its own. Rooms of one line do not import each other.
ORDER = (
    ("types", "environment", "checks", "text", "interrupts", "_jaxprs"),
    ("parallel",),
    ("trees", "files"),
    ("checkpoint", "tracking", "convert", "data"),
    ("lora", "losses"),
    ("models",),
    ("curvature", "solvers"),
    ("planning",),
    ("compiled",),
    ("runs",),
    ("training",),
    ("unlearning",),
    ("rivals", "notation", "export"),
    ("evaluation",),
    ("deletion",),
    ("demo",),
    ("cli",),
    (PACKAGE,),  # its __init__, which names the public things of all rooms
)


def modules():
    """Every module's syntax tree by its name."""
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


def imported(tree) -> Iterator[tuple[str, str]]:
    """`(module, name)` of every import, those inside functions included; the name is empty for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module and node.level == 0, "imports are absolute"
            module = node.module
            yield from ((module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


@pytest.fixture(scope="module")
def graph():
    """Of every module the modules of the package that it imports."""
    trees, edges = modules(), collections.defaultdict(set)
    for importer, tree in trees.items():
        edges[importer] = set()
        for module, name in imported(tree):
            if module.split(".")[0] == PACKAGE:
                edges[importer].add(f"{module}.{name}" if f"{module}.{name}" in trees else module)
    return edges


def room_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else PACKAGE


LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def test_every_room_has_a_place(graph):
    assert {room_of(module) for module in graph} == set(LEVELS)


def test_nothing_imports_upwards_or_across(graph):
    wrong = [
        f"{importer} imports {module}"
        for importer, targets in graph.items()
        for module in targets
        if room_of(importer) != room_of(module) and LEVELS[room_of(module)] >= LEVELS[room_of(importer)]
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle(graph):
    graphlib.TopologicalSorter(graph).prepare()  # raises with the circle


def test_only_one_room_touches_jax_s_internals():
    internal = ("jax.extend", "jax.interpreters", "jax.core", "jax._src")
    users = {
        room_of(importer)
        for importer, tree in modules().items()
        for module, name in imported(tree)
        if f"{module}.{name}".startswith(internal)
    }
    assert users == {"_jaxprs"}


def test_no_room_imports_what_another_keeps_to_itself():
    private = [
        f"{importer} imports {module}.{name}"
        for importer, tree in modules().items()
        for module, name in imported(tree)
        if module.startswith(PACKAGE)
        and name.startswith("_")
        and not name.startswith("__")
        and room_of(importer) != room_of(module)
    ]
    assert not private
