"""Adapters of every family: PEFT's logits, folders in and out, merging, and that they alone are trained."""

import copy
import dataclasses
import json
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import runs
import safetensors.numpy
import tiny
import torch
import torch_llama
from test_models_families import ROWS, T, logits_of

from alignax.losses import dpo
from alignax.mesh import make_mesh
from alignax.models import adapter_config, hf, lora, parameters
from alignax.models.lora import Lora, column_norms, find_targets, join, merge, modules, quantise, split
from alignax.models.peft import Adapted, read_adapter, write_adapter
from alignax.models.tokenizers import check_tokenizer, load_tokenizer
from alignax.models.transformer import forward
from alignax.rewards.ensembles import ensemble_model, load_members, open_ensemble
from alignax.run import roles
from alignax.run.opening import notices

FAMILY = {row: row.split(",")[0] for row in ROWS if "," not in row} | {"llama": "llama"}
VARIANT = {"gpt2": {"use_rslora": True}, "gpt_neox": {"use_dora": True}, "qwen3": {"use_dora": True}, "gemma2": {"use_rslora": True}}
MODULES = {
    "gpt2": ["c_attn", "attn.c_proj", "c_fc"], "gpt_neox": ["query_key_value", "dense_4h_to_h"], "phi3": ["qkv_proj", "gate_up_proj"],
    "qwen3_moe": ["q_proj", "o_proj"], "mixtral": ["k_proj", "v_proj"],
}  # fmt: skip
ONE = make_mesh({}, jax.devices()[:1])


def adapted(folder: Path, row: str):
    """A random tiny model under a random adapter of PEFT's, both saved; returns the model."""
    changes = {"model_type": FAMILY[row]} | ROWS.get(row, {"tie_word_embeddings": False})
    torch_llama.write(folder / "base", **changes)
    model = torch_llama.transformers.AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    names = MODULES.get(row, ["q_proj", "v_proj", "up_proj", "down_proj"])
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=names, task_type="CAUSAL_LM", fan_in_fan_out=row == "gpt2", **VARIANT.get(row, {})
    )
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                p.copy_(0.3 * torch.randn_like(p))
            elif "magnitude" in name:
                p.mul_(1 + 0.3 * torch.rand_like(p))
    model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.filterwarnings("ignore")  # of torch, about PEFT
