"""The words of docs/terms.md: README, docs, help texts, messages and docstrings avoid those that it replaces."""

import ast
import importlib
import re

import pytest
from conftest import TOP

from harness.__main__ import VERBS
from harness.config.command_line import help_text

ROWS = [line.split("|")[1:4] for line in (TOP / "docs" / "terms.md").read_text().splitlines() if line.startswith("| ")]
AVOIDED = [word.strip() for _, _, words in ROWS[1:] for word in words.split(",") if word.strip()]
FOLDERS = (TOP, TOP / "docs", TOP / "tests", TOP / "tests" / "faults")
PAGES = [path for folder in FOLDERS for path in folder.glob("*.md") if path.name != "terms.md"]
SOURCES = [
    path
    for package in ("architectures", "benchmarks", "export", "harness", "tune_spaces")
    for path in sorted((TOP / package).rglob("*.py"))
    if "results" not in path.parts
]


def found_in(text: str) -> list[str]:
    return [word for word in AVOIDED if re.search(rf"\b{word}\b", text, re.IGNORECASE)]


def test_there_are_words_to_avoid():
    assert {"torn", "by hand", "told to go", "nine of ten"} <= set(AVOIDED)
    assert found_in("a torn file, fixed by hand") == ["by hand", "torn"]


def test_every_test_that_a_page_names_is_there():
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?", (TOP / "tests" / "README.md").read_text())
    assert len(named) > 60
    for file, name in named:
        assert f"def {name}(" in (TOP / "tests" / file).read_text() if name else (TOP / "tests" / file).is_file(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_pages(page):
    assert found_in(page.read_text()) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(TOP)))
def test_messages_and_docstrings(path):
    """Every string of the code that is more than one word: messages, docstrings, help."""
    strings = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    assert {text: found_in(text) for text in strings if isinstance(text, str) and " " in text and found_in(text)} == {}


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_a_meaning_for_every_key(verb):
    """Each key's line says more than its type."""
    from harness.config.keys import keys

    module = importlib.import_module(VERBS[verb])
    models = [one for one in vars(module).values() if isinstance(one, type) and hasattr(one, "model_fields")]
    model = next(one for one in models if one.__name__ not in ("Strict", "StageConfig", "Trial", "Manifest"))
    assert help_text(module.__doc__ or "", model)
    assert [key.name for key in keys(model) if not key.description] == []
