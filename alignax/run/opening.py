"""Opens and checks the model folders that a config names, and gives each model its role in the run; no weight is read."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from alignax import paths
from alignax.config import HEAD, Experiment, asked, trunk_values
from alignax.data.mixture import sources
from alignax.generate import policy_config
from alignax.host.functions import models_asked
from alignax.models import hf, lora, peft, transformer
from alignax.models.lora import Lora
from alignax.models.reward import CRITIC
from alignax.models.small_files import chat_template, small_files, tokenizer_parts
from alignax.models.tokenizers import check_token, check_tokenizer, load_tokenizer
from alignax.rewards.ensembles import check_one_score, ensemble_apply, open_ensemble
from alignax.run.checks import check_head, check_members, check_token_kl
from alignax.run.roles import BASE, ENSEMBLE, GOLD, POLICY, REFERENCE, STORED, TRAINED, Role, attention, make_giving, scores_alone
from alignax.text import short
from alignax.types import Batch, Outputs, Params


class Vocabulary(NamedTuple):
    """The tokens of a run: the tokenizer, and the token ids with a special use."""

    tokenizer: Any  # the policy's
    ends: tuple[int, ...]  # token ids that end a completion, see `hf.end_ids`
    unused: tuple[tuple[int, int], ...]  # ranges of token ids that are never sampled, see `hf.with_vocabulary`


def open_models(experiment: Experiment, mesh: Mesh) -> tuple[dict[str, Role], Vocabulary]:
    """Opens the model folders of a run, and refuses models that do not go together.

    Returns:
      The roles by name, and the policy's vocabulary. The names are "policy"; "base" if the policy has adapters; and, if the run has such
      models, "reference", "critic", "ensemble" and the names of `config.models`.
    """
    config, asks = experiment.config, (*tokenwise(experiment), *models_asked(experiment))
    source = open_model(config.model.path, config.model.init, "model.path")
    source = hf.with_heads(source, config.model.num_labels, trunk_values(config), config.model.language_head)
    check_head(config, source, experiment)
    check_members(config, mesh)
    tokenizer = load_tokenizer(source.path, source.config.vocab_size)
    if source.config.num_labels:  # the config of an export names its pad token
        check_token("pad token", source.path, tokenizer.pad_token_id, source.config.vocab_size)
    words = Vocabulary(tokenizer, hf.end_ids(source, tokenizer), hf.with_vocabulary(source, tokenizer).config.unused_tokens)
    source = spoken(config, source, words.unused)
    reference = open_reference(config, source, words) if "reference" in asks else None
    if config.reference.path and reference is None:
        raise ValueError(
            "reference.path is set, but nothing asks for a reference; let experience(..) or reward(..) ask for reference, or leave the "
            "path empty"
        )
    if config.reference.token_kl:
        check_token_kl(source, reference)
    adapters = make_lora(config, source)
    if config.lora.path:
        peft.weights(paths.of(config.lora.path))
        if tokenizer_parts(paths.of(config.lora.path))[:-2]:
            check_tokenizer(paths.of(config.lora.path), source.config.vocab_size, f"lora.path {config.lora.path!r}", source, tokenizer)
    dtype = compute_dtype(config, mesh)
    roles = trained_roles(config, source, adapters, dtype, mesh)
    if CRITIC in roles:
        critic = roles[CRITIC].source
        check_tokenizer(critic.path, critic.config.vocab_size, f"model.critic {config.model.critic!r}", source, tokenizer)
    judges = open_judges(config) if "ensemble" in asks else []
    if config.reward.path and not judges:
        raise ValueError(
            "reward.path is set, but nothing asks for a reward model; let experience(..) or reward(..) ask for ensemble, or leave the path "
            "empty"
        )
    if adapters is not None:
        bare = dataclasses.replace(roles[POLICY].config, critic_heads=0)
        roles[BASE] = roles[POLICY]._replace(name=BASE, tree=BASE, config=bare, members=0)
    if reference is not None:
        roles[REFERENCE] = reference_role(experiment, reference, roles, mesh)
    if judges:
        roles[ENSEMBLE] = scoring_role(config, ENSEMBLE, judges, dtype, mesh)
    others = open_others(experiment, roles[POLICY], words, mesh)
    if GOLD in others:
        check_gold(experiment, others[GOLD], roles[POLICY])
    return roles | others, words


def tokenwise(experiment: Experiment) -> tuple[str, ...]:
    """The parameters of experience, loss and speaker of an experiment: models among them read the policy's own tokens."""
    return (*asked(experiment.experience), *asked(experiment.loss)[1:], *asked(experiment.speaker))


