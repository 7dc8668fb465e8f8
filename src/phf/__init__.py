"""phf: pretraining language models with human feedback.

A reward function scores every segment of the training data, and the objective uses the scores. The model learns from
all the text and is guided not to produce the bad part. The flow, one folder with a manifest.json per arrow:

    corpus --segment, score--> scored corpus       phf.data, phf.scorers, phf.scoring
    scored corpus --tokenize--> token store        phf.tokens
    token store --objective.edit--> rows           phf.objectives, phf.tokens.rows
    rows --model, objective.loss--> checkpoints    phf.training
    model --sample--> texts                        phf.generation
    texts --the same scorer--> estimates           phf.evaluation
    model --attack--> worst prompts                phf.redteaming
    runs --compare--> page                         phf.report
    all of it in one file                          phf.recipes
    run --export--> a model for from_pretrained    phf.release

The packages in reading order; imports only go to an earlier one:

    core         settings, files and folders, statistics, random numbers, the layout of a run's folder
    data         readers of corpora, segmenters, the scored corpus on disk
    scorers      what scores texts: one file per scorer, and fitting one to labels
    scoring      scoring a corpus at any size, inspecting the scores
    tokens       tokenizers, the token store, the edited stream, rows and the order of training
    objectives   what an objective is, the paper's, those of later papers, and those made of others
    training     the fused loss, the model, the trainer, a run from start to finish
    engines      the edited token stream in other engines' formats; adapters of OLMo-core and torchtitan
    generation   scenarios, loading a model, sampling
    evaluation   judging: misalignment, held-out loss, KL, capabilities; also during training
    labelling    labels of a sample of a corpus, by an LLM judge or by hand
    redteaming   searching for prompts, attacking control tokens, tampering and tuning
    report       pages with plots
    recipes      whole comparisons
    release      a model that plain transformers loads
    functions    the stages as functions that take names and settings
    cli          the commands

docs/architecture.md says where to add a scorer, an objective, a metric, a reader, a capability or an attack:

    a scorer       phf/scorers/: a class like those in simple.py, and its name in `SingleScorer` (combined.py)
    an objective   phf/objectives/family.py: a class with `edit`, `loss` or both, and its name in `AnyObjective`
    a metric       of samples: evaluation/results.py and judge.py, on the page report/measures.py; of training: the
                   objective's `LossOutputs.metrics`
    a reader       phf/data/readers.py: a class with `plan`, `read` and `fingerprint`, and its name in `SingleCorpus`
                   (several.py)
    a capability   phf/evaluation/capabilities/: a class with `measure` and `inputs`, and its name in `AnyCapability`
    an attack      on prompts: an attacker in redteaming/attackers.py; on control tokens: redteaming/control_tokens.py

Without changing phf: scorers by `--scorer callable`, objectives as a subclass of `Objective` (docs/objective.md).
The public names are in `phf/__init__.pyi`.
"""

from typing import Any

import lazy_loader

_named, _names, __all__ = lazy_loader.attach_stub(__name__, __file__)
"""The names in `__init__.pyi`, each imported when it is first used: torch and transformers take seconds."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("phf")
    from phf.core.extras import naming_extras

    with naming_extras(f"phf.{name}", "train"):
        return _named(name)


def __dir__() -> list[str]:
    return [*_names(), "__version__"]
