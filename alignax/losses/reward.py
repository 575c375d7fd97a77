"""Losses on reward scores: `Outputs.scores` [B, N], what a reward model gives each response."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss, Term, chosen_examples, make_loss, sequence, token_logps
from alignax.losses.pairs import TIE, check_pairs, check_positive, check_smoothing, logistic
from alignax.types import Batch, Metrics, Outputs


def bradley_terry(margin: Callable[[Batch], jax.Array] | None = None, label_smoothing: float = 0.0) -> Loss:
    """The reward model's loss under Bradley and Terry (Stiennon et al. 2020, arXiv:2009.01325).

    -(1 - e) log sigmoid(z) - e log sigmoid(-z),   z = s_w - s_l - margin

    The scores of a prompt may all move together, so add `centring()` or `score_l2()` before comparing prompts or models.

    Args:
      margin: batch -> [B], how much better the chosen response is, as data says (Touvron et al. 2023, arXiv:2307.09288), for
        example `lambda batch: batch["margin"]`; None: 0.
      label_smoothing: e, the probability that a label is flipped, in [0, 0.5).
    """
    check_smoothing(label_smoothing)

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        s = pair_scores(out)
        margins = s[:, 0] - s[:, 1]
        wanted = margins if margin is None else margins - margin(batch)
        metrics = {
            "rewards/chosen": s[:, 0],
            "rewards/rejected": s[:, 1],
            "rewards/margins": margins,
            "rewards/accuracies": correct(s),
        }
        return logistic(wanted, label_smoothing), metrics

    return make_loss("bradley_terry", value)


def centring() -> Loss:
    """Scores of a pair that add up to 0 (Eisenstein et al. 2023, arXiv:2312.09244): `bradley_terry() + 0.01 * centring()`.

    (s_w + s_l)^2
    """
    return make_loss("centring", lambda out, batch: (jnp.square(pair_scores(out).sum(axis=1)), {}))


def score_l2() -> Loss:
    """Scores near 0, which anchors the offset of each member of an ensemble (Coste et al. 2023, arXiv:2310.02743).

    (s_w^2 + s_l^2) / 2,   weighed 0.001 there
    """
    return make_loss("score_l2", lambda out, batch: (0.5 * jnp.square(pair_scores(out)).sum(axis=1), {}))


def grm_sft(beta: float = 0.1) -> Loss:
    """What keeps a reward model's hidden states those of a language model (GRM, Yang et al. 2024, arXiv:2406.10216).

    -log sigmoid(beta log pi(y_w)),   pi the distribution of the trunk's own output layer, summed over the chosen response

    `0.99 * bradley_terry() + 0.01 * grm_sft()` is the paper's; `sft()` in its place has no logistic. Needs a reward model that gives
    log-probs too: `--config.model.language_head=true`.

    Args:
      beta: of the log-prob, above 0.
    """
    check_positive("beta", beta)

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        chosen = sequence(token_logps(out), batch)[:, 0]  # [B]
        return logistic(beta * chosen), {"logps/chosen": chosen}

    return make_loss("grm_sft", value, chosen_examples)


def attribute_regression(names: Sequence[str]) -> Loss:
    """Several scores of a response, regressed on what people gave its attributes (HelpSteer2, Wang et al. 2024, arXiv:2406.08673).

    (1 / labels) sum_j mean of (s_j - y_j)^2,   over the responses that have y_j

    An attribute is averaged over what is given of it, so one that few responses have counts as much as another; what is not
    given has no gradient.

    Args:
      names: of the attributes, for their metrics `loss/<name>` and `errors/<name>` (mean absolute error), in the order of the batch field
        `attributes` [B, N, labels], which `data.columns.attributes` brings; as many as `model.num_labels`.
    """
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise ValueError(f"attributes are named {names!r}; give a list of different names, ['helpfulness', 'verbosity'] say")

    def term(j: int, name: str) -> Term:
        def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
            s, y = label_scores(out), _attributes(batch)
            if not s.shape[-1] == y.shape[-1] == len(names):
                have = f"the data have {y.shape[-1]} and the model gives {s.shape[-1]} scores"
                raise ValueError(f"the loss names {len(names)} attributes, {have}; set data.columns.attributes and model.num_labels alike")
            # NaN is replaced in front of the difference: behind it, its gradient would be NaN times 0.
            error = jnp.where(jnp.isnan(y), 0.0, s - jnp.where(jnp.isnan(y), 0.0, y))[..., j]  # [B, N]
            return jnp.square(error), {f"errors/{name}": jnp.abs(error)}

        return Term(name, value, lambda batch: batch["completion_mask"].any(axis=-1) & ~jnp.isnan(_attributes(batch)[..., j]))

    return Loss(tuple((1 / len(names), term(j, name)) for j, name in enumerate(names)))


def _attributes(batch: Batch) -> jax.Array:
    if "attributes" not in batch:
        raise ValueError('the batch has no "attributes"; name their columns with data.columns.attributes')
    return batch["attributes"]


def correct(scores: jax.Array) -> jax.Array:
    """1 where the chosen response scores higher, 1/2 for a tie, else 0: [.., 2] -> [..]."""
    margins = scores[..., 0] - scores[..., 1]
    return 0.5 * (1.0 + jnp.sign(jnp.where(jnp.abs(margins) > TIE, margins, 0.0)))


def pair_scores(out: Outputs) -> jax.Array:
    """The scores of a pair: [B, 2].

    Raises:
      ValueError: for a model without scores, and for examples that are no pairs.
    """
    s = label_scores(out)
    if s.shape[-1] != 1:
        raise ValueError(f"this loss takes one score of a response, the model gives {s.shape[-1]}; set model.num_labels to 1")
    check_pairs(s)
    return s[..., 0]


def label_scores(out: Outputs) -> jax.Array:
    """All scores of each response: [B, N, labels]."""
    if out.scores is None:
        raise ValueError("a reward loss needs Outputs.scores, which this model leaves out; give a model with a reward head")
    return out.scores if out.scores.ndim == 3 else out.scores[..., None]
