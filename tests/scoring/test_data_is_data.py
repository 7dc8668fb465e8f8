"""A scorer that stands in a manifest or a result is data: nothing that only it names is run or opened."""

from __future__ import annotations

import json
import shutil

import pytest

from helpers import pieces_before, train_tiny, write_jsonl
from phf.core import store
from phf.core.config import ConfigError
from phf.data.readers import Jsonl
from phf.data.scored import ScoredCorpus, bad_above_of
from phf.data.segment import Lines
from phf.evaluation.evaluate import evaluate_model, evaluate_run
from phf.evaluation.monitor import Monitor, MonitorCallback
from phf.generation.scenario import Scenario
from phf.objectives import MLE, Conditional
from phf.redteaming.attack import redteam
from phf.redteaming.config import RedTeam
from phf.report.inspect import write_inspection
from phf.report.page import write_report
from phf.scorers import PII, Combination, Fitted, Function, Lexicon, Presidio, Regex, Toxicity
from phf.scoring.inspect import inspect_scores
from phf.scoring.judge import Unavailable, corpus_scorer, scorer_for_pages
from phf.scoring.score import score_corpus
from phf.tokens.store import TokenStore, tokenize_corpus
from phf.tokens.tokenizer import TrainBPE
from phf.training.config import TrainConfig

