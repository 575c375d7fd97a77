"""A profile has the steps that were asked for, and compiled programs name their parts."""

import gzip
import json
import re
from contextlib import closing
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import pytest
import runs
import tiny

from alignax.cli import main
from alignax.config import default_config
from alignax.generate import Sampling, speaker
from alignax.generate.engine import Engine, Shape, State
from alignax.losses import dpo
from alignax.models.transformer import forward
from alignax.run.checks import check_profile
from alignax.run.log import Log
from alignax.run.profile import Profile
from alignax.train import init_state, make_step


def scopes(text: str) -> set[str]:
    """The names of the parts of a compiled program, from the metadata of its instructions."""
    return {part for name in re.findall(r'op_name="([^"]*)"', text) for part in re.split(r"[/()]", name)}


def test_the_training_program_names_its_parts():
    optimizer = optax.sgd(1e-3)
    state = init_state(tiny.params(), optimizer, jax.random.key(0))
    step = make_step(forward(tiny.MODEL), dpo(), optimizer)
    text = jax.jit(step).lower(state, tiny.with_reference(tiny.batch(2))).compile().as_text()
    assert scopes(text) >= {"embed", "layer", "attention", "mlp", "head", "loss", "optimizer"}
    products = re.findall(r' dot\(.*op_name="([^"]*)"', text)
    assert products and all(re.search(r"attention|mlp|head", name) for name in products)  # the backward pass has the same names


@pytest.mark.slow
def test_the_sampling_program_names_its_parts():
    engine = Engine(speaker(tiny.MODEL), Shape(8, 4, 2, 2, 2), Sampling(), (2,))
    rows = engine.empty(), jnp.arange(2), jnp.int32(1), jax.random.key(0)
    text = jax.jit(engine.step).lower(tiny.params(), engine.speaker.head(tiny.params()), *rows).compile().as_text()
    assert scopes(text) >= {"embed", "layer", "attention", "mlp", "head", "sample"} and isinstance(engine.empty(), State)


def test_more_steps_than_follow_the_first_are_refused():
    config = default_config()
    config.log.profile = 3
    check_profile(config, 4)
    with pytest.raises(ValueError, match="log.profile is 3, and only 2 of 3 steps follow the first step, which compiles"):
        check_profile(config, 3)
    config.rollout.samples, config.rollout.epochs = 2, 4
    with pytest.raises(ValueError, match="only 0 of 4 steps follow the first 4 steps, which compile; lower it, or raise steps"):
        check_profile(config, 4)


def test_a_profile_that_finds_no_room_is_one_error_and_nothing_of_it_remains(tmp_path):
    run = SimpleNamespace(config=default_config(), workdir=tmp_path, steps=4)
    run.config.log.profile = 2

    def steps():
        with closing(Log(tmp_path, steps=4, start=0, every=1, tensorboard=False)) as log:
            profile = Profile(run, log, 0)
            try:
                for number in range(3):
                    with profile.step(number, jnp.ones(3)):
                        jnp.ones(3).block_until_ready()
            finally:
                profile.close()

    with (
        runs.small_files(64),
        pytest.raises(OSError, match=r"profile' could not be written \(.*File too large.*\); make room, and run") as e,
    ):
        steps()
    assert "\n" not in str(e.value) and not [*(tmp_path / "profile").rglob("*")]
    jax.profiler.stop_trace()  # ends the trace inside jax, as the end of the process does
    steps()
    assert len([*tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")]) == 1
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["plugins"]


@pytest.mark.slow
def test_a_profile_has_the_steps_that_were_asked_for(tmp_path, capsys):
    less = {"steps": 4, "log.profile": 2, "eval.every": 0, "eval.samples": 0, "eval.sample_prompts": 0, "model.packing": -1}
    fields = runs.world(tmp_path) | less | {"workdir": tmp_path / "run", "data.eval": ""}
    assert main(runs.arguments(fields | {"log.profile": 4})) == 2 and "log.profile is 4" in capsys.readouterr().err
    assert main(runs.arguments(fields)) == 0
    assert f"profile of steps 2 to 3: `xprof {tmp_path / 'run' / 'profile'}`" in capsys.readouterr().err
    assert len([*(tmp_path / "run" / "profile").glob("plugins/profile/*/*.xplane.pb")]) == 1  # what xprof and TensorBoard read
    (file,) = (tmp_path / "run" / "profile").glob("plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert {event["args"]["step_num"] for event in events if event.get("name") == "train"} == {"2", "3"}
    assert any("dot" in event.get("name", "") for event in events)
