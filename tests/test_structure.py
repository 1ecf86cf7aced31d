"""The structure: imports go one way from room to room, functions stay short, names are meaningful."""

import ast
import graphlib
import sys

import pytest
from running import ROOT

PACKAGE = ROOT / "mxdsurgery"

# A room imports only from rooms above it in this list, and from FOUNDATION, which imports from none of them.
ROOMS = [
    "hardware", "layers", "text", "terminal", "base", "runs", "training", "planning", "checkpoint", "measuring", "sharing",
    "catalogue", "editing", "conversion",
]  # fmt: skip
FOUNDATION = {
    "arguments",
    "errors",
    "outside",
    "processes",
    "aside",
    "disclosure",
    "paths",
    "keys",
    "recipe",
    "once",
    "choices",
    "demo",
}
FRONT_DOOR = {"__init__", "options", "cli", "__main__"}

# Each file by its path in dots, without the package's own name: ``base.model``, ``cli``.
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted([*PACKAGE.rglob("*.py"), PACKAGE / "__init__.pyi"])  # what __init__ loads is in its stub
}
MODULES = {name: tree for name, tree in FILES.items() if not name.endswith(".__init__") or name.startswith("demo")}


def imported(name):
    """The modules of ours that one imports, inside functions, too: what is loaded late is loaded in the same order."""
    for node in ast.walk(FILES[name]):
        if isinstance(node, ast.ImportFrom) and node.level:  # among the files that travel with a checkpoint
            yield f"{name.partition('.')[0]}.{node.module}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mxdsurgery":
            inside = node.module.partition(".")[2]
            whole = {f"{inside}.{alias.name}".lstrip(".") for alias in node.names}
            yield from whole if inside in ("", *ROOMS) else {inside}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "mxdsurgery":
                    yield alias.name.partition(".")[2] or "__init__"


def place(name):
    """Where a module stands: 0 for the foundation, then the rooms, and the front door behind them all."""
    first = name.partition(".")[0]
    return 0 if first in FOUNDATION else len(ROOMS) + 1 if first in FRONT_DOOR else 1 + ROOMS.index(first)


def test_every_module_has_its_place_and_imports_flow_one_way():
    for name in MODULES:
        for other in imported(name):
            assert place(other) <= place(name), f"{name} imports {other}, of a room after its own"


@pytest.mark.parametrize("room", [*ROOMS, ""])
def test_no_room_has_a_cycle(room):
    inside = {name for name in MODULES if (place(name) in (0, len(ROOMS) + 1) if not room else name.startswith(f"{room}."))}
    graph = {name: set(imported(name)) & inside for name in inside}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(inside) > 1  # raises CycleError


def test_what_travels_with_a_checkpoint_imports_torch_and_transformers_only():
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    for name in (name for name in MODULES if name.startswith("layers.")):
        for node in ast.walk(FILES[name]):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level in (0, 1), name
                names = [] if node.level else [node.module]
            assert {imported.partition(".")[0] for imported in names} <= allowed, name


def test_a_room_says_what_it_is_for_and_hands_on_nothing():
    for room in ROOMS:
        tree = FILES[f"{room}.__init__"]
        assert ast.get_docstring(tree) and len(tree.body) == 1, room


def test_functions_and_files_stay_readable():
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{name}.{node.name} is {node.end_lineno - node.lineno} lines long"
        assert max(getattr(node, "end_lineno", 0) for node in tree.body) <= 450, f"{name} is too long to read in one sitting"


def test_every_module_says_what_it_is_for():
    for name, tree in FILES.items():
        assert ast.get_docstring(tree), f"{name} has no docstring"


def test_no_module_is_named_after_nothing_or_after_its_room():
    for name in MODULES:
        room, _, file = name.rpartition(".")
        assert file not in ("utils", "helpers", "misc", "common", room), name


def test_a_command_is_a_thin_layer():
    commands = {"analyze", "plan", "convert", "frontier", "probe", "dissect", "evaluate"}
    commands |= {"experts", "search", "report", "coefficients", "edit", "effect", "heal", "apply_", "push", "plot"}
    found = {node.name: node for node in FILES["cli"].body if isinstance(node, ast.FunctionDef) and node.name in commands}
    assert found.keys() == commands
    for name, node in found.items():
        assert node.end_lineno - node.lineno <= 25, f"{name} does more than load, call and print"


def test_nothing_unpickles_and_nothing_swallows_errors():
    for name, tree in FILES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{name}: a bare except"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("pickle", "load"), ("pickle", "loads")}, name
