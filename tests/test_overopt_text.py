"""The world of words: its gold reward, its demonstrations, and what transformers must show there."""

import json

import numpy as np
import pytest
import runs

from alignax import cli, config
from alignax.config import BadInput
from alignax.overopt import laboratory, results, text, words

FILE = str(runs.REPO / "experiments" / "overoptimization_tokens.py")
TINY = {
    "repeats": 1, "control": False, "world.pairs": 24, "world.held_out": 8, "world.prompts": 1, "world.responses": 16, "sft.answers": 64,
    "sft.width": 8, "sft.steps": 6, "sft.batch_size": 8, "proxy.members": 2, "proxy.width": 8, "proxy.steps": 3, "proxy.batch_size": 8,
    "best_of_n.n": "(1,2,4,8,16)", "direct.repeats": 1, "direct.objectives": "('RPO',)", "direct.betas": "(0.1,)", "direct.steps": 4,
    "direct.every": 2, "direct.samples": 16, "direct.batch_size": 8,
}  # fmt: skip
ids = lambda *said: [words.VOCABULARY.index(word) for word in said]


def padded(*answers: list[int]) -> np.ndarray:
    return np.array([[*answer, *[words.EOS] * (text.NEW - len(answer))] for answer in answers])


def test_gold_adds_up_values_and_wants_no_loops():
    values = np.arange(words.WORDS, dtype=float)
    gold = words.Gold(values, offset=1.0, outside=-2.0, mean=0.5, std=2.0)
    first, second, last = "waves", "salt", "noise"  # values 0, 1 and 23
    answers = padded(ids(first, second, last), ids(*[last] * 4), ids(*[last] * 5), [])
    np.testing.assert_allclose(gold(answers), [(24 - 1 - 0.5) / 2, (92 - 1 - 0.5) / 2, (-2 - 0.5) / 2, (-1 - 0.5) / 2])
    assert words.counts(padded(ids("sea", first, first))).sum() == 2, "the name of a topic is no word of an answer"


def test_gold_is_standardised_under_the_policy():
    _, shown = words.demonstrations(np.random.default_rng(0), 0.05, 2000)
    answers = padded(*(list(answer) for (answer,) in shown))
    gold, other = (words.make_gold(seed, -1.0, answers) for seed in (0, 1))
    assert abs(gold(answers).mean()) < 1e-5 and abs(gold(answers).std() - 1) < 1e-5
    loops = words.counts(answers).max(axis=-1) > words.PATIENCE
    assert len(set(gold(answers)[loops].tolist())) == 1 and -1.3 < gold(answers)[loops][0] < -0.7
    assert abs(np.corrcoef(gold(answers), other(answers))[0, 1]) < 0.9, "a seed has values of its own"
    with pytest.raises(BadInput, match="must be finite"):
        words.make_gold(0, -1.0, answers[loops])


def test_demonstrations_are_lists_of_words_and_so_many_loops():
    prompts, shown = words.demonstrations(np.random.default_rng(0), 0.1, 1000)
    answers = [answer for (answer,) in shown]
    assert all(answer[-1] == words.EOS and answer[:-1].min() >= words.FIRST for answer in answers)
    loops = [len(set(answer[:-1].tolist())) == 1 for answer in answers]
    assert 0.07 < np.mean(loops) < 0.13 and {len(a) - 1 for a, loop in zip(answers, loops, strict=True) if loop} == {6, 7, 8}
    for (topic,), answer, loop in zip(prompts, answers, loops, strict=True):
        assert loop or (4 <= len(set(answer[:-1].tolist())) == len(answer) - 1 <= 8), "an answer that is no loop repeats nothing"
        assert words.text([topic]) in words.TOPICS
    topic = lambda prompt: words.TOPICS[words.text(prompt)].split()
    on = [word in topic(p) for p, a in zip(prompts, answers, strict=True) for word in words.text(a).split()]
    assert 0.45 < np.mean(on) < 0.55
    assert words.text(answers[0][:1]) in words.VOCABULARY and words.text([words.EOS]) == ""


