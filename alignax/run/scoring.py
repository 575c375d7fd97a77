"""Scores and log-probs of samples by the frozen models of a run: for reward functions that ask for a model, and as gold rewards."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from alignax import mesh as meshes
from alignax.generate import Answers, sampled_batch
from alignax.host.functions import models_asked
from alignax.program import Program
from alignax.rewards import judge as judges
from alignax.run.prepare import Run
from alignax.run.roles import GOLD
from alignax.run.state import Held, put_padded


def score_of(sampler: str, name: str) -> str:
    """The name of the program that scores a sampler's samples with the model `name`."""
    return f"{sampler}/score/{name}"


class Scored(NamedTuple):
    """What the frozen models of a run say about samples."""

    models: dict[str, list[Any]]  # for reward functions, by the name of the model that they ask for: a value for each of B * N completions
    gold: np.ndarray | None  # gold rewards [B, N] float32 of the model "gold", NaN for samples that it cannot read; None without that model


class Scorers:
    """The frozen models of a run, as functions of samples on the host."""

    def __init__(self, run: Run, held: Held, programs: Mapping[str, Program], sampler: str):
        """Computes nothing yet.

        Args:
          run: the run.
          held: the frozen parameter trees of the run.
          programs: the programs of the run.
          sampler: the sampler whose samples are scored, "rollout" or "eval".
        """
        self.run, self.held, place = run, held, score_of(sampler, "")
        self.programs = {name.removeprefix(place): program for name, program in programs.items() if name.startswith(place)}

    def __call__(self, answers: Answers) -> Scored:
        """Scores samples; each model reads them once, whoever asks for it.

        For reward functions a reward model gives its score, or a list of scores if it has several: those of its labels, or of K members. A
        language model gives a list of the log-probs of the completion's tokens, in its own tokens if it reads text. A completion that a
        model cannot read has the score NaN, or the list [NaN]. The gold reward is the mean score of the model "gold".
        """
        out: dict[str, list[Any]] = {}
        every = {name: self.said(name, answers) for name in self.programs}
        for name in models_asked(self.run.experiment):
            said, mask = (x.reshape(-1, x.shape[-1]) for x in every[name])
            if self.run.roles[name].members:
                out[name] = said.tolist() if said.shape[-1] > 1 else said[:, 0].tolist()
            else:
                out[name] = [[math.nan] if np.isnan(row).all() else row[scored].tolist() for row, scored in zip(said, mask, strict=True)]
        return Scored(out, every[GOLD][0].mean(axis=-1) if GOLD in every else None)

    def said(self, name: str, answers: Answers) -> tuple[np.ndarray, np.ndarray]:
        """The output of a model for samples, float32, and the mask of the completion tokens that it read, [B, N, T] bool.

        The output of a reward model is scores [B, N, K]; of a language model, log-probs [B, N, T]. Samples that it cannot read have NaN:
        those that its chat template refuses, and of a language model that reads text those that do not fit into its row.
        """
        run, role, judge = self.run, self.run.roles[name], self.run.judges.get(name)
        if judge is None:
            whole = sampled_batch(answers.prompts, answers.completions, run.data.train.length if run.config.rollout.samples else 0)
            batch = {field: whole[field] for field in judges.FIELDS}
            unread = np.zeros((*batch["mask"].shape[:2], 1), bool)
        else:
            own = judges.read(judge, run.words.tokenizer, answers)
            batch = {field: own[f"{name}_{field}"] for field in judges.FIELDS}
            unread = ~batch["completion_mask"].any(axis=-1, keepdims=True)
            if role.reads_text:
                batch["completion_mask"], unread = judges.without_ends(judge, batch, answers), unread | own[f"{name}_cut"][..., None]
        program, mask, B = self.programs[name], batch["completion_mask"], len(answers.rows)
        rows = len(program.arguments[1]["tokens"])  # of a whole rollout: a refill has fewer, and would compile another program
        said = meshes.gathered(program.call(self.held[role.tree], put_padded(run.mesh, batch, rows)))[:B]
        return np.where(unread, np.float32(np.nan), said), mask
