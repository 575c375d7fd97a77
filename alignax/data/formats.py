"""Formats of well-known preference data sets: each function turns a row, as the data set's card describes it, into alignax columns.

The columns are `prompt`, `chosen` and `rejected`: texts, or messages that may contain the prompt. A data set with a strength of
preference has `margin` too, and one of rankings `completions`, best first. A function returns None for a row without a preference.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

Row = dict[str, Any]


def hh_rlhf(row: Mapping) -> Row:
    """Anthropic/hh-rlhf: two transcripts that differ in the last answer of the assistant."""
    mark = "\n\nAssistant:"
    sides = {name: row[name].rpartition(mark) for name in ("chosen", "rejected")}
    prompts = [before + found for before, found, _ in sides.values()]
    if prompts[0] != prompts[1] or not prompts[0]:
        raise ValueError("the transcripts differ before their last answer")
    return {"prompt": prompts[0]} | {name: after for name, (_, _, after) in sides.items()}


def ultrafeedback_binarized(row: Mapping) -> Row | None:
    """HuggingFaceH4/ultrafeedback_binarized: two conversations with the prompt in them, and their scores."""
    pair = {"chosen": row["chosen"], "rejected": row["rejected"], "margin": row["score_chosen"] - row["score_rejected"]}
    return pair if pair["margin"] else None


def helpsteer2(row: Mapping) -> Row | None:
    """nvidia/HelpSteer2, preferences: a strength of -3 says that response 1 is much better, and 3 that response 2 is."""
    return _by_strength(row["prompt"], row["response_1"], row["response_2"], row["preference_strength"])


def helpsteer3(row: Mapping) -> Row | None:
    """nvidia/HelpSteer3: messages and two texts; -3 says that response 1 is much better, and 3 that response 2 is."""
    return _by_strength(row["context"], row["response1"], row["response2"], row["overall_preference"])


def shp(row: Mapping) -> Row:
    """stanfordnlp/SHP: a post and two comments; the label is 1 where A is preferred."""
    return _ordered(row["history"], row["human_ref_A"], row["human_ref_B"], _choice(row["labels"]) == 1)


def pku_saferlhf(row: Mapping) -> Row:
    """PKU-Alignment/PKU-SafeRLHF: the more helpful response is chosen."""
    return _ordered(row["prompt"], row["response_0"], row["response_1"], _choice(row["better_response_id"]) == 0)


def pku_saferlhf_safer(row: Mapping) -> Row:
    """PKU-Alignment/PKU-SafeRLHF: the safer response is chosen."""
    return _ordered(row["prompt"], row["response_0"], row["response_1"], _choice(row["safer_response_id"]) == 0)


def orca_dpo_pairs(row: Mapping) -> Row | None:
    """Intel/orca_dpo_pairs: a system prompt, which may be empty, and a question; argilla's copy calls the question `input` and has ties."""
    if row.get("status") == "tie":
        return None
    system = [{"role": "system", "content": row["system"]}] if row["system"] else []
    question = row["question"] if "question" in row else row["input"]
    return {"prompt": [*system, {"role": "user", "content": question}], "chosen": row["chosen"], "rejected": row["rejected"]}


def dpo_mix(row: Mapping) -> Row | None:
    """argilla/dpo-mix-7k: two conversations with the prompt in them, and their ratings."""
    pair = {"chosen": row["chosen"], "rejected": row["rejected"], "margin": row["chosen_rating"] - row["rejected_rating"]}
    return pair if pair["margin"] else None


def capybara(row: Mapping) -> Row:
    """argilla/distilabel-capybara-dpo-7k-binarized: two conversations of several turns with the prompt in them."""
    return {"chosen": row["chosen"], "rejected": row["rejected"]}


def nectar(row: Mapping) -> Row:
    """berkeley-nest/Nectar: seven answers with ranks, 1 the best; a pair takes the best and the worst answer."""
    answers = [answer["answer"] for answer in sorted(row["answers"], key=lambda answer: answer["rank"])]
    return {"prompt": row["prompt"], "completions": answers, "chosen": answers[0], "rejected": answers[-1]}


def webgpt_comparisons(row: Mapping) -> Row | None:
    """openai/webgpt_comparisons: two answers and their scores, which add up to 0."""
    return _by_strength(row["question"]["full_text"], row["answer_0"], row["answer_1"], row["score_1"] - row["score_0"])


def summarize_from_feedback(row: Mapping) -> Row:
    """openai/summarize_from_feedback, comparisons: the prompts of Stiennon et al. 2020, arXiv:2009.01325, for posts and for articles."""
    about, (first, second) = row["info"], row["summaries"]
    if about.get("post") is not None:
        prompt = f"SUBREDDIT: r/{about['subreddit']}\nTITLE: {about['title']}\nPOST: {about['post']}\nTL;DR:"
    else:
        prompt = f"Article:\n\n{about['article']}\n\nTL;DR:"
    return _ordered(prompt, first["text"], second["text"], _choice(row["choice"]) == 0)


def skywork_reward_preference(row: Mapping) -> Row:
    """Skywork/Skywork-Reward-Preference-80K: two conversations with the prompt in them."""
    return {"chosen": row["chosen"], "rejected": row["rejected"]}


def openai_preference(row: Mapping) -> Row:
    """The format of OpenAI's preference fine-tuning: input messages, optional tools, and two lists of output messages."""
    pair = _ordered(row["input"]["messages"], row["preferred_output"], row["non_preferred_output"], True)
    return pair | ({"tools": row["input"]["tools"]} if row["input"].get("tools") else {})


def _by_strength(prompt: Any, first: Any, second: Any, strength: float) -> Row | None:
    """A pair from a strength that is negative where the first response is better; its absolute value is the margin, and 0 gives None."""
    return _ordered(prompt, first, second, strength < 0) | {"margin": abs(strength)} if strength else None


def _ordered(prompt: Any, first: Any, second: Any, first_better: bool) -> Row:
    chosen, rejected = (first, second) if first_better else (second, first)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _choice(value: Any) -> int:
    if value not in (0, 1):
        raise ValueError(f"a choice is {value!r}, not 0 or 1")
    return int(value)


FORMATS: dict[str, Callable[[Mapping], Row | None]] = {
    function.__name__: function
    for function in (
        hh_rlhf, ultrafeedback_binarized, helpsteer2, helpsteer3, shp, pku_saferlhf, pku_saferlhf_safer, orca_dpo_pairs, dpo_mix,
        capybara, nectar, webgpt_comparisons, summarize_from_feedback, skywork_reward_preference, openai_preference,
    )
}  # fmt: skip


def named(name: str) -> Callable[[Mapping], Row | None]:
    """The function of a format; an unknown name is a ValueError that suggests the nearest one."""
    if name not in FORMATS:
        near = max(FORMATS, key=lambda known: difflib.SequenceMatcher(None, name.lower(), known).ratio())
        raise ValueError(f"data.format is {name!r}; the nearest is {near!r}, and the formats are {', '.join(FORMATS)}")
    return FORMATS[name]


def likely(row: Mapping) -> str:
    """The formats that can read a row, in words for an error about its columns; empty if none can."""
    found = []
    for name, function in FORMATS.items():
        try:
            function(row)
            found.append(name)
        except Exception:  # a row of another structure may raise anything
            continue
    return f"; its rows look like those of data.format={' or '.join(found)}" if found else ""