@pytest.mark.parametrize("row", runs.by_turn(FAMILY, ("llama",), ("gpt2", "gpt_neox", "phi3")))
def test_peft_folders_in_and_out(row, tmp_path):
    model = adapted(tmp_path, row)
    source = hf.open_folder(tmp_path / "base")
    base = hf.load_params(source, ONE)
    spec, adapters = read_adapter(tmp_path / "adapter", source, ONE)
    tokens, mask = torch_llama.rows([T, 13], T)
    config = dataclasses.replace(source.config, lora=spec)
    ours = np.asarray(logits_of(config)(join(base, adapters), tokens, mask))
    theirs = torch_llama.torch_logits(model, tokens, mask)  # type: ignore[arg-type]
    plain = np.asarray(logits_of(source.config)(base, tokens, mask))
    assert np.abs(theirs - plain)[mask].max() > 0.1, "the adapter does something"
    np.testing.assert_allclose(ours[mask], theirs[mask], atol=1e-4, rtol=0)

    merged = merge(spec, base, adapters)
    np.testing.assert_allclose(logits_of(source.config)(merged, tokens, mask)[mask], theirs[mask], atol=1e-4, rtol=0)

    write_adapter(adapters, spec, source, str(tmp_path / "base"), tmp_path / "out")
    fresh = torch_llama.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    again = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "out")).eval()
    np.testing.assert_allclose(torch_llama.torch_logits(again, tokens, mask)[mask], theirs[mask], atol=1e-4, rtol=0)  # type: ignore[arg-type]

    spec, adapters = read_adapter(tmp_path / "out", source, ONE)
    config = dataclasses.replace(source.config, lora=spec)
    np.testing.assert_allclose(logits_of(config)(join(base, adapters), tokens, mask)[mask], theirs[mask], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random tiny model, its folder, and its parameters."""
    folder = tmp_path_factory.mktemp("base")
    model = torch_llama.write(folder, tie_word_embeddings=False)
    source = hf.open_folder(folder)
    return model, source, hf.load_params(source, ONE)


Q, V, UP = "self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"


@pytest.mark.filterwarnings("ignore")  # of PEFT, about its own options
@pytest.mark.parametrize(
    "options",
    [
        {"alpha_pattern": {f"layers.0.{Q}": 64}},
        {"alpha_pattern": {"q_proj": 7, f"model.layers.1.{Q}": 64}},  # the first that matches
        {"rank_pattern": {"[qk]_proj": 2, r"^model\.layers\.1\..*": 6}, "alpha_pattern": {f"layers.1.{V}": 3}, "use_rslora": True},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 9}, "use_dora": True},
        {"layers_to_transform": [1], "rank_pattern": {"v_proj": 2}, "use_dora": True},
        {"target_modules": [f"model.layers.0.{Q}", f"layers.1.{UP}"], "use_dora": True},
        {"target_modules": r".*layers\.1.*\.(q|up)_proj"},
        {"target_modules": [f"model.layers.0.{Q}", f"layers.1.{UP}"]},
        {"target_modules": ["q_proj", f"model.layers.0.{UP}"], "layers_to_transform": 1},  # a whole name is taken all the same
        {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
        {"target_modules": "all-linear", "exclude_modules": [f"layers.0.{V}", "down_proj"]},
        {"exclude_modules": r".*\.0\..*"},
        {"target_modules": ["q_proj", "c_attn"]},  # of another family, which PEFT passes over
        {"init_lora_weights": "gaussian", "loftq_config": {"loftq_bits": 4}},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica", "lora_dropout": 0.5},
        {"init_lora_weights": False, "fan_in_fan_out": True},
    ],
    ids=lambda x: "-".join(x),
)
def test_options_mean_what_peft_makes_of_them(options, base, tmp_path):
    model, source, params = base
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                p.copy_(0.3 * torch.randn_like(p))
            elif "magnitude" in name:
                p.mul_(1 + 0.3 * torch.rand_like(p))
    theirs.save_pretrained(tmp_path / "adapter")
    spec, adapters = read_adapter(tmp_path / "adapter", source, ONE)
    write_adapter(adapters, spec, source, str(source.path), tmp_path / "again")
    ours, changed = merge(spec, params, adapters)["layers"], 0
    for name in ("adapter", "again"):  # as PEFT reads what it saved: it sorts the patterns as it saves
        merged = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / name)).merge_and_unload()
        state = merged.state_dict()
        for leaf, module in Adapted(source).names.items():
            for i in range(2):
                expected = state[f"{module.format(i)}.weight"].numpy().T
                np.testing.assert_allclose(ours[leaf][i], expected, atol=1e-5, rtol=1e-5)
                changed += np.abs(expected - params["layers"][leaf][i]).max() > 0.1
    assert changed >= 2, "the adapter does something"


def test_every_field_of_pefts_config_is_read_harmless_or_refused():
    """Fields that a later version of PEFT adds are met here first; a folder with one that is set is refused."""
    known = {*adapter_config.KINDS, *adapter_config.HARMLESS}
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} - known == {
        "megatron_config", "trainable_token_indices", "velora_config", "alora_invocation_tokens", "use_qalora", "monteclora_config",
        "layer_replication", "lora_bias", "target_parameters", "use_bdlora", "arrow_config", "kasa_config",
    }  # fmt: skip


WHOLE_NAMES = [f"model.layers.{i}.{name}" for i in range(2) for name in (Q, V, UP)]


@pytest.mark.parametrize(
    "pattern",
    [
        r".*layers\.1.*\.(q|up)_proj", r"^model\.layers\.(0|1)\.self_attn\.[qk]_proj$", r"(?:.*\.)*v_proj", r"q_proj",
        r"^(?!.*layers\.0).*(?:q|v)_proj", r"(?i).*Q_PROJ", r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.layers\.\d+\.mlp\..*)",
    ],
)  # fmt: skip
def test_regular_expressions_match_as_pefts_do(pattern):
    found = [adapter_config._whole(pattern, "target_modules", Path("a.json"))(m) for m in WHOLE_NAMES]
    assert found == [bool(re.fullmatch(pattern, m)) for m in WHOLE_NAMES]


def test_a_regular_expression_that_goes_back_for_ever(monkeypatch):
    monkeypatch.setattr(adapter_config, "SECONDS", 0.05)
    file = Path("a.json")
    for pattern in (r"(?=m)([a-z._0-9]+)+!", r".*" * 13 + "!", r"(?:.?){40}!", r"(?:.|.|a)" * 25 + "!"):
        for config in (
            {"target_modules": pattern},
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": pattern},
        ):
            with pytest.raises(ValueError, match=r"a.json has a regular expression that takes over 0.05 s .* write their names plainly"):
                adapter_config.in_time(lambda c=config: adapter_config.chosen(c, WHOLE_NAMES, [], file), file)
    assert adapter_config.in_time(lambda: 3, file) == 3 and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    with pytest.raises(ValueError, match="regular expression of 20,001 characters; at most 20,000 are read"):
        adapter_config._whole("a" * 20_001, "target_modules", file)


@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_an_adapter_of_a_reward_model_as_peft_saves_it(tmp_path):
    config = torch_llama.transformers.LlamaConfig(**tiny.CONFIG | {"architectures": None, "num_labels": 1})
    model = torch_llama.transformers.LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear")
    model = peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path / "adapter")
    assert "classifier" in json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"]
    _, adapters = read_adapter(tmp_path / "adapter", hf.open_folder(tmp_path / "base"), ONE)
    score = model.base_model.model.score.modules_to_save["default"].weight
    np.testing.assert_array_equal(adapters["score"], score.detach().numpy().T)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_dora_of_some_layers_is_trained_there_alone(base, tmp_path):
    model, source, params = base
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], use_dora=True, task_type="CAUSAL_LM")
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    spec, adapters = read_adapter(tmp_path, source, ONE)
    tokens, mask = torch_llama.rows([T, 13], T)
    logits = logits_of(dataclasses.replace(source.config, lora=spec))
    np.testing.assert_allclose(logits(join(params, adapters), tokens, mask), logits_of(source.config)(params, tokens, mask), atol=1e-5)
    slopes = jax.grad(lambda own: (logits(join(params, own), tokens, mask) ** 2).sum())(adapters)["layers"]
    for leaf in ("q_lora_a", "q_lora_b", "q_lora_m"):
        assert not slopes[leaf][0].any(), f"{leaf} of a layer that is not adapted"
    assert slopes["q_lora_m"][1].all() and slopes["q_lora_b"][1].any()


@pytest.mark.filterwarnings("ignore")  # of PEFT
@pytest.mark.parametrize("tied", runs.by_turn([True, False], [], [False]))
def test_a_reward_model_of_adapters_over_a_language_model(tied, tmp_path):
    """TRL's RewardTrainer saves such a folder: the head in modules_to_save, the base as published."""
    tiny.folder(tmp_path / "base", tie_word_embeddings=tied)
    model = torch_llama.transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1, pad_token_id=0)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], modules_to_save=["score"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    load_tokenizer(tmp_path / "base", 96).save_pretrained(tmp_path / "adapter")
    (source,) = open_ensemble([tmp_path / "adapter"])
    params = load_members([source], ONE)
    tokens = torch_llama.rows([T, T], T)[0]
    with torch.no_grad():
        theirs = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    batch = {"tokens": tokens[:, None], "mask": np.ones((2, 1, T), bool), "completion_mask": np.ones((2, 1, T), bool)}
    rated = ensemble_model(source.config, params, ONE)
    np.testing.assert_allclose(rated.apply(params, batch).scores[:, 0], theirs, atol=1e-5)

    with pytest.raises(
        ValueError, match=r"is of a reward model \(task_type 'SEQ_CLS', modules_to_save .*'score'.*is a language model; give"
    ):
        read_adapter(tmp_path / "adapter", hf.open_folder(tmp_path / "base"), ONE)
    with pytest.raises(ValueError, match=r"holds adapters and no model; .* those of a reward model can be a reward\.path"):
        hf.open_folder(tmp_path / "adapter")
    (tmp_path / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ValueError, match="the chat template in .*adapter' is not that of its base"):
        open_ensemble([tmp_path / "adapter"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "org/name"}))
    with pytest.raises(ValueError, match="names the base 'org/name', which is no folder here; write the path of the base there"):
        open_ensemble([tmp_path / "adapter"])


