"""How often the loops of a run's programs turn whose turns depend on data: averages of the training data.

A plan has the compiled programs, but no batch. So it deals examples of the training data as `alignax.packing` does, and counts.
"""

from typing import NamedTuple

import numpy as np

from alignax import hlo
from alignax.mesh import batch_shards, sharding
from alignax.models.moe import BLOCKS, block_rows
from alignax.packing import PARTS, Packing
from alignax.run.prepare import Run


def batch_of(run: Run, name: str) -> int:
    """The examples of a call."""
    return (run.config.eval.batch_size if name != "train" else 0) or run.config.batch_size


def example_sizes(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the prompts [n] and of their responses [n, N] in the training data; those of rollouts are as long as they may be."""
    examples, samples = run.data.train.examples, run.config.rollout.samples
    prompts = examples.prompt_lengths.reshape(-1, examples.N)
    if samples:
        return prompts[:, 0], np.full((len(prompts), samples), run.config.rollout.max_new_tokens)
    return prompts[:, 0], examples.lengths.reshape(-1, examples.N) - prompts[:, :1]


class Packed(NamedTuple):
    """How a shard's share of a training batch is packed: averages of the training data, at most 512 examples of it."""

    parts: float  # for each example
    pairs: float  # of blocks that see each other, for each example
    filled: float  # the share of the positions that hold a token
    positions: int  # P, of a part


def packed(run: Run) -> Packed | None:
    """Deals examples of the training data into parts, first fit by decreasing size as `alignax.packing` does, and lays the parts out.

    None for a run whose rows are padded.
    """
    packing, (prompts, responses) = run.packing, example_sizes(run)
    if packing is None:
        return None
    shape = (run.config.batch_size, responses.shape[1], run.data.train.length)
    P = packing.size({"mask": np.broadcast_to(False, shape)}, run.config.microbatches)  # pyright: ignore[reportArgumentType]
    sizes = prompts * (1 if packing.shared else responses.shape[1]) + responses.sum(1)
    taken = sorted(range(min(len(sizes), max(run.config.batch_size // batch_shards(run.mesh), 1), 512)), key=lambda i: -sizes[i])
    parts: list[list[int]] = []
    for i in taken:
        fits = next((part for part in parts if sizes[part].sum() + sizes[i] <= P), None)
        parts.append([i]) if fits is None else fits.append(i)
    pairs = sum(seen_pairs([(int(prompts[i]), responses[i].tolist()) for i in part], P, packing) for part in parts)
    return Packed(len(parts) / len(taken), pairs / len(taken), float(sizes[taken].sum()) / (len(parts) * P), P)


def seen_pairs(examples: list[tuple[int, list[int]]], P: int, packing: Packing) -> int:
    """The pairs of blocks that see each other in a row of P positions, which holds examples: the tokens of prompt and responses of each."""
    t, end = packing.block, 0
    seen = np.zeros((P // t, P // t), bool)  # [queries, keys]
    place = lambda first, tokens: slice(first // t, -(-(first + tokens) // t))
    for prompt, responses in examples:
        for number, tokens in enumerate(responses):
            if number == 0 or not packing.shared:
                root, end = place(end, prompt), end + prompt
            own, end = place(end, tokens), end + tokens
            seen[root, root] = seen[own, root] = seen[own, own] = True
    return int(np.tril(seen).sum())


def shares_of(run: Run, own: Packed | None) -> hlo.Shares:
    """The shares of loops whose turns depend on data: of the scored positions among those computed, and by the scopes of the others.

    Args:
      run: the run.
      own: how its rows are packed, from `packed`.
    """
    prompts, responses = example_sizes(run)
    scored = responses.sum() if run.config.rollout.samples else run.data.train.examples.scored.sum()
    if own is None or run.packing is None:
        computed = run.config.batch_size // run.config.microbatches * responses.shape[1] * run.data.train.length
        shares = {"": float(scored) / (responses.size * run.data.train.length)}
        return shares | expert_blocks(run, computed // batch_shards(run.mesh))
    sizes = prompts * (1 if run.packing.shared else responses.shape[1]) + responses.sum(1)
    shares = {"": own.filled * float(scored / sizes.sum()), PARTS: own.parts}
    return shares | expert_blocks(run, own.positions // run.packing.context)


def expert_blocks(run: Run, positions: int) -> dict[str, float]:
    """The blocks of each expert of the policy on a device, for a call with so many positions, under equal load; the last is half empty."""
    c = run.policy.config
    if not c.num_experts:
        return {}
    own = sharding(run.mesh, ("expert",), (c.num_experts,)).shard_shape((c.num_experts,))[0]
    assignments = positions * c.num_experts_per_tok
    return {BLOCKS: assignments / c.num_experts / block_rows(assignments, own) + 0.5}


def visited_pairs(run: Run, own: Packed, name: str, blocks: int) -> float:
    """The pairs of blocks that attention visits on a device in all parts of a call; 0 for smaller parts, whose pairs are among them.

    Args:
      run: the run.
      own: how its rows are packed, from `packed`.
      name: the program.
      blocks: the blocks of a row of a part, or of a context shard's queries.
    """
    packing = run.packing
    assert packing is not None
    if blocks * packing.block * packing.context < own.positions:
        return 0.0
    return own.pairs * batch_of(run, name) / batch_shards(run.mesh) / packing.context
