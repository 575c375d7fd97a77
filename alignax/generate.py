"""Plain sampling: prompts to completions with a key-value cache, greedy or at a temperature."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from alignax.models.heads import soft_cap
from alignax.models.transformer import Decoder, ModelConfig, head_weight
from alignax.types import Params


def sampler(
    config: ModelConfig, *, max_new_tokens: int, eos: int, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> Callable[[Params, jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """A pure function that samples completions, to be jitted.

    Args:
      config: the model.
      max_new_tokens: the most that a completion has.
      eos: the token that ends a completion, itself part of it.
      dtype: of activations and cache.
      mesh: as in `alignax.models.transformer.forward`.

    Returns:
      `sample(params, tokens [R, P], mask [R, P], temperature [], key) -> (tokens [R, C], mask [R, C])`: prompts are left padded; a
      temperature of 0 is greedy. The mask is True up to the EOS, itself included.
    """
    decoder = Decoder(config, dtype, "none", mesh)

    def sample(params: Params, tokens: jax.Array, mask: jax.Array, temperature: jax.Array, key: jax.Array):
        R, P = tokens.shape
        S = P + max_new_tokens
        weight = head_weight(config, params)
        slots = jnp.pad(mask, ((0, 0), (0, max_new_tokens)), constant_values=True)  # [R, S]
        shape = (config.num_hidden_layers, R, S, config.num_key_value_heads, config.head_dim)
        cache = (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

        def draw(hidden: jax.Array, key: jax.Array) -> jax.Array:  # [R, D] -> [R]
            logits = jnp.einsum("rd,dv->rv", hidden, weight.astype(dtype), preferred_element_type=jnp.float32)
            logits = soft_cap(logits, config.final_logit_softcapping)
            heat = jnp.where(temperature > 0, temperature, 1.0)
            return jnp.where(temperature > 0, jax.random.categorical(key, logits / heat), logits.argmax(-1)).astype(jnp.int32)

        def step(carry: Any, key: jax.Array) -> Any:
            cache, token, slot, alive = carry
            hidden, cache = decoder.apply({"params": params}, token[:, None], slots, cache, slot)
            new = draw(hidden[:, -1], key)
            return (cache, new, slot + 1, alive & (token != eos)), (token, alive)

        hidden, cache = decoder.apply({"params": params}, tokens, slots, cache, 0)
        first, *keys = jax.random.split(key, max_new_tokens + 1)
        start = (cache, draw(hidden[:, -1], first), jnp.int32(P), jnp.ones(R, bool))
        _, (out, alive) = jax.lax.scan(step, start, jnp.stack(keys))
        return jnp.where(alive, out, 0).T, alive.T

    return sample
