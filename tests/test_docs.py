"""docs/losses.md names every loss, docs/traps.md every trap, and every page tests that exist."""

import ast
import inspect
import re

import pytest
import runs

from alignax import losses

LABORATORY = (runs.REPO / "docs" / "overoptimisation.md").read_text()
REWARDS = (runs.REPO / "docs" / "rewards.md").read_text()
ROUTED = (runs.REPO / "docs" / "routed.md").read_text()
ONLINE = (runs.REPO / "docs" / "online.md").read_text()
ATTENTION = (runs.REPO / "docs" / "attention.md").read_text()
GENERATE = (runs.REPO / "docs" / "generate.md").read_text()
DOCS = (runs.REPO / "docs" / "losses.md").read_text()
TRAPS = (runs.REPO / "docs" / "traps.md").read_text()
README = (runs.REPO / "README.md").read_text()


FUNCTIONS = {name: f for name, f in vars(losses).items() if inspect.isfunction(f)}
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
        for word in ("loss", "gradient", "fails", "test") if name not in ("make_loss", "observe", "pairwise") else ("loss", "test"):
            assert f"- {word}: " in text, (name, word)


GUIDES = {
    "losses": DOCS,
    "traps": TRAPS,
    "generate": DOCS + GENERATE + ROUTED,
    "rewards": DOCS + REWARDS,
    "online": DOCS + ONLINE,
    "attention": DOCS + ATTENTION,
}


@pytest.mark.parametrize("text", GUIDES.values(), ids=list(GUIDES))
def test_the_named_tests_exist(text):
    named = set(re.findall(r"(tests/\w+\.py)::(\w+)", text))
    assert len(named) > 20
    for file in sorted({file for file, _ in named}):
        tree = ast.parse((runs.REPO / file).read_text())
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {test for other, test in named if other == file} <= there, file


def test_every_trap_has_a_behaviour_and_a_test():
    rows = [line.strip("|").split(" | ") for line in TRAPS.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 23
    for row in rows:
        assert len(row) == 3 and all(cell.strip() for cell in row[:2]), row
        assert re.fullmatch(r"`tests/\w+\.py::test_\w+`(, `tests/\w+\.py::test_\w+`)*", row[2].strip()), row


def test_losses_are_in_the_readme():
    for name in MAKERS - {"make_loss", "observe", "pairwise"}:
        assert f"`{name}(" in README, name
        assert name in losses.__all__


def test_the_laboratorys_fields_files_and_functions_exist():
    from alignax import config
    from alignax.experience import ensembles

    files = (runs.REPO / "experiments" / f"overoptimization{which}.py" for which in ("", "_tokens"))
    fields = {field for file in files for field in config.flat(config.load_experiment(file).config)}
    named = set(re.findall(r"--config\.([a-z_.]+)|`((?:world|sft|proxy|direct|online|best_of_n|folders)\.[a-z0-9_]+)", LABORATORY))
    assert named and {a or b for a, b in named} <= fields
    for path in re.findall(r"((?:alignax|experiments)/[\w/]+\.py)", LABORATORY):
        assert (runs.REPO / path).is_file(), path
    assert all(hasattr(ensembles, name) for name in ("mean", "median", "wco", "uwo", "quantile"))


def test_tables_of_the_laboratory_are_as_the_command_wrote_them():
    kept = "".join(file.read_text() for file in sorted((runs.REPO / "docs" / "tables").glob("*.md")))
    assert kept.count("Measured by overoptimization") == 2 and "-dirty" not in kept
    quoted = [line for line in (README + LABORATORY).splitlines() if line.startswith("| ") and "±" in line]
    assert len(quoted) > 40 and not set(quoted) - set(kept.splitlines())
