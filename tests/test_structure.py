"""The house: imports flow one way, functions stay short, names say something."""

import ast

from running import ROOT

PACKAGE = ROOT / "mxdsurgery"

# A module imports only from those before it. The list is the data's path: errors and words, model, blocks, text and
# activations, layer, training, what it takes, plan, surgery, measuring, export, and the commands on top.
ORDER = [
    "errors", "threads", "device", "timing", "compute", "demo", "outside", "selection", "disclosure", "keys", "recipe",
    "choices", "console", "journal", "digest", "parallel", "offload", "dtypes", "families", "hub", "model", "blocks",
    "proof", "finding", "analyze", "packing", "text", "sparse", "layer", "baselines", "interventions", "replacement",
    "kernels", "accelerator", "activations", "memory", "cost", "effort", "budget", "machine", "resolve", "resume",
    "run_folder", "initialize", "distill", "scores", "metrics", "calibrate", "plan", "surgery", "inputs", "lora",
    "teacher", "endtoend", "train", "card", "scoring", "measure", "adapter", "checkpoint", "export", "apply", "convert",
    "chart", "plot", "comparison", "frontier", "evaluate", "heal", "growth", "labelled", "subjects", "probe", "dissect",
    "catalogue", "corpus", "tally", "unembedding", "tables", "experts", "search", "coefficients", "edits", "generate",
    "edit", "report", "predictions", "effect", "sweep", "judge", "steering", "parcel", "push", "__init__", "options",
    "voice", "cli", "__main__",
]  # fmt: skip


def modules():
    for path in sorted([*PACKAGE.rglob("*.py"), PACKAGE / "__init__.pyi"]):  # what __init__ loads is in its stub
        name = path.parent.name if path.name == "__init__.py" and path.parent != PACKAGE else path.stem
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def imported(tree):
    for node in ast.walk(tree):  # inside functions, too: what is loaded late is loaded in the same order
        if isinstance(node, ast.ImportFrom) and node.module == "mxdsurgery":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:  # among the files that travel with a checkpoint
            yield node.module
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mxdsurgery."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "mxdsurgery":
                    yield alias.name.partition(".")[2].split(".")[0] or "__init__"


def test_every_module_has_its_place_and_imports_flow_one_way():
    for name, tree in modules():
        assert name in ORDER, f"{name}.py has no place in ORDER"
        for other in imported(tree):
            assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}, which comes after it"


def test_functions_and_files_stay_readable():
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{name}.{node.name} is {node.end_lineno - node.lineno} lines long"
        assert max(getattr(node, "end_lineno", 0) for node in tree.body) <= 450, f"{name} is too long to read in one sitting"


def test_every_module_and_public_function_says_what_it_is_for():
    for name, tree in modules():
        assert ast.get_docstring(tree), f"{name} has no docstring"


def test_no_module_is_named_after_nothing():
    assert not {name for name, _ in modules()} & {"utils", "helpers", "misc", "common"}


def test_a_command_is_a_thin_layer():
    tree = dict(modules())["cli"]
    commands = {"analyze", "plan", "convert", "frontier", "probe", "dissect", "evaluate"}
    commands |= {"experts", "search", "report", "coefficients", "edit", "effect", "heal", "apply_", "push", "plot"}
    found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in commands}
    assert found.keys() == commands
    for name, node in found.items():
        assert node.end_lineno - node.lineno <= 25, f"{name} does more than load, call and print"


def test_nothing_unpickles_and_nothing_swallows_errors():
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{name}: a bare except"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("pickle", "load"), ("pickle", "loads")}, name
