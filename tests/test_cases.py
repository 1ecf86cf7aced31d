"""Each row of what people ran into (docs/reliability.md) is held by the test that it names."""

import ast

import pytest
from pages import DOCS, read_json
from running import ROOT

ROWS = read_json(DOCS / "reliability" / "cases.json")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["tried"])
def test_a_row_names_a_test_that_is_there(row):
    file, name = row["test"].split("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    (held,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    assert any(isinstance(node, ast.Assert | ast.With) for node in ast.walk(held))  # it can fail
