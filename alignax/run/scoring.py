"""Scores and log-probs of samples by the frozen models of a run: for reward functions that ask for a model, and as gold rewards."""

import math
from collections.abc import Mapping
from typing import Any

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

    def gold(self, answers: Answers) -> np.ndarray | None:
        """Gold rewards [B, N] float32: the mean score of the model "gold", NaN for samples that it cannot read; None without that model."""
        return self.said(GOLD, answers)[0].mean(axis=-1) if GOLD in self.programs else None

    def given(self, answers: Answers) -> dict[str, list[Any]]:
        """The values of models for reward functions that ask for them, by the model's name: one value for each of the B * N completions.

        Reward models give a score, or a list of scores if there are several: those of a model's labels, or of K members. A language model
        gives a list of the log-probs of the completion's tokens, in its own tokens if it reads text. A completion that a model cannot read
        has the score NaN, or the list [NaN].
        """
        out: dict[str, list[Any]] = {}
        for name in models_asked(self.run.experiment):
            said, mask = (x.reshape(-1, x.shape[-1]) for x in self.said(name, answers))
            if self.run.roles[name].members:
                out[name] = said.tolist() if said.shape[-1] > 1 else said[:, 0].tolist()
            else:
                out[name] = [[math.nan] if np.isnan(row).all() else row[scored].tolist() for row, scored in zip(said, mask, strict=True)]
        return out

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
