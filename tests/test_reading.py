"""A batch notes what is read of it, through what experiences and jax do with it."""

import jax
import jax.numpy as jnp
import pytest
import tiny

from alignax.experience import advance, chain, group_relative, logps, report
from alignax.losses.pairs import field
from alignax.reading import Noting
from alignax.types import Model, microbatch

READS = {
    "a field": lambda batch: batch["old"],
    "a field that is asked for": lambda batch: field(batch, "old", "an experience"),
    "get without a default": lambda batch: batch.get("old"),
    "a plain copy": lambda batch: dict(batch),
    "a literal": lambda batch: {**batch, "x": 1},
    "a comprehension": lambda batch: {name: x for name, x in batch.items()},
    "values": lambda batch: list(batch.values()),
    "behind what is written": lambda batch: (batch | {"x": 1})["old"],
    "behind what is written in place": lambda batch: written_in_place(batch)["old"],
    "behind a copy": lambda batch: batch.copy()["old"],
    "in a part": lambda batch: microbatch(batch, 2)["old"],
    "in a loop": lambda batch: jax.lax.map(lambda part: part["old"] + 1, batch),
    "in a program": lambda batch: jax.jit(lambda batch: batch["old"] + 1)(batch),
    "behind a report": lambda batch: report(batch, x=1.0)["old"],
    "in a chain": lambda batch: advance(chain(group_relative(), lambda batch: batch | {"x": batch["old"]}), {}, batch),
}
DOES_WITHOUT = {
    "a question": lambda batch: "old" in batch,
    "get with a default": lambda batch: batch.get("old", None),
    "another field": lambda batch: batch["tokens"],
    "names": lambda batch: list(batch),
    "what is written since": lambda batch: (batch | {"old": 1})["old"],
    "parts": lambda batch: microbatch(batch, 2)["tokens"],
    "a chain": lambda batch: advance(chain(logps("new", Model(tiny.plain_apply, tiny.plain_params())), group_relative()), {}, batch),
    "a report": lambda batch: advance(chain(lambda batch: report(batch, x=1.0)), {}, batch),
}


def written_in_place(batch):
    batch |= {"x": 1}
    return batch


def noted(function) -> set[str]:
    """The fields of `old` that a function reads, found on shapes alone."""
    read = set()
    batch = tiny.batch() | {"rewards": jnp.zeros((4, 2)), "old": jnp.zeros((4, 2, 24))}
    jax.eval_shape(lambda batch: (function(Noting(batch, frozenset({"old"}), read.add)), 0)[1], batch)
    return read


@pytest.mark.parametrize("name", READS)
def test_what_is_read_is_noted(name):
    assert noted(READS[name]) == {"old"}


@pytest.mark.parametrize("name", DOES_WITHOUT)
def test_what_is_done_without_is_not(name):
    assert noted(DOES_WITHOUT[name]) == set()


def test_a_field_that_is_not_there_is_missed_as_ever():
    batch = Noting({"tokens": 1}, frozenset({"tokens"}), print)
    with pytest.raises(KeyError, match="tokns"):
        batch["tokns"]
    with pytest.raises(ValueError, match="no \"tokns\".*the nearest is 'tokens'; it has tokens"):
        field(batch, "tokns", "an experience")
