"""docs/losses.md names every loss, and with docs/generate.md tests that exist."""

import inspect
import re

import runs

import alignax
from alignax import losses

GENERATE = (runs.REPO / "docs" / "generate.md").read_text()
DOCS = (runs.REPO / "docs" / "losses.md").read_text()
README = (runs.REPO / "README.md").read_text()


FUNCTIONS = {name: f for name in losses.__all__ if inspect.isfunction(f := getattr(losses, name))}
MAKERS = {name for name, f in FUNCTIONS.items() if inspect.signature(f).return_annotation is losses.Loss and name != "at_step"}


def sections() -> dict[str, str]:
    parts = re.split(r"^### `(\w+)\(.*\)`$", DOCS, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_loss_is_documented_with_its_arguments():
    assert len(MAKERS) > 30
    assert sections().keys() == MAKERS
    for name, arguments in re.findall(r"^### `(\w+)\((.*)\)`$", DOCS, flags=re.M):
        known = inspect.signature(getattr(losses, name)).parameters
        assert set(filter(None, arguments.split(", "))) <= set(known), name


def test_every_section_says_what_it_must():
    for name, text in sections().items():
        for word in ("loss", "gradient", "fails", "test") if name not in ("make_loss", "pairwise") else ("loss", "test"):
            assert f"- {word}: " in text, (name, word)


def test_the_named_tests_exist():
    named = set(re.findall(r"(tests/\w+\.py)::(\w+)", DOCS + GENERATE))
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (runs.REPO / file).read_text(), (file, test)


def test_losses_are_in_the_readme_and_at_the_top():
    for name in MAKERS - {"make_loss", "pairwise"}:
        assert f"`{name}(" in README, name
        assert getattr(alignax, name) is getattr(losses, name)
        assert name in alignax.__all__
