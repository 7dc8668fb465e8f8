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

import inspect
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from phf.core.config import ConfigError, Plain, did_you_mean, merge, validate
from phf.core.extras import naming_extras

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
    from phf.generation.server import Server
    from phf.objectives import Objective
    from phf.redteaming.config import RedTeam, TokenAttacks
    from phf.redteaming.results import RedTeamResult
    from phf.scorers import Scorer
    from phf.tokens.store import TokensManifest
    from phf.tokens.tokenizer import PretrainedTokenizer, TrainBPE
    from phf.training.config import TrainConfig
    from phf.training.lm import FromConfig, FromWeights

Settings = Mapping[str, Any]


def _made(value: Any, type_: Any, what: str, base: type) -> Any:
    """A name, settings or an object as the object. Raises ConfigError for what cannot be used."""
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, Mapping):
        return validate(dict(value), type_, what)
    if isinstance(value, base):
        return value
    if isinstance(value, type) and issubclass(value, base):
        raise ConfigError(f"{what}: {value.__name__} is a class; give an object, {value.__name__}(...)")
    if callable(value) and what == "scorer":
        raise ConfigError(
            "scorer: a function is given by its place, so that other processes find it: "
            '{"name": "callable", "function": "mine.py:score"}'
        )
    names = "a path, a name, settings" if what == "corpus" else "a name, settings"
    raise ConfigError(f"{what}: expected {names} or a {base.__name__}, got {reprlib.repr(value)}")


def _known(settings: Settings, of: Callable[..., Any], name: str, own: Iterable[str]) -> None:
    """Raise ConfigError for settings that a function does not have. `own`: those that `name` has itself."""
    known = set(inspect.signature(of).parameters) | set(own)
    for key in settings:
        if key not in known:
            raise ConfigError(f"phf.{name}: unknown setting {key!r}{did_you_mean(key, known)}")


WORKERS = Annotated[int, Field(gt=0)]
SHARE = Annotated[float, Field(ge=0, le=1)]
"""Types of settings that functions check themselves."""


def _checked(settings: Settings, types: Mapping[str, Any]) -> Plain:
    """The settings with the values of `types` checked. Raises ConfigError."""
    return {key: validate(value, types[key], key) if key in types else value for key, value in settings.items()}


def _path(value: Any, what: str) -> str:
    if not isinstance(value, str | Path):
        raise ConfigError(f"{what}: expected a path, got {value!r}")
    return str(value)


@naming_extras("phf.score", "score")
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
    from phf.data.corpus import Corpus
    from phf.data.readers import from_path
    from phf.data.segment import AnySegmenter, Segmenter
    from phf.scorers import AnyScorer, Scorer
    from phf.scoring.score import score_corpus

    _known(settings, score_corpus, "score", ())
    read_from = from_path(str(corpus)) if isinstance(corpus, str | Path) else corpus
    return score_corpus(
        _made(read_from, AnyCorpus, "corpus", Corpus),
        _made(segmenter, AnySegmenter, "segmenter", Segmenter),
        scorer=_made(scorer, AnyScorer, "scorer", Scorer),
        out=_path(out, "out"),
        **_checked(settings, {"workers": WORKERS, "max_unjudged": SHARE, "overwrite": bool}),
    )


@naming_extras("phf.tokenize", "train")
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

    _known(settings, tokenize_corpus, "tokenize", ())
    made: Any = tokenizer
    if tokenizer is None:
        made = validate({"vocab_size": vocab_size}, TrainBPE, "tokenize")
    elif isinstance(tokenizer, str | Path):
        made = PretrainedTokenizer(str(tokenizer))
    elif not isinstance(tokenizer, TrainBPE | PretrainedTokenizer):
        raise ConfigError(
            f"tokenizer: expected a folder, a name on the Hub or a tokenizer's settings, got {tokenizer!r}"
        )
    share: float = validate(heldout, Annotated[float, Field(ge=0, lt=1)], "heldout")
    more = _checked(settings, {"token_scores": bool, "columns": tuple[str, ...], "workers": WORKERS})
    return tokenize_corpus(_path(scored, "scored"), made, _path(out, "out"), share, **more)


