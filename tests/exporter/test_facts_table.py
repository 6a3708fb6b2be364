"""What is written of runtimes is what the code takes for granted, and says how that is known."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from backends.facts import ORT, Fact, Runtime, stated
from backends.known import FACTS
from backends.onnx.targets import TARGETS as ONNX
from backends.safetensors.targets import TARGETS as SAFETENSORS
from calib.errors import OutputError
from calib.schemes import LINEAR_SCHEMES
from exporter.tables.facts_table import BEGIN, END, all_facts, facts_table, with_facts

ROOT = Path(__file__).parents[2]
RUNTIMES = {runtime for fact in all_facts() for runtime in fact.runtimes if runtime.seen}
PAGE = ROOT / "docs" / "runtime-facts.md"


def test_the_page_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_facts(text) == text, "run: python -m exporter.tables.facts_table"


def test_every_reason_of_every_target_stands_in_it() -> None:
    table = facts_table()
    for target in (*ONNX.values(), *SAFETENSORS.values()):
        for rule in (*target.rules, *target.warnings):
            assert rule.reason in table
    assert len(table.splitlines()) == 2 + len(all_facts())


@pytest.mark.parametrize("fact", all_facts(), ids=lambda fact: f"{fact.where}-{fact.text[:40]}")
def test_what_is_tested_names_its_test_and_what_is_not_a_format_names_a_version(fact: Fact) -> None:
    """A test that was renamed, or a module that moved, is found here."""
    if fact.how in ("asked", "tested", "tried", "read"):
        assert fact.runtimes
    if not fact.where.startswith("`"):
        assert (ROOT / fact.where).is_file()
    if fact.shown:
        path, _, name = fact.shown.partition("::")
        tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_facts_outside_of_rules_that_are_tested_say_where() -> None:
    assert [fact.text for fact in FACTS if fact.how in ("asked", "tested") and not fact.shown] == []


class TestVersions:
    """What a text says of which version it speaks."""

    @pytest.mark.parametrize(
        ("version", "said"),
        [
            ("1.2.1", "it fuses nothing"),
            ("1.3", "it fuses nothing"),
            ("1.3.7", "it fuses nothing"),
            ("1.30", "it fuses nothing (seen in Thing 1.3)"),
            ("2.0", "it fuses nothing (seen in Thing 1.3)"),
            (None, "it fuses nothing (seen in Thing 1.3)"),
        ],
    )
    def test_it_is_named_unless_it_is_the_installed_one(
        self, version: str | None, said: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        thing = Runtime("Thing", ("thing",), ("1.2.1", "1.3"))
        monkeypatch.setattr(Runtime, "installed", lambda self: version)
        assert stated("it fuses nothing", [thing]) == said
        assert stated("Thing 1.3 fuses nothing", [thing]) == "Thing 1.3 fuses nothing"

    def test_one_of_which_nobody_noted_the_version_is_not_given_one(self) -> None:
        assert stated("it loads this", [Runtime("Thing", (), ())]) == "it loads this"

    def test_a_package_that_is_installed_has_a_version(self) -> None:
        import onnxruntime

        assert ORT.installed() == onnxruntime.__version__
        assert Runtime("Thing", ("no-such-package",), ("1",)).installed() is None
        second = Runtime("Thing", ("no-such-package", "onnxruntime"), ("1",))
        assert second.installed() == onnxruntime.__version__

    @pytest.mark.parametrize("name", LINEAR_SCHEMES)
    def test_reasons_of_runtimes_that_are_not_here_name_a_version(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on a machine where none of them is installed."""
        monkeypatch.setattr(Runtime, "installed", lambda self: None)
        scheme = LINEAR_SCHEMES[name]
        onnx = [(target.refusal, target.warning) for target in ONNX.values()]
        bundles = [(target.limits.linear, target.limits.slow) for target in SAFETENSORS.values()]
        for refusal_of, warning_of in (*onnx, *bundles):
            refusal = refusal_of(scheme)
            spoken = refusal if refusal is not None else warning_of(scheme)
            if spoken is None or "Q/DQ graphs take" in spoken:
                continue  # of the file, whoever reads it
            assert any(f"{runtime.name} {runtime.seen[-1]}" in spoken for runtime in RUNTIMES)


def test_the_table_replaces_an_old_one_and_nothing_else() -> None:
    once = with_facts(f"above\n\n{BEGIN}\n\nold\n\n{END}\n\nbelow\n")
    assert with_facts(once.replace("ONNX", "ONX")) == once
    assert once.startswith("above\n")
    assert once.endswith(f"{END}\n\nbelow\n")
    with pytest.raises(OutputError, match="no lines"):
        with_facts("nothing here")