def check_gold(experiment: Experiment, gold: Role, policy: Role) -> None:
    """Refuses a gold model that is no reward model, that has no samples to score, or that stands beside a function `gold(..)`."""
    c, file = experiment.config, experiment.file
    if not gold.members:
        raise ValueError(f"models.gold.path {str(gold.source.path)!r} is a language model; give a reward model, which scores samples")
    if experiment.gold is not None:
        raise ValueError(f"models.gold.path is set, and {file} has a gold(); leave one of them out")
    if policy.source.config.num_labels or not (c.rollout.samples or max(c.eval.samples, c.eval.sample_prompts)):
        raise ValueError(
            "models.gold.path is set, but the run samples nothing that the gold model could score; set eval.sample_prompts, to 64 say"
        )


def trained_roles(config: Any, source: hf.Source, adapters: Lora | None, dtype: Any, mesh: Mesh) -> dict[str, Role]:
    """The roles that are trained: the policy, and a critic with parameters of its own if `model.critic` names a folder."""
    model = dataclasses.replace(source.config, lora=adapters)
    giving = make_giving(model, config, dtype, mesh)
    policy = Role(POLICY, (source,), model, dtype, TRAINED, giving, config.model.init, members=config.ensemble.members)
    critic = open_critic(config)
    return {POLICY: policy} if critic is None else {POLICY: policy, CRITIC: critic_role(config, critic, dtype, mesh)}


def reference_role(experiment: Experiment, source: hf.Source, roles: Mapping[str, Role], mesh: Mesh) -> Role:
    """The role of the reference: the base of the policy's adapters if it has some, unless `reference.path` names another model."""
    config, policy, own = experiment.config, roles[POLICY], source is not roles[POLICY].source
    shared = policy.lora is not None and not own
    bare = dataclasses.replace(policy.lora, targets=()) if policy.lora is not None and shared else None
    language = {"num_labels": 0, "language_head": False} if source.config.language_head else {}  # a reward model: its language model
    model = dataclasses.replace(source.config, lora=bare, critic_heads=0, **language)
    # The policy's own forward pass if possible, so that equal parameters give equal numbers.
    giving = policy.giving if model == policy.config else make_giving(model, config, policy.dtype, mesh)
    tree = BASE if shared else REFERENCE
    return Role(REFERENCE, (source,), model, policy.dtype, tree, giving, "pretrained" if own else policy.init)


def without_idle_reference(experiment: Experiment, roles: dict[str, Role]) -> dict[str, Role]:
    """The roles of a run with stored log-probs: it holds the reference only for evaluations that score, make or compare samples with it."""
    c, role = experiment.config.eval, roles[REFERENCE]
    needed = REFERENCE in (*models_asked(experiment), *asked(experiment.speaker)) or (c.temperature > 0 and c.top_p == 1)
    if role.tree == BASE or (needed and max(c.samples, c.sample_prompts)):
        return roles
    return roles | {REFERENCE: role._replace(tree=STORED)}


