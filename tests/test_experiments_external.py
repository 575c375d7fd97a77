"""The experiment whose rollouts come from an OpenAI-compatible server: servers on loopback, one of which samples by transformers."""

import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import pytest
import runs
import tiny
from test_run_external import outside
from test_run_online import rows

from alignax.cli import main
from alignax.config import load_experiment
from alignax.generate import LENGTH, STOP_ID, STOP_STRING
from alignax.run.external import SamplerFailed

FILE = runs.REPO / "experiments" / "external_sampler.py"


@contextmanager
def serving(answer):
    """The URL of a server on loopback; `answer(path, body)` gives the code and the JSON of each answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            code, said = answer(self.path, body)
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def choices(n, dialect, rows, why="stop"):
    """The choices of a server that has sampled (token ids, log-probs) `rows`, as SGLang and new vLLM, or as older vLLM writes them."""
    texts = [[f"token_id:{i}" if dialect == "older" else chr(64 + i) for i in ids] for ids, _ in rows]
    out = [
        {"index": k, "text": "", "finish_reason": why, "logprobs": {"tokens": texts[k], "token_logprobs": logps, "top_logprobs": None}}
        | ({"token_ids": ids} if dialect == "newer" else {})
        for k, (ids, logps) in enumerate(rows)
    ]
    return {"object": "text_completion", "choices": out[:n]}


def asked(url, save=lambda *_: None, prompts=((1, 3), (1, 3)), n=2, **fields):
    """What the experiment's sampler gives for prompts, through the checks of a run."""
    given = {"server.url": url, "rollout.max_new_tokens": 4, "rollout.temperature": 0.7, "rollout.top_p": 0.9, "workdir": "x"} | fields
    experiment = load_experiment(FILE, [f"{name}={value}" for name, value in given.items()])
    own = experiment.sampler(experiment.config, (2, 5), save)
    return outside(own, stops="a stop string" if fields.get("rollout.stop") else None)({}, prompts, jax.random.key(0), n)


@pytest.mark.parametrize("dialect", ["newer", "older"])
def test_a_server_is_asked_for_tokens_and_log_probs(dialect):
    seen, order = [], []

    def answer(path, body):
        order.append(path)
        if path == "/update_weights_from_disk":
            return 200, {"success": body["model_path"].endswith("x_served"), "message": "", "num_paused_requests": 0}
        seen.append(body)
        return 200, choices(2, dialect, [([7, 2], [-0.5, -1.5]), ([8, 9, 6], [-1.0, -2.0, -3.0])])

    with serving(answer) as url:
        out = asked(url, lambda params, folder, dtype: order.append((params, folder.name, dtype)), **{"rollout.stop": "('a',)"})
    assert order[:2] == [({}, "x_served", "float32"), "/update_weights_from_disk"] and order[2:] == ["/v1/completions"] * 2
    assert out.rows()[1][0].tolist() == [7, 2] and out.drawn_rows()[0][1].tolist() == [-1.0, -2.0, -3.0]
    assert out.ended.tolist() == [[STOP_ID, STOP_STRING]] * 2
    assert len({body.pop("seed") for body in seen}) == 2  # the same prompt twice has other samples
    assert seen[0] == seen[1] == {
        "model": "default", "prompt": [1, 3], "n": 2, "temperature": 0.7, "top_p": 0.9, "max_tokens": 4, "stop": ["a"],
        "stop_token_ids": [2, 5], "logprobs": 1, "return_token_ids": True, "return_tokens_as_token_ids": True, "skip_special_tokens": False,
    }  # fmt: skip


