"""Experiment files: what is wrong in them is said in one line, with the place, before anything is written."""

import math
import pickle
import re
import sys

import pytest
import runs

from alignax.cli import main, parse
from alignax.config import (
    check_kept,
    code,
    default_config,
    difference,
    effective,
    identity,
    load_experiment,
    modules,
    set_field,
)
from alignax.config.defaults import PATHS
from alignax.run.checks import check_fields
from alignax.run.opening import open_judges
from alignax.run.saved import reward_models

GOOD = """
from alignax import chain, default_config, dpo, logps, sft
from alignax.losses import make_loss, sequence

def get_config():
    config = default_config()
    return config

def loss(config):
    return dpo(0.1)

def experience(config, reference):
    return chain(logps("ref_logps", reference))

def gold(prompts, completions):
    return [float(len(c)) for c in completions]
"""
OWN = """    def value(out, batch):
        {}
    return make_loss("own", value)
"""
RETURN = "    return dpo(0.1)\n"
BAD = {
    "misspelt top-level field": ("return config", "config.step = 40; return config", r"'step' of .* is unknown; the nearest is 'steps'"),
    "misspelt field of a group": ("return config", "config.data.max_lenght = 4; return config", r"mine\.py, line 7: .*max_lenght"),
    "null for a number": ("return config", "config.batch_size = None; return config", r"'batch_size' of .* is None; it must be a whole"),
    "a number for a group": ("return config", "config.optimizer = 1; return config", r"mine\.py"),
    "text for a number": ("return config", 'config.optimizer.learning_rate = "2e-4"; return config', r"mine\.py, line 7: .*learning_rate"),
    "no return": ("return config", "", r"get_config\(\) of .*mine\.py returns None; it must return a ConfigDict"),
    "undefined name": ("return config", "return confg", r"mine\.py, line 7: NameError: name 'confg'"),
    "syntax": ("return config", "return (", r"mine\.py, line 7: SyntaxError"),
    "absent import": ("import chain,", "import chein,", r"mine\.py, line 2: ImportError.*chein"),
    "loss without return": ("return dpo(0.1)", "dpo(0.1)", r"loss\(config\) of .* returns None; return a loss, for example dpo\(\)"),
    "loss not called": ("return dpo(0.1)", "return dpo", r"loss\(config\) of .* returns <function dpo.*return a loss"),
    "text as beta": ("dpo(0.1)", 'dpo("0.1")', r"mine\.py, line 10: .*0\.1"),
    "negative beta": ("dpo(0.1)", "dpo(-1.0)", r"mine\.py, line 10: beta is -1\.0"),
    "unknown argument": ("dpo(0.1)", "dpo(betta=0.1)", r"mine\.py, line 10: TypeError: .*betta"),
    "text as a weight": ("dpo(0.1)", 'dpo(0.1) + "0.01" * sft()', r"mine\.py, line 10: TypeError"),
    "value alone": (RETURN, OWN.format("return sequence(out.logps, batch)[:, 0]"), r"own.*return \(values, \{metric: values\}\)"),
    "an error in a value": (RETURN, OWN.format('raise ValueError("oops")'), r"mine\.py, line 11: oops"),
    "values of another shape": (RETURN, OWN.format("return out.logps.sum(), {}"), r"own.*shape \(\).*\(8,\)"),
    "unknown model": ("(config, reference)", "(config, teacher)", r"asks for 'teacher'; a parameter must be one of config, reference"),
    "a field of the batch that is not there": (RETURN, OWN.format('return batch["reference"], {}'),
     r"mine\.py, line 11: batch has no field 'ref"),
    "no value": (RETURN, OWN.format("return sequence(out.values, batch)[:, 0], {}"),
     r"mine\.py, line 11: .*Arrays there: out \(logps float32\[8, 2,"),
    "loss of nothing": ("def loss(config)", "def loss()", r"loss\(\) of .*mine\.py takes \(\); it is called with \(config\)"),
    "misspelt parameter": ("(config, reference)", "(confg, reference)", r"asks for 'confg'; the nearest is 'config'"),
    "misspelt hook": ("def gold(", "def golds(",
     r"has a function golds\(\), which nothing calls; the nearest is 'gold'; a run calls get_con"),
    "misspelt experience": ("def experience(", "def experiance(", r"experiance\(\), which nothing calls; the nearest is 'experience'"),
    "misspelt lambda": ("def gold(", "avarages = lambda c: {}\ndef gold(", r"avarages\(\), which nothing calls; the nearest is 'averages'"),
    "misspelt optimizer": ("def gold(", "def optimiser(", r"optimiser\(\), which nothing calls; the nearest is 'optimizer'"),
    "misspelt metrics": ("def gold(", "def metric(", r"metric\(\), which nothing calls; the nearest is 'metrics'"),
    "misspelt combine": ("def gold(", "def combined(", r"combined\(\), which nothing calls; the nearest is 'combine'"),
    "an optimizer of the config alone": ("def gold(", "def optimizer(config):\n    return None\ndef gold(",
     r"optimizer\(\) of .*mine\.py takes \(config\); it is called with \(config, schedule\)"),
    "an optimizer that is none": ("def gold(", "def optimizer(config, schedule):\n    return schedule\ndef gold(",
     r"optimizer\(\) of .*mine\.py returns <function .*; return an optax\.GradientTransformation"),
    "an optimizer that raises": ("def gold(", "def optimizer(config, schedule):\n    return 1 / 0\ndef gold(",
     r"mine\.py, line 16: ZeroDivisionError"),
    "gradients of one loss": ("def gold(", "def combine(gradients):\n    return gradients\ndef gold(",
     r"combine\(\) of .* takes gradients of several losses, but loss\(config\) returns one"),
    "losses that nothing combines": ("dpo(0.1)", '{"a": dpo(0.1), "b": sft()}', r"names a loss 'a'.*other names need combine\(gradients\)"),
    "no gradient of a batch": (RETURN, '    return {"a": dpo(0.1), "b": sft()}\n\ndef combine(gradients):\n    return gradients\n',
     r"combine\(gradients\) gives .*return one gradient, a tree like each"),
    "an error in a combination": (RETURN, '    return {"a": dpo(0.1), "b": sft()}\n\ndef combine(gradients):\n    return gradients["c"]\n',
     r"mine\.py, line 13: gradients has no field 'c'"),
    "metrics without names": ("def gold(", "def metrics(prompts, completions):\n    return [1.0]\ndef gold(",
     r"metrics\(\) of .*it gives a list; it must return lists by name"),
    "metrics of one number": ("def gold(", "def metrics(prompts, completions):\n    return {'words': 1.0}\ndef gold(",
     r"metrics\(\) of .*for the name 'words' it gives a float"),
    "metrics of a column that is not there": ("def gold(", "def metrics(prompts, completions, answer):\n    return {}\ndef gold(",
     r"metrics\(\) of .*asks for column 'answer'"),
    "metrics of two numbers": ("def gold(", "def metrics(prompts, completions):\n    return {'words': [1, 2]}\ndef gold(",
     r"metrics\(\) of .*for the name 'words' it gives 2 numbers for 1 completions"),
    "no loss": ("def loss(", "def los(", r"has no function loss\(\); the nearest is 'los'"),
    "a number as experience": ("def gold(", "experience = 3\ndef gold(", r"experience of .*mine\.py is 3; it must be a function"),
    "a field of a group at the top": ("return config", "config.learning_rate = 1.0; return config",
     r"'learning_rate' .*'optimizer\.learning_rate'"),
    "initials of a field at the top": ("return config", "config.lr = 1.0; return config",
     r"'lr' of .* unknown.*'optimizer\.learning_rate'"),
    "experience without return": ("return chain", "chain",
     r"what experience\(\) of .* returns is None; it must be a function of \(batch\)"),
    "experience not called": ('chain(logps("ref_logps", reference))', "logps", r"returns takes \(name, model, .*called with \(batch\)"),
    "averages that are none": ("def gold(", 'def averages(config):\n    return {"a": 0.9}\ndef gold(', r"average 'a' is 0\.9; it must be"),
    "averages without names": ("def gold(", "def averages(config):\n    return 1\ndef gold(",
     r"averages\(\) .* returns 1; return averages by name"),
    "a gold that divides by zero": ("float(len(c))", "1 / 0", r"mine\.py, line 16: ZeroDivisionError"),
    "a gold of one number": ("[float(len(c)) for c in completions]", "1.0", r"mine\.py: TypeError"),
    "a gold that is no number": ("float(len(c))", 'float("nan")', r"gold\(\) of .* returns \[nan\].*a finite number up to 1e\+15 for each"),
}  # fmt: skip


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    return runs.world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", BAD)
def test_bad_experiment_files(name, fields, tmp_path, capsys):
    old, new, message = BAD[name]
    assert old in GOOD
    file = tmp_path / "mine.py"
    file.write_text(GOOD.replace(old, new, 1))
    given = fields | {"workdir": tmp_path / "run"}
    arguments = ["train", "--config", str(file), *(f"--config.{k}={v}" for k, v in given.items())]
    assert main([*arguments, *(["--dry-run"] if "batch" in name else [])]) == 2  # a dry run traces the step too
    said = capsys.readouterr().err.strip()
    error = said.splitlines()[-1]
    assert error.startswith("alignax: error: ") and "Traceback" not in said
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


