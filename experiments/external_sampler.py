"""GRPO whose rollouts come from an OpenAI-compatible server, SGLang's say, which gets the policy's weights before each rollout.

  GRPO: Shao et al. 2024, arXiv:2402.03300.  Truncated importance weights for samples of another program: Yao et al. 2025, "Your
  efficient RL framework secretly brings you off-policy RL training".

Commands:
  python -m sglang.launch_server --model-path MODEL --port 30000
  alignax train --config experiments/external_sampler.py --config.workdir=runs/external --config.model.path=MODEL \\
    --config.data.train=sums.jsonl --config.server.url=http://127.0.0.1:30000

sums.jsonl has rows {"prompt": .., "answer": a number}; an answer is rewarded if its last number is right.

The server must see the folder `server.folder` (default: WORKDIR_served), where the policy is written. Requests go to /v1/completions,
with the prompt as token ids. Token ids come back in `token_ids` of a choice (`return_token_ids`: vLLM and SGLang), or as "token_id:5" in
place of tokens (`return_tokens_as_token_ids`: older vLLM). SGLang loads weights by /update_weights_from_disk; for another server change
`hand_over`. Log-probs must be those that tokens were sampled with: SGLang's default; start vLLM with --logprobs-mode processed_logprobs.

Expected: `sampler_gap` stays as small as the rounding of the server's dtype (below 1e-3 in float32). If it grows, the server has not
loaded the weights. `sampler_kl` is then above 0, and the loss corrects for it as far as its weights reach.
"""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from alignax import default_config, group_relative, grpo, paths
from alignax.distributed import is_main
from alignax.generate import LENGTH, STOP_ID, STOP_STRING, Completions
from alignax.losses import importance_weighted
from alignax.rewards.rules import last_number

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # past the proxies of the environment


def get_config():
    """The config: a server on this machine."""
    config = default_config()
    config.server = ConfigDict()
    config.server.url = "http://127.0.0.1:30000"
    config.server.folder = ""  # where the policy is written for the server; empty: WORKDIR_served
    config.server.dtype = "float32"  # of the written weights; or "bfloat16", "float16"
    config.server.name = "default"  # the model's name in requests; vLLM wants that of its --served-model-name
    config.server.reload = "/update_weights_from_disk"  # the request that loads the folder; empty: the server keeps its weights
    config.server.requests = 64  # at once
    config.server.timeout = 600.0  # seconds for an answer
    config.workdir = "runs/external"
    config.steps = 200
    config.batch_size = 32
    config.data.kind = "prompt"
    config.rollout.samples = 8
    config.rollout.max_new_tokens = 128
    config.optimizer.learning_rate = 1e-6
    config.optimizer.schedule = "constant"
    config.eval.every = 50
    config.eval.sample_prompts = 32
    return config


def loss(config):
    """The loss: GRPO with importance weights from the server's log-probs to the policy's."""
    return importance_weighted(grpo())


def experience(config):
    """The experience: each reward compared with the other rewards of its group."""
    return group_relative()


def reward(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[float]) -> list[float]:
    """The rewards: 1 if the last number is right, else 0."""
    return [float(last_number(text) == right) for text, right in zip(completions, answer, strict=True)]


def sampler(config, ends, save):
    """The sampler of rollouts: a server."""
    return Server(config, ends, save)


class Server:
    """A server as a sampler: it gets the policy's weights, then prompts, and gives completions with their log-probs."""

    def __init__(self, config, ends, save):
        """Connects to nothing yet."""
        self.own, self.rollout, self.ends, self.save = config.server, config.rollout, ends, save
        self.folder = paths.here(self.own.folder or f"{config.workdir}_served", "server.folder").absolute()

    def __call__(self, params: Any, prompts: Sequence[Sequence[int]], key: jax.Array, n: int) -> Completions | None:
        """Samples n completions of each prompt; every process writes its part of the weights, and process 0 asks the server."""
        if self.own.reload:
            self.save(params, self.folder, self.own.dtype)
        if not is_main():
            return None
        if self.own.reload:
            self.hand_over()
        seeds = np.random.default_rng(np.asarray(jax.random.key_data(key))).integers(1 << 31, size=len(prompts)).tolist()
        with ThreadPoolExecutor(self.own.requests) as threads:
            answers = list(threads.map(lambda prompt, seed: self.complete(prompt, seed, n), prompts, seeds))
        return padded(answers)

    def hand_over(self) -> None:
        """Asks the server to load the written weights."""
        said = self.post(self.own.reload, {"model_path": str(self.folder)})
        if not said.get("success"):
            raise ValueError(f"the server has not loaded {str(self.folder)!r}: {said.get('message')}; it must see this folder")

    def complete(self, prompt: Sequence[int], seed: int, n: int) -> list[tuple[list[int], list[float], str]]:
        """The n completions of a prompt: token ids, their log-probs, and why they ended."""
        c = self.rollout
        asked = {
            "model": self.own.name, "prompt": list(prompt), "n": n, "seed": seed, "temperature": c.temperature, "top_p": c.top_p,
            "max_tokens": c.max_new_tokens, "stop": list(c.stop) or None, "stop_token_ids": list(self.ends), "logprobs": 1,
            "return_token_ids": True, "return_tokens_as_token_ids": True, "skip_special_tokens": False,
        }  # fmt: skip
        choices = self.post("/v1/completions", asked).get("choices", [])
        if len(choices) != n:
            raise ValueError(f"{self.own.url} gives {len(choices)} choices, and n is {n}; it must sample n completions of a prompt")
        return [self.read(choice) for choice in choices]

    def read(self, choice: dict[str, Any]) -> tuple[list[int], list[float], str]:
        """Token ids, log-probs and the reason of the end in a choice of the server."""
        found = choice.get("logprobs") or {}
        texts, logps = found.get("tokens") or [], found.get("token_logprobs") or []
        ids = choice.get("token_ids") or [int(text[9:]) for text in texts if text.startswith("token_id:") and text[9:].isdecimal()]
        if not ids or len(ids) != len(logps):
            raise ValueError(
                f"{self.own.url} gives {len(ids)} token ids and {len(logps)} log-probs for a completion; use a server that knows "
                "return_token_ids or return_tokens_as_token_ids, and logprobs"
            )
        why = choice.get("finish_reason")
        if why not in ("stop", "length"):
            raise ValueError(f"{self.own.url} ended a completion by {why!r}; it must be 'stop' or 'length'")
        return ids, logps, LENGTH if why == "length" else STOP_ID if ids[-1] in self.ends else STOP_STRING

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of the server to a request."""
        url = self.own.url.rstrip("/") + path
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with DIRECT.open(request, timeout=self.own.timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as e:
            with e:
                said = e.read(300).decode(errors="replace")
            raise ValueError(f"{url} answers {e.code} {e.reason}: {said}") from e
        except (OSError, http.client.HTTPException, ValueError) as e:
            raise ValueError(f"{url} does not answer ({e}); start the server, or set config.server.url and config.server.timeout") from e


def padded(answers: Sequence[Sequence[tuple[list[int], list[float], str]]]) -> Completions:
    """The completions of all prompts as arrays [B, n, C], C being the most tokens of one."""
    shape = (len(answers), len(answers[0]), max(len(ids) for group in answers for ids, *_ in group))
    tokens, logps, mask = np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(shape, bool)
    for b, i in np.ndindex(shape[:2]):
        ids, own, _ = answers[b][i]
        tokens[b, i, : len(ids)], logps[b, i, : len(ids)], mask[b, i, : len(ids)] = ids, own, True
    return Completions(tokens, mask, logps, np.array([[why for *_, why in group] for group in answers]))
