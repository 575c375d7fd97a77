"""`alignax generate`: prompts from files and a terminal, a folder and a run, what is written, and what is refused."""

import gzip
import io
import json
import re
import sys

import jax
import numpy as np
import pytest
import runs
import tiny

from alignax import cli
from alignax.config import default_config
from alignax.data import load_examples
from alignax.data.shapes import said
from alignax.generate import Completions, Sampling, console
from alignax.generate.console import Request
from alignax.mesh import make_mesh
from alignax.models import hf
from alignax.models.transformer import Decoder, head_weight

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


DATA = default_config().data


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("generate") / "model")


def generate(*words) -> int:
    return cli.main(["generate", *map(str, words)])


def jsonl(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_prompts_of_a_file_into_jsonl(model, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("Is it so?\n\nIs it?\nWhy\n")
    options = ["--prompts", prompts, "--max-new-tokens", 6, "--n=2", "--seed", 3, "--stop", "a", "--stop=XYZZY"]
    assert generate(model, *options, "--out", out) == 0
    rows, said = jsonl(out), capsys.readouterr()
    assert [(r["prompt"], r["sample"]) for r in rows] == [(p, s) for p in ("Is it so?", "Is it?", "Why") for s in (0, 1)]
    tokenizer = tiny.tokenizer()
    for r in rows:
        assert 1 <= len(r["tokens"]) == len(r["logps"]) <= 6 and all(x < 0 for x in r["logps"]) and r["exact"] is True
        assert r["ended"] in ("stop id", "stop string", "length") and "a" not in r["completion"]
        if r["ended"] == "length":
            assert r["completion"] == tokenizer.decode(r["tokens"], skip_special_tokens=True) and len(r["tokens"]) == 6
    assert said.out == "" and re.search(r"^6 completions of 3 prompts: \d+ tokens in .* ended by ", said.err)
    assert "stop string 'XYZZY' ended 0 completions" in said.err and "stop string 'a' ended " in said.err


def test_prompts_of_a_pipe_as_text(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Is it so?\nWhy\n"))
    warped = ["--temperature", 0.5, "--top-k", 5, "--top-p", 0.9, "--min-p", 0.01, "--repetition-penalty", 1.1]
    assert generate(model, "--max-new-tokens", 4, *warped) == 0
    said = capsys.readouterr()
    assert said.out.startswith("> Is it so?\n") and said.out.count("> ") == 2
    assert "drawn at temperature 0.5, top_k 5, top_p 0.9, min_p 0.01, repetition_penalty 1.1; logps are the model's own" in said.err


def test_a_terminal_takes_prompts_one_by_one(model, tmp_path, monkeypatch, capsys):
    lines = io.StringIO("Is it so?\n\n" + "long " * 40 + "\nWhy\n")
    lines.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", lines)
    assert generate(model, "--max-new-tokens", 4, "--temperature", 0, "--out", tmp_path / "out.jsonl") == 0
    out, err = capsys.readouterr()
    assert [row["prompt"] for row in jsonl(tmp_path / "out.jsonl")] == ["Is it so?", "Why"]
    assert out.count("> ") == 5 and err.count("1 completions of 1 prompts") == 2
    assert "alignax: prompt 0 has 201 tokens; it must have at least 1, and at most the 124 of the cache" in err


def test_a_file_is_whole_until_the_first_typed_prompt_is_answered(model, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    seen, lines = [], []

    def typing(_):
        seen.append(out.read_text())
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", typing)
    for typed in ([], ["", "Is it so?", "long " * 40, "Why"]):
        lines += typed
        out.write_text("of an afternoon\n")
        assert generate(model, "--max-new-tokens", 4, "--out", out, "--force") == 0
        assert seen[0] == "of an afternoon\n"
    assert seen[1:3] == ["of an afternoon\n"] * 2, "an empty line writes nothing"
    assert [row["prompt"] for row in jsonl(out)] == ["Is it so?", "Why"] and [*tmp_path.iterdir()] == [out]


def test_a_typed_line_that_is_no_prompt_is_refused_and_the_next_is_read(tmp_path, monkeypatch, capsys):
    tokenizer = tiny.byte_tokenizer(
        CHATML.replace("{{ m.content }}", "{{ raise_exception('no tea') if 'tea' in m.content else m.content }}")
    )
    lines = iter(["a b", "tea", "c"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    typed = console.typed(Request(), tokenizer, DATA)
    assert [next(typed).given for _ in range(2)] == [[said("user", "a b")[0]], [said("user", "c")[0]]]
    assert "alignax: row 0 of the terminal: the chat template refuses the conversation: 'no tea'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_and_its_export_say_the_same(tmp_path, capsys):
    """The newest checkpoint of adapters, and the merged folder; the run's data is gone by then."""
    fields = runs.world(tmp_path) | {"workdir": tmp_path / "run", "steps": 2, "eval.every": 0, "eval.samples": 0, "eval.sample_prompts": 0}
    fields |= {"lora.rank": 2, "export.final": True, "optimizer.learning_rate": 0.1, "optimizer.warmup": 0.0}
    assert cli.main([str(a) for a in runs.arguments(fields, "sft_hh")]) == 0
    (tmp_path / "pairs.jsonl").unlink()
    (tmp_path / "prompts.txt").write_text("Is it so?\nIs abc 3?\n")
    capsys.readouterr()
    texts = []
    for place in (tmp_path / "run", tmp_path / "run" / "export", tmp_path / "model"):
        assert generate(place, "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 12, "--temperature", 0) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    both = f"{tmp_path / 'run'}@1,{tmp_path / 'run' / 'export'}@-1"
    assert generate(place, "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 12, "--temperature", 0, "--combine", both) == 0
    assert capsys.readouterr().out == texts[2], "what a run adds to the model its export takes away"


@pytest.mark.slow
def test_proxy_tuning_through_the_command_line(model, tmp_path, capsys):
    """A small model before and after tuning steers MODEL: log-probs of `--combine` are those of whole forward passes of all three."""
    small = {"hidden_size": 16, "num_hidden_layers": 1}
    tuned = tiny.folder(tmp_path / "tuned", **small, vocab_size=104)  # its head is padded
    untuned = tiny.folder(tmp_path / "untuned", **small, num_attention_heads=2, max_position_embeddings=64)
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("Is it so?\nWhy\n")
    options = ["--prompts", prompts, "--max-new-tokens", 6, "--temperature", 0, "--combine", f"{tuned}@1.5, {untuned}@-1.5"]
    assert generate(model, *options, "--out", out) == 0
    assert "drawn at temperature 0.0; logps are those of the combined models, at temperature 1" in capsys.readouterr().err
    for row in jsonl(out):
        prompt = tiny.tokenizer()(row["prompt"])["input_ids"]
        tokens, z = np.asarray([[*prompt, *row["tokens"]]]), 0.0
        for folder, coefficient in ((model, 1.0), (tuned, 1.5), (untuned, -1.5)):
            source = hf.open_folder(folder)
            params = hf.load_params(source, make_mesh({}, jax.devices()[:1]))
            hidden, _ = Decoder(source.config).apply({"params": params}, tokens, np.ones(tokens.shape, bool))
            z += coefficient * (hidden[0] @ head_weight(source.config, params))[len(prompt) - 1 : -1, :95]  # the tokenizer's
        logps = np.asarray(jax.nn.log_softmax(z))
        assert row["tokens"] == logps.argmax(-1).tolist() and row["exact"] is False
        np.testing.assert_allclose(row["logps"], logps.max(-1), atol=1e-5)
    prompts.write_text("Why" * 20)
    assert generate(model, *options) == 2
    assert "prompts of 61 tokens and max_new_tokens 6 exceed the model's 64 positions" in capsys.readouterr().err


def test_models_of_other_tokenizers_are_not_combined(model, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("Why?")
    other = tiny.folder(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert generate(model, "--prompts", tmp_path / "prompts.txt", "--combine", f"{other}@1.0") == 2
    _, err = capsys.readouterr()
    assert f"'{other}' of --combine has another tokenizer than MODEL: its id " in err and err.count("\n") == 1


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_say_what_one_does(model, tmp_path):
    prompts, outs = tmp_path / "prompts.txt", [tmp_path / name for name in ("one.jsonl", "two.jsonl")]
    prompts.write_text("Is it so?\nIs it?\nWhy\n")
    args = lambda out: ["generate", str(model), "--prompts", str(prompts), "--out", str(out), "--n", "3", "--max-new-tokens", "9"]
    runs.finish(runs.begin(args(outs[0])))
    for process in runs.begin_two([args(outs[1])] * 2):
        runs.finish(process)
    one, two = ([(r["prompt"], r["tokens"], r["ended"]) for r in jsonl(out)] for out in outs)
    assert one == two and len(one) == 9


def test_lines_go_through_the_chat_template_or_raw(tmp_path, monkeypatch):
    (file := tmp_path / "lines.txt").write_text("hi\n")
    tokenizer = tiny.byte_tokenizer(CHATML)
    (line,) = console.read(Request(prompts=str(file)), tokenizer, DATA)
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert line.text == said and line.ids == tokenizer(said, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr("builtins.input", lambda _: "hi")
    assert next(console.typed(Request(), tokenizer, DATA)) == line
    (raw,) = console.read(Request(prompts=str(file), raw=True), tokenizer, DATA)
    assert raw == next(console.typed(Request(raw=True), tokenizer, DATA)) and raw.text == "hi"
    assert console.read(Request(prompts=str(file)), tiny.byte_tokenizer(), DATA) == [raw], "no template: as it is"
    content_first = lambda turns: str([dict(reversed(m.items())) for m in turns])
    for read in (json.dumps, str, content_first, lambda turns: json.dumps(turns[0])):  # a conversation, as JSON or Python writes it
        file.write_text(read([{"role": "user", "content": "hi"}]))
        assert console.read(Request(prompts=str(file)), tokenizer, DATA) == [line]
        (raw,) = console.read(Request(prompts=str(file), raw=True), tokenizer, DATA)
        assert raw.text == file.read_text()
    file.write_text('[{"role": "user"}] is what?')
    assert console.read(Request(prompts=str(file)), tokenizer, DATA)[0].text == said.replace("hi", file.read_text())
    assert cli.parse(["generate", "M", "--raw", "--n", "2"]).request == Request(raw=True, n=2)


def test_conversations_go_through_the_chat_template(tmp_path, monkeypatch):
    tokenizer = tiny.byte_tokenizer(CHATML)
    file = tmp_path / "prompts.jsonl"
    turns = [{"role": "user", "content": "hi"}]
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in (turns, "hi", "")))
    chat, text, empty = console.read(Request(prompts=str(file)), tokenizer, DATA)
    assert chat.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(chat.ids) == chat.text and tokenizer.decode(text.ids) == "<s>hi" and tokenizer.decode(empty.ids) == "<s>"
    shapes = ([{"from": "human", "value": "hi"}], turns[0], [{"role": "user", "content": [{"type": "text", "text": "hi"}]}])
    (tmp_path / "shapes.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in shapes))
    assert console.read(Request(prompts=str(tmp_path / "shapes.jsonl")), tokenizer, DATA) == [chat] * 3, "as training reads them"
    (tmp_path / "folder").mkdir()
    for place, content in (("folder/a.jsonl", '{"prompt": "hi"}'), ("held.json", '{"data": [{"prompt": "hi"}]}')):
        (tmp_path / place).write_text(content)
    for place in ("folder", "held.json:data", "folder/*.jsonl", "folder/a.jsonl"):
        assert console.read(Request(prompts=str(tmp_path / place)), tokenizer, DATA) == [text], "wherever training reads rows"
    with monkeypatch.context() as patched:
        patched.setattr(console, "read_rows", lambda path: [{"prompt": path}])
        assert console.read(Request(prompts="hf://org/name"), tokenizer, DATA)[0].text == "hf://org/name"
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": 3}]}))
    with pytest.raises(ValueError, match=r"row 0 of .*other.jsonl: message 0 of 'the prompt' is"):
        console.read(Request(prompts=str(tmp_path / "other.jsonl")), tokenizer, DATA)
    (tmp_path / "text.jsonl").write_text(json.dumps({"prompt": json.dumps(turns)}))
    with pytest.raises(ValueError, match="row 0 of .*text.jsonl: 'prompt' is .*, text that holds messages in JSON"):
        console.read(Request(prompts=str(tmp_path / "text.jsonl")), tokenizer, DATA)
    data = default_config().data
    data.columns.prompt, data.columns.system = "question", "system"
    (tmp_path / "columns.jsonl").write_text(json.dumps({"question": "hi", "system": "Be brief."}) + "\n" + json.dumps({"prompt": "hi"}))
    first, second = console.read(Request(prompts=str(tmp_path / "columns.jsonl")), tokenizer, data)
    assert first.text == "<|im_start|>system\nBe brief.<|im_end|>\n" + second.text and second == chat, "columns that the run's data have"
    with pytest.raises(ValueError, match="has no chat template"):
        console.read(Request(prompts=str(file)), tiny.byte_tokenizer(), DATA)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0; it must be 0"),
        (["--top-p", "0"], "top_p is 0.0; it must be above 0"),
        (["--top-k", "-3"], "top_k is -3"),
        (["--top-k", "few"], "--top-k is 'few'; it must be a whole number"),
        (["--n", "0"], "n is 0; it must be at least 1"),
        (["--seed", str(2**32)], "seed is 4294967296; it must be at least 0 and less than 2^31"),
        (["--seed", str(2**64)], "seed is 18446744073709551616; it must be"),
        (["--max-new-tokens"], "--max-new-tokens has no value"),
        (["--combine", "x@y,z@1"], "combine has 'x@y', which is not a model with its coefficient; write for example TUNED@1.0"),
        (["--combine", "x@1,"], "combine has '', which is not a model"),
        (["--combine", "nowhere@1"], "model folder 'nowhere' does not exist"),
        (["--combine", "nope://bucket/x@1"], "'nope://bucket/x'"),
        (["--beams", "3"], "option '--beams' is unknown"),
        (["--stop", ""], "a stop string is empty"),
        (["--stop", "é"], "stop string 'é' can never occur"),
        (["--cache", "int4"], "cache dtype 'int4' is unknown"),
        (["--max-new-tokens", "128"], "prompts of 5 tokens and max_new_tokens 128 exceed the model's 128 positions; lower"),
        (["--out", "/dev/null/out.jsonl"], "'/dev/null/out.jsonl' cannot be written: '/dev/null' is a file"),
        (["--prompts", "nowhere.txt"], "there is no file 'nowhere.txt'"),
        (["--slots", "3"], "slots 3 do not divide into 8 batch shards; use a multiple of 8"),
        (["--config.model.dtyp", "x"], "the nearest is 'model.dtype'"),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_is_computed(options, message, model, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("Why?")
    monkeypatch.setattr("alignax.models.hf.load_params", lambda *_: pytest.fail("weights were read"))
    assert generate(model, "--prompts", tmp_path / "prompts.txt", *options) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("alignax: error: ") and err.count("\n") == 1 and message in err


def test_files_that_hold_no_prompts(model, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04\xff\xff")
    cases = {"empty.txt": "holds no prompts", "other.jsonl": "row 0 of", "latin.txt": "is not UTF-8 text", "a.zip": "is a zip archive"}
    for name, message in cases.items():
        assert generate(model, "--prompts", tmp_path / name) == 2
        assert message in capsys.readouterr().err
    assert generate(tmp_path / "nowhere", "--prompts", tmp_path / "latin.txt") == 2
    assert "nowhere' does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_lines_of_a_file_are_its_text_alone(pack, tmp_path):
    """A byte order mark is no character of the first prompt, and a compressed file of lines is read as one of rows is."""
    (tmp_path / "a.txt").write_bytes(pack("\ufeffone\r\ntwo\u2028three\n".encode()))
    request = Request(prompts=str(tmp_path / "a.txt"))
    assert [p.given for p in console.read(request, tiny.tokenizer(), DATA)] == ["one", "two\u2028three"]


@pytest.mark.parametrize("conversation", [False, True])
def test_a_very_long_prompt_is_not_tokenised_whole_to_be_refused(conversation, monkeypatch):
    tokenizer = tiny.byte_tokenizer(CHATML)
    given, own = [], type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, text, **how: given.append(sum(map(len, text))) or own(self, text, **how))
    text = "abc " * 500_000
    prompt = said("user", text) if conversation else text
    found = console.encoded(0, prompt, None, tokenizer, "x.jsonl", most=100)
    assert len(found.ids) > 100 and len(found.text) >= len(text) and max(given) < 300_000
    short = said("user", "abc") if conversation else "abc"
    assert console.encoded(0, short, None, tokenizer, "x.jsonl", most=2) == console.encoded(0, short, None, tokenizer, "x.jsonl")
    with pytest.raises(ValueError, match=r"row 7 of x\.jsonl: the row has 20,0.* characters to tokenise.* shorten the row"):
        console.encoded(7, said("user", text * 10) if conversation else text * 10, None, tokenizer, "x.jsonl")


def test_text_ends_before_a_stop_string():
    from alignax.generate import LENGTH, STOP_STRING, Stops

    tokenizer = tiny.byte_tokenizer()
    ids = np.asarray(tokenizer("yes. Human:", add_special_tokens=False)["input_ids"])
    stops = Stops(tokenizer, ("Human:",))
    assert console.text_of(ids, STOP_STRING, tokenizer, stops) == "yes. "
    assert console.text_of(ids, LENGTH, tokenizer, stops) == "yes. Human:"


def test_a_text_is_what_its_tokens_say_whatever_the_folder_asks_for(tmp_path):
    from alignax.generate.stops import added_text
    from alignax.models.tokenizers import load_tokenizer

    tokenizer = tiny.tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"clean_up_tokenization_spaces": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path, 96)
    ids = np.asarray(tokenizer("a , . do n't ?", add_special_tokens=False)["input_ids"])
    assert console.text_of(ids, "length", tokenizer, None) == added_text(tokenizer, [1], ids) == tokenizer.decode(ids) == "a , . do n't ?"


def test_completions_of_a_conversation_are_rows_that_any_template_can_read(tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": [{"from": "human", "value": "hi"}], "tools": "[]"}) + "\n")
    tokenizer = tiny.byte_tokenizer("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    prompts = console.read(Request(prompts=str(tmp_path / "prompts.jsonl")), tokenizer, DATA)
    tokens = np.array([[tokenizer("ok", add_special_tokens=False)["input_ids"]]], np.int32)
    out = Completions(tokens, tokens >= 0, np.zeros(tokens.shape, np.float32), np.array([["length"]], object), Sampling(), 0, 0)
    ((row,),) = console.rows(prompts, out, tokenizer, None)
    assert row["prompt"] == [{"role": "user", "content": "hi"}] and row["completion"] == "ok" and "tools" not in row
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    data, other = default_config().data, tiny.byte_tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}")
    data.kind = "sft"
    examples, _ = load_examples(tmp_path / "rows.jsonl", data, other, 999, {1})
    assert other.decode(examples.tokens) == "user: hi</s>assistant: ok</s>"


def test_completions_are_added_whole_or_not_at_all(tmp_path):
    file = tmp_path / "out.jsonl"
    console.write(str(file), [[{"completion": "ä"}]], further=False)
    with runs.small_files(40), pytest.raises(OSError, match=r"out\.jsonl' could not be written \(.*File too large.*\); make room"):
        console.write(str(file), [[{"completion": "b" * 20}]], further=True)
    assert file.read_text() == '{"completion": "ä"}\n'


def test_a_full_disk_is_found_before_anything_is_sampled(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.txt").write_text("the sun\nthe moon\n")
    monkeypatch.setattr(console.output.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    monkeypatch.setattr(console, "summary", lambda *_: pytest.fail("it sampled"))
    assert generate(model, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out.jsonl", "--max-new-tokens", "20") == 2
    assert re.search(r"the file of completions needs 1,761 bytes, .* has 1,000 bytes free; make room", capsys.readouterr().err)
    assert not (tmp_path / "out.jsonl").exists()
