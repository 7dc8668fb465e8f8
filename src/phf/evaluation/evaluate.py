"""Judge a finished model: misalignment of its samples, diversity, held-out loss, KL, capabilities; all with
intervals.

    phf eval runs/conditional

Samples are scored by the scorer that scored the corpus; its identity is checked. A model with control tokens is
read with the corpus's own tokens ("oracle") and with the good token before every segment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phf.core import folders, store
from phf.core.config import ConfigError, did_you_mean, to_plain
from phf.core.locks import locked
from phf.core.runs import RedTeamFolder, RunFolder, TrainManifest, model_mark, not_a_run, places
from phf.core.types import PhfError
from phf.data.scored import ADDED, ScoredCorpus, ScoreManifest
from phf.data.segment import Lines, Segmenter, segmenter_from
from phf.evaluation.capabilities.base import Capability
from phf.evaluation.heldout import corpus_of, in_tokens_of
from phf.evaluation.kl import KL
from phf.evaluation.parts import (
    Evaluation,
    Heldout,
    HeldoutText,
    Judging,
    Part,
    again_part,
    capability_part,
    heldout_part,
    scenario_part,
)
from phf.evaluation.results import (
    CapabilityResult,
    DataSection,
    EvalResult,
    HeldoutResult,
    HeldoutSection,
    JudgedModel,
    PreferenceResult,
)
from phf.generation.loaded import LoadedModel, can_be_asked, load_model
from phf.generation.scenario import Scenario
from phf.scorers import Scorer
from phf.scoring.judge import check_identity, corpus_scorer, is_same_scorer
from phf.tokens.store import TokensManifest, TokenStore, is_token_store

HELDOUT_TOKENS = 1_000_000
"""Held-out tokens that are read, unless asked otherwise."""
FOREIGN_CONTEXT = 1024
"""Longest context in which a model from elsewhere reads held-out text."""


@dataclass(frozen=True)
class JudgedRun:
    """A run of phf with the data that it was trained on."""

    folder: RunFolder
    manifest: TrainManifest
    tokens: TokenStore
    scorer: Scorer

    @property
    def segmenter(self) -> Segmenter:
        """How the corpus was cut; lines if the corpus came in segments of its own."""
        return segmenter_from(self.tokens.manifest.segmenter)

    @property
    def corpus_threshold(self) -> float | None:
        """Scores of the corpus above it are bad, where another scorer scored the corpus than judges; else None."""
        same = is_same_scorer(self.scorer, self.tokens.manifest.identity)
        return None if same else self.tokens.bad_above

    def threshold(self, given: float | None) -> float:
        """Scores above it are bad: what is given, else the scorer's own threshold."""
        if given is not None:
            return given
        return self.tokens.bad_above if self.scorer.bad_above is None else self.scorer.bad_above

    def corpus_limit(self, threshold: float) -> float:
        """Scores of the corpus above it are bad, where those of samples above `threshold` are."""
        return threshold if self.corpus_threshold is None else self.corpus_threshold


def open_run(
    run: str | Path,
    tokens_dir: str | Path | None = None,
    scorer: Scorer | None = None,
    allow_other_scorer: bool = False,
    main: bool = False,
) -> JudgedRun:
    """A finished run, its token store and its scorer. `tokens_dir` and `scorer` replace those of the run's manifest.
    `main`: judge by the corpus's own scores, whichever the run was trained on.

    Raises StoreError if the run is not finished. Raises ConfigError if the token store is not the one that the run was
    trained on, or the scorer not the one that scored the corpus.
    """
    folder = RunFolder(Path(run))
    manifest = folders.read_manifest(run, TrainManifest)
    place = tokens_dir or _tokens_of(folder.path, manifest)
    tokens = TokenStore.open(place, None if main else manifest.scores)
    trained_on = tokens if manifest.scores is None else tokens.with_scores(manifest.scores)
    if trained_on.manifest.content != manifest.tokens_content:
        raise ConfigError(f"{tokens.path} is not the token store that {run} was trained on (its content differs)")
    if scorer is None:
        scorer = corpus_scorer(tokens.manifest.scorer, tokens.manifest.identity, allow_other_scorer)
    else:
        check_identity(scorer, tokens.manifest.identity, allow_other_scorer)
    return JudgedRun(folder, manifest, tokens, scorer)


def _tokens_of(run: Path, manifest: TrainManifest) -> Path:
    """The token store that a run was trained on, wherever both are now."""
    found = places(manifest.tokens_dir, manifest.tokens_from_here, run)
    return next((place for place in found if (place / folders.MANIFEST).exists()), found[-1])


