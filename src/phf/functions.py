"""The stages as functions that take names, settings and paths as the command line does.

    import phf

    phf.score("texts.jsonl", "scored", scorer="pii")
    phf.tokenize("scored", "tokens", vocab_size=2048)
    phf.train("tokens", "runs/mine", model="tiny", objective="conditional", tokens=2e6, context=256, batch_rows=8)
    phf.evaluate("runs/mine", num_samples=256)
    phf.report("runs")

Wherever a scorer, a segmenter, a model or an objective is expected, its name will do, settings ({"name": "regex",
"pattern": "http"}), or the object itself. All functions do nothing again that is finished, and resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phf.core.config import ConfigError, Plain, merge, validate

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from phf.core.runs import TrainManifest
    from phf.core.types import Sample
    from phf.data.corpus import Corpus
    from phf.data.scored import ScoreManifest
    from phf.data.segment import Segmenter
    from phf.evaluation.capabilities import Capability
    from phf.evaluation.kl import KL
    from phf.evaluation.results import EvalResult
    from phf.generation.loaded import LoadedModel
    from phf.generation.scenario import Scenario
    from phf.objectives import Objective
    from phf.scorers import Scorer
    from phf.tokens.store import TokensManifest
    from phf.tokens.tokenizer import PretrainedTokenizer, TrainBPE
    from phf.training.config import TrainConfig
    from phf.training.lm import FromConfig, FromWeights

Settings = Mapping[str, Any]


def _made(value: Any, type_: Any, what: str) -> Any:
    """A name, settings or an object as the object. Raises ConfigError for what cannot be used."""
    if isinstance(value, str):
        value = {"name": value}
    return validate(dict(value), type_, what) if isinstance(value, Mapping) else value


def score(
    corpus: str | Path | Settings | Corpus,
    out: str | Path,
    scorer: str | Settings | Scorer = "pii",
    segmenter: str | Settings | Segmenter = "lines",
    **settings: Any,
) -> ScoreManifest:
    """Cut a corpus into segments, score each one and return the manifest. `corpus`: a file or a folder, the name of a
    corpus (installed_packages), a reader. `settings`: those of `score_corpus`, for example workers=4.

    Raises ConfigError for settings that cannot be used, and if too many segments cannot be judged.
    """
    from phf.data.canaries import AnyCorpus
    from phf.data.readers import from_path
    from phf.data.segment import AnySegmenter
    from phf.scorers import AnyScorer
    from phf.scoring.score import score_corpus

    read_from = from_path(str(corpus)) if isinstance(corpus, str | Path) else corpus
    return score_corpus(
        _made(read_from, AnyCorpus, "corpus"),
        _made(segmenter, AnySegmenter, "segmenter"),
        scorer=_made(scorer, AnyScorer, "scorer"),
        out=out,
        **settings,
    )


def tokenize(
    scored: str | Path,
    out: str | Path,
    tokenizer: str | TrainBPE | PretrainedTokenizer | None = None,
    vocab_size: int = 8192,
    heldout: float = 0.05,
    **settings: Any,
) -> TokensManifest:
    """Tokenize a scored corpus and return the manifest. `tokenizer`: a folder or a name on the Hub; None: a byte-level
    BPE with `vocab_size` entries, trained on the corpus. `heldout`: share of the documents to hold out. `settings`:
    those of `tokenize_corpus`. Errors as there."""
    from phf.tokens.store import tokenize_corpus
    from phf.tokens.tokenizer import PretrainedTokenizer, TrainBPE

    if tokenizer is None:
        tokenizer = TrainBPE(vocab_size)
    if isinstance(tokenizer, str):
        tokenizer = PretrainedTokenizer(tokenizer)
    return tokenize_corpus(scored, tokenizer, out, heldout, **settings)


def train(
    tokens_dir: str | Path,
    out: str | Path,
    model: str | Settings | FromConfig | FromWeights,
    objective: str | Settings | Objective = "mle",
    config: TrainConfig | None = None,
    seed: int = 0,
    stop_after: int | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    **settings: Any,
) -> TrainManifest | None:
    """Train a model with an objective into folder `out` and return the run's manifest. `model`: a name (tiny, small,
    gpt2), settings, or where weights are (FromWeights). `settings`: those of `TrainConfig`, in place of `config` or
    over it. The rest and the errors: as `phf.training.train.train`."""
    from phf.core.config import to_plain
    from phf.objectives import AnyObjective
    from phf.training.config import TrainConfig
    from phf.training.lm import AnyModel
    from phf.training.train import train as train_run

    if config is None or settings:
        base = {} if config is None else to_plain(config)
        config = validate(merge(base, settings), TrainConfig, "train")
    return train_run(
        tokens_dir=tokens_dir,
        out=out,
        model=validate(model, AnyModel, "model") if isinstance(model, str | Mapping) else model,
        objective=_made(objective, AnyObjective, "objective"),
        config=config,
        seed=seed,
        stop_after=stop_after,
        callbacks=callbacks,
    )


def sample(model: str | Path | LoadedModel, scenario: Scenario | None = None, **settings: Any) -> list[Sample]:
    """Samples of a run, a model in a folder or on the Hub, or a loaded model. `settings`: those of `Scenario`, for
    example num_samples=64, temperature=0.7, in place of `scenario` or over it. Raises ConfigError for what the model
    cannot do."""
    from phf.generation.loaded import LoadedModel, load_model
    from phf.generation.sample import sample as draw

    loaded = model if isinstance(model, LoadedModel) else load_model(str(model))
    return draw(loaded, _scenario(scenario, settings))


def evaluate(
    run: str | Path,
    scenarios: Mapping[str, Scenario] | None = None,
    *,
    scorer: str | Settings | Scorer | None = None,
    kl: Settings | KL | None = None,
    capabilities: Sequence[Settings | Capability] = (),
    threshold: float | None = None,
    allow_other_scorer: bool = False,
    **settings: Any,
) -> EvalResult:
    """Judge a run and return what `eval.json` holds. `scenarios`: by name; None: one with the `settings`, those of
    `Scenario`. `scorer`: None: the corpus's own. `kl`: settings of `KL`, for example {"reference": {"path": "gpt2"}}.
    Errors as `evaluate_run`, which has more settings; `evaluate_model` judges models from elsewhere."""
    from phf.evaluation.capabilities import AnyCapability
    from phf.evaluation.evaluate import evaluate_run
    from phf.evaluation.kl import KL
    from phf.scorers import AnyScorer

    if scenarios is not None and settings:
        raise ConfigError("evaluate: give scenarios or the settings of one, not both")
    if isinstance(kl, Mapping):
        given: Plain = merge({"reference": {"name": "local"}}, kl)
        kl = validate(given, KL, "kl")
    one = _scenario(None, settings)
    return evaluate_run(
        run,
        dict(scenarios) if scenarios is not None else {"prompted" if one.prompts else "unconditional": one},
        threshold=threshold,
        scorer=None if scorer is None else _made(scorer, AnyScorer, "scorer"),
        allow_other_scorer=allow_other_scorer,
        kl_from=kl,
        capabilities=[_made(each, AnyCapability, "capabilities") for each in capabilities],
    )


def _scenario(scenario: Scenario | None, settings: Settings) -> Scenario:
    from phf.core.config import to_plain
    from phf.generation.scenario import Scenario

    if scenario is not None and not settings:
        return scenario
    found: Scenario = validate(merge({} if scenario is None else to_plain(scenario), settings), Scenario, "scenario")
    return found
