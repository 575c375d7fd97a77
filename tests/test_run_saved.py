"""Commands on past runs: that they tell of changed code of the user's modules, by name."""

import sys

import pytest
import runs
import tiny

from alignax.cli import main
from alignax.cli.commands import language_model
from alignax.config import BadInput, effective, load_experiment
from alignax.run.saved import saved_experiment

EXPERIMENT = """
import helper_of_saved

def gold(prompts, completions):
    return helper_of_saved.judged(completions)
"""
HELPER = "def judged(completions):\n    return [float(len(text)) for text in completions]\n"
CHANGED = HELPER.replace("len(text)", "2 * len(text)")
NOTICE = (
    "notice: the code of helper_of_saved.py, which the experiment of {!r} imports, has changed since the run began; "
    "what follows is computed with the code of now\n"
)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """The folder of an experiment with a module beside it; its workdir `run` has the config.py of a run."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "helper_of_saved", raising=False)
    (tmp_path / "helper_of_saved.py").write_text(HELPER)
    (tmp_path / "mine.py").write_text((runs.REPO / "experiments" / "dpo_hh.py").read_text() + EXPERIMENT)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.py").write_text(effective(load_experiment(tmp_path / "mine.py")))
    yield tmp_path
    sys.modules.pop("helper_of_saved", None)


def test_a_module_that_has_changed_since_the_run_began_is_named(saved, capsys):
    saved_experiment(saved / "run", [])
    (saved / "helper_of_saved.py").write_text(f'"""Words."""\n{HELPER}# and more\n')
    saved_experiment(saved / "run", [])
    assert capsys.readouterr().err == ""
    (saved / "helper_of_saved.py").write_text(CHANGED)
    saved_experiment(saved / "run", [])
    assert capsys.readouterr().err == NOTICE.format(str(saved / "run"))


@pytest.mark.parametrize("hook", ["", "\ndef speaker(policy):\n    return policy\n"])
def test_generate_says_that_it_samples_the_policy_alone_where_the_run_had_a_speaker(hook, saved, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(file.read_text() + hook)
    (saved / "run" / "config.py").write_text(effective(load_experiment(file, [f"model.path={tiny.folder(tmp_path / 'model')}"])))
    language_model(saved / "run", [])
    assert (
        "sampled from speaker(..) of its experiment; alignax generate samples from its policy alone" in capsys.readouterr().err
    ) == bool(hook)


def test_a_module_that_is_gone_is_named(saved):
    (saved / "helper_of_saved.py").unlink()
    del sys.modules["helper_of_saved"]
    with pytest.raises(BadInput, match=f"config.py imports 'helper_of_saved', which was there .* is gone; put it back into '{saved}'"):
        saved_experiment(saved / "run", [])
    with pytest.raises(BadInput, match="mine.py, line .*No module named 'helper_of_saved'"):
        load_experiment(saved / "mine.py")


@pytest.mark.slow
def test_commands_on_a_run_name_a_changed_module_and_training_refuses_it(saved, tmp_path, capsys):
    fields = runs.world(saved) | {"steps": 1, "eval.every": 0, "workdir": saved / "trained"}
    words = ["train", "--config", str(saved / "mine.py"), *(f"--config.{name}={value}" for name, value in fields.items())]
    run = saved / "trained"
    assert main(words) == 0
    (saved / "helper_of_saved.py").write_text(CHANGED)
    for command in (
        ["eval", run],
        ["export", run, tmp_path / "export"],
        ["generate", run, "--prompts", tiny.pairs(tmp_path / "p.jsonl", 2), "--max-new-tokens", 2],
    ):
        assert main([*map(str, command)]) == 0
        assert capsys.readouterr().err.count(NOTICE.format(str(run))) == 1, command
    refused = f"workdir {str(run)!r} belongs to another run (the code of helper_of_saved.py, which "
    for again in (words, ["train", "--config", str(run / "config.py")]):
        assert main(again) == 2
        assert refused in capsys.readouterr().err
