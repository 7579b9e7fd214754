"""The contract's file keeps its own rules: every hook says who calls it, how often, and why."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from disagg_plugins import hookspecs

SOURCE = Path(hookspecs.__file__).read_text()
HOOKS = [
    node
    for node in ast.parse(SOURCE).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("disagg_")
]
KINDS = ("register", "select", "nominate", "filter", "score", "on")


def returns(hook: ast.FunctionDef) -> str:
    return ast.unparse(hook.returns) if hook.returns else ""


def is_first_result(hook: ast.FunctionDef) -> bool:
    return any("firstresult=True" in ast.unparse(decorator) for decorator in hook.decorator_list)


def test_the_contract_fits_into_six_hundred_lines():
    assert len(SOURCE.splitlines()) <= 600


def test_all_three_families_are_there():
    names = {hook.name for hook in HOOKS}
    assert {"disagg_select_split", "disagg_register_transports", "disagg_select_estimate"} <= names
    assert len(names) == 21


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name)
class TestEveryHook:
    def test_says_where_and_how_often_it_is_called_and_what_becomes_of_answers(self, hook):
        text = ast.get_docstring(hook) or ""
        assert text.split("\n")[0].endswith(".")
        for part in ("Called in: ", "How often: ", "Answers: "):
            assert len(re.findall(f"^{part}", text, re.MULTILINE)) == 1, part

    def test_shows_one_example_that_is_python_and_fits_the_signature(self, hook):
        text = ast.get_docstring(hook) or ""
        example = text.split("Example::")[1]
        parsed = ast.parse(inspect.cleandoc(example)).body[0]
        assert isinstance(parsed, ast.FunctionDef)
        assert parsed.name == hook.name
        taken = {argument.arg for argument in parsed.args.args} - {"self"}
        assert taken <= {argument.arg for argument in hook.args.args}

    def test_documents_its_answer_and_what_none_means_where_it_has_one(self, hook):
        text = ast.get_docstring(hook) or ""
        if returns(hook) == "None":
            assert "Returns:" not in text
        else:
            section = text.split("Returns:")[1].split("Example::")[0]
            assert "None" in section

    def test_kind_shows_in_its_name_and_matches_the_marker(self, hook):
        kind = hook.name.split("_")[1]
        assert kind in KINDS
        assert is_first_result(hook) == (kind == "select")
        assert (returns(hook) == "None") == (kind == "on")

    def test_has_annotated_arguments_without_defaults(self, hook):
        assert not hook.args.defaults
        assert all(argument.annotation is not None for argument in hook.args.args)

    def test_placement_hooks_say_when_nothing_calls_them_yet(self, hook):
        text = ast.get_docstring(hook) or ""
        banner = SOURCE.index("# Placement:")
        offset = SOURCE.index(f"def {hook.name}(")
        called = hook.name == "disagg_select_rebalance"
        assert ("No caller in this release" in text) == (offset > banner and not called)