FINE = {
    "a helper that is called": "def rewards(texts):\n    return [1.0 for _ in texts]\n\n"
    "def gold(prompts, completions):\n    return rewards(completions)\n",
    "private": "def _rewards(texts):\n    return texts\n",
    "another word": "def words(texts):\n    return texts\n\ndef goal(x):\n    return x\n",
    "given as a value": "def mains():\n    return 1\n\nTABLE = {'a': mains}\n",
    "a default of its own": "def experience(config, reference, scale=1.0, **more):\n    return chain(logps('ref_logps', reference))\n",
    "a field of its own that is read": "def loss(config):\n    return dpo(config.get('alpha', 0.1))\n",
}


@pytest.mark.parametrize("name", FINE)
def test_what_an_experiment_file_may_have(name, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        GOOD.replace("return config\n", "config.alpha = 0.1\n    return config\n") + FINE[name] + "\nALPHA = lambda c: c.alpha\n"
    )
    assert load_experiment(file).config.alpha == 0.1


def test_an_experiment_file_is_a_module_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "lies_beside.py").write_text("scale = 3")
    future = "from __future__ import annotations\nimport dataclasses\nfrom lies_beside import scale\n"
    record = "@dataclasses.dataclass\nclass Record:\n    x: int = scale\n"
    (tmp_path / "mine.py").write_text(future + GOOD + record + "RECORD = Record()\n")
    record = load_experiment(tmp_path / "mine.py").loss.__globals__["RECORD"]
    assert record.x == 3 and type(pickle.loads(pickle.dumps(record))) is type(record)
    file = tmp_path / "mine.py"
    for workdir in ("run", "again"):  # a later process finds the modules too, and one that goes on from the workdir's file
        text = effective(load_experiment(file))
        (tmp_path / workdir).mkdir()
        file = tmp_path / workdir / "config.py"
        file.write_text(text)
        monkeypatch.setattr(sys, "path", [path for path in sys.path if not path.startswith(str(tmp_path))])
        del sys.modules["lies_beside"]
        assert load_experiment(file).loss.__globals__["RECORD"].x == 3


