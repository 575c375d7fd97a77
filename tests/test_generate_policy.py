"""How a run samples: a policy at a temperature, and whether its samples are exact."""

import jax
import pytest
import tiny

from alignax.generate import Sampling, policy_config, policy_sampling, sampler, speaker
from alignax.mesh import make_mesh


@pytest.mark.parametrize(
    ("temperature", "top_p", "sampling", "exact"),
    [
        (0.7, 1.0, Sampling(), True),
        (1.0, 0.9, Sampling(top_p=0.9), False),
        (0.0, 1.0, Sampling(temperature=0.0), False),
        (0.7, 0.9, Sampling(top_p=0.9), False),
    ],
)
def test_a_policy_has_its_temperature_itself(temperature, top_p, sampling, exact):
    """Log-probs are those at the policy's temperature, so samples at any temperature are exact; greedy and nucleus samples are not."""
    own = policy_config(tiny.MODEL, temperature, ((0, 2),))
    assert (own.temperature, own.unused_tokens) == (temperature or 1.0, ((0, 2),))
    assert policy_sampling(temperature, top_p) == sampling and sampling.exact == exact


def test_a_sampler_has_rows_for_its_mesh():
    """The sampler also has the end tokens and the sampling that it is given."""
    mesh = make_mesh({"fsdp": -1})
    generate = sampler(speaker(tiny.MODEL, mesh=mesh), 20, 8, 12, policy_sampling(1.0, 0.9), ends=(2, 5, 2))
    shards = jax.device_count()
    assert (generate.shape.slots, generate.shape.prompt, generate.shape.new) == (-(-20 // shards) * shards, 8, 12)
    assert generate.stop_ids == {2, 5} and generate.sampling == Sampling(top_p=0.9) and generate.mesh == mesh
    with pytest.raises(ValueError, match="slots 3 do not divide into 8 batch shards"):
        sampler(speaker(tiny.MODEL, mesh=mesh), 20, 8, 12, ends=(2,), slots=3)
