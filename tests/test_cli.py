"""The command line: overrides, dry run, re-running an effective config, and one clear error for each bad input."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny

from alignax import cli, config, output
from alignax.cli import commands  # noqa: F401  (before anything is patched)
from alignax.config.blame import refusing
from alignax.models.tokenizers import load_tokenizer
from alignax.run import loop
from alignax.run.observer import Observer
from alignax.run.prepare import prepare
from alignax.run.state import abstract_batch
from alignax.run.stop import Stop
from alignax.run.summary import summary

DPO = str(runs.REPO / "experiments" / "dpo_hh.py")
SFT = str(runs.REPO / "experiments" / "sft_hh.py")


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    return runs.world(tmp_path_factory.mktemp("world"))


def run(fields, experiment="dpo_hh", *more):
    return cli.main([*runs.arguments(fields, experiment), *more])


# The console --------------------------------------------------------------------------------------------------------------


def test_a_reader_that_goes_is_no_error():
    gone, out = os.pipe()
    os.close(gone)
    ended = subprocess.run([sys.executable, "-m", "alignax", "--help"], stdout=out, stderr=subprocess.PIPE, cwd=runs.REPO)
    os.close(out)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_a_console_of_few_characters_is_told_all(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(cli, "command", lambda args: print("0 → 1") or print(output.json_text({"é": "😀"})) or 0)
    assert cli.main([]) == 0
    first, second = sys.stdout.buffer.getvalue().decode("ascii").splitlines()
    assert first == r"0 \u2192 1" and json.loads(second) == {"é": "😀"}
    monkeypatch.setattr(sys, "stdout", None)  # as after `>&-`
    assert cli.main([]) == 0
    sys.stdout.close()


LINES = {
    signal.SIGINT: "alignax: interrupted\n",
    signal.SIGTERM: "alignax: stopped by SIGTERM\n",
    signal.SIGHUP: "alignax: stopped by SIGHUP\n",
}


@pytest.mark.parametrize("number", LINES)
def test_a_signal_is_not_lost_where_the_garbage_collector_calls(number, monkeypatch, capsys):
    """Python ignores exceptions that are raised in callbacks of the garbage collector, so a signal there would be lost."""

    def _xla_gc_callback():  # as jax's is called
        os.kill(os.getpid(), number)

    def work(args):
        _xla_gc_callback()
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(cli, "parse", work)
    default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, default)
    try:
        assert cli.main(["train"]) == 128 + number and capsys.readouterr().err == LINES[number]
    finally:
        signal.signal(number, before)


MOMENTS = ["numpy.version", "numpy", "jax._src.config", "jax", "flax.core", "optax"]


@pytest.mark.parametrize("module", [pytest.param(name, marks=() if name == "jax" else pytest.mark.slow) for name in MOMENTS])
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "command", [["-m", "alignax"], ["-c", "import sys; from alignax.cli import main; sys.exit(main())"]], ids=["m", "script"]
)
def test_a_signal_while_libraries_are_imported(command, number, module):
    """The signal comes as soon as Python reports that it has imported the module, while other imports are still to come."""
    words = [sys.executable, "-X", "importtime", *command, "train", "--config", "absent.py"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": runs.REPO}
    with subprocess.Popen(words, **pipes) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.rpartition("|")[2].strip() == module)
        process.send_signal(number)
        last = [line for line in process.stderr if not line.startswith("import time:")]
    assert (process.returncode, last) == (128 + number, [LINES[number]])


@pytest.mark.parametrize(
    "message, code", [("Unable to initialize backend 'tpu': no chips", "jax finds no device .*'tpu': no chips"), ("other", None)]
)
def test_a_machine_without_the_device_that_was_asked_for(message, code):
    with pytest.raises(ValueError if code else RuntimeError, match=code or message), refusing():
        raise RuntimeError(message)


def test_a_tokenizer_that_panics_is_refused(fields, tmp_path):
    """The tokenizer's template names a special token that it lacks; the Rust library then panics, which is no Exception of Python."""
    copy = shutil.copytree(fields["model.path"], tmp_path / "model")
    content = json.loads((copy / "tokenizer.json").read_text())
    named = {"SpecialToken": {"id": "<absent>", "type_id": 0}}
    content["post_processor"] = {"type": "TemplateProcessing", "single": [named], "pair": [named], "special_tokens": {}}
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has no tokenizer that transformers reads"):
        load_tokenizer(copy, 96)


def test_the_end_of_a_terminal_saves_and_nohup_goes_on():
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested() and stop.signal == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested()
    finally:
        signal.signal(signal.SIGHUP, old)


# Bad input ----------------------------------------------------------------------------------------------------------------


