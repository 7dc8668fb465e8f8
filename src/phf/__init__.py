"""phf: pretraining language models with human feedback. The public names; see the modules for what they do.

Functions named as their modules are imported from there, since `phf.train` is the module: `from phf.train import train`,
`from phf.sample import sample`, `from phf.redteam import redteam`, `from phf.survey import survey`.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "phf.annotate": ("ScoredCorpus", "add_scores", "score_corpus"),
    "phf.during": ("During", "JudgeDuring"),
    "phf.fitting": ("fit_scorer", "read_labels"),
    "phf.hub": ("push_scored",),
    "phf.control_attacks": ("TokenAttacks", "attack_tokens", "injection"),
    "phf.evaluate": ("evaluate_model", "evaluate_run", "judge_samples"),
    "phf.fused": ("fused_loss",),
    "phf.heldout": ("heldout_loss", "understanding"),
    "phf.model": ("FromConfig", "FromWeights", "PHFModel"),
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
    "phf.packing": ("Rows",),
    "phf.plan": ("make_plan",),
    "phf.recipe": ("Recipe", "load_recipe"),
    "phf.redteam": ("RedTeam",),
    "phf.release": ("export", "push_release"),
    "phf.report": ("write_report",),
    "phf.running": ("run_recipe",),
    "phf.sample": ("Scenario", "load_model"),
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
    "phf.tokens": ("PretrainedTokenizer", "TokenStore", "TrainBPE", "tokenize_corpus"),
    "phf.train": ("TrainConfig",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and transformers take seconds."""
    if name not in _HOME:
        raise AttributeError(f"module 'phf' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
