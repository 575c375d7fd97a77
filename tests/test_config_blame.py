"""Messages about errors in a user's code: the place, the missing name, the names that exist, and the nearest one."""

import functools
import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from alignax import config, default_config, dpo
from alignax.config.blame import BadInput, blaming, check_call
from alignax.experience import advance, chain
from alignax.losses import make_loss
from alignax.losses.algebra import token_logps
from alignax.types import Outputs

HEAD = """import jax
import jax.numpy as jnp
def value(out, batch, config):
    """
NAMES = itertools.count()


def said(tmp_path, code: str, always: bool = True) -> str:
    """The message about one line of code that runs on outputs, a batch and a config."""
    file = tmp_path / f"mine{next(NAMES)}.py"
    file.write_text(HEAD + code + "\n")
    spec = importlib.util.spec_from_file_location("mine", file)
    module = importlib.util.module_from_spec(spec)
    own = default_config()
    own.beta = 0.1
    out = Outputs(jnp.zeros((2, 2, 3)), jnp.zeros((2, 2, 3)))
    batch = {"tokens": jnp.zeros((2, 2, 3), jnp.int32), "ref_logps": jnp.zeros((2, 2, 3))}
    with pytest.raises(BadInput) as caught, blaming(file, always):
        spec.loader.exec_module(module)
        jax.eval_shape(lambda out, batch: module.value(out, batch, own), out, batch)
    text = str(caught.value)
    assert "\n" not in text
    return text.removeprefix(f"{file}, line 4: ")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("out.logprobs", "out has no field 'logprobs'; the nearest is 'logps'; it has logps float32[2, 2, 3], entropy float32[2, 2, 3], "
         "log_sum_sq None, ref_kl None, policy_kl None, scores None, values None"),
        ('batch["ref_logp"] + 1', "batch has no field 'ref_logp'; the nearest is 'ref_logps'; it has ref_logps float32[2, 2, 3], "
         "tokens int32[2, 2, 3]"),
        ('name = "advantages"; batch[name]', "batch has no field 'advantages'; it has ref_logps float32[2, 2, 3], tokens int32[2, 2, 3]"),
        ("batch.tokens", "AttributeError: 'dict' object has no attribute 'tokens'"),
        ("jnp.maximun(0.0, out.logps)", "AttributeError: module 'jax.numpy' has no attribute 'maximun'; the nearest is 'maximum'"),
        ("outt.logps", "NameError: name 'outt' is not defined; the nearest is 'out'"),
        ("from alignax import grop", "ImportError: cannot import name 'grop' from 'alignax'; the nearest is 'grpo'"),
        ("from alignax import robust_dop", "ImportError: cannot import name 'robust_dop' from 'alignax'; "
         "the nearest is 'alignax.losses.robust_dpo'"),
        ("kl_k3()", "NameError: name 'kl_k3' is not defined; it is alignax.losses.kl_k3: import it from there"),
        ("whiten_reward()", "NameError: name 'whiten_reward' is not defined; the nearest is 'alignax.experience.whiten_rewards'"),
        ("assert out.logps.shape[1] == 3", "AssertionError: assert out.logps.shape[1] == 3"),
        ("raise ValueError('of mine')", "of mine"),
        ("if out.logps.sum() > 0: pass", "TracerBoolConversionError: Attempted boolean conversion of traced array with shape bool[]"),
        ("config.optimizer.lr = 1.0", "config field 'optimizer.lr' is unknown; the nearest is 'optimizer.learning_rate'"),
        ('config["data"].max_lenght', "config field 'data.max_lenght' is unknown; the nearest is 'data.max_length'"),
        ("c = config.optimizer; c.lr", "config field 'lr' is unknown; the nearest is 'learning_rate'"),
        ("config.optimiser.clip = 1.0", "config field 'optimiser' is unknown; the nearest is 'optimizer'"),
        ("config.betta", "config field 'betta' is unknown; the nearest is 'beta'"),
        ('config.steps = "ten"', "config field 'steps' must be a whole number, such as 0"),
        ("config.mesh = 8", "config field 'mesh' is a group; set one of its fields: context, data, fsdp, member, slices, tensor"),
        ("from alignax import dpo; dpo(betta=1.0)", "TypeError: dpo() got an unexpected keyword argument 'betta'; "
         "dpo() takes (beta=0.1, label_smoothing=0.0"),
    ],
)  # fmt: skip
def test_names_that_are_not_there(tmp_path, code, text):
    assert said(tmp_path, code).startswith(text)


