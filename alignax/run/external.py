"""Samplers outside of alignax: the object that `sampler(..)` of an experiment returns samples the rollouts, by a server for example.

Another program gives other log-probs than the policy's forward pass, if only by rounding, and it may hold older weights. So its samples
are never taken for the policy's own: the log has their gap, and the loss corrects for it.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from alignax.config.blame import BadInput, blaming
from alignax.distributed import is_main, link
from alignax.generate import LENGTH, STOP_ID, STOP_STRING, Completions, Sampling, Shape, Speaker, Stops
from alignax.generate.generator import Prompts
from alignax.program import Program
from alignax.text import one_line, short

ENDS = (STOP_ID, STOP_STRING, LENGTH)
ABOVE = 1e-4  # nats by which rounding may lift a log-prob above 0


class SamplerFailed(RuntimeError):
    """The sampler of an experiment raised, or returned what no sampler of the policy can have sampled."""


@dataclasses.dataclass(frozen=True)
class External:
    """A sampler of rollouts outside of alignax. It stands in the place of a `Generator`, and has no programs."""

    file: Path  # the experiment file
    sample: Callable[[Any, Prompts, jax.Array, int], Any]  # what its `sampler(..)` returns
    speaker: Speaker  # of the policy, as not exact
    shape: Shape  # the longest prompt and completion; slots: the completions of a rollout
    sampling: Sampling  # what the config asks for
    stops: Stops | None
    stop_ids: frozenset[int]
    unused: tuple[tuple[int, int], ...] = ()  # ranges of token ids that the policy never samples

    def __call__(self, params: Any, prompts: Prompts, key: jax.Array, n: int = 1, look: Callable[[], None] = lambda: None) -> Completions:
        """The completions of process 0, checked, in every process. Every process calls the object, since each holds a part of `params`.

        Arguments are those of a `Generator`; `look` is called before and after the object.

        Raises:
          SamplerFailed: in every process, if the object raised in one of them, or returned no possible completions in process 0.
        """
        look()
        data = jnp.asarray(np.asarray(jax.random.key_data(key).addressable_data(0)))
        key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))  # of this process, which may use it alone
        made, problem = None, ""
        try:
            with blaming(self.file):
                given = self.sample(params, prompts, key, n)
            made = self.checked(given, len(prompts), n) if is_main() else None
        except BadInput as e:  # "FILE, line 3: .." from the object
            at = str(e)
            problem = f"sampler() of {self.file}" + (at.removeprefix(str(self.file)) if at.startswith(str(self.file)) else f": {at}")
        except ValueError as e:
            problem = f"sampler() of {self.file}: {e}"
        own = link()
        if failed := next(filter(None, [problem] if own is None else own.gather(problem)), ""):
            raise SamplerFailed(failed)
        look()
        return self.shared(made, len(prompts), n)

    def programs(self, params: Any) -> dict[str, Program]:
        """No programs: nothing is compiled for a sampler outside."""
        return {}

    def checked(self, made: Any, count: int, n: int) -> Completions:
        """What the object returned for `count` prompts, in arrays of the rollout's size that are 0 after the end of each completion.

        Raises:
          ValueError: for the first thing that is wrong, with the numbers of prompt and sample, and the remedy.
        """
        if not isinstance(made, Completions):
            raise ValueError(f"its object returns {short(made)}; let it return alignax.generate.Completions(tokens, mask, logps, ended)")
        try:
            tokens, mask, logps, ended = map(np.asarray, made[:4])
            drawn = logps if made.drawn is None else np.asarray(made.drawn)
        except ValueError as e:  # lists of several lengths
            raise ValueError(f"its object returns no arrays ({one_line(e)}); let all completions be as long, with a mask") from e
        C = tokens.shape[-1] if tokens.ndim == 3 else self.shape.new
        for name, x, kinds, words in (
            ("tokens", tokens, "iu", "integers"), ("mask", mask, "b", "booleans"), ("logps", logps, "f", "floats"),
            ("drawn", drawn, "f", "floats"), ("ended", ended, "UO", "reasons"),
        ):  # fmt: skip
            wanted = [count, n] if name == "ended" else [count, n, C]
            if list(x.shape) != wanted or x.dtype.kind not in kinds:
                raise ValueError(
                    f"{name} are {x.dtype} {list(x.shape)}; let them be {words} {wanted}, for {count} prompts and {n} samples of each"
                )
        if not 1 <= C <= self.shape.new:
            raise ValueError(f"completions have {C} tokens; let them have 1 to {self.shape.new}, which is rollout.max_new_tokens")
        self.check(tokens, mask, ended)
        for name, x in (("logps", logps), ("drawn", drawn)):
            refuse(
                mask & ~(np.isfinite(x) & (x <= ABOVE)),
                lambda *at, name=name, x=x: f"has {x[at]} in {name}; let them be the logarithms of probabilities: finite, and at most 0",
            )
        pad = lambda x, dtype: np.pad(np.where(mask, x, 0).astype(dtype), ((0, 0), (0, 0), (0, self.shape.new - C)))
        own = pad(tokens, np.int32), pad(mask, bool), pad(logps, np.float32), ended.astype("<U11")
        return Completions(*own, self.sampling, drawn=pad(drawn, np.float32), of_model=False)

    def check(self, tokens: np.ndarray, mask: np.ndarray, ended: np.ndarray) -> None:
        """Refuses completions whose mask, tokens or reasons of the end no sampler of the policy can give; [B, n, C], `ended` [B, n]."""
        length, why, known = mask.sum(axis=-1), ended[..., None], ", ".join(map(repr, ENDS))
        refuse(mask[..., 1:] & ~mask[..., :-1], lambda *at: "has a mask with a gap; let it be True from the first token to the last")
        refuse((length == 0)[..., None], lambda *at: "has no token; let it have at least one, a stop id if it ends at once")
        size = self.speaker.predicted
        refuse(mask & ((tokens < 0) | (tokens >= size)), lambda *at: f"has the token {tokens[at]}; the policy has {size} tokens, from 0 on")
        lacking = np.any([(tokens >= first) & (tokens < behind) for first, behind in self.unused], axis=0)
        refuse(mask & lacking, lambda *at: f"has the token {tokens[at]}, which the tokenizer lacks; let what samples leave out such tokens")
        refuse(~np.isin(why, ENDS), lambda b, i, _: f"ended by {short(ended.tolist()[b][i])}; let it be one of {known}")
        if self.stops is None:
            refuse(why == STOP_STRING, lambda *at: f"ended by {STOP_STRING!r}, and rollout.stop is empty; let it be {LENGTH!r}")
        last, ids = np.arange(mask.shape[-1]) == length[..., None] - 1, sorted(self.stop_ids)
        refuse(
            mask & (np.isin(tokens, ids) != (last & (why == STOP_ID))),
            lambda b, i, t: (
                f"has {tokens[b, i, t]} as token {t + 1} of {length[b, i]}, and ended by {ended.tolist()[b][i]!r}; let it end with the "
                f"first of the stop ids {', '.join(map(str, ids))}, and by {STOP_ID!r} only then"
            ),
        )

    def shared(self, made: Completions | None, count: int, n: int) -> Completions:
        """The completions of process 0, in every process."""
        if jax.process_count() == 1:
            assert made is not None
            return made
        shape = (count, n, self.shape.new)
        if made is None:
            own = np.zeros(shape, np.int32), np.zeros((2, *shape), np.float32), np.zeros((2, count, n), np.int32)
        else:
            why = sum(np.where(made.ended == reason, number, 0) for number, reason in enumerate(ENDS))
            drawn = made.logps if made.drawn is None else made.drawn
            own = made.tokens, np.stack([made.logps, drawn]), np.stack([made.mask.sum(axis=-1), why]).astype(np.int32)
        tokens, (logps, drawn), (length, why) = map(np.asarray, multihost_utils.broadcast_one_to_all(own))
        mask = np.arange(shape[-1]) < length[..., None]
        return Completions(tokens, mask, logps, np.array(ENDS)[why], self.sampling, drawn=drawn, of_model=False)


def refuse(wrong: np.ndarray, says: Callable[..., str]) -> None:
    """Raises a ValueError for the first place at which completions are wrong [B, n, ..]; `says` tells what is there."""
    if wrong.any():
        at = tuple(int(x) for x in np.unravel_index(wrong.argmax(), wrong.shape))
        raise ValueError(f"sample {at[1]} of prompt {at[0]} {says(*at)}")