def evaluate_run(
    run: str | Path,
    scenarios: dict[str, Scenario],
    *,
    threshold: float | None = None,
    tokens_dir: str | Path | None = None,
    scorer: Scorer | None = None,
    allow_other_scorer: bool = False,
    heldout_tokens: int = HELDOUT_TOKENS,
    kl_from: KL | None = None,
    capabilities: Sequence[Capability] = (),
    preferences: Mapping[str, Scorer] | None = None,
    main: bool = False,
) -> EvalResult:
    """Judge a finished run: writes `samples/<scenario>.jsonl` and `eval.json` into its folder and returns the
    latter.

    Returns at once if this was done with the same settings, and resumes with the missing parts after an
    interruption. `threshold`: scores above it are bad, in samples and in the held-out text (default: the scorer's own).
    Where the store has scores of several preferences, the same samples and text are judged by each; `preferences`:
    scorers of these, by name, that a manifest cannot name (models, own code). `main`: as in `open_run`. Errors as
    `open_run`.
    """
    opened = open_run(run, tokens_dir, scorer, allow_other_scorer, main)
    manifest = opened.manifest
    tokens = opened.tokens
    text = HeldoutText(tokens, manifest.train["context"], heldout_tokens)
    evaluation = Evaluation(
        folder=opened.folder,
        judging=Judging(
            opened.scorer,
            opened.segmenter,
            opened.threshold(threshold),
            corpus_threshold=opened.corpus_threshold,
        ),
        scenarios=scenarios,
        heldout=Heldout(lambda model: text, [heldout_tokens]),
        kl=kl_from,
        capabilities=[capability.of_text(str(tokens.path)) for capability in capabilities],
        trained_on=None if manifest.scores in (None, tokens.preference) else manifest.scores,
        preferences=_other_judging(opened, preferences or {}, allow_other_scorer),
    )
    about = JudgedModel(
        run=opened.folder.path.name,
        objective=manifest.objective,
        seed=manifest.seed,
        tokens=manifest.counts.tokens,
        tokens_content=manifest.tokens_content,
        data=_data_section(tokens),
    )
    return _evaluate(evaluation, manifest.key, lambda: load_model(run), str(run), about)


def _other_judging(opened: JudgedRun, given: Mapping[str, Scorer], allow_other: bool) -> dict[str, Judging]:
    """How samples are judged by the other preferences of a run's store. A note says of which it is not known."""
    tokens = opened.tokens
    others = [name for name in tokens.manifest.scores if name != tokens.preference]
    for name in given:
        if name not in tokens.manifest.scores:
            raise ConfigError(f"preferences: {tokens.path} has no scores named {name!r}{did_you_mean(name, others)}")
    found = {}
    for name in others:
        scores = tokens.manifest.scores[name]
        try:
            if name in given:
                scorer = given[name]
                check_identity(scorer, scores.identity, allow_other)
            else:
                scorer = corpus_scorer(scores.scorer, scores.identity, allow_other)
        except ConfigError as error:
            if name in given:
                raise
            print(f"note: samples are not judged by the scores named {name!r}: {error}", file=sys.stderr)
            continue
        found[name] = Judging(scorer, opened.segmenter, tokens.with_scores(name).bad_above)
    return found


def evaluate_model(
    model: str,
    out: str | Path,
    scorer: Scorer | None,
    scenarios: dict[str, Scenario],
    *,
    threshold: float | None = None,
    segmenter: Segmenter | None = None,
    kl_from: KL | None = None,
    capabilities: Sequence[Capability] = (),
    revision: str | None = None,
    heldout: str | Path | None = None,
    heldout_tokens: int = HELDOUT_TOKENS,
    allow_other_scorer: bool = False,
    control_threshold: float | None = None,
) -> EvalResult:
    """Judge any causal LM, trained here or not, into folder `out`, as a run is judged.

    `heldout`: a token store, whose held-out documents are read in the model's own tokens, or a scored corpus, of
    which the first documents are read (4 bytes for each of `heldout_tokens`). Without it there is no held-out loss.
    `scorer` and `segmenter`: by default those of `heldout`. `threshold`: scores above it are bad (default: the
    scorer's own). `control_threshold`: segments with a score above it had
    the bad control token in training; by default what the model's record says, else `threshold`.

    Raises ConfigError if nothing says how to judge the model.
    """
    tokens = TokenStore.open(str(heldout)) if heldout is not None and is_token_store(heldout) else None
    corpus = corpus_of(tokens) if tokens is not None else ScoredCorpus(heldout) if heldout is not None else None
    data: TokensManifest | ScoreManifest | None = None
    if corpus is not None:
        data = corpus.manifest if tokens is None else tokens.manifest
    if scorer is None and data is None:
        raise ConfigError(
            f"{not_a_run(model)}, so nothing says how to judge it; name a scorer: --scorer pii, in Python scorer='pii'"
        )
    if scorer is None:
        assert data is not None
        scorer = corpus_scorer(data.scorer, data.identity, allow_other_scorer)
    elif data is not None:
        check_identity(scorer, data.identity, allow_other_scorer)
    if threshold is None:
        threshold = _own_threshold(scorer, tokens)
    if segmenter is None:
        segmenter = segmenter_from(data.segmenter) if data is not None else Lines()

    def text(loaded: LoadedModel) -> HeldoutText:
        assert corpus is not None
        own = in_tokens_of(loaded, corpus, tokens, heldout_tokens)
        return HeldoutText(own, min(loaded.positions, FOREIGN_CONTEXT), len(own.tokens))

    evaluation = Evaluation(
        folder=RunFolder(Path(out)),
        judging=Judging(scorer, segmenter, threshold, control_threshold),
        scenarios=scenarios,
        heldout=None if data is None else Heldout(text, [heldout_tokens, data.content, control_threshold]),
        kl=kl_from,
        capabilities=capabilities,
    )
    about = JudgedModel(run=model, revision=revision)
    return _evaluate(evaluation, model_mark(model, revision), lambda: load_model(model, revision), model, about)