@naming_extras("phf.train", "train")
def train(
    tokens_dir: str | Path,
    out: str | Path,
    model: str | Settings | FromConfig | FromWeights,
    objective: str | Settings | Objective = "mle",
    config: TrainConfig | None = None,
    seed: int = 0,
    stop_after: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **settings: Any,
) -> TrainManifest | None:
    """Train a model with an objective into folder `out` and return the run's manifest. `model`: a name (tiny, small,
    gpt2), settings, or where weights are (FromWeights). `settings`: those of `TrainConfig`, in place of `config` or
    over it. The rest and the errors: as `phf.training.train.train`."""
    from transformers import TrainerCallback

    from phf.core.config import to_plain
    from phf.objectives import AnyObjective, Objective
    from phf.training.config import TrainConfig
    from phf.training.lm import AnyModel, FromConfig, FromWeights
    from phf.training.train import train as train_run

    trained_with = _made(objective, AnyObjective, "objective", Objective)
    if isinstance(model, str) and Path(model).is_dir():
        model = FromWeights(model)
    if not isinstance(model, FromConfig | FromWeights):
        model = validate(model, AnyModel, "model")
    if config is None or settings or isinstance(config, Mapping):
        base = {} if config is None else config if isinstance(config, Mapping) else to_plain(config)
        if isinstance(settings.get("report_to"), str):
            settings["report_to"] = [settings["report_to"]]
        config = validate(merge(base, settings), TrainConfig, "train")
    if stop_after is not None:
        stop_after = validate(stop_after, WORKERS, "stop_after")
    if not isinstance(callbacks, Sequence) or not all(isinstance(one, TrainerCallback) for one in callbacks):
        raise ConfigError(f"callbacks: expected a list of TrainerCallback, got {callbacks!r}")
    return train_run(
        tokens_dir=_path(tokens_dir, "tokens_dir"),
        out=_path(out, "out"),
        model=model,
        objective=trained_with,
        config=config,
        seed=validate(seed, Annotated[int, Field(ge=0, lt=2**32)], "seed"),
        stop_after=stop_after,
        callbacks=tuple(callbacks),
    )


@naming_extras("phf.sample", "train")
def sample(model: str | Path | LoadedModel, scenario: Scenario | None = None, **settings: Any) -> list[Sample]:
    """Samples of a run, a model in a folder or on the Hub, or a loaded model. `settings`: those of `Scenario`, for
    example num_samples=64, temperature=0.7, in place of `scenario` or over it. Raises ConfigError for what the model
    cannot do."""
    from phf.generation.loaded import LoadedModel, load_model
    from phf.generation.sample import sample as draw

    how = _scenario(scenario, settings)
    return draw(model if isinstance(model, LoadedModel) else load_model(_path(model, "model")), how)


@naming_extras("phf.evaluate", "train")
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
    from phf.evaluation.capabilities import AnyCapability, Capability
    from phf.evaluation.evaluate import evaluate_run
    from phf.evaluation.kl import KL
    from phf.scorers import AnyScorer, Scorer

    if scenarios is not None and settings:
        raise ConfigError("evaluate: give scenarios or the settings of one, not both")
    if scenarios is not None and not isinstance(scenarios, Mapping):
        raise ConfigError(f"scenarios: expected scenarios by name, got {scenarios!r}")
    if isinstance(kl, str | Path):
        kl = {"reference": {"path": str(kl)}}
    if not (kl is None or isinstance(kl, KL | Mapping)):
        raise ConfigError(f"kl: expected settings or the folder of a reference model, got {kl!r}")
    if isinstance(kl, Mapping):
        given: Plain = merge({"reference": {"name": "local"}}, kl)
        kl = validate(given, KL, "kl")
    if isinstance(capabilities, str | Mapping):
        capabilities = [{"name": capabilities} if isinstance(capabilities, str) else capabilities]
    if not isinstance(capabilities, Sequence):
        raise ConfigError(f"capabilities: expected a list of names, settings or capabilities, got {capabilities!r}")
    one = _scenario(None, settings)
    asked = scenarios or {"prompted" if one.prompts else "unconditional": one}
    return evaluate_run(
        _path(run, "run"),
        {name: _scenario(scenario, {}) for name, scenario in asked.items()},
        threshold=None if threshold is None else validate(threshold, float, "threshold"),
        scorer=None if scorer is None else _made(scorer, AnyScorer, "scorer", Scorer),
        allow_other_scorer=allow_other_scorer,
        kl_from=kl,
        capabilities=[_made(each, AnyCapability, "capabilities", Capability) for each in capabilities],
    )