FINE = choices(2, "newer", [([7, 6], [-0.5, -1.5]), ([8], [-1.0])], "length")
BAD = {
    "fewer choices": (200, {"choices": FINE["choices"][:1]}, "gives 1 choices, and n is 2; it must sample n completions of a prompt"),
    "no token ids": (200, choices(2, "plain", [([7], [-1.0])] * 2), "gives 0 token ids and 1 log-probs .*; use a server that knows ret"),
    "no log-probs": (200, choices(2, "newer", [([7, 8], [])] * 2), "gives 2 token ids and 0 log-probs for a completion"),
    "an abort": (200, choices(2, "newer", [([7], [-1.0])] * 2, "abort"), "ended a completion by 'abort'; it must be 'stop' or 'length'"),
    "a stop that is none": (200, choices(2, "newer", [([7], [-1.0])] * 2), "ended by 'stop string', and rollout.stop is empty"),
    "too many tokens": (200, choices(2, "newer", [([7] * 5, [-1.0] * 5)] * 2, "length"), "completions have 5 tokens; let them have 1 to 4"),
    "an error": (500, {"error": "out of memory"}, "/v1/completions answers 500 .*out of memory"),
    "no JSON": (200, b"<html>", r"/v1/completions does not answer \(.*\); start the server, or set config.server.url"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_an_answer_that_cannot_be_used_ends_the_run_in_one_line(name):
    code, said, message = BAD[name]
    with serving(lambda path, body: (code, said)) as url, pytest.raises(SamplerFailed, match=message) as e:
        asked(url, **{"server.reload": ""})
    assert str(e.value).startswith("sampler() of mine.py") and "\n" not in str(e.value)
    with serving(lambda path, body: (200, FINE)) as url:
        assert asked(url, **{"server.reload": ""}).ended.tolist() == [[LENGTH] * 2] * 2


def test_a_server_that_is_not_there_or_loads_no_weights():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(SamplerFailed, match=rf"{url}/v1/completions does not answer \(.*refused.*\); start the server"):
            asked(url, **{"server.reload": ""})
    with serving(lambda path, body: (200, {"success": False, "message": "no such folder"})) as url:
        with pytest.raises(SamplerFailed, match="the server has not loaded '.*x_served': no such folder; it must see this folder"):
            asked(url)


class Sampling:
    """A server's engine: transformers on the folder that it was last asked to load, as long as it obeys."""

    def __init__(self, obeys: int):
        """Loads weights so many times, and then keeps what it has, though it says that it has loaded."""
        self.obeys, self.loads, self.lock = obeys, 0, threading.Lock()

    def __call__(self, path, body):
        with self.lock:
            return 200, self.load(body["model_path"]) if path == "/update_weights_from_disk" else self.complete(body)

    def load(self, folder):
        import torch
        import transformers

        self.loads += 1
        if self.loads <= self.obeys:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}

    def complete(self, body):
        import torch

        rng, n = torch.Generator().manual_seed(body["seed"]), body["n"]
        row, drawn = torch.tensor([body["prompt"]] * n), []
        for _ in range(body["max_tokens"]):
            with torch.no_grad():
                scores = (self.model(row).logits[:, -1] / body["temperature"]).log_softmax(-1)
            token = torch.multinomial(scores.exp(), 1, generator=rng)
            row, _ = torch.cat([row, token], 1), drawn.append(scores.gather(1, token))
        made, out = row[:, len(body["prompt"]) :].tolist(), []
        for ids, logps in zip(made, torch.cat(drawn, 1).tolist(), strict=True):
            end = next((i + 1 for i, x in enumerate(ids) if x in body["stop_token_ids"]), None)
            (own,) = choices(1, "newer", [(ids[:end], logps[:end])], "length" if end is None else "stop")["choices"]
            out.append(own | {"index": len(out)})
        return {"choices": out}


@pytest.mark.slow
def test_a_run_sees_whether_its_server_has_the_policys_weights(tmp_path):
    """Its gap is that of rounding while the server loads what it is given; then gap and KL grow, and the corrected run goes on."""
    data = [{"prompt": f"{a} + {b} =", "answer": a + b} for a in range(4) for b in range(4)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    # As many tokens as the tokenizer has: a server knows of no others that the policy would not sample.
    model = tiny.folder(tmp_path / "model", vocab_size=95)
    given = {
        "model.path": model, "data.train": tmp_path / "sums.jsonl", "workdir": tmp_path / "run", "batch_size": 16, "steps": 6,
        "rollout.samples": 8, "rollout.max_new_tokens": 8, "rollout.temperature": 0.8, "optimizer.learning_rate": 3e-3, "eval.samples": 0,
        "eval.sample_prompts": 0, "eval.every": 0, "log.every": 1, "log.tensorboard": False, "export.final": False,
    }  # fmt: skip
    engine = Sampling(obeys=3)
    with serving(engine) as url:
        fields = given | {"server.url": url}
        assert main(["train", "--config", str(FILE), *(f"--config.{name}={value}" for name, value in fields.items())]) == 0
    assert engine.loads == 6
    found = [row for row in rows(tmp_path / "run") if "loss" in row]
    gaps, kls = (np.array([row[name] for row in found]) for name in ("sampler_gap", "sampler_kl"))
    assert len(found) == 6 and (gaps[:3] < 1e-3).all() and (np.abs(kls[:3]) < 1e-3).all()
    assert (gaps[3:] > 0.01).all() and gaps[5] > gaps[3] and (kls[3:] > 0).all() and kls[5] > kls[3]
    assert all(np.isfinite(row["loss"]) and row["skipped"] == 0 for row in found) and any(row["grad_norm"] > 0 for row in found[:3])