# Running the parts


@dataclass(frozen=True)
class _Measured:
    """`eval/<part>.json`: the result of a part."""

    value: Any
    seconds: float
    written: str | None = None
    """Hash of the file that the part wrote."""


class _Runner:
    """Runs parts on one model, which is loaded when a part first needs it. Results are kept under their keys."""

    def __init__(self, folder: RunFolder, model_key: str, load: Callable[[], LoadedModel]) -> None:
        self.folder = folder
        self.model_key = model_key
        self.load = load
        self.loaded: LoadedModel | None = None
        self.earlier_kept = False

    def model(self) -> LoadedModel:
        if self.loaded is None:
            self.loaded = self.load()
        return self.loaded

    def kept(self, part: Part) -> _Measured | None:
        """The kept result of a part, if it was measured with the same settings and its file has not changed."""
        found = folders.kept(self.folder.part(part.name), self._key(part), _Measured)
        if found is None or (part.written is not None and found.written != store.path_hash(part.written)):
            return None
        try:
            return self._typed(part, found)
        except store.StoreError:  # a version that measured something else
            return None

    def _typed(self, part: Part, found: _Measured) -> _Measured:
        """The result with its value as a record instead of plain data."""
        return dataclasses.replace(found, value=store.as_record(found.value, part.result, self.folder.part(part.name)))

    def keep_earlier(self) -> None:
        """Before the first file of an earlier result is written again: keep that result next to it."""
        folder = self.folder
        if not self.earlier_kept and folder.eval.exists():
            parts = folder.part("x").parent
            earlier = folders.keep_earlier(folder.path, folder.eval.name, parts.name, "samples")
            print(
                f"note: {folder.eval} was judged with other settings; that result is kept in {earlier}", file=sys.stderr
            )
            folder.eval.unlink()
        self.earlier_kept = True

    def run(self, part: Part) -> tuple[Any, float]:
        """(result, seconds) of a part, measured now or kept."""
        if (found := self.kept(part)) is None:
            start = time.perf_counter()
            if part.written is not None:
                self.keep_earlier()
            value = part.measure(self.model())
            self.keep_earlier()
            written = None if part.written is None else store.path_hash(part.written)
            measured = _Measured(store.jsonable(value), time.perf_counter() - start, written)
            folders.keep(self.folder.part(part.name), self._key(part), measured)
            found = self._typed(part, measured)
        return found.value, found.seconds

    def _key(self, part: Part) -> str:
        return store.fingerprint([self.model_key, part.name, part.settings(), "eval/5"])


def _evaluate(
    evaluation: Evaluation, model_key: str, load: Callable[[], LoadedModel], model_name: str, about: JudgedModel
) -> EvalResult:
    """Run an evaluation and write `eval.json`. An earlier result with other settings is kept next to it."""
    key = evaluation.key(model_key)
    folder = evaluation.folder
    parts = folder.part("x").parent
    if (done := folders.kept(folder.eval, key, EvalResult)) is not None:
        folders.tidy(folder.path, parts)
        folders.done_before(folder.eval)
        return done
    known = (folder.eval, parts, folder.path / folders.MANIFEST, RedTeamFolder(folder.path).result)
    if folder.path.is_dir() and any(folder.path.iterdir()) and not any(place.exists() for place in known):
        raise store.StoreError(f"{folder.path} is not empty and was not made by `phf eval`; give another folder")
    parts.mkdir(parents=True, exist_ok=True)
    with locked(folder.path, "eval", shared=True), locked(parts, "eval"):
        folders.remove_leftovers(parts)
        return _measure_all(evaluation, key, model_key, load, model_name, about)