@naming_extras("phf.redteam", "train")
def redteam(
    model: str | Path | Server,
    out: str | Path | None = None,
    config: Settings | RedTeam | None = None,
    token_attacks: Settings | TokenAttacks | bool | None = True,
    *,
    scorer: str | Settings | Scorer | None = None,
    threshold: float | None = None,
    tokens_dir: str | Path | None = None,
    allow_other_scorer: bool = False,
    **settings: Any,
) -> RedTeamResult:
    """Attack a run, any model in a folder or on the Hub, or on a server, and return what `redteam.json` holds.
    `settings`: those of `RedTeam`, for example trials=2, in place of `config` or over it. `token_attacks`: settings of
    `TokenAttacks`; false or None leaves them out. `scorer`: None: the run's own. Errors as
    `phf.redteaming.attack.redteam`."""
    from phf.core.config import to_plain
    from phf.generation.server import Server
    from phf.redteaming.attack import redteam as attack
    from phf.redteaming.config import RedTeam, TokenAttacks
    from phf.scorers import AnyScorer, Scorer

    def made(value: Any, type_: Any, what: str, over: Settings) -> Any:
        if not isinstance(value, type_ | Mapping):
            raise ConfigError(f"{what}: expected settings or a {type_.__name__}, got {value!r}")
        return validate(merge(value if isinstance(value, Mapping) else to_plain(value), over), type_, what)

    on_tokens = {True: {}, False: None}[token_attacks] if isinstance(token_attacks, bool) else token_attacks
    return attack(
        model if isinstance(model, Server) else _path(model, "model"),
        None if out is None else _path(out, "out"),
        config=made({} if config is None else config, RedTeam, "redteam", settings),
        token_attacks=made(on_tokens, TokenAttacks, "token_attacks", {}) if on_tokens is not None else None,
        scorer=None if scorer is None else _made(scorer, AnyScorer, "scorer", Scorer),
        threshold=None if threshold is None else validate(threshold, float, "threshold"),
        tokens_dir=None if tokens_dir is None else _path(tokens_dir, "tokens_dir"),
        allow_other_scorer=allow_other_scorer,
    )


@naming_extras("phf.export", "train")
def export(run: str | Path, out: str | Path, name: str | None = None, licence: str | None = None) -> Path:
    """Write the release of a trained run, which any `from_pretrained` loads, into folder `out` and return it. Its card
    has what `evaluate` and `redteam` found. `name`: the model's, on the Hub or for itself. `licence`: as the Hub names
    licences. Errors as `phf.release.export`."""
    from phf.release import export as release

    for value, what in ((name, "name"), (licence, "licence")):
        if not isinstance(value, str | None):
            raise ConfigError(f"{what}: expected text, got {value!r}")
    return release(_path(run, "run"), _path(out, "out"), name, licence)


def _scenario(scenario: Any, settings: Settings) -> Scenario:
    """A scenario, or settings of one, with further `settings`."""
    from phf.core.config import to_plain
    from phf.generation.scenario import Scenario, with_room

    if isinstance(scenario, Scenario) and not settings:
        return scenario
    base = {} if scenario is None else scenario if isinstance(scenario, Mapping) else to_plain(scenario)
    if not isinstance(base, Mapping):
        raise ConfigError(f"scenario: expected settings or a Scenario, got {scenario!r}")
    found: Scenario = validate(with_room(merge(base, settings)), Scenario, "scenario")
    return found
