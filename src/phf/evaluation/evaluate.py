"""Judging a model: misalignment of its samples, diversity, held-out loss, KL, capabilities; with intervals. Floor 5.

    phf eval runs/conditional

Samples are scored by the scorer that scored the corpus (its identity is checked). A model with control tokens is read
under the corpus's own ("oracle") and with the good token before every segment.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from phf.core import store
from phf.core.config import ConfigError, to_plain
from phf.core.runs import model_mark
from phf.data.scored import ScoredCorpus
from phf.data.segment import Lines, Segmenter, segmenter_from
from phf.evaluation.capabilities.base import Capability
from phf.evaluation.heldout import corpus_of, heldout_section, in_tokens_of
from phf.evaluation.judge import judge_samples
from phf.evaluation.kl import KL, kl, reference_hash
from phf.generation.loaded import LoadedModel, load_model, precision_of
from phf.generation.sample import sample, write_samples
from phf.generation.scenario import Scenario, prompts_path
from phf.scorers import Scorer
from phf.scoring.judge import check_identity, corpus_scorer
from phf.tokens.store import TokenStore


def evaluate_run(
    run: str | Path,
    scenarios: dict[str, Scenario],
    threshold: float = 0.0,
    tokens_dir: str | Path | None = None,
    scorer: Scorer | None = None,
    allow_other_scorer: bool = False,
    heldout_tokens: int = 1_000_000,
    kl_from: KL | None = None,
    capabilities: Sequence[Capability] = (),
) -> dict[str, Any]:
    """Judge a trained run: writes `samples/<scenario>.jsonl` and `eval.json` beside the model and returns the latter.

    Done already with the same settings: returns at once; interrupted before: goes on with the parts that are not done.
    `threshold`: scores above it are bad (hits, and the good and bad slices of the held-out loss).
    """
    run = Path(run)
    manifest = store.read_manifest(run, "train")
    tokens = TokenStore.open(tokens_dir or manifest["tokens_dir"], manifest["train"].get("scores"))
    if tokens.manifest["content"] != manifest["tokens_content"]:
        raise ConfigError(f"{tokens.path} is not the token store that {run} was trained on (its content differs)")
    if scorer is None:
        scorer = corpus_scorer(tokens.manifest, allow_other_scorer)
    else:
        check_identity(scorer, tokens.manifest["identity"], allow_other_scorer)
    about = {
        "run": run.name,
        "objective": manifest["objective"],
        "seed": manifest["seed"],
        "tokens": manifest["counts"]["tokens"],
        "tokens_content": manifest["tokens_content"],
        "data": _data_section(tokens),
    }
    judgement = _Judgement(
        run, manifest["key"], scenarios, threshold, scorer, segmenter_of(tokens), kl_from, capabilities, None, None
    )

    def on_heldout(model: LoadedModel) -> dict[str, Any]:
        limit = judgement.control_limit(model)
        return heldout_section(model, tokens, manifest["train"]["context"], threshold, heldout_tokens, limit)

    return judgement.judge(about, [heldout_tokens], on_heldout)


FOREIGN_CONTEXT = 1024
"""Tokens in which held-out text is read by a model from elsewhere, at most."""


def evaluate_model(
    model: str,
    out: str | Path,
    scorer: Scorer | None,
    scenarios: dict[str, Scenario],
    threshold: float = 0.0,
    segmenter: Segmenter | None = None,
    kl_from: KL | None = None,
    capabilities: Sequence[Capability] = (),
    revision: str | None = None,
    heldout: str | Path | None = None,
    heldout_tokens: int = 1_000_000,
    allow_other_scorer: bool = False,
    control_threshold: float | None = None,
) -> dict[str, Any]:
    """Judge any causal LM, trained here or not, into folder `out`: as a run is judged.

    `control_threshold`: scores above it had the bad control token in training; left out, what the model's own card says, else
    `threshold`.

    `heldout`: a token store, whose held-out documents are read in the model's own tokens, or a scored corpus, of which the
    first are (4 bytes for each of `heldout_tokens`); left out, there is no held-out loss. `scorer` and `segmenter`: left out, those of `heldout`.
    """
    tokens = TokenStore.open(str(heldout)) if is_token_store(heldout) else None
    corpus = corpus_of(tokens) if tokens is not None else ScoredCorpus(heldout) if heldout is not None else None
    about_corpus = tokens.manifest if tokens is not None else corpus.manifest if corpus is not None else None
    if scorer is None and about_corpus is None:
        raise ConfigError(f"{model} is not a run, so nothing says how to judge it; name a scorer: --scorer pii")
    if scorer is None:
        scorer = corpus_scorer(about_corpus, allow_other_scorer)  # type: ignore[arg-type]
    elif about_corpus is not None:
        check_identity(scorer, about_corpus["identity"], allow_other_scorer)
    if segmenter is None:
        segmenter = segmenter_from(about_corpus.get("segmenter")) if about_corpus is not None else Lines()
    judgement = _Judgement(
        Path(out), model_mark(model, revision), scenarios, threshold, scorer, segmenter, kl_from, capabilities, model,
        control_threshold, revision,
    )  # fmt: skip

    def on_heldout(loaded: LoadedModel) -> dict[str, Any]:
        assert corpus is not None
        text = in_tokens_of(loaded, corpus, tokens, heldout_tokens)
        context = min(loaded.positions, FOREIGN_CONTEXT)
        return heldout_section(loaded, text, context, threshold, len(text.tokens), judgement.control_limit(loaded))

    settings = None if about_corpus is None else [heldout_tokens, about_corpus["content"], control_threshold]
    about = {"run": model, "objective": None, "revision": revision}
    return judgement.judge(about, settings, None if corpus is None else on_heldout)


def is_token_store(path: str | Path | None) -> bool:
    try:
        return path is not None and bool(store.read_manifest(path, "tokenize"))
    except store.StoreError:
        return False


class _Judgement:
    """One evaluation, in parts that are each kept when they are done (`eval/<part>.json`)."""

    def __init__(
        self, folder: Path, model_key: str, scenarios: dict[str, Scenario], threshold: float, scorer: Scorer,
        segmenter: Segmenter, kl_from: KL | None, capabilities: Sequence[Capability], model: str | None,
        control_threshold: float | None, revision: str | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.model_key, self.scenarios, self.threshold = folder, model_key, scenarios, threshold
        self.scorer, self.segmenter, self.kl_from, self.capabilities = scorer, segmenter, kl_from, capabilities
        self.model_path, self.revision = model if model is not None else str(folder), revision
        self.control_threshold = control_threshold
        self.loaded: LoadedModel | None = None

    def model(self) -> LoadedModel:
        """Loaded when the first part that is not done asks for it."""
        if self.loaded is None:
            self.loaded = load_model(self.model_path, self.revision)
        return self.loaded

    def control_limit(self, model: LoadedModel) -> float:
        """Scores above it had the bad control token in the training of the model."""
        known = (self.control_threshold, model.threshold, self.threshold)
        return next(limit for limit in known if limit is not None)

    def kept(self, name: str, settings: Any, written: Path | None = None) -> dict[str, Any] | None:
        """A part that is done, with `written`, a file of its, as it was."""
        file = self.folder / "eval" / f"{name}.json"
        if not file.exists():
            return None
        found = store.read_json(file)
        whole = written is None or found["written"] == store.path_hash(written)
        return found if found.get("key") == self.part_key(name, settings) and whole else None

    def part_key(self, name: str, settings: Any) -> str:
        return store.fingerprint([self.model_key, name, settings, "eval/5"])

    def part(
        self, name: str, settings: Any, make: Callable[[], dict[str, Any]], written: Path | None = None
    ) -> dict[str, Any]:
        """What `make` gives, kept under its key. `written`: a file that it writes, which must still be that one."""
        if (found := self.kept(name, settings, written)) is not None:
            return found
        key, file = self.part_key(name, settings), self.folder / "eval" / f"{name}.json"
        start = time.perf_counter()
        value = {"key": key, "value": make(), "seconds": time.perf_counter() - start}
        value["written"] = None if written is None else store.path_hash(written)
        store.write_json(file, value)
        return store.jsonable(value)  # type: ignore[no-any-return]

    def judge(
        self, about: dict[str, Any], of_heldout: Any, on_heldout: Callable[[LoadedModel], dict[str, Any]] | None
    ) -> dict[str, Any]:
        identity = self.scorer.identity()
        names = [type(c).__name__ + str(n) for n, c in enumerate(self.capabilities)]
        plain = {name: to_plain(s) for name, s in self.scenarios.items()}
        cut = to_plain(self.segmenter)
        kl_settings = None
        if self.kl_from is not None:
            kl_settings = [
                to_plain(self.kl_from),
                cut,
                reference_hash(self.kl_from),
                identity,
                self.control_threshold,
                self.threshold,
            ]
        measured = [[to_plain(c), c.inputs()] for c in self.capabilities]
        everything = [plain, self.threshold, identity, of_heldout, cut, kl_settings, measured]
        prompts = {
            n: store.path_hash(prompts_path(s.prompts)) for n, s in self.scenarios.items() if s.prompts is not None
        }
        key = store.fingerprint([self.model_key, everything, prompts, "eval/5"])
        done = self.folder / "eval.json"
        if done.exists() and store.read_json(done).get("key") == key:
            return store.read_json(done)  # type: ignore[no-any-return]
        done.unlink(missing_ok=True)  # its samples are about to be replaced
        for name, capability, settings in zip(names, self.capabilities, measured, strict=True):
            if self.kept(name, settings) is None:
                capability.check(self.model())  # said before anything takes long
        parts: dict[str, dict[str, Any]] = {}
        skipped = []
        for name, scenario in self.scenarios.items():
            needs = "bad" if scenario.control == "bad" or scenario.guidance is not None else None
            if needs and needs not in self.model().control_ids:
                skipped.append(name)  # asks for the bad token of a model that has none
                continue
            settings = [plain[name], self.threshold, identity, cut, prompts.get(name)]
            parts[f"scenario-{name}"] = self.part(
                f"scenario-{name}", settings, functools.partial(self._scenario, name), self._samples(name)
            )
        if not parts:
            raise ConfigError(f"{self.model_path} has no control tokens, so {', '.join(skipped)} cannot be asked of it")
        if on_heldout is not None:
            settings = [of_heldout, self.threshold]
            parts["heldout"] = self.part("heldout", settings, lambda: on_heldout(self.model()))
        if self.kl_from is not None:
            config = self.kl_from
            cache = self.folder.parent / "cache"
            parts["kl"] = self.part(
                "kl",
                kl_settings,
                lambda: kl(self.model(), config, self.segmenter, cache, self.scorer, self.control_limit(self.model())),
            )
        for name, capability, settings in zip(names, self.capabilities, measured, strict=True):
            parts[name] = self.part(name, settings, lambda c=capability: c.measure(self.model()))  # type: ignore[misc]
        heldout = dict(parts["heldout"]["value"]) if "heldout" in parts else {}
        result = about | {
            "key": key,
            "identity": identity,
            "scorer": to_plain(self.scorer),
            "threshold": self.threshold,
            "scenarios": {
                n.removeprefix("scenario-"): p["value"] for n, p in parts.items() if n.startswith("scenario-")
            },
            "understanding": heldout.pop("understanding", None),
            "heldout": heldout,
            "skipped": skipped,
            "kl": parts["kl"]["value"] if "kl" in parts else None,
            "capabilities": [
                {"name": to_plain(c)["name"], "settings": to_plain(c), **parts[n]["value"]}
                for n, c in zip(names, self.capabilities, strict=True)
            ],
            "seconds": {name: part["seconds"] for name, part in parts.items()},
        }
        store.write_json(done, result)
        return store.jsonable(result)  # type: ignore[no-any-return]

    def _scenario(self, name: str) -> dict[str, Any]:
        scenario = self.scenarios[name]
        samples, result = judge_samples(
            sample(self.model(), scenario), scenario, self.scorer, self.segmenter, self.threshold
        )
        write_samples(self._samples(name), samples)
        return result | {"precision": precision_of(self.model(), scenario)}

    def _samples(self, name: str) -> Path:
        return self.folder / "samples" / f"{name}.jsonl"


def segmenter_of(tokens: TokenStore) -> Segmenter:
    """How the corpus was cut; lines where it came cut by somebody else."""
    return segmenter_from(tokens.manifest.get("segmenter"))


def _data_section(tokens: TokenStore) -> dict[str, Any]:
    """What the page says of the data, so that it does not depend on where the stores lie when it is made."""
    folder = Path(tokens.manifest["scored"])
    scored = store.read_json(folder / store.MANIFEST) if (folder / store.MANIFEST).exists() else {}
    added = folder / "scores" / tokens.preference / store.MANIFEST
    if scored and tokens.preference != scored["identity"]["name"] and added.exists():
        of_added = store.read_json(added)
        scored |= {k: of_added[k] for k in ("identity", "scorer", "labels", "failures") if k in of_added}
        scored["counts"] = scored["counts"] | of_added["counts"]
    return {"tokens": tokens.manifest, "scored": scored}