def test_adapters_of_a_language_model_are_no_reward_model(plain):
    with pytest.raises(ValueError, match="holds adapters of a language model, without base_model.model.score.weight"):
        open_ensemble([plain])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("model") / "base")


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_fresh_adapters_are_the_base_and_only_they_have_a_gradient(dora, folder):
    source = hf.open_folder(folder)
    base = hf.load_params(source, ONE)
    spec = Lora(2, 4.0, ("q", "v", "down"), dora=dora)
    adapters = parameters.init_adapters(source.config, spec, ONE, base, jax.random.key(0))
    assert {n.split("_lora_")[0] for n in adapters["layers"]} == {"q", "v", "down"}
    apply = forward(dataclasses.replace(source.config, lora=spec))
    batch = tiny.batch()
    plain = forward(source.config)(base, batch).logps
    np.testing.assert_allclose(apply(join(base, adapters), batch).logps, plain, atol=2e-6)
    batch |= {"ref_logps": plain}
    value = lambda a: dpo()(out := apply(join(base, a), batch), batch, dpo().normalised(batch))[0] + 0 * out.entropy.sum()
    grads = jax.grad(value)(adapters)["layers"]
    assert all(np.abs(grads[f"{n}_lora_b"]).max() > 0 for n in ("q", "v", "down"))
    assert np.abs(grads["q_lora_a"]).max() == 0, "B is 0 at first, so A has no gradient yet"
    if dora:
        norms = column_norms(base["layers"]["q"], adapters["layers"]["q_lora_a"], adapters["layers"]["q_lora_b"], spec.scale)
        np.testing.assert_array_equal(adapters["layers"]["q_lora_m"], norms)
        assert np.abs(grads["q_lora_m"]).max() > 0