def critic_role(config: Any, source: hf.Source, dtype: Any, mesh: Mesh) -> Role:
    """The role of a critic with parameters of its own: a reward model that gives a value before every token, trained beside the policy."""
    options: Any = {"dtype": dtype, "remat": config.model.remat, "mesh": mesh, "attention": attention(config, mesh)[0]}
    values = transformer.critic(source.config, **options)
    apply = lambda params, batch: Outputs(None, None, values=values(params, batch))  # pyright: ignore[reportArgumentType]
    return Role(CRITIC, (source,), source.config, dtype, TRAINED, scores_alone(apply))


def scoring_role(config: Any, name: str, sources: Iterable[hf.Source], dtype: Any, mesh: Mesh) -> Role:
    """The role of frozen reward models, with scores [B, N, K]: K members of an ensemble, or one model with K labels."""
    sources = tuple(sources)
    each = ensemble_apply(sources[0].config, mesh, dtype, name, attention(config, mesh)[0])
    several = sources[0].config.num_labels > 1  # one model, whose K labels are its scores

    def apply(params: Params, batch: Batch) -> Outputs:
        out = each(params, batch)
        return out._replace(scores=out.scores[..., 0]) if several and out.scores is not None else out

    return Role(name, sources, sources[0].config, dtype, name, scores_alone(apply), members=len(sources))


def spoken(config: Any, source: hf.Source, unused: tuple[tuple[int, int], ...]) -> hf.Source:
    """The model `source` with the distribution that rollouts are sampled from: their temperature, without the `unused` tokens.

    Without rollouts the model is unchanged: its distribution covers all rows of its head, as in transformers.
    """
    if not config.rollout.samples:
        return source
    return source._replace(config=policy_config(source.config, config.rollout.temperature, unused))


def open_reference(config: Any, source: hf.Source, words: Vocabulary) -> hf.Source:
    """The model of the reference: that of `reference.path`, or by default the one that the policy starts from."""
    if not config.reference.path:
        return source
    reference = spoken(config, open_model(config.reference.path, "pretrained", "reference.path"), words.unused)
    check_speech(reference, source, words, "reference.path", "the reference")
    return beside(reference, source)


def own_speech(other: hf.Source, source: hf.Source, words: Vocabulary, field: str, what: str) -> str:
    """Why a language model cannot read the policy's tokens, see `check_speech`; the empty text if it can."""
    try:
        check_speech(other, source, words, field, what)
    except ValueError as e:
        return str(e)
    return ""


def check_speech(other: hf.Source, source: hf.Source, words: Vocabulary, field: str, what: str) -> None:
    """Refuses a language model that reads the policy's tokens, but has another tokenizer than the policy; rows of padding may differ."""
    if tokenizer_parts(other.path)[:-2]:
        check_tokenizer(other.path, other.config.vocab_size, f"{field} {str(other.path)!r}", source, words.tokenizer)
    elif other.config.vocab_size != source.config.vocab_size:  # a folder without a tokenizer is accepted by its size
        raise ValueError(
            f"{what} has {other.config.vocab_size} rows in its embedding, the policy has {source.config.vocab_size}, and "
            f"{str(other.path)!r} has no tokenizer that shows whether their tokens are the same; copy the model's tokenizer into it"
        )


def beside(other: hf.Source, source: hf.Source) -> hf.Source:
    """A model that reads the policy's tokens, without the ids in its distribution that lie beyond the policy's head (padding, say)."""
    count = source.config.predicted_tokens or source.config.vocab_size
    if count >= (other.config.predicted_tokens or other.config.vocab_size):
        return other
    return other._replace(config=dataclasses.replace(other.config, predicted_tokens=count))