def test_pairs_have_the_answer_that_gold_prefers_first():
    own = text.examples([[1], [2]], [[ids("waves"), ids("salt", "fish")], [ids("cows"), ids("hay", "hay")]])
    assert (own.N, own.prompts) == (2, ["sea", "farm"])
    assert own.tokens.tolist() == [1, *ids("waves"), 1, *ids("salt", "fish"), 2, *ids("cows"), 2, *ids("hay", "hay")]
    assert own.scored.tolist() == [False, True, False, True, True, False, True, False, True, True]


def arguments(workdir, **changes) -> list[str]:
    return ["overopt", "--config", FILE, *(f"--config.{k}={v}" for k, v in (TINY | {"workdir": workdir} | changes).items())]


@pytest.mark.slow
def test_the_command_trains_measures_and_reports(tmp_path):
    assert cli.main(arguments(tmp_path / "run")) == 0
    out = json.loads((tmp_path / "run" / "results.json").read_text())
    curves = {(c["kind"], c["objective"]): c for c in out["curves"]}
    assert {objective for kind, objective in curves if kind == "best_of_n"} == {"single", "mean", "median", "WCO", "UWO"}
    trained = curves["direct", "RPO"]
    assert trained["at"] == [0, 2, 4] and trained["values"]["kl"]["mean"][0] == pytest.approx(0, abs=1e-4), "starts from the reference"
    assert trained["values"]["proxy"]["mean"][0] == pytest.approx(0, abs=1e-5) and abs(trained["values"]["chosen_drift"]["mean"][0]) < 1e-4
    (m,) = out["measurements"]
    assert set(" ".join(row["response"] for row in m["samples"]).split()) <= set(words.VOCABULARY)
    figures = {file.name for file in (tmp_path / "run" / "figures").iterdir()}
    assert {"best-of-n-loops-length.png", "direct-alignment-loops-length-rpo.png"} <= figures


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("world.noise=0.7", r"'world.noise' is 0.7; it must be in 0 ... 0.5"),
        ("world.prompts=4", r"'world.prompts' is 4; it must be in 1 ... 3"),
        ("world.responses=100", r"best of n = 4096 of 100 responses; .* raise world.responses to 4096"),
        ("proxy.width=30", r"'proxy.width' is 30, not a multiple of the 4 heads"),
        ("direct.steps=90", r"90, not a multiple of direct.every \(25\)"),
    ],
)
def test_settings_that_measure_nothing_are_refused(override, message):
    own = config.load_experiment(FILE, [override])
    with pytest.raises(BadInput, match=message):
        text.text(own.config, own.loss(own.config))


REDUCED = ("repeats=3", "world.responses=2100", "sft.steps=1500", "best_of_n.n=(1,8,64,256,1024,2048)")


def best_of_n() -> dict[str, dict[str, float]]:
    """Objective -> peak, final and drop of the mean gold reward over seeds, at a reduced size."""
    own = config.load_experiment(FILE, REDUCED)
    names = own.loss.__globals__["ensembles"]
    aggregates = {"mean": names.mean, "WCO": names.wco, "UWO": names.uwo(own.config.uwo)}
    world, seeds = text.text(own.config, own.loss(own.config)), range(own.config.repeats)
    m = laboratory.score("loops", world.score(seeds), aggregates, own.config.best_of_n.n, seeds)
    return {curve.objective: results.peak(curve) for curve in results.curves([m])}


@pytest.mark.long
@pytest.mark.slow
def test_conservative_ensembles_of_transformers_hold_what_a_single_one_and_the_mean_lose():
    final, drop = ({name: x[key] for name, x in best_of_n().items()} for key in ("final", "drop"))
    assert drop["single"] >= 0.2 and drop["UWO"] <= 0.6 * drop["mean"]
    # Three seeds differ by 0.9 at the end: where WCO stands against a single model is told by more of them, of vectors.
    assert final["UWO"] - final["mean"] >= 0.4 and final["UWO"] > final["single"]