@pytest.mark.slow
def test_sharded_adapters_are_the_unsharded_ones(folder):
    source, spec, batch = hf.open_folder(folder), Lora(2, 4.0, ("q", "o", "up", "down"), dora=True), tiny.batch()
    out = []
    for mesh in (ONE, make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        base = hf.load_params(source, mesh)
        adapters = parameters.init_adapters(source.config, spec, mesh, base, jax.random.key(0))
        adapters = jax.tree.map(lambda x: x + 0.1, adapters)
        apply = jax.jit(forward(dataclasses.replace(source.config, lora=spec), mesh=mesh))
        out.append(apply(join(base, adapters), batch).logps)
    np.testing.assert_allclose(out[0], out[1], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_an_int8_base_is_the_base_to_the_rounding_of_its_weights(dora, folder):
    source, batch = hf.open_folder(folder), tiny.batch()
    base = hf.load_params(source, ONE)
    spec = Lora(2, 4.0, ("q", "down"), dora=dora, int8=True)
    stored = quantise(base)
    for n in ("q", "down", "gate"):
        assert stored["layers"][n].dtype == np.int8
        back = stored["layers"][n] * np.expand_dims(stored["layers"][n + "_scale"], 1)
        step = np.abs(base["layers"][n]).max(axis=1, keepdims=True) / 127
        assert (np.abs(back - base["layers"][n]) <= 0.5001 * step).all()
    assert stored["embed"] is base["embed"] and "attention_norm_scale" not in stored["layers"]
    adapters = parameters.init_adapters(source.config, spec, ONE, stored, jax.random.key(0))
    score = lambda config, params: forward(config)(params, batch).logps
    alone = score(dataclasses.replace(source.config, lora=dataclasses.replace(spec, targets=())), stored)
    adapted = score(dataclasses.replace(source.config, lora=spec), join(stored, adapters))
    np.testing.assert_allclose(adapted, alone, atol=1e-5 if dora else 0)  # m over the norm is 1 to rounding
    error = np.abs(alone - score(source.config, base)).max()
    assert 1e-4 < error < 0.2, "logs of probabilities, in nats"


def test_the_experts_of_an_int8_base_stay_what_they_are():
    """Experts are not quantised, and a cast of them to int8 would leave zeros."""
    spec = Lora(2, 4.0, ("q",), int8=True)
    config = dataclasses.replace(tiny.MODEL, num_experts=4, num_experts_per_tok=2, lora=spec)
    role = roles.Role("policy", (), config, jnp.float32, roles.BASE, lambda statistics: forward(config))
    whole = parameters.init_params(dataclasses.replace(config, lora=None), None, jax.random.key(0))
    held = roles.freeze(role, whole)["layers"]
    assert held["q"].dtype == np.int8 and "gate_scale" not in held
    for name in lora.EXPERTS:
        np.testing.assert_array_equal(held[name], whole["layers"][name])
    told = jax.tree.map(lambda x: (x.shape, x.dtype), roles.abstract(role)["layers"])
    assert told == jax.tree.map(lambda x: (x.shape, x.dtype), held)


def test_join_and_split_are_inverse(folder):
    source = hf.open_folder(folder)
    base = hf.load_params(source, ONE)
    adapters = parameters.init_adapters(source.config, Lora(2, 4.0, ("k",)), ONE, base, jax.random.key(0))
    a, b = split(join(base, adapters))
    assert jax.tree.structure((a, b)) == jax.tree.structure((base, adapters))
    assert all(x is y for x, y in zip(jax.tree.leaves((a, b)), jax.tree.leaves((base, adapters)), strict=True))


NAMES = {"q": "l.{}.attn.c_attn", "k": "l.{}.attn.c_attn", "v": "l.{}.attn.c_attn", "o": "l.{}.attn.c_proj", "up": "l.{}.mlp.c_fc"}


@pytest.mark.parametrize(
    "patterns, experts, expected",
    [
        ("all-linear", False, ("q", "k", "v", "o", "up")),
        ("all-linear", True, ("q", "k", "v", "o")),
        ("c_attn", False, ("q", "k", "v")),
        ("q, up", False, ("q", "up")),
        ("c_*", False, ("q", "k", "v", "o", "up")),
    ],
)
def test_patterns_name_matrices(patterns, experts, expected):
    assert find_targets(patterns, NAMES, experts) == expected


@pytest.mark.parametrize("patterns, experts", [("q_proj", False), ("q,", False), ("up", True)])
def test_a_pattern_that_names_nothing(patterns, experts):
    with pytest.raises(ValueError, match=r"lora.targets '.*' names no matrix of this model; use all-linear, or some of q \(c_attn\)"):
        find_targets(patterns, NAMES, experts)


def test_modules_of_a_family(folder):
    source = hf.open_folder(folder)
    leaves = [f"layers.{n}" for n in (*lora.MATRICES, "q_norm")]
    assert modules(dict(source.family.weights), leaves)["q"] == "model.layers.{}.self_attn.q_proj"


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """An adapter folder of rank 2 for q alone."""
    source, spec = hf.open_folder(folder), Lora(2, 4.0, ("q",))
    adapters = parameters.init_adapters(source.config, spec, ONE, hf.load_params(source, ONE), jax.random.key(0))
    out = tmp_path_factory.mktemp("plain") / "adapter"
    write_adapter(adapters, spec, source, str(folder), out)
    return out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only LORA"),
        ({"bias": "all"}, "bias 'all', which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save .'lm_head'., which is not supported"),
        ({"target_modules": ["q_proj", "lm_head"]}, "adapts 'lm_head', which is not supported"),
        ({"target_modules": ".*(q_proj|norm)"}, "adapts 'model.layers.0.input_layernorm', which is not supported; merge that"),
        ({"target_modules": 3}, "target_modules 3; it must be names of modules, a regular expression, or all-linear"),
        ({"target_modules": "(q_proj"}, "target_modules with a regular expression that cannot be read .*; correct it"),
        ({"target_modules": ["c_attn"]}, r"adapts nothing of this model: target_modules \['c_attn'\] match no module; check that"),
        ({"exclude_modules": ["q_proj"]}, "adapts nothing"),
        ({"layers_to_transform": [5]}, "adapts nothing"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "layers_to_transform beside target_modules '.*q_proj'"),
        ({"layers_to_transform": [0]}, r"has 2 tensors that its config does not describe, '.*layers\.1\.self_attn\.q_proj"),
        ({"alpha_pattern": {"layers.7.self_attn.q_proj": 3}}, "alpha_pattern for 'layers.7.self_attn.q_proj', which matches no adapted"),
        ({"rank_pattern": {"q_pro": 3}}, "rank_pattern for 'q_pro', which matches no adapted module"),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 1e-20}}, "float32 cannot hold both"),
        *[
            ({"init_lora_weights": name}, f"init_lora_weights '{name}', which changes the base .*; convert it to plain LoRA first")
            for name in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga")
        ],
        *[
            ({name: value}, f"has {name} .*, which is not supported; merge that adapter with peft first")
            for name, value in {
                "megatron_config": {"a": 1},
                "trainable_token_indices": [1],
                "velora_config": {"scale": 1.0},
                "alora_invocation_tokens": [5],
                "use_qalora": True,
                "monteclora_config": {"num_samples": 2},
                "layer_replication": [[0, 2]],
                "lora_bias": True,
                "target_parameters": ["experts.down_proj"],
                "use_bdlora": {"nblocks": 2},
                "arrow_config": {"top_k": 1},
                "kasa_config": {"beta": 1.0},
                "a_field_of_tomorrow": 1,
                "bias": "lora_only",
            }.items()
        ],
        ({"target_modules": ["q_proj", "k_proj"]}, "lacks base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"),
        ({"target_modules": []}, "adapts nothing"),
        ({"r": 0}, "has r 0; it must be a whole number above 0"),
        ({"r": 3}, r"lora_A.weight in .* has shape \(2, 32\), not \(3, 32\); check that the adapter belongs to"),
        ({"lora_alpha": None}, "has lora_alpha None; it must be a number above 0"),
        ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern .'q_proj': '2'.; it must be whole numbers by module"),
        ({"use_dora": "no"}, "use_dora 'no'; it must be true or false"),
    ],
)
def test_adapter_folders_that_are_refused(change, message, folder, plain, tmp_path):
    source, file = hf.open_folder(folder), shutil.copytree(plain, tmp_path / "out") / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path / "out", source, ONE)