def open_others(experiment: Experiment, policy: Role, words: Vocabulary, mesh: Mesh) -> dict[str, Role]:
    """The roles of `config.models`: frozen language models and reward models.

    A language model reads the policy's tokens. If it has another tokenizer and only reward functions ask for it, it reads text.

    Raises:
      ValueError: for an unknown field, a model that nothing asks for, and all that is refused for a reference or for reward models.
    """
    config, roles = experiment.config, {}
    for name, given in config.models.items():
        field = f"models.{name}.path"
        if name not in (*tokenwise(experiment), *models_asked(experiment), GOLD):
            raise ValueError(
                f"config field {field!r} is set and nothing asks for that model; let experience(..), loss(..) or reward(..) ask for {name}"
            )
        if unknown := sorted(set(given) - {"path", "adapters"}):
            raise ValueError(f"config field 'models.{name}.{unknown[0]}' is unknown; a model has a path, and may have adapters")
        path, adapters = given.get("path", ""), given.get("adapters", "")
        several = paths_of(path) if "," in path and "@" not in path else [path]
        source = None if len(several) > 1 or peft.is_adapter(paths.of(path)) else open_model(path, "pretrained", field)
        if source is None or source.config.num_labels:
            if adapters:
                raise ValueError(
                    f"models.{name}.adapters is {adapters!r}, and {path!r} is a reward model; give the adapters' folder as {field} itself"
                )
            judges = open_ensemble(several)
            if len(judges) > 1:
                check_one_score(judges[0])
            roles[name] = scoring_role(config, name, judges, policy.dtype, mesh)
            continue
        why, unused = own_speech(source, policy.source, words, field, f"the model {name!r}"), words.unused
        if why and name in tokenwise(experiment):
            raise ValueError(
                f"{why}. experience(..), loss(..) and speaker(..) read the policy's own tokens; let reward(..), gold(..) or metrics(..) "
                f"alone ask for {name}, which then reads text"
            )
        if why:
            unused = hf.with_vocabulary(source, load_tokenizer(source.path, source.config.vocab_size)).config.unused_tokens
        source = spoken(config, source, unused)
        source = source if why else beside(source, policy.source)
        if adapters:
            peft.read_config(paths.of(adapters), source)
            peft.weights(paths.of(adapters))
        giving = make_giving(source.config, config, policy.dtype, mesh)
        roles[name] = Role(name, (source,), source.config, policy.dtype, name, giving, adapters=adapters, reads_text=bool(why))
    return roles


def paths_of(text: str) -> list[str]:
    """The paths in a text that separates them by commas."""
    return [path.strip() for path in text.split(",")]


def open_judges(config: Any) -> list[hf.Source]:
    """The reward models of `reward.path`."""
    if not config.reward.path:
        raise ValueError(
            "the experiment asks for ensemble, but config field 'reward.path' is empty; set --config.reward.path=FOLDER,FOLDER"
        )
    judges = open_ensemble(paths_of(config.reward.path))
    check_one_score(judges[0])
    return judges


def open_critic(config: Any) -> hf.Source | None:
    """The folder that `model.critic` names, as a reward model with `model.critic_heads` scores; None if it names no folder."""
    c = config.model
    return None if c.critic in ("", HEAD) else hf.with_heads(open_model(c.critic, "pretrained", "model.critic"), c.critic_heads)


def compute_dtype(config: Any, mesh: Mesh) -> Any:
    """The dtype of activations: that of the config, or for "auto" float32 on CPU and bfloat16 elsewhere."""
    auto = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    return jnp.dtype(auto if config.model.dtype == "auto" else config.model.dtype)


def open_model(path: str, init: str, field: str) -> hf.Source:
    """Opens a model folder, or a soup of several, and checks its tensors against its config."""
    if not path:
        raise ValueError(f"config field {field!r} is empty; set --config.{field}=FOLDER, a Hugging Face model folder")
    if init not in ("pretrained", "random"):
        raise ValueError(f"model.init {init!r} is unknown; use pretrained or random")
    source = open_source(path, field)
    hf.stop_ids(source)  # refuses an id that is no token
    small_files(source.path)
    if init == "pretrained":
        for part, _ in hf.ingredients(source):
            hf.check_tensors(part, hf.tensor_files(part))
    elif source.soup:
        raise ValueError(f"{field} {path!r} is a mean of weights, but model.init 'random' reads no weights; name one folder")
    return source


