"""The demo: SFT from scratch, then DPO and RPO on noisy pairs, in a world with a known gold reward. It needs no download.

  DPO: Rafailov et al. 2023, arXiv:2305.18290.  RPO: Liu et al. 2024, arXiv:2405.16436.
  Overoptimisation over sqrt(KL): Gao et al. 2022, arXiv:2210.10760; of DPO: Rafailov et al. 2024, arXiv:2406.02900.

Command, the same as `make demo`:
  alignax train --config experiments/demo.py

Hardware: 2 CPU cores, one process.

The world: a prompt names a topic, and an answer is a list of words. The gold reward counts each word on the topic once. Other words,
repetitions, and words past the seventh cost. Pairs are sampled from the SFT policy, and a quarter of their labels are flipped. This policy
rarely repeats a word (14 % of its answers) or writes more than seven (3 %). The pairs therefore teach much about topics and little about
repetition and length, and a policy can overoptimise. eta is far above the paper's 0.005, because these answers have 6 tokens, not hundreds.

Expected, with seed 0 (2.5 minutes of CPU time): the chosen log-prob falls by 11 nats under DPO and by 0.5 under RPO. Under DPO the gold
reward rises from 0.9 (SFT) to 2.4, then falls to -3.8 at a KL of 16 nats, while the implicit reward keeps rising. Under RPO it ends at
2.4, at a KL below 1. The fall under DPO differs much between seeds.
"""

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

import jax

from alignax import chain, default_config, dpo, logps, paths, rpo, sft
from alignax.cli import commands, comparison
from alignax.config import BadInput
from alignax.generate import Generator, shape_for
from alignax.mesh import make_mesh
from alignax.models import hf

TOPICS = {
    "sea": "waves salt fish ships tide sand whales storms",
    "farm": "cows wheat barn tractor hens hay fences milk",
    "city": "streets towers buses crowds shops lights parks noise",
    "forest": "trees moss owls deer paths leaves wolves shade",
    "kitchen": "oven knives spoons bread soup pepper plates steam",
    "school": "pupils books desks chalk lessons exams maths bells",
    "winter": "snow ice frost gloves sledges scarves icicles blizzards",
    "sky": "stars planets rockets comets moons orbits clouds meteors",
    "music": "songs drums violins rhythm choirs melody pianos notes",
    "garden": "roses bees seeds weeds worms rakes tulips soil",
    "hospital": "nurses doctors beds masks wards surgery bandages medicine",
    "railway": "trains tracks tickets platforms signals tunnels bridges guards",
}
FACTS = {topic: words.split() for topic, words in TOPICS.items()}
PROMPTS = ("tell me about the {}", "what belongs to the {}", "name things of the {}", "what do you know of the {}")
PATIENCE = 7  # most words without a cost, and most words of a demonstration
AT_ONCE = 1024  # answers sampled side by side
STAGES = ("sft", "dpo", "rpo")
EOS, UNKNOWN = "</s>", "<unk>"


def get_config():
    """The config: sizes for two to three minutes on 2 cores."""
    config = default_config()
    config.stage = "all"  # or one of STAGES, a single run
    config.workdir = "runs/demo"
    config.beta = 0.03
    config.eta = 0.4
    config.answers = 12000  # demonstrations
    config.pairs = 8000
    config.held_out = 512
    config.noise = 0.25  # share of the training pairs whose label is flipped
    config.width = 64
    config.sft_steps = 400
    config.sft_learning_rate = 3e-3
    config.steps = 500
    config.batch_size = 64
    config.data.max_length = 48
    config.optimizer.learning_rate = 4e-4
    config.optimizer.schedule = "constant"
    config.model.remat = "none"
    config.eval.every = 25
    config.eval.batch_size = 256
    config.eval.sample_prompts = 512
    config.eval.max_new_tokens = 16
    config.log.every = 50
    return config


def loss(config):
    """The loss of the stage."""
    return {"sft": sft, "dpo": lambda: dpo(config.beta), "rpo": lambda: rpo(config.beta, config.eta)}[config.stage]()


def experience(config, reference):
    """The experience: log-probs of the reference, the SFT policy, for DPO and RPO. SFT needs none."""
    return chain() if config.stage == "sft" else chain(logps("ref_logps", reference))


