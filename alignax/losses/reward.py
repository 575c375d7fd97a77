"""Losses of reward models, on the scores of responses: `Outputs.scores` [B, N].

Examples assume `import jax.numpy as jnp` and the names of `alignax`, `alignax.losses` and `alignax.experience`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from alignax.losses.algebra import Loss, Term, chosen_examples, make_loss, sequence, token_logps
from alignax.losses.pairs import TIE, check_pairs, check_positive, check_smoothing, logistic
from alignax.types import Batch, Metrics, Outputs


def bradley_terry(margin: Callable[[Batch], jax.Array] | None = None, label_smoothing: float = 0.0) -> Loss:
    """The Bradley-Terry loss of a reward model on pairs (Stiennon et al. 2020, arXiv:2009.01325).

    -(1 - e) log sigmoid(z) - e log sigmoid(-z),   z = s_w - s_l - margin

    The loss does not fix the offset of a prompt's scores. To compare scores across prompts or models, add `centring()` or `score_l2()`.

    >>> out = Outputs(None, None, scores=jnp.array([[2.0, 1.0]]))  # [B, N]
    >>> batch = {"completion_mask": jnp.array([[[False, True], [False, True]]])}
    >>> value, _ = bradley_terry()(out, batch, bradley_terry().normalised(batch))
    >>> print(f"{value:.3f}")  # log(1 + exp(-1))
    0.313

    Args:
      margin: batch -> [B], how much better the chosen response is according to the data (Touvron et al. 2023, arXiv:2307.09288), for
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
    """A penalty that keeps the scores of a pair at a sum of 0 (Eisenstein et al. 2023, arXiv:2312.09244).

    (s_w + s_l)^2

    >>> bradley_terry() + 0.01 * centring()
    bradley_terry + 0.01 * centring
    """
    return make_loss("centring", lambda out, batch: (jnp.square(pair_scores(out).sum(axis=1)), {}))


def score_l2() -> Loss:
    """A penalty that keeps scores near 0, so that all members of an ensemble have one offset (Coste et al. 2023, arXiv:2310.02743).

    (s_w^2 + s_l^2) / 2,   with a coefficient of 0.001 in the paper
    """
    return make_loss("score_l2", lambda out, batch: (0.5 * jnp.square(pair_scores(out)).sum(axis=1), {}))


def grm_sft(beta: float = 0.1) -> Loss:
    """A regulariser that keeps a reward model's hidden states useful as a language model (GRM, Yang et al. 2024, arXiv:2406.10216).

    -log sigmoid(beta log pi(y_w)),   pi the distribution of the trunk's own output layer, summed over the chosen response

    The paper's loss is `0.99 * bradley_terry() + 0.01 * grm_sft()`; for the version without the logistic function take `sft()`. Needs a
    reward model that also gives log-probs: `--config.model.language_head=true`.

    Args:
      beta: factor of the log-prob, above 0.
    """
    check_positive("beta", beta)

    def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        chosen = sequence(token_logps(out), batch)[:, 0]  # [B]
        return logistic(beta * chosen), {"logps/chosen": chosen}

    return make_loss("grm_sft", value, chosen_examples)


def attribute_regression(names: Sequence[str]) -> Loss:
    """Regression of several scores of a response on human ratings of its attributes (HelpSteer2, Wang et al. 2024, arXiv:2406.08673).

    (1 / labels) sum_j mean of (s_j - y_j)^2,   over the responses that have y_j

    Each attribute is averaged over the responses that have a rating of it, so an attribute with few ratings counts as much as another.
    Missing ratings (NaN) have no gradient.

    >>> out = Outputs(None, None, scores=jnp.array([[[1.0, 3.0]]]))  # [B, N, labels]
    >>> batch = {"completion_mask": jnp.array([[[False, True]]]), "attributes": jnp.array([[[2.0, jnp.nan]]])}
    >>> loss = attribute_regression(["helpfulness", "verbosity"])
    >>> value, metrics = loss(out, batch, loss.normalised(batch))
    >>> print(value, metrics["errors/helpfulness"])  # half of (1 - 2)^2
    0.5 1.0

    Args:
      names: of the attributes, for the metrics `loss/<name>` and `errors/<name>` (mean absolute error), in the order of the batch field
        `attributes` [B, N, labels], which `data.columns.attributes` fills; as many as `model.num_labels`.
    """
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise ValueError(f"attributes are named {names!r}; give a list of different names, for example ['helpfulness', 'verbosity']")

    def term(j: int, name: str) -> Term:
        def value(out: Outputs, batch: Batch) -> tuple[jax.Array, Metrics]:
            s, y = label_scores(out), _attributes(batch)
            if not s.shape[-1] == y.shape[-1] == len(names):
                have = f"the data have {y.shape[-1]} and the model gives {s.shape[-1]} scores"
                raise ValueError(
                    f"the loss names {len(names)} attributes, but {have}; set data.columns.attributes and model.num_labels to match"
                )
            # NaN is replaced before the difference is taken: afterwards the gradient would be NaN times 0.
            error = jnp.where(jnp.isnan(y), 0.0, s - jnp.where(jnp.isnan(y), 0.0, y))[..., j]  # [B, N]
            return jnp.square(error), {f"errors/{name}": jnp.abs(error)}

        return Term(name, value, lambda batch: batch["completion_mask"].any(axis=-1) & ~jnp.isnan(_attributes(batch)[..., j]))

    return Loss(tuple((1 / len(names), term(j, name)) for j, name in enumerate(names)))


def _attributes(batch: Batch) -> jax.Array:
    if "attributes" not in batch:
        raise ValueError('the batch has no "attributes"; name the columns of the attributes with data.columns.attributes')
    return batch["attributes"]


def correct(scores: jax.Array) -> jax.Array:
    """The accuracy of each pair: 1 if the chosen response has the higher score, 1/2 for a tie, else 0: [.., 2] -> [..]."""
    margins = scores[..., 0] - scores[..., 1]
    return 0.5 * (1.0 + jnp.sign(jnp.where(jnp.abs(margins) > TIE, margins, 0.0)))


def pair_scores(out: Outputs) -> jax.Array:
    """The scores of a pair: [B, 2].

    Raises:
      ValueError: for a model without scores, or with several for a response; and for examples that are not pairs.
    """
    s = label_scores(out)
    if s.shape[-1] != 1:
        raise ValueError(f"this loss takes one score per response, but the model gives {s.shape[-1]}; set model.num_labels to 1")
    check_pairs(s)
    return s[..., 0]


def label_scores(out: Outputs) -> jax.Array:
    """All scores of each response: [B, N, labels]."""
    if out.scores is None:
        raise ValueError("a reward loss needs Outputs.scores, which this model leaves out; give a model with a reward head")
    return out.scores if out.scores.ndim == 3 else out.scores[..., None]