def open_source(text: str, field: str) -> hf.Source:
    """Opens the folder that a config field names, or the soup of several, `FOLDER@0.5,OTHER@0.5`. The weights stay on disk."""
    named = sources(text, field)
    if all(share is not None for _, share in named):
        return hf.make_soup([(hf.open_folder(path), share) for path, share in named if share is not None])
    if len(named) > 1:
        raise ValueError(f"{field} {text!r} names several models; give each its share of the mean, as in FOLDER@0.5,OTHER@0.5")
    return hf.open_folder(text)


def make_lora(config: Any, source: hf.Source) -> Lora | None:
    """The adapters that a config asks for, with patterns resolved to matrices of the model; None if it asks for none."""
    c = config.lora
    if c.path:
        given = peft.read_config(paths.of(c.path), source)[0]
        if c.rank not in (0, given.rank):
            raise ValueError(f"lora.rank is {c.rank}, but the adapters in lora.path {c.path!r} have rank {given.rank}; set lora.rank to 0")
        return dataclasses.replace(given, int8=c.int8)
    lora.check(c)
    if config.model.freeze:
        if c.rank or not source.config.num_labels:
            raise ValueError("model.freeze trains a reward model's head alone; set model.num_labels to 1 and lora.rank to 0")
        return Lora(1, 1.0, ())
    if not c.rank:
        return None
    if config.model.init != "pretrained":
        raise ValueError(
            f"lora.rank {c.rank} adapts trained weights, but model.init is {config.model.init!r}; set model.init=pretrained, or lora.rank=0"
        )
    targets = lora.find_targets(c.targets, peft.Adapted(source).names, source.config.num_experts > 0)
    return Lora(c.rank, c.alpha, targets, c.rslora, c.dora, c.int8)


def notices(roles: Mapping[str, Role], tokenizer: Any, adapters: str = "", online: bool = False) -> list[str]:
    """Notices for the user about the models of a run and about the folder `adapters` it continues from; no notice stops the run."""
    source, lines = roles[POLICY].source, []
    if beyond := sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= source.config.vocab_size):
        shown = ", ".join(f"{short(token)} ({i})" for i, token in beyond[:3])
        lines.append(
            f"the tokenizer in {str(source.path)!r} has {len(beyond)} tokens beyond the {source.config.vocab_size} rows of the embedding, "
            f"{shown}{' ..' if beyond[3:] else ''}; texts with these tokens are refused"
        )
    if online and (unread := hf.unread(source)):
        lines.append(
            f"{hf.GENERATION} in {str(source.path)!r} asks for {unread}; alignax does not read this, and samples "
            "rollouts as the config says"
        )
    for field, model in (("model.num_labels", source), *(("model.critic", role.source) for name, role in roles.items() if name == CRITIC)):
        if model.stored.num_labels not in (0, model.config.num_labels):
            lines.append(
                f"the head in {str(model.path)!r} gives {model.stored.num_labels} scores, but {field} asks for {model.config.num_labels}: "
                "this head is left out, and a new one begins untrained"
            )
    if adapters and (theirs := chat_template(paths.of(adapters))) is not None and theirs != chat_template(source.path):
        lines.append(
            f"the chat template in lora.path {adapters!r} differs from the one in {str(source.path)!r}, which the run uses; if the "
            "conversations are to read as in the training of the adapters, copy their chat_template.jinja into that folder"
        )
    if adapters and (end := tokenizer_parts(paths.of(adapters))[-1]) not in (None, tokenizer.eos_token):
        lines.append(
            f"the tokenizer in lora.path {adapters!r} ends texts with {short(end)}, but the one in {str(source.path)!r}, which the run "
            f"uses, ends them with {short(tokenizer.eos_token)}; if texts are to end as in the training of the adapters, set eos_token in "
            "tokenizer_config.json of that folder"
        )
    return lines