def gold(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The gold rewards: 1 per word on the topic, -1 per other word or repetition, and -1 more per word past the seventh."""
    return [_gold(prompt.split()[-1], completion.split()) for prompt, completion in zip(prompts, completions, strict=True)]


def _gold(topic: str, words: list[str]) -> float:
    facts = set(words) & set(FACTS[topic])
    return float(2 * len(facts) - len(words) - max(len(words) - PATIENCE, 0))


def main(experiment):
    """Runs all three stages, or the one that `stage` names."""
    config = experiment.config
    if config.stage not in ("all", *STAGES):
        raise BadInput(f"config field 'stage' is {config.stage!r}; use all, {', '.join(STAGES)}")
    if config.stage != "all":
        return commands.run(_experiment(experiment, config.stage))
    work = paths.here(config.workdir, "workdir")
    write_world(work / "world", config)
    commands.run(_experiment(experiment, "sft"))
    write_pairs(work / "world", work / "sft" / "export", config)
    for stage in STAGES[1:]:
        commands.run(_experiment(experiment, stage))
    runs = {stage.upper(): work / stage for stage in STAGES}
    aligned = {name: workdir for name, workdir in runs.items() if name != "SFT"}
    comparison.figure(aligned, work / "overoptimisation.png")
    print(f"\n{comparison.summary_table(runs)}\n\n{comparison.chosen_line(aligned)}")
    print(f"figure {work / 'overoptimisation.png'}; Hugging Face folders {work / 'dpo' / 'export'}, {work / 'rpo' / 'export'}")


def _experiment(experiment, stage: str):
    """The experiment of a single stage."""
    if experiment.config.stage == stage:
        return experiment if stage != "sft" else experiment._replace(experience=None)
    config = experiment.config.copy_and_resolve_references()
    world = paths.here(config.workdir, "workdir") / "world"
    config.stage = stage
    config.data.eval = str(world / "eval.jsonl")
    if stage == "sft":
        config.data.kind = "sft"
        config.data.train = str(world / "answers.jsonl")
        config.data.eval = str(world / "held_out_answers.jsonl")
        config.model.path, config.model.init = str(world / "model"), "random"
        config.steps, config.optimizer.learning_rate = config.sft_steps, config.sft_learning_rate
        config.optimizer.schedule = "cosine"
        config.eval.every = 0
    else:
        config.data.train = str(world / "pairs.jsonl")
        config.model.path = str(paths.here(config.workdir, "workdir") / "sft" / "export")
    config.workdir = str(paths.here(config.workdir, "workdir") / stage)
    return _experiment(experiment._replace(config=config), stage)


def write_world(folder: Path, config) -> None:
    """Writes a model folder without weights, and demonstrations that depend only on the seed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model", config.width)
    rng = random.Random(f"{config.seed} answers")
    for name, count in (("answers", config.answers), ("held_out_answers", config.held_out)):
        prompts = [prompt(rng) for _ in range(count)]
        write_jsonl(folder / f"{name}.jsonl", [{"prompt": p, "chosen": answer(p, rng)} for p in prompts])


def prompt(rng: random.Random) -> str:
    """A random question whose last word is its topic."""
    return rng.choice(PROMPTS).format(rng.choice(list(FACTS)))


def answer(prompt: str, rng: random.Random) -> str:
    """A random answer of 2 to 7 different words, each on the topic with probability 0.65."""
    own = FACTS[prompt.split()[-1]]
    others = [word for facts in FACTS.values() for word in facts if facts is not own]
    length = rng.randint(2, PATIENCE)
    on = sum(rng.random() < 0.65 for _ in range(length))
    return " " + " ".join(sorted(rng.sample(own, on) + rng.sample(others, length - on)))


def write_model(folder: Path, width: int) -> None:
    """Writes a Hugging Face folder of the Llama family without weights: a config and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in (*PROMPTS, *TOPICS, *TOPICS.values()) for word in text.split()} - {"{}"})
    vocabulary = {word: i for i, word in enumerate((EOS, UNKNOWN, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # EOS is the only special token: decoding hides special tokens, and the gold reward must see every word.
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS).save_pretrained(folder)
    description = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(vocabulary), "hidden_size": width,
        "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "head_dim": width // 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": True, "initializer_range": 0.05,
        "bos_token_id": None, "eos_token_id": vocabulary[EOS], "pad_token_id": vocabulary[EOS],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(description, indent=2))
    generation = {"eos_token_id": vocabulary[EOS], "pad_token_id": vocabulary[EOS]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))


def write_pairs(folder: Path, policy: Path, config) -> None:
    """Writes pairs of the SFT policy's answers, labelled by the gold reward. Ties are left out; training labels are noisy."""
    if (folder / "eval.jsonl").is_file():
        return
    rng = random.Random(f"{config.seed} pairs")
    wanted = config.pairs + config.held_out
    prompts = [prompt(rng) for _ in range(wanted * 3 // 2)]
    rows = []
    for p, two in zip(prompts, sample(policy, prompts, config), strict=True):
        a, b = gold([p, p], two)
        if a != b and all(two):
            better, worse = two if a > b else two[::-1]
            rows.append({"prompt": p, "chosen": " " + better, "rejected": " " + worse})
    if len(rows) < wanted:
        raise BadInput(
            f"the gold reward tells apart only {len(rows)} pairs of the policy's answers, but {wanted} are needed; train SFT longer"
        )
    noisy = [flipped(row) if rng.random() < config.noise else row for row in rows[: config.pairs]]
    write_jsonl(folder / "pairs.jsonl", noisy)
    write_jsonl(folder / "eval.jsonl", rows[config.pairs : wanted])


def flipped(row: dict[str, str]) -> dict[str, str]:
    """The pair with chosen and rejected swapped."""
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


def sample(policy: Path, prompts: list[str], config) -> list[list[str]]:
    """Two completions of each prompt, sampled at temperature 1."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(policy), local_files_only=True, trust_remote_code=False)
    source = hf.open_folder(policy)
    mesh = make_mesh(config.mesh)
    params = hf.load_params(source, mesh)
    ids = tokenizer(prompts)["input_ids"]
    shape = shape_for(2 * len(ids), max(map(len, ids)), config.eval.max_new_tokens, mesh=mesh, slots=AT_ONCE)
    generate = Generator(source.config, shape, stop_ids=hf.end_ids(source, tokenizer), mesh=mesh)
    completions = generate(params, ids, jax.random.key(config.seed), n=2)
    return [[tokenizer.decode(t, skip_special_tokens=True) for t in two] for two in completions.rows()]


def write_jsonl(file: Path, rows: list[dict[str, str]]) -> None:
    """Writes rows as JSONL; the file appears whole."""
    tmp = file.with_suffix(".tmp")
    tmp.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(tmp, file)