def test_modules_that_an_experiment_imports_are_a_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "elsewhere")])
    files = {
        "helper_a.py": "from package_a import inner\n",
        "package_a/__init__.py": "",
        "package_a/inner.py": "from . import deep\nfrom .deep import x\n",
        "package_a/deep.py": "x = 1  # of version 1\n",
        "spaces_a/late.py": "y = 1\n",
        "elsewhere/far_a.py": "z = 1\n",
        "unused_a.py": "import json\n",
    }
    files["mine.py"] = (
        f"import json, numpy.linalg\nimport helper_a, far_a\n{GOOD}\ndef gold(prompts, completions):\n    import spaces_a.late\n"
    )
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    experiment = load_experiment(tmp_path / "mine.py")
    within = {name for name in files if name not in ("mine.py", "unused_a.py", "elsewhere/far_a.py")} | {"far_a.py"}
    assert set(modules(experiment.file)) == within
    assert "# package_a/deep.py\nx = 1" in code(experiment), "processes compare it"
    saved, first = tmp_path / "run" / "config.py", identity(experiment, ())
    saved.parent.mkdir()
    saved.write_text(effective(experiment))
    assert "x = 1" not in saved.read_text(), "the copy stays readable"

    def change(name, text):
        (tmp_path / name).write_text(text)
        now = load_experiment(tmp_path / "mine.py")
        check_kept(now)
        here, there = (
            [line.partition(",")[0] for line in difference(load_experiment(saved), new, ())] for new in (now, load_experiment(saved))
        )
        assert here == there, "a run that goes on from its own copy is compared too"
        return identity(now, ()), here

    assert change("package_a/deep.py", "# of version 2\nx = 1\n") == (first, [])
    assert change("unused_a.py", "x = 2\n") == (first, [])
    for name in within - {"far_a.py"}:
        now, lines = change(name, files[name] + "w = 2\n")
        assert now != first and lines == [f"the code of {name}"]
        change(name, files[name])
    assert change("helper_a.py", "")[1] == [
        f"the code of {n}" for n in ("helper_a.py", *(f"package_a/{n}.py" for n in ("__init__", "deep", "inner")))
    ]