@pytest.mark.parametrize("code", ["batch['tokens'].reshape(5)", "jnp.concatenate([out.logps, jnp.zeros(3)])", "out.values[0]"])
def test_arrays_that_do_not_fit_are_named_with_their_shapes(tmp_path, code):
    text = said(tmp_path, code)
    assert "Error: " in text and ". Arrays there: out (logps float32[2, 2, 3], entropy float32[2, 2, 3], log_sum_sq None" in text
    assert text.endswith("batch (ref_logps float32[2, 2, 3], tokens int32[2, 2, 3])")


OURS = "def run(guard, call):\n    with guard:\n        call()\n"


def test_errors_of_our_own_are_not_blamed_on_a_file_that_they_never_passed(tmp_path):
    file, names = tmp_path / "main.py", {}
    exec(compile(OURS, config.__file__, "exec"), names)  # as if it stood in the package
    ours = functools.partial(token_logps, None)
    with pytest.raises(AttributeError):
        names["run"](blaming(file, always=False), ours)
    file.write_text("def main(call):\n    call()\n    return undefined\n")
    exec(compile(file.read_text(), str(file), "exec"), names)
    with pytest.raises(AttributeError):  # what a main() calls is not its own
        names["run"](blaming(file, own=True), lambda: names["main"](ours))
    with pytest.raises(BadInput, match=r"main\.py, line 3: NameError: name 'undefined'"):
        names["run"](blaming(file, own=True), lambda: names["main"](list))


def test_what_an_experiment_imports_of_its_users_is_blamed_too(tmp_path):
    helper, names = tmp_path / "helper.py", {}
    helper.write_text('def value(out, batch):\n    return batch["reference"], {}\n')
    exec(compile(helper.read_text(), str(helper), "exec"), names)
    loss = make_loss("own", names["value"])
    batch = {"completion_mask": np.ones((2, 1, 3), bool)}
    with pytest.raises(BadInput, match=r"helper\.py, line 2: batch has no field 'reference'; it has completion_mask bool\[2, 1, 3\]"):
        exec(compile(OURS, config.__file__, "exec"), names)
        names["run"](blaming(tmp_path / "mine.py", always=False), functools.partial(loss, None, batch, loss.normalised(batch)))


def test_functions_of_other_arguments_are_refused_where_they_are_given():
    check_call(lambda out, batch, more=1: None, "it", "out", "batch")
    check_call(max, "it", "out", "batch")
    with pytest.raises(ValueError, match=r"the value of loss 'own' takes \(out\); it is called with \(out, batch\)"):
        make_loss("own", lambda out: (out, {}))
    with pytest.raises(ValueError, match=r"over of loss 'own' takes \(out, batch\)"):
        make_loss("own", lambda out, batch: (out, {}), over=lambda out, batch: batch)
    with pytest.raises(ValueError, match=r"function 1 of chain\(\.\.\) is None; it must be a function of \(batch\)"):
        chain(lambda batch: batch, None)
    with pytest.raises(ValueError, match="returns NoneType; an experience function must return the batch"):
        advance(chain(lambda batch: None), {}, {})
    with pytest.raises(TypeError, match="3 is added to the loss dpo"):
        dpo() + 3


def test_metrics_of_another_shape_are_named():
    batch, out = tiny.batch(4), Outputs(jnp.zeros((4, 2, 11)), jnp.zeros((4, 2, 11)))
    loss = make_loss("own", lambda out, batch: (np.zeros(4), {"fine": np.zeros(4), "odd": np.zeros((4, 2))}))
    with pytest.raises(ValueError, match=r"metric 'odd' of loss 'own' has shape \(4, 2\), but the weights have \(4,\)"):
        loss(out, batch, loss.normalised(batch))
    loss = make_loss("own", lambda out, batch: (np.zeros(4), np.zeros(4)))
    with pytest.raises(ValueError, match=r"return \(values, \{metric: values\}\)"):
        loss(out, batch, loss.normalised(batch))