def _measure_all(
    evaluation: Evaluation,
    key: str,
    model_key: str,
    load: Callable[[], LoadedModel],
    model_name: str,
    about: JudgedModel,
) -> EvalResult:
    file = evaluation.folder.eval
    runner = _Runner(evaluation.folder, model_key, load)
    parts = evaluation.parts()
    capabilities = [capability_part(c, n) for n, c in enumerate(evaluation.capabilities)]
    failed: dict[str, str] = {}
    for name in capabilities:
        if runner.kept(parts[name]) is None:
            with _noted(name, failed):
                parts[name].check(runner.model())  # before anything takes long
    scenarios = {name: parts[scenario_part(name)] for name in evaluation.scenarios}
    skipped = [n for n, part in scenarios.items() if part.needs and not can_be_asked(runner.model(), part.needs)]
    if len(skipped) == len(scenarios):
        raise ConfigError(f"{model_name} has no control tokens, so it cannot be sampled in {', '.join(skipped)}")
    results: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    left_out = {*failed, *(scenario_part(s) for s in skipped)}
    left_out |= {again_part(s, other) for s in skipped for other in evaluation.preferences}
    asked = {n: p for n, p in parts.items() if n not in left_out}
    for name, part in asked.items():
        if name not in capabilities and runner.kept(part) is None:
            part.check(runner.model())  # before an earlier result is moved
    for name, part in asked.items():
        with _noted(name, failed) if name in capabilities else contextlib.nullcontext():
            results[name], seconds[name] = runner.run(part)
    heldout: HeldoutResult = results.get(heldout_part(), HeldoutResult())
    judged = [name for name in scenarios if name not in skipped]
    judging = evaluation.judging
    assert judging.scorer is not None
    result = EvalResult(
        **vars(about),
        key=f"{key} with failures" if failed else key,
        identity=judging.scorer.identity(),
        scorer=to_plain(judging.scorer),
        threshold=judging.threshold,
        scenarios={name: results[scenario_part(name)] for name in judged},
        understanding=heldout.understanding,
        heldout=_section(heldout),
        skipped=skipped,
        kl=results.get("kl"),
        capabilities=[
            _named(results[n], c) for n, c in zip(capabilities, evaluation.capabilities, strict=True) if n in results
        ],
        failed=failed,
        preferences={
            other: PreferenceResult(
                identity=how.scorer.identity(),
                scorer=to_plain(how.scorer),
                threshold=how.threshold,
                scenarios={name: results[again_part(name, other)] for name in judged},
                heldout=_section(results.get(heldout_part(other), HeldoutResult())),
                understanding=results.get(heldout_part(other), HeldoutResult()).understanding,
            )
            for other, how in evaluation.preferences.items()
            if how.scorer is not None
        },
        seconds=seconds,
    )
    runner.keep_earlier()
    store.write_json(file, result)
    return store.read_record(file, EvalResult)


def _section(found: HeldoutResult) -> HeldoutSection:
    return HeldoutSection(found.none, found.oracle, found.good)


@contextlib.contextmanager
def _noted(name: str, failed: dict[str, str]) -> Iterator[None]:
    """Note why a part fails instead of losing the rest: everything else has been judged, or will be."""
    try:
        yield
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        if not isinstance(error, PhfError | OSError):
            traceback.print_exc()
        failed[name] = f"{type(error).__name__}: {error}"
        print(f"failed: {name}: {error}", file=sys.stderr)


def _named(result: CapabilityResult, capability: Capability) -> CapabilityResult:
    """The result with the capability's name and settings, which parts kept by earlier versions lack."""
    settings = to_plain(capability)
    return dataclasses.replace(result, name=settings["name"], settings=settings)


def _data_section(tokens: TokenStore) -> DataSection:
    """Manifests of the tokens and of the scored corpus, the latter for the scores that were trained on."""
    found = places(tokens.manifest.scored, tokens.manifest.scored_from_here, tokens.path)
    corpus = next((place for place in found if (place / folders.MANIFEST).exists()), found[-1])
    if not folders.has_manifest(corpus, ScoreManifest):
        return DataSection(tokens.manifest, None)
    scored = folders.read_manifest(corpus, ScoreManifest)
    added = corpus / ADDED / tokens.preference
    if tokens.preference != scored.identity["name"] and folders.has_manifest(added, ScoreManifest):
        own = folders.read_manifest(added, ScoreManifest)
        scored = dataclasses.replace(
            scored,
            identity=own.identity,
            scorer=own.scorer,
            labels=own.labels,
            failures=own.failures,
            counts=own.counts,
        )
    return DataSection(tokens.manifest, scored)


def _own_threshold(scorer: Scorer, tokens: TokenStore | None) -> float:
    """The scorer's own threshold, else the store's, else 0, which is noted."""
    if scorer.bad_above is not None:
        return scorer.bad_above
    if tokens is not None:
        return tokens.bad_above
    print(
        "note: the scorer states no threshold; scores above 0 count as bad. Say another with --threshold",
        file=sys.stderr,
    )
    return 0.0