def test_a_tokenizer_beside_adapters_is_the_bases(folder, tmp_path):
    """TRL and axolotl save a tokenizer beside adapters."""
    source, tokenizer = hf.open_folder(folder), load_tokenizer(folder, 96)
    models = {"policy": SimpleNamespace(source=source)}, tokenizer
    assert not notices(*models, str(tmp_path))  # no tokenizer
    tokenizer.save_pretrained(tmp_path)
    check_tokenizer(tmp_path, 96, "lora.path 'x'", source, tokenizer)
    with pytest.raises(ValueError, match=r"x has another tokenizer .*its id 90 is no token, not 'v'"):
        check_tokenizer(tmp_path, 90, "x", source, tokenizer)
    assert not notices(*models, str(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": "<unk>"}))
    template, end = notices(*models, str(tmp_path))
    assert "the chat template in lora.path" in template and "copy their chat_template.jinja into that folder" in template
    assert "ends texts with '<unk>'" in end and "which the run uses, ends them with '</s>'" in end
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"a":', '"ä":'))
    with pytest.raises(ValueError, match=r"lora.path 'x' has another tokenizer than the policy: its id 69 is 'ä', not 'a'"):
        check_tokenizer(tmp_path, 96, "lora.path 'x'", source, tokenizer)


def test_an_adapter_of_another_base(folder, tmp_path):
    source = hf.open_folder(folder)
    spec = Lora(2, 4.0, ("q", "k"))
    adapters = parameters.init_adapters(source.config, spec, ONE, hf.load_params(source, ONE), jax.random.key(0))
    write_adapter(adapters, spec, source, str(folder), tmp_path / "out")
    other = source._replace(config=dataclasses.replace(source.config, num_key_value_heads=source.config.num_attention_heads))
    with pytest.raises(ValueError, match=r"k_proj\.lora_B\.weight in .* has shape \(16, 2\), not \(32, 2\); check that the adapter"):
        read_adapter(tmp_path / "out", other, ONE)
    deeper = source._replace(config=dataclasses.replace(source.config, num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"lacks base_model\.model\.model\.layers\.2\."):
        read_adapter(tmp_path / "out", deeper, ONE)
    file = tmp_path / "out" / "adapter_model.safetensors"
    named = {name.replace(".weight", ".default.weight"): x for name, x in safetensors.numpy.load_file(file).items()}
    safetensors.numpy.save_file(named, file)
    (tmp_path / "out" / "alignax.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"lora_A\.weight and holds 'base_model.*lora_A\.default\.weight'; check that it is of this model"):
        read_adapter(tmp_path / "out", source, ONE)


def test_damaged_adapter_files(folder, tmp_path):
    source = hf.open_folder(folder)
    spec = Lora(2, 4.0, ("q",))
    adapters = parameters.init_adapters(source.config, spec, ONE, hf.load_params(source, ONE), jax.random.key(0))
    out = tmp_path / "out"
    write_adapter(adapters, spec, source, str(folder), out)
    weights = (out / "adapter_model.safetensors").read_bytes()
    (out / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="is damaged or cut short"):
        read_adapter(out, source, ONE)
    (out / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a JSON object|peft_type None"):
        read_adapter(out, source, ONE)
    (out / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
    (out / "adapter_model.safetensors").rename(out / "adapter_model.bin")
    with pytest.raises(ValueError, match="weights as adapter_model.bin, a format that can run code; .*save it as adapter_model"):
        read_adapter(out, source, ONE)
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        read_adapter(folder, source, ONE)
    with pytest.raises(ValueError, match="exists and is not an adapter folder"):
        write_adapter(adapters, spec, source, str(folder), folder)
