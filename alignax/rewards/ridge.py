"""A reward head in closed form: ridge regression on the hidden states of a frozen trunk, without training steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from alignax import mesh as meshes
from alignax.data import Examples, padded_length
from alignax.models.transformer import ModelConfig, forward
from alignax.rewards.ensembles import rated
from alignax.types import Params


def fit_ridge(
    config: ModelConfig,
    params: Params,
    examples: Examples,
    mesh: Mesh,
    *,
    penalty: float = 1.0,
    batch_size: int = 32,
    dtype: Any = jnp.float32,
) -> Params:
    """Fits the reward head of a model to data by ridge regression, for each label (Hoerl & Kennard 1970):

        w = (X^T X + penalty I)^-1 X^T y

    For pairs, a row x of X is the hidden state of the chosen response minus that of the rejected one, each at its last token, and y = 1.
    For single responses with attributes, x is the hidden state and y the given attribute. Each label is fitted to the responses that have
    it, with an intercept, which is not penalised; it becomes `score_offset`.

    The sums are float64 on the host, [D + 1, D + 1] for each set of labels that are given for the same responses. Memory holds the hidden
    states of one batch at a time.

    Args:
      config: config of the reward model; `num_labels` is 1 for pairs, else the number of attributes.
      params: parameters of the reward model.
      examples: pairs, or single responses with the field `attributes`.
      mesh: mesh of the parameters.
      penalty: above 0; on the scale of the number of rows times the variance of a hidden state.
      batch_size: examples of a forward pass.
      dtype: dtype of activations.

    Returns:
      The parameters with a new head: `score` [D, labels] and `score_offset` [labels].

    Raises:
      ValueError: for other data, an attribute that no response has, hidden states that are not finite, or a penalty that is not positive.
    """
    if not 0 < penalty < np.inf:
        raise ValueError(f"the penalty is {penalty}; it must be above 0 and finite (1 is usual)")
    y, there = _targets(examples, config.num_labels)  # [n, labels]
    D, pairs = config.hidden_size, "attributes" not in examples.fields
    sets, of = np.unique(there, axis=1, return_inverse=True)  # [n, S], and the set of each label
    xx, xy = np.zeros((sets.shape[1], D + 1, D + 1)), np.zeros((D + 1, y.shape[1]))
    # With the identity as head, the scores are the hidden states.
    replicated = meshes.sharding(mesh)
    whole = params | {"score": jax.device_put(np.eye(D, dtype=np.float32), replicated)}
    whole |= {"score_offset": jax.device_put(np.zeros(D, np.float32), replicated)}
    apply, first = forward(dataclasses.replace(config, num_labels=D), dtype=dtype, remat="none", mesh=mesh), 0
    for h in rated(apply, whole, examples, mesh, batch_size, padded_length(examples)):  # [b, N, D]
        x = (h[:, 0] - h[:, 1] if pairs else h[:, 0]).astype(np.float64)
        if not np.isfinite(x).all():
            raise ValueError(f"hidden states are not finite in rows {first} to {first + len(x) - 1} (counted from 0); check that model")
        x = np.concatenate([x, np.full((len(x), 1), 0.0 if pairs else 1.0)], axis=1)  # the last column is for the intercept
        rows = slice(first, first + len(x))
        for s in range(len(xx)):
            part = x[sets[rows, s]]
            xx[s] += part.T @ part
        xy += x.T @ y[rows]
        first += len(x)
    ridge = np.diag([*[penalty] * D, penalty if pairs else 0.0])
    w = np.stack([np.linalg.solve(xx[s] + ridge, xy[:, j]) for j, s in enumerate(of.ravel())], axis=1).astype(np.float32)
    placed = lambda name, value: jax.device_put(value, params[name].sharding)
    return params | {"score": placed("score", w[:D]), "score_offset": placed("score_offset", -w[D])}


def _targets(examples: Examples, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """The regression targets, float64 with 0 for missing labels, and a mask of the labels that are given: both [n, labels]."""
    if "attributes" not in examples.fields and examples.N == 2 and labels == 1:
        return np.ones((len(examples), 1)), np.ones((len(examples), 1), bool)
    if "attributes" not in examples.fields or examples.N != 1:
        have = f"these examples have {examples.N} responses per prompt, and the model has {labels} labels"
        raise ValueError(f"ridge regression takes pairs and one label, or single responses with attributes, but {have}; set data.kind")
    given = examples.fields["attributes"][:, 0].astype(np.float64)
    if given.shape[1] != labels:
        raise ValueError(f"the data have {given.shape[1]} attributes, but the model gives {labels} scores; set model.num_labels")
    there = ~np.isnan(given)
    if empty := np.flatnonzero(~there.any(axis=0)).tolist():
        raise ValueError(f"no response has attribute {empty[0]} (counted from 0); leave its column out of data.columns.attributes")
    return np.where(there, given, 0.0), there