@pytest.mark.parametrize("file", sorted(runs.REPO.glob("experiments/*.py")), ids=lambda file: file.stem)
def test_our_own_experiment_files_are_fine(file):
    load_experiment(file)


def test_a_best_metric_that_is_none_is_refused_before_anything_is_written(fields, tmp_path, capsys):
    given = fields | {"workdir": tmp_path / "run", "checkpoint.best": "accuracy"}
    assert main(runs.arguments(given)) == 2
    assert (
        "checkpoint.best 'accuracy' is not a metric of the evaluation; use one of bad_gold, completion_length, distinct"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def with_field(folder, line):
    file = folder / "mine.py"
    file.write_text(GOOD.replace("    return config", f"    {line}\n    return config", 1))
    return load_experiment(file)


KEPT = {
    "nested tuples": ("((1, 2), (3, (4,)))", ((1, 2), (3, (4,)))),
    "a list of dictionaries": ("[{1: 2.5, 'a': (None, True)}]", [{1: 2.5, "a": (None, True)}]),
    "quotes and line ends": (r"""'a\'b"c\n\\u2028 \ud800 \"\"\"'""", "a'b\"c\n\\u2028 \ud800 \"\"\""),
    "a negative zero": ("-0.0", -0.0),
    "a great number": ("[10**30]", [10**30]),
    "nothing": ("None", None),
    "bytes": (r"b'\xff'", b"\xff"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_a_config_holds_is_read_back_from_its_file(name, tmp_path):
    text, value = KEPT[name]
    experiment = with_field(tmp_path, f"config.own = {text}")
    check_kept(experiment)
    (tmp_path / "config.py").write_text(effective(experiment), encoding="utf-8")
    again = load_experiment(tmp_path / "config.py").config.own
    assert repr(again) == repr(value)
    assert name != "a negative zero" or math.copysign(1, again) == -1


LOST = {
    "a path": "config.own = __import__('pathlib').Path('x')",
    "a numpy number": "config.own = __import__('numpy').float32(1)",
    "a numpy array in a list": "config.own = [__import__('numpy').zeros(2)]",
    "not a number, nested": "config.own = (1.0, float('nan'))",
    "a function": "config.own = len",
    "an integer key": "config.own = {1: 0.5}",
    "a date": "config.own = __import__('datetime').date(2024, 1, 1)",
}


@pytest.mark.parametrize("name", LOST)
def test_what_a_config_cannot_hold_is_refused_by_name(name, tmp_path):
    with pytest.raises(ValueError, match="^config field 'own[.1]*' is "):
        check_kept(with_field(tmp_path, LOST[name]))


def test_an_experiment_whose_file_cannot_be_read_from_the_workdir_is_refused(tmp_path):
    (tmp_path / "words.txt").write_text("yes")
    experiment = with_field(tmp_path, "config.own = __import__('pathlib').Path(__file__).with_name('words.txt').read_text()")
    with pytest.raises(ValueError, match=r"this run could not be resumed: .*config\.py, line 7: FileNotFoundError"):
        check_kept(experiment)


# Of the URLs that some machine reads, tests/test_paths.py tells which are refused where.
URLS = {
    "nope://bucket/a": "nope:// paths are not known to fsspec",
    "file:///tmp/a": "file:// is for paths on this machine",
    "gs:/bucket/a": "gs:/ has one slash",
    "here@0.5,nope://b/a@0.5": "nope:// paths are not known to fsspec",
}


@pytest.mark.parametrize("url", URLS)
def test_a_url_that_nothing_reads_is_refused_in_any_field_of_paths_as_it_was_written(url):
    for name in PATHS:
        with pytest.raises(ValueError, match=rf"^config field '{name}' is '{re.escape(url)}', and {URLS[url]}"):
            set_field(default_config(), f"{name}={url}")
    for path, part in (("~/run", "~"), ("~bob/run", "~bob"), ("$WORK/run", "$WORK"), ("/a/${X}/run", "${X}")):
        with pytest.raises(ValueError, match=re.escape(f"'workdir' is {path!r}, and no shell has expanded its {part}; write the full")):
            set_field(default_config(), f"workdir={path}")
    for command in ("train --config X", "export X here", "export runs/a X", "generate X", "generate m --out X", "generate m --prompts X"):
        with pytest.raises(ValueError, match=re.escape(repr(url))):
            parse(command.replace("X", url).split())
    config = default_config()
    config.workdir = url  # as a stage of an experiment sets it
    with pytest.raises(ValueError, match=re.escape(repr(url))):
        check_fields(config)


def test_paths_and_the_hub_are_no_urls():
    config = default_config()
    for path in ("runs/a", "C:/a", "/tmp/a:b", "a@0.5,b@0.5", "a~/x", "data$v1/a", "$5/a"):
        set_field(config, f"model.path={path}")
    set_field(config, "data.train=hf://org/name:train")
    with pytest.raises(ValueError, match="'model.path' is 'hf://org/name'"):
        set_field(config, "model.path=hf://org/name")


def test_reward_models_may_have_spaces_between_them(tmp_path):
    config = default_config()
    for place in (" here, there", "here,there "):
        config.reward.path = place
        for read in (lambda: open_judges(config), lambda place=place: reward_models(place, "", [])):
            with pytest.raises(ValueError, match="folder 'here'"):
                read()


def test_an_experiment_file_of_another_encoding(tmp_path):
    file = tmp_path / "experiment.py"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    experiment = load_experiment(file)
    check_kept(experiment)
    assert "\ufeff" not in effective(experiment)
    file.write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n" + GOOD.encode())
    with pytest.raises(ValueError, match=r"experiment.py is not UTF-8 text .* convert it to UTF-8"):
        load_experiment(file)