def rows(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


GOOD = {"prompt": "Is it?", "chosen": " yes", "rejected": " no"}
CONVERSATION = {
    side: [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": text}]
    for side, text in (("chosen", "yes"), ("rejected", "no"))
}


def edited(fields, tmp_path, change) -> str:
    """A copy of the model folder whose files `change(folder)` spoils."""
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(str(fields["model.path"]), folder)
    change(folder)
    return str(folder)


def set_json(file: Path, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def set_tensors(folder: Path, change):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_nan(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan


NORM = "model.layers.0.input_layernorm.weight"
BAD = {
    # name: (overrides(fields, tmp_path), what the error must hold)
    "missing data file": (lambda f, t: {"data.train": t / "nowhere.jsonl"}, r"nowhere\.jsonl"),
    "missing model folder": (lambda f, t: {"model.path": t / "nowhere"}, r"nowhere.*does not exist"),
    "no model": (lambda f, t: {"model.path": ""}, r"model\.path.*--config\.model\.path="),
    "no data": (lambda f, t: {"data.train": ""}, r"data\.train.*--config\.data\.train="),
    "workdir with a backslash": (lambda f, t: {"workdir": str(t / "a\\b")}, r"a\\+b' has a backslash.*choose another name"),
    "no workdir": (lambda f, t: {"workdir": ""}, r"workdir.*--config\.workdir="),
    "unknown model_type": (
        lambda f, t: {"model.path": edited(f, t, lambda d: set_json(d / "config.json", model_type="mamba"))},
        r"'mamba'.*llama",
    ),
    "missing tensor": (
        lambda f, t: {"model.path": edited(f, t, lambda d: set_tensors(d, lambda x: x.pop(NORM)))},
        r"lacks 1 tensors, model\.layers\.0\.input_layernorm",
    ),
    "extra tensor": (
        lambda f, t: {"model.path": edited(f, t, lambda d: set_tensors(d, lambda x: x.update(more=np.ones(3, np.float32))))},
        r"1 tensors that config\.json does not describe, .more. first",
    ),
    "misshapen tensor": (
        lambda f, t: {"model.path": edited(f, t, lambda d: set_tensors(d, lambda x: x.update({NORM: np.ones(5, np.float32)})))},
        r"input_layernorm.*\(5,\).*\(32,\)",
    ),
    "truncated safetensors": (
        lambda f, t: {
            "model.path": edited(f, t, lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]))
        },
        r"model\.safetensors is damaged",
    ),
    "NaN weights": (lambda f, t: {"model.path": edited(f, t, lambda d: set_tensors(d, spoil_nan))}, r"up_proj.*not finite"),
    "tokenizer without EOS": (
        lambda f, t: {
            "model.path": edited(
                f,
                t,
                lambda d: set_json(d / "tokenizer_config.json", eos_token=None),
            )
        },
        r"no EOS token",
    ),
    "vocabulary larger than the embedding": (
        lambda f, t: {"model.path": str(tiny.folder(t / "model", vocab_size=40))},
        r"token id \d+ \('.+'\) lies outside the model's 40 embedding rows",
    ),
    "empty dataset": (lambda f, t: {"data.train": rows(t / "x.jsonl")}, r"x\.jsonl.*(empty|no rows)"),
    "missing column": (lambda f, t: {"data.train": rows(t / "x.jsonl", {"prompt": "a", "chosem": " b", "rejected": "c"})}, r"chosen"),
    "non-text row": (lambda f, t: {"data.train": rows(t / "x.jsonl", GOOD, GOOD | {"chosen": 7})}, r"row 1.*7"),
    "empty completion": (lambda f, t: {"data.train": rows(t / "x.jsonl", GOOD, GOOD | {"rejected": ""})}, r"row 1.*empty"),
    "chosen = rejected": (lambda f, t: {"data.train": rows(t / "x.jsonl", GOOD | {"chosen": " no"})}, r"row 0.*bad_rows=drop"),
    "prompt beyond the budget": (
        lambda f, t: {"data.train": rows(t / "x.jsonl", GOOD | {"prompt": "a" * 99}), "data.max_prompt_length": 0},
        r"max_prompt_length",
    ),
    "rows longer than the model": (lambda f, t: {"data.train": rows(t / "x.jsonl", GOOD | {"chosen": " y" * 200}), "data.max_length": 300},
                                   r"128 positions"),
    "unknown kind of data": (lambda f, t: {"data.kind": "pairs"}, r"'pairs'.*preference, sft, unpaired, ranked"),
    "unknown turns": (lambda f, t: {"data.turns": "first"}, r"data\.turns is 'first'.*last or all"),
    "margin that is no number": (
        lambda f, t: {"data.train": rows(t / "x.jsonl", GOOD | {"gap": "wide"}), "data.columns.margin": "gap"}, r"row 0.*'wide'.*number"
    ),
    "label that is neither": (
        lambda f, t: {"data.kind": "unpaired", "data.train": rows(t / "x.jsonl", {"prompt": "a", "completion": "b", "label": 7})},
        r"row 0.*'label' is 7, not true or false",
    ),
    "rankings of several sizes": (
        lambda f, t: {
            "data.kind": "ranked",
            "data.train": rows(t / "x.jsonl", *({"prompt": "a", "completions": list(x)} for x in ("bc", "bc", "bcd"))),
        },
        r"row 2.*3 completions, but most rows have 2",
    ),
    "conversations without a template": (
        lambda f, t: {"data.train": rows(t / "x.jsonl", CONVERSATION)}, r"no chat template.*chat_template\.jinja"
    ),
    "conversation whose turns differ": (
        lambda f, t: {"data.train": rows(t / "x.jsonl", CONVERSATION | {"rejected": CONVERSATION["chosen"][1:]})}, r"row 0.*bad_rows=drop"
    ),
    "hub that does not answer": (lambda f, t: {"data.train": "hf://alignax-tests/none"}, r"hf://alignax-tests/none could not be fetched"),
    "name of the hub without its prefix": (lambda f, t: {"data.train": "org/pairs"}, r"'org/pairs'.*write hf://org/pairs"),
    "weight of a source": (lambda f, t: {"data.train": f"{f['data.train']}@0,{t}@1"}, r"data\.train: the weight of .* is '0'.*positive"),
    "weight of one source alone": (lambda f, t: {"data.train": f"{f['data.train']}@1,other.jsonl"}, r"give all a weight"),
    "weights of evaluation data": (lambda f, t: {"data.eval": f"{f['data.eval']}@1"}, r"data\.eval .*leave the weights out"),
    "folder of several splits": (
        lambda f, t: {"data.train": [rows(t / f"{split}.jsonl", GOOD) for split in ("dev", "train")] and t},
        r"several splits \(dev, train\); name one",
    ),
    "damaged tokenizer": (
        lambda f, t: {"model.path": edited(f, t, lambda d: (d / "tokenizer.json").write_text("{"))}, r"no tokenizer that transformers reads"
    ),
    "tokenizer of sentencepiece alone": (
        lambda f, t: {"model.path": edited(f, t, lambda d: (d / "tokenizer.json").rename(d / "tokenizer.model"))},
        r"has tokenizer\.model but no tokenizer\.json, without which transformers gives some texts other token ids; fetch",
    ),
    "batch that the mesh does not divide": (lambda f, t: {"batch_size": 12}, r"batch_size 12.*multiple of 8"),
    "batch that microbatches do not divide": (lambda f, t: {"microbatches": 3}, r"multiple of 24"),
    "mesh that the devices do not fill": (lambda f, t: {"mesh.data": 3}, r"3.*8 devices"),
    "unknown field": (lambda f, t: {"optimizer.learning_rat": 1e-3}, r"optimizer\.learning_rat'.*nearest.*optimizer\.learning_rate"),
    "a group of variables": (lambda f, t: {"data.template": 5}, r"'data\.template' is a group.*--config\.data\.template\.NAME=VALUE"),
    "unknown group": (lambda f, t: {"optimiser.clip": 1.0}, r"optimiser\.clip.*optimizer\.clip"),
    "field of another type": (lambda f, t: {"batch_size": "many"}, r"batch_size.*'many'.*whole number"),
    "unknown optimizer": (lambda f, t: {"optimizer.name": "adamv"}, r"'adamv'.*adamw"),
    "unknown remat": (lambda f, t: {"model.remat": "some"}, r"'some'.*full"),
    "unknown moments": (lambda f, t: {"optimizer.moments": "int4"}, r"'int4'.*float32, bfloat16, int8"),
    "unknown gradient dtype": (lambda f, t: {"optimizer.gradient_dtype": "half"}, r"'half'.*float32 or bfloat16"),
    "learning rate of 0": (lambda f, t: {"optimizer.learning_rate": 0.0}, r"learning_rate is 0"),
    "unknown experiment of a loss": (lambda f, t: {"beta": -1.0}, r"beta is -1"),
    "pair loss on single responses": (lambda f, t: {"data.kind": "sft"}, r"takes pairs, but these examples have 1 responses"),
    "no checkpoint kept": (lambda f, t: {"checkpoint.keep": 0}, r"checkpoint\.keep' is 0; it must be at least 1"),
    "interval of 0 steps": (lambda f, t: {"log.every": 0}, r"log\.every' is 0"),
    "negative evaluation batch": (lambda f, t: {"eval.batch_size": -8}, r"eval\.batch_size' is -8"),
    "unknown dtype of the export": (lambda f, t: {"export.dtype": "bf16"}, r"export\.dtype 'bf16'.*bfloat16"),
    "samples longer than the model": (lambda f, t: {"eval.max_new_tokens": 4000}, r"max_new_tokens 4000.*128 positions"),
    "samples below temperature 0": (lambda f, t: {"eval.temperature": -1.0}, r"eval\.temperature' is -1\.0; it must be at least 0"),
    "decay without effect": (lambda f, t: {"optimizer.name": "sgd", "optimizer.weight_decay": 0.1}, r"weight_decay is 0\.1.*adamw"),
    "tensor of whole numbers": (
        lambda f, t: {"model.path": edited(f, t, lambda d: set_tensors(d, lambda x: x.update({NORM: np.ones(32, np.int64)})))},
        r"input_layernorm.*stored as I64; alignax reads float32, float16, bfloat16",
    ),
    "text for a number in config.json": (
        lambda f, t: {"model.path": edited(f, t, lambda d: set_json(d / "config.json", vocab_size="96"))},
        r"vocab_size in .*config\.json is '96'; it must be a whole number above 0",
    ),
    "tokenizer that breaks in use": (
        lambda f, t: {"model.path": edited(f, t, lambda d: set_json(d / "tokenizer_config.json", model_max_length="long"))},
        r"no tokenizer that transformers reads",
    ),
    "reference of another tokenizer": (
        lambda f, t: {
            "reference.path": edited(
                f, t, lambda d: (d / "tokenizer.json").write_text((d / "tokenizer.json").read_text().replace('"a":', '"ä":'))
            )
        },
        r"reference\.path '.*' has another tokenizer than the policy.*is 'ä', not 'a'; give models",
    ),
    "reference of another vocabulary": (
        lambda f, t: {"reference.path": edited(f, t, lambda d: set_json(d / "config.json", vocab_size=97)), "model.init": "random"},
        r"embed_tokens.*\(96, 32\), but config\.json says \(97, 32\)",
    ),
    "shares that do not sum to 1": (
        lambda f, t: {"reference.path": f"{f['model.path']}@0.5,{f['model.path']}/@0.4"}, r"shares 0\.5, 0\.4 of .* sum to 0\.9; make"
    ),
    "soup without shares": (lambda f, t: {"model.path": f"{f['model.path']},{t}"}, r"model\.path .* several models; give each its share"),
    "soup of unlike models": (
        lambda f, t: {"reference.path": f"{f['model.path']}@0.5,{tiny.folder(t / 'b', vocab_size=97)}@0.5"}, r"another shape or vocabulary"
    ),
    "soup with a missing folder": (lambda f, t: {"reference.path": f"{f['model.path']}@0.5,{t / 'none'}@0.5"}, r"none' does not exist"),
    "random weights of a soup": (lambda f, t: {"model.path": f"{f['model.path']}@1", "model.init": "random"}, r"mean of weights.*'random'"),
    "cache that is a file": (lambda f, t: {"reference.cache": rows(t / "cache", GOOD)}, r"reference\.cache '.*cache' is a file"),
    "mesh of no device": (lambda f, t: {"mesh.fsdp": 0}, r"'fsdp': 0.*sizes must be positive"),
    "average that nobody keeps": (lambda f, t: {"eval.params": "ema"}, r"eval\.params' is 'ema'; this experiment has policy"),
    "adapters of no rank": (lambda f, t: {"lora.ranks": 4}, r"lora\.ranks' is unknown; the nearest is 'lora\.rank'"),
    "initials of a field": (lambda f, t: {"optimizer.lr": 1e-3}, r"optimizer\.lr' is unknown; the nearest is 'optimizer\.learning_rate'"),
    "number beyond any": (lambda f, t: {"optimizer.learning_rate": "1e999"}, r"learning_rate' is inf; use a finite number"),
    "whole number beyond any": (lambda f, t: {"seed": 2**70}, r"'seed' is 1180591620717411303424; .*below 2\^31"),
    "negative clip": (lambda f, t: {"optimizer.clip": -1.0}, r"optimizer\.clip' is -1\.0; it must be at least 0"),
    "beta of a moment of 1": (lambda f, t: {"optimizer.b2": 1.0}, r"optimizer\.b2' is 1\.0; it must be below 1"),
    "best of no evaluation": (lambda f, t: {"checkpoint.best": "loss", "eval.every": 0}, r"eval\.every"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error_before_compile_and_nothing_written(name, fields, tmp_path, capsys, monkeypatch):
    overrides, pattern = BAD[name]
    monkeypatch.setattr(loop, "loop", lambda *args: pytest.fail("a step was about to be compiled"))
    workdir = tmp_path / "run"
    assert run(fields | {"workdir": workdir} | overrides(fields, tmp_path)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("alignax: error: "), err
    assert re.search(pattern, err), err
    assert not workdir.exists()


def test_missing_and_broken_experiment_files(tmp_path, capsys):
    assert cli.main(["train", "--config", str(tmp_path / "no.py")]) == 2
    assert "no.py' does not exist" in capsys.readouterr().err
    (tmp_path / "empty.py").write_text("")
    assert cli.main(["train", "--config", str(tmp_path / "empty.py")]) == 2
    assert "get_config()" in capsys.readouterr().err
    (tmp_path / "syntax.py").write_text("def get_config(:\n")
    assert cli.main(["train", "--config", str(tmp_path / "syntax.py")]) == 2
    assert "syntax.py, line 1: SyntaxError" in capsys.readouterr().err
    stages = "from alignax.run.prepare import *\nfrom alignax import default_config as get_config\nloss = lambda config: None\n"
    (tmp_path / "stages.py").write_text(stages + "def main(experiment):\n    load_tokenizer(Path('none'), 9)\n")
    assert cli.main(["train", "--config", str(tmp_path / "stages.py")]) == 2
    assert "error: 'none' has no tokenizer" in capsys.readouterr().err
    text = "from alignax import default_config as c\ndef get_config():\n    d = c()\n    d.optimizer.learningrate = 1.0\n    return d\n"
    (tmp_path / "typo.py").write_text(text + "def loss(config):\n    return None\n")
    assert cli.main(["train", "--config", str(tmp_path / "typo.py")]) == 2
    err = capsys.readouterr().err
    assert "learningrate" in err and "learning_rate" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "args, message",
    [
        (["trian"], "'trian' is unknown"),
        (["train"], "needs --config"),
        (["train", "--config", DPO, "--dry_run"], "'--dry_run' is unknown"),
        (["train", "--config", DPO, "--json", "-"], "'--json' is unknown"),
        (["eval", "runs/x", "--config", DPO], "'--config' is unknown to `alignax eval`"),
        (["report", "runs/x", "--config.seed=1"], "'--config.seed=1' is unknown to `alignax report`"),
        (["generate", "here", "--raw=no"], "--raw takes no value"),
        (["check-data"], "needs --config"),
        (["check-data", "--config", DPO, "--json"], "--json has no value; write --json=FILE"),
        (["eval", "here", "--json", "--force"], "--json has no value"),
        (["eval", "here", "--json="], "--json has no value"),
        (["train", "--config", "--dry-run"], "--config has no value; write --config=FILE"),
        (["train", "--config", DPO, "--config.workdir", "--dry-run"], "--config.workdir has no value; write --config.workdir=VALUE"),
        (["train", "--config", DPO, "--config.workdir"], "--config.workdir has no value"),
        (["generate", "here", "--out", "--raw"], "--out has no value; write --out=VALUE"),
        (["generate", "here", "--colour", "--raw"], "'--colour' is unknown"),
        (["anchor", "here", "there", "--samples", "--scale"], "--samples has no value"),
        (["ridge", "there", "--config", DPO, "--penalty"], "--penalty has no value; write --penalty=X"),
        (["ridge", "there", "--config", DPO, "--penalty=much"], "--penalty is 'much'; it must be a number"),
        (["train", "--config", DPO, f"--config={SFT}"], "--config is given twice, as "),
        (["eval", "here", "--json", "a", "--json=b"], "--json is given twice, as 'a' and 'b'; leave one out"),
        (["anchor", "here", "there", "--samples", "a", "--samples", "b"], "--samples is given twice"),
        (["check-data", "--config", DPO], "model folder '' does not exist; set --config.model.path=FOLDER"),
        (["export", "here"], "takes WORKDIR and FOLDER"),
        (["eval", "/nowhere/at/all"], "no config.py"),
    ],
)
def test_wrong_words(args, message, capsys):
    assert cli.main(args) == 2
    assert message in capsys.readouterr().err


def test_values_of_options_behind_a_space_or_an_equals_sign():
    for join in (lambda name, value: [name, value], lambda name, value: [f"{name}={value}"]):
        assert cli.parse(["eval", "here", *join("--json", "F"), "--force"]).json == "F"
        assert cli.parse(["anchor", "here", "there", *join("--samples", "F")]).samples == "F"
        assert cli.parse(["ridge", "there", *join("--config", DPO), *join("--penalty", "2")]).penalty == 2.0
        given = cli.parse(["generate", "here", *join("--config.data.kind", "sft"), *join("--stop", "-"), *join("--out", "-")])
        assert given.overrides == ["data.kind=sft"] and given.request.stop == ("-",) and given.request.out == "-"
    assert cli.parse(["generate", "here", "--stop=--"]).request.stop == ("--",)
    assert cli.parse(["train", "--config", DPO, "--config.lora.path=", "--config.seed", "-1"]).overrides == ["lora.path=", "seed=-1"]


@pytest.mark.parametrize("line", ["generate X --prompts P", "eval-rm X", "anchor X Y --samples P", "eval X", "export X Y", "train"])
def test_the_code_of_a_folder_that_no_run_wrote_is_not_run(line, fields, tmp_path, capsys):
    """A folder of the hub may have a config.py beside its config.json; a project too, in which a run is started."""
    (tmp_path / "config.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    (tmp_path / "P").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    words = [str(tmp_path) if word == "X" else str(tmp_path / word) if word in "PY" else word for word in line.split()]
    assert (run(fields | {"workdir": tmp_path}) if words == ["train"] else cli.main(words)) == 2
    said = capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and said.count("\n") == 1
    assert line[0] not in "et" or re.search("not the workdir of a run|holds other files", said), said


def test_no_room_on_the_disk(fields, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert run(fields | {"workdir": tmp_path / "run"}) == 2
    assert re.search(r"needs [\d,]+ bytes, .* has 1,000 bytes free; make room", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


# The commands -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dry_run_shows_everything_and_writes_nothing(fields, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert run(fields | {"workdir": workdir}, "dpo_hh", "--dry-run") == 0
    out = capsys.readouterr().out
    for part in (
        "layers.gate",
        "(2, 32, 48)",
        "M parameters",
        "temporary",
        "\ntrain ",
        "\neval/decode ",
        "\ncompare ",
        '"data.max_length": 48',
        "rows: 40 of 40 kept",
        "[</s>]",
    ):
        assert part in out, part
    assert not workdir.exists()


def test_further_fields_and_mixtures_reach_the_step(fields, tmp_path):
    mixed = rows(tmp_path / "gap.jsonl", *(GOOD | {"chosen": f" yes {i}", "gap": i} for i in range(9)))
    other = rows(tmp_path / "more.jsonl", *(GOOD | {"chosen": f" ja {i}", "gap": -i} for i in range(9)))
    changes = {"workdir": tmp_path / "run", "data.train": f"{mixed}@3,{other}@1", "data.eval": mixed, "data.columns.margin": "gap"}
    run = prepare(config.load_experiment(DPO, [f"{name}={value}" for name, value in (fields | changes).items()]))
    batch, described = run.data.train.batch(0), abstract_batch(run)
    assert described.keys() == batch.keys() and "margin" in batch
    assert all((described[name].shape, described[name].dtype) == (x.shape, x.dtype) for name, x in batch.items())
    assert (batch["margin"] >= 0).sum() >= 6 and set(run.data.reports) == {f"train ({mixed})", f"train ({other})", "eval"}
    lines = summary(run, {"policy": "a", "reference": "a"}, 0)
    assert f"mixture: 75.0% of the examples from {mixed}: 9 rows, each used 16.00 times" in lines


def check(fields, *more):
    kept = {name: fields[name] for name in ("model.path", "data.train", "data.eval", "data.max_length", "data.max_prompt_length")}
    return cli.main(["check-data", *runs.arguments(kept)[1:], *more])


def test_check_data_needs_a_tokenizer_alone_and_writes_text_or_json(fields, tmp_path, capsys, monkeypatch):
    folder = edited(fields, tmp_path, lambda d: [(d / name).unlink() for name in ("model.safetensors", "config.json")])
    here = fields | {"model.path": folder}
    assert check(here, "--json", str(tmp_path / "out.json")) == 0
    text = capsys.readouterr().out
    for part in (
        "train data: ",
        "rows: 40 of 40 kept",
        "tokens of a prompt before any cut",
        "####",
        "[</s>]",
        "in the training data: 40 of 40",
    ):
        assert part in text, part
    assert check(here, "--json", "-") == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "out.json").read_text()) and result["eval_prompts_in_train"] == 40
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for no_color, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        assert check(here) == 0 and ("\x1b[1;32m</s>" in capsys.readouterr().out) == coloured


def test_check_data_reports_bad_rows_and_ends_as_a_run_would(fields, tmp_path, capsys):
    bad = rows(tmp_path / "bad.jsonl", GOOD, GOOD | {"rejected": ""}, GOOD | {"chosen": 3}, GOOD | {"chosen": ""})
    assert check(fields | {"data.train": bad}) == 2
    out, err = capsys.readouterr()
    for part in (
        "row 1 (counted from 0): the completion in 'rejected' is empty",
        "row 2 (counted from 0): 'chosen' is 3, not text",
        "row 3",
    ):
        assert part in out
    assert err.count("\n") == 1 and re.search(
        r"error: a run would stop here: .*bad\.jsonl has bad rows \(empty completion: 2, not text: 1\)", err
    )
    assert check(fields | {"data.train": bad}, "--config.data.bad_rows=drop") == 0
    capsys.readouterr()
    assert check(fields | {"data.train": rows(tmp_path / "none.jsonl", GOOD | {"chosen": ""})}) == 2
    err = capsys.readouterr().err
    assert "none of the 1 rows" in err and "such as row 0 (counted from 0): the completion in 'chosen' is empty" in err
    assert check(fields | {"data.train": tmp_path / "nowhere.jsonl"}) == 2


@pytest.mark.slow
def test_run_rerun_of_the_effective_config_eval_export(fields, tmp_path, capsys):
    workdir, again = tmp_path / "run", tmp_path / "again"
    assert run(fields | {"workdir": workdir, "steps": 4, "log.tensorboard": True, "export.final": True}) == 0
    err = capsys.readouterr().err
    assert "policy = reference, margin" in err and "step 4/4" in err
    assert list(workdir.glob("tensorboard/events*")) and (workdir / "export" / "model.safetensors").is_file()
    samples = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {0, 4} and samples[0]["prompt"].startswith("Is ")

    assert cli.main(["train", "--config", str(workdir / "config.py"), f"--config.workdir={again}"]) == 0
    assert runs.losses(workdir) == runs.losses(again)

    assert run(fields | {"workdir": workdir, "steps": 3}) == 2
    assert "belongs to another run (4 steps there, 3 now): a run may grow, but not shrink; set --config.steps=4" in capsys.readouterr().err

    assert cli.main(["eval", str(workdir), "--json", str(tmp_path / "eval.json")]) == 0
    table = capsys.readouterr().out
    loss = runs.evaluations(workdir)[-1]["eval/loss"]
    assert f"{loss:.4f}" in table
    found = json.loads((tmp_path / "eval.json").read_text())
    assert (found["step"], found["rows"], found["prompts"], found["params"]) == (4, 40, 4, "policy")
    assert found["metrics"]["loss"] == loss and found["config"]["batch_size"] == 8 and found["workdir"] == str(workdir)

    other = tiny.pairs(tmp_path / "other.jsonl", n=9, seed=5)
    assert cli.main(["eval", str(workdir), f"--config.data.eval={other}"]) == 0
    assert f"{loss:.4f}" not in capsys.readouterr().out, "the run's own data"

    assert cli.main(["export", str(workdir), str(tmp_path / "out"), "--config.export.dtype=bfloat16"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert cli.main(["export", str(workdir), str(tmp_path / "out")]) == 0, "its own export"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"

    model = shutil.copytree(str(fields["model.path"]), tmp_path / "model")
    before = (model / "model.safetensors").read_bytes()
    (tmp_path / "rows.jsonl").write_text("mine")
    writes = {
        str(model): ["export", str(workdir), str(model)],
        str(tmp_path / "rows.jsonl"): ["generate", str(model), "--prompts", str(other), "--out", str(tmp_path / "rows.jsonl")],
    }
    capsys.readouterr()
    for place, words in writes.items():
        assert cli.main(words) == 2
        assert re.search(rf"error: '{place}' exists.*; give --force to replace it, or choose another place", capsys.readouterr().err)
    assert (model / "model.safetensors").read_bytes() == before and (tmp_path / "rows.jsonl").read_text() == "mine"
    assert cli.main([*writes[str(model)], "--force"]) == 0
    assert (model / "model.safetensors").read_bytes() != before

    said = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(said | {"rms_norm_eps": 1e-2}))
    capsys.readouterr()
    for words in (
        ["export", str(workdir), str(tmp_path / "new")],
        ["eval", str(workdir)],
        ["generate", str(workdir), "--prompts", str(other)],
    ):
        assert cli.main([*words, f"--config.model.path={model}"]) == 2
        assert f"in '{workdir}' comes from another config.json (" in capsys.readouterr().err


def test_a_workdir_that_cannot_be(fields, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        assert run(fields | {"workdir": workdir}) == 2
        assert f"workdir {str(workdir)!r} cannot be a folder: {str(tmp_path / 'file')!r} is a file" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert run(fields | {"workdir": tmp_path / "some" / "run"}) == 2
    assert f"cannot be written: you have no write permission for {str(tmp_path)!r}" in capsys.readouterr().err


@pytest.mark.slow
def test_workdir_of_other_files_and_changed_code(fields, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert run(fields | {"workdir": tmp_path}) == 2
    assert "holds other files" in capsys.readouterr().err

    mine = tmp_path / "mine.py"
    text = Path(DPO).read_text()
    mine.write_text(text)
    workdir = tmp_path / "run"
    base = [f"--config.{k}={v}" for k, v in (fields | {"workdir": workdir, "steps": 1}).items()]
    assert cli.main(["train", "--config", str(mine), *base]) == 0
    mine.write_text('"""Another docstring."""\n# and a comment\n' + text.split('"""', 2)[2])
    assert cli.main(["train", "--config", str(mine), *base]) == 0, "words about the code are not the code"
    mine.write_text(text.replace("dpo(beta=config.beta)", "dpo(beta=config.beta, label_smoothing=0.1)"))
    assert cli.main(["train", "--config", str(mine), *base]) == 2
    assert "the code of mine.py has changed" in capsys.readouterr().err


@pytest.mark.slow
def test_sft_run_has_no_reference_and_best_checkpoint_is_kept(fields, tmp_path, capsys):
    workdir = tmp_path / "run"
    small = {
        "workdir": workdir,
        "steps": 12,
        "eval.every": 2,
        "checkpoint.every": 100,
        "checkpoint.best": "loss",
        "checkpoint.keep": 1,
    }
    changes = {"data.kind": "sft", "optimizer.learning_rate": 1.0, "optimizer.clip": 0.0}
    assert run(fields | small | changes, "sft_hh") == 0
    assert "no reference" in capsys.readouterr().err
    scores = {row["step"]: row["eval/loss"] for row in runs.evaluations(workdir) if row["step"]}
    kept = {int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {min(scores, key=scores.get), 12}


def test_overrides_take_the_type_of_the_field():
    c = config.default_config()
    for override in ("batch_size=64", "epochs=2", "log.tensorboard=false", "workdir=runs/7", "optimizer.learning_rate=1e-4"):
        config.set_field(c, override)
    assert (c.batch_size, c.epochs, c.log.tensorboard, c.workdir, c.optimizer.learning_rate) == (64, 2.0, False, "runs/7", 1e-4)
    with pytest.raises(ValueError, match="is a group"):
        config.set_field(c, "optimizer=adam")


@pytest.mark.parametrize(
    "old, text, value",
    [
        ((), "END", ("END",)),
        ((), "'END'", ("END",)),
        ((), r"('\n\n')", ("\n\n",)),
        ((), "'", ("'",)),
        ((), "5", ("5",)),
        ((), "()", ()),
        ((), "['a', 'b']", ("a", "b")),
        ((), "(1, 'a')", (1, "a")),
        (("a",), "true", ("true",)),
        ((1, 2), "16", (16,)),
        ((1, 2), "(4.0, 2)", (4, 2)),
        ((0.1, 0.2), "1", (1.0,)),
        ((1, 0.5), "(0.1, 2)", (0.1, 2)),
        ((1, 2), "(1, 2.5)", "a list of whole numbers, such as .1, 2."),
        ((0.1, 0.2), "many", "a list of numbers, such as"),
        ((1, 2), "(1, true)", "a list of whole numbers"),
        (("a",), "(1, 2)", "a list of texts"),
        ((0.1,), "(1e999,)", "is inf; use a finite number"),
    ],
)
def test_an_override_of_several_values_has_elements_of_their_kind(old, text, value):
    c = config.default_config()
    c.own = old
    if isinstance(value, str):
        with pytest.raises(ValueError, match=f"'own' .*{value}"):
            config.set_field(c, f"own={text}")
    else:
        config.set_field(c, f"own={text}")
        assert c.own == value and list(map(type, c.own)) == list(map(type, value)) or old == (1, 0.5)


@pytest.mark.slow
def test_nonfinite_steps_are_named_and_stop_the_run(fields, tmp_path, capsys, monkeypatch):
    import alignax.losses.preference as preference

    real = preference.jax.nn.log_sigmoid
    monkeypatch.setattr(preference.jax.nn, "log_sigmoid", lambda z: real(z) * np.nan)
    workdir = tmp_path / "run"
    assert run(fields | {"workdir": workdir, "max_skipped": 3, "eval.samples": 0, "eval.sample_prompts": 0}) == 1
    err = capsys.readouterr().err
    assert "step 1: loss, loss/dpo is not finite; step skipped (1 so far, 1 in a row)" in err
    assert "stopped: 3 steps in a row were not finite" in err
    assert run(fields | {"workdir": tmp_path / "all", "steps": 2, "eval.samples": 0, "eval.sample_prompts": 0, "export.final": True}) == 1
    assert "stopped: none of the 2 steps was finite, nothing was learnt, and nothing is exported" in capsys.readouterr().err
    assert not (tmp_path / "all" / "export").exists()
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"], row["skipped"]) for row in rows if "loss" in row] == [(1, None, 1), (2, None, 1), (3, None, 1)]


def test_notice_names_rpo_once_when_the_chosen_log_prob_falls():
    lines = []
    log = type("Log", (), {"line": lambda self, text: lines.append(text), "step": lambda *a: None})()
    observer = Observer(type("Run", (), {})(), log, equal=False)
    base = {"skipped": 0.0, "loss": 0.6, "tokens": 1.0}
    for step in range(60):
        observer(step + 2, base | {"logps/chosen_drift": -0.1 * step, "rewards/margins": 0.02 * step})
    assert len(lines) == 1 and "rpo(beta, eta=0.005)" in lines[0] and "lose log-probability" in lines[0]
    lines.clear()
    observer = Observer(type("Run", (), {})(), log, equal=False)
    for step in range(60):  # far from a reference that is another model, from the start, is no fall
        observer(step + 2, base | {"logps/chosen_drift": -50 + 0.1 * step, "rewards/margins": 0.02 * step})
    assert not lines


def test_a_workdir_that_was_moved_is_not_begun_anew_elsewhere(tmp_path, monkeypatch):
    """The moved config.py still names the old workdir; an override says which one is meant."""
    moved = tmp_path / "moved"
    (moved / "checkpoints").mkdir(parents=True)
    experiment = config.load_experiment(DPO)._replace(file=moved / "config.py")
    experiment.config.workdir = str(tmp_path / "before")
    with pytest.raises(
        ValueError, match="moved', but it names the workdir '.*before': the workdir was moved, .* add --config.workdir=.*moved to resume"
    ):
        commands.check_moved(experiment, [])
    commands.check_moved(experiment, [f"workdir={tmp_path / 'before'}"])
    commands.check_moved(experiment._replace(file=moved / "other.py"), [])
    monkeypatch.chdir(tmp_path)
    experiment.config.workdir = "moved"
    commands.check_moved(experiment, [])
