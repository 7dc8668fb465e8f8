"""phf: pretraining language models with human feedback. The public names; see the modules for what they do.

Functions named as their modules are imported from there, since `phf.train` is the module: `from phf.train import train`,
`from phf.sample import sample`, `from phf.redteam import redteam`, `from phf.survey import survey`.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "phf.data.scored": ("ScoredCorpus",),
    "phf.scorers": (
        "PEP8",
        "PII",
        "Combination",
        "Fitted",
        "Function",
        "Lexicon",
        "Presidio",
        "Regex",
        "Scorer",
        "Toxicity",
    ),
    "phf.scorers.fitting": ("fit_scorer", "read_labels"),
    "phf.scoring.score": ("add_scores", "score_corpus"),
    "phf.scoring.publish": ("push_scored",),
    "phf.tokens.tokenizer": ("PretrainedTokenizer", "TrainBPE"),
    "phf.tokens.store": ("TokenStore", "tokenize_corpus"),
    "phf.tokens.rows": ("Rows",),
    "phf.objectives": (
        "AWR",
        "MLE",
        "RWR",
        "Conditional",
        "Filtering",
        "LossInputs",
        "LossOutputs",
        "Masking",
        "Objective",
        "Unlikelihood",
    ),
    "phf.training.fused": ("fused_loss",),
    "phf.training.lm": ("FromConfig", "FromWeights"),
    "phf.training.model": ("PHFModel",),
    "phf.training.train": ("TrainConfig", "train"),
    "phf.generation.scenario": ("Scenario",),
    "phf.generation.loaded": ("load_model",),
    "phf.generation.sample": ("sample",),
    "phf.evaluation.judge": ("judge_samples",),
    "phf.evaluation.evaluate": ("evaluate_model", "evaluate_run"),
    "phf.evaluation.heldout": ("heldout_loss", "understanding"),
    "phf.evaluation.monitor": ("During", "JudgeDuring"),
    "phf.redteaming.control_tokens": ("TokenAttacks", "attack_tokens", "injection"),
    "phf.redteaming.search": ("RedTeam", "redteam"),
    "phf.report.page": ("write_report",),
    "phf.recipes.recipe": ("Recipe", "load_recipe"),
    "phf.recipes.plan": ("make_plan",),
    "phf.recipes.run": ("run_recipe",),
    "phf.release": ("export", "push_release"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and transformers take seconds."""
    if name not in _HOME:
        raise AttributeError(f"module 'phf' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