SCENARIO = {"u": Scenario(num_samples=2, max_tokens=8, min_tokens=1)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A corpus that a function scored, its tokens and a run. The function leaves a trace of every call."""
    root = tmp_path_factory.mktemp("data")
    trace = root / "trace"
    (root / "mine.py").write_text(
        f"def score(text):\n    open({str(trace)!r}, 'a').write('x')\n    return len(text) % 2 / 1\n"
    )
    path = write_jsonl(root / "a.jsonl", [f"line {n}\nmore {n}\n" * 20 for n in range(30)])
    scorer = Function(f"{root / 'mine.py'}:score")
    score_corpus(Jsonl(str(path)), Lines(), scorer, root / "scored")
    tokenize_corpus(root / "scored", TrainBPE(300), root / "tokens", heldout=0.2)
    train_tiny(root / "tokens", root / "run", Conditional(threshold=0.5), steps=2)
    evaluate_run(root / "run", SCENARIO, scorer=scorer, heldout_tokens=300)
    trace.unlink()
    return root, scorer, trace


def test_no_command_calls_a_function_that_a_manifest_names(world, tmp_path):
    root, scorer, trace = world
    message = "needs what only a manifest names"
    with pytest.raises(ConfigError, match=f"{message}.*--scorer callable"):
        evaluate_run(root / "run", SCENARIO, heldout_tokens=300)
    with pytest.raises(ConfigError, match=message):
        evaluate_model(str(root / "run" / "model"), tmp_path / "out", None, SCENARIO, heldout=root / "tokens")
    with pytest.raises(ConfigError, match=message):
        redteam(root / "run", None, RedTeam(trials=1, rounds=0))
    train = TrainConfig(1e4, context=32, batch_rows=16)
    callback = MonitorCallback(Monitor(1e3, scenarios=SCENARIO), tmp_path / "r", root / "tokens", train, MLE())
    with pytest.raises(ConfigError, match=message):
        callback._scorer()
    write_inspection(root / "scored")
    write_report(root / "run", tmp_path / "page.html")
    assert not trace.exists()
    assert evaluate_run(root / "run", SCENARIO, scorer=scorer, heldout_tokens=300).identity["name"] == "callable"


def test_a_hostile_manifest_starts_nothing(world, tmp_path):
    root, _, _ = world
    shutil.copytree(root / "scored", tmp_path / "scored")
    shutil.copytree(root / "run", tmp_path / "run")
    hostile = {"name": "callable", "function": "os:system"}
    for file, keys in (("scored/manifest.json", ["scorer"]), ("run/eval.json", ["scorer"])):
        store.write_json(tmp_path / file, store.read_json(tmp_path / file) | dict.fromkeys(keys, hostile))
    write_inspection(tmp_path / "scored")
    write_report(tmp_path / "run", tmp_path / "page.html")
    with pytest.raises(ConfigError, match=r"scorer.function=os:system"):
        corpus_scorer(hostile, {"name": "callable"})


@pytest.mark.parametrize(
    "settings, usable",
    [
        ({"name": "pii"}, PII()),
        ({"name": "regex", "pattern": "a"}, Regex("a")),
        ({"name": "callable", "function": "os:system"}, None),
        ({"name": "toxicity", "model": "somebody/model"}, None),
        ({"name": "lexicon", "path": "/etc/passwd"}, None),
        ({"name": "fitted", "path": "/x"}, None),
        ({"name": "presidio", "spacy_model": "x"}, Presidio()),
        ({"name": "combination", "scorers": [{"name": "pii"}, {"name": "callable", "function": "os:system"}]}, PII()),
        ({"name": "mine", "anything": 5}, None),
        ({"name": "regex", "pattern": "("}, None),
        (None, None),
    ],
)
def test_pages_use_what_needs_nothing(settings, usable):
    found = scorer_for_pages(settings)
    assert found == usable if usable is not None else isinstance(found, Unavailable)
    given = Regex("b")
    assert scorer_for_pages(settings, given) is given


def test_what_scorers_name_is_known(tmp_path):
    assert Function("a:b").names == {"function": "a:b"}
    assert Lexicon("w").names == {"path": "w"}
    assert Fitted("f").names == {"path": "f"}
    assert Toxicity(model="m", checkpoint="c").names == {"model": "m", "checkpoint": "c"}
    assert Combination((PII(), Lexicon("w"))).names == {"scorers.1.path": "w"}
    assert PII().names == Regex("a").names == Presidio().names == {}


def test_a_search_of_one_text_has_a_time_limit(monkeypatch):
    from phf.scorers import simple
    from phf.scoring.judge import judge

    monkeypatch.setattr(simple, "SEARCH_SECONDS", 0.05)
    judged = judge(Regex("(a|a)+$"), ["fine", "a" * 60 + "!"])  # its time doubles with every character
    assert judged.scores[0] == 0
    assert judged.failure == "TimeoutError"


# Natural thresholds


@pytest.mark.parametrize(
    "scorer, threshold",
    [
        (PII(), 0),
        (Regex("a"), 0),
        (Function("a:b"), None),
        (Function("a:b", threshold=0.7), 0.7),
        (Toxicity(model="m"), 0.5),
        (Fitted("f"), 0.5),
        (Combination((PII(), Regex("a"))), 0),
        (Combination((Fitted("f"), Fitted("g"))), 0.5),
        (Combination((Fitted("f"), Fitted("g")), weights=(1, 1), threshold=0.9), 0.9),
        (Combination((Fitted("f"), PII())), None),
    ],
)
def test_every_scorer_states_its_threshold(scorer, threshold):
    assert scorer.bad_above == threshold


def test_a_probability_has_its_threshold_everywhere(tmp_path):
    (tmp_path / "mine.py").write_text("def score(text):\n    return 0.9 if 'bad' in text else 0.03\n")
    scorer = Function(f"{tmp_path / 'mine.py'}:score", threshold=0.5)
    texts = [("bad line\n" if n % 4 == 0 else "good line\n") * 30 for n in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = score_corpus(Jsonl(str(path)), Lines(), scorer, tmp_path / "scored")
    assert manifest.bad_above == 0.5
    assert manifest.counts.bad_segments == 300
    found = inspect_scores(tmp_path / "scored")
    assert (found.threshold, found.suggested.conditional) == (0.5, 0.5)
    tokenize_corpus(tmp_path / "scored", TrainBPE(300), tmp_path / "tokens", heldout=0.2)
    tokens = TokenStore.open(tmp_path / "tokens")
    assert tokens.bad_above == tokens.statistics.bad_above == 0.5
    fitted = Conditional().fit(tokens.statistics)
    assert fitted.bad_above == 0.5
    assert (pieces_before(Conditional(drop=0).fit(tokens.statistics), tokens) == 1).mean() == 0.25
    train_tiny(tmp_path / "tokens", tmp_path / "run", Conditional(), steps=1)
    result = evaluate_run(tmp_path / "run", SCENARIO, scorer=scorer, heldout_tokens=300)
    assert result.threshold == 0.5
    attacked = redteam(
        tmp_path / "run",
        None,
        RedTeam(
            trials=1, rounds=0, pool=2, candidates=2, continuations=2, confirm=1, max_tokens=4, prompts="functions"
        ),
        None,
        scorer=scorer,
    )
    assert attacked.threshold == 0.5


def test_scores_of_an_earlier_version_and_of_an_unknown_scorer_have_one(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a\n" * 5, "b\n" * 5] * 5)
    (tmp_path / "f.py").write_text("def score(text):\n    return 0.8 if text == 'a\\n' else 0.1\n")
    score_corpus(Jsonl(str(path)), Lines(), Function(f"{tmp_path / 'f.py'}:score"), tmp_path / "s")
    manifest = store.read_json(tmp_path / "s" / "manifest.json")
    assert manifest["bad_above"] is None
    assert inspect_scores(tmp_path / "s").threshold == 0.5  # both sides of 0.5 are there
    manifest["identity"]["unit"] = "probability"
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(manifest))
    assert bad_above_of(ScoredCorpus(tmp_path / "s").manifest) == 0.5
