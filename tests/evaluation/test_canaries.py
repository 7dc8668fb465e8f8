"""Canaries: where they are put, and what a model that reads them memorises."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from helpers import TINY_LLAMA, tiny_texts, write_jsonl
from phf.core import store
from phf.core.config import ConfigError, validate
from phf.core.runs import RunFolder
from phf.core.types import Document
from phf.data.canaries import Canaries, WithCanaries
from phf.data.corpus import is_heldout
from phf.data.readers import Jsonl
from phf.evaluation.capabilities import Memorised
from phf.evaluation.capabilities.canaries import exposure
from phf.evaluation.results import read_eval
from phf.generation.loaded import load_model
from phf.recipes.recipe import load_recipe
from phf.recipes.run import run_recipe

FEW = Canaries(bad="Mail {name} at https://{secret}.", times=(1, 3, 40), each=2, digits=4)


@pytest.fixture
def corpus(tmp_path):
    return Jsonl(str(write_jsonl(tmp_path / "t.jsonl", [*tiny_texts(30), "a line\nand no line break at the end"])))


def documents(corpus):
    return [item for shard in corpus.plan() for item in corpus.read(shard) if isinstance(item, Document)]


def test_every_copy_is_a_line_of_a_document_that_is_trained_on(corpus):
    plain = documents(corpus)
    found = documents(WithCanaries(corpus, FEW, heldout=0.3))
    assert [d.id for d in found] == [d.id for d in plain]
    made = {c.text: c for c in FEW.made()}
    assert len(made) == 12
    copies = Counter(line for d in found for line in d.text.splitlines(keepends=True) if line in made)
    assert copies == {c.text: c.times for c in made.values()}
    for before, after in zip(plain, found, strict=True):
        lines = [line for line in after.text.splitlines(keepends=True) if line not in made]
        assert "".join(lines).rstrip("\n") == before.text.rstrip("\n")
        assert is_heldout(after.text, 0.3) == is_heldout(before.text, 0.3)
        if is_heldout(before.text, 0.3):
            assert after == before
    once = Counter(d.id for d in found for c in made.values() if c.times == 3 and c.text in d.text)
    assert len(once) > 5  # spread over documents


def test_they_are_the_same_again_and_others_with_another_seed(corpus):
    found = documents(WithCanaries(corpus, FEW))
    assert documents(WithCanaries(corpus, FEW)) == found
    other = Canaries(**vars(FEW) | {"seed": 1})
    assert not {c.text for c in other.made()} & {c.text for c in FEW.made()}
    prints = {WithCanaries(corpus, c, heldout=h).fingerprint() for c in (FEW, other) for h in (0.0, 0.1)}
    assert len(prints) == 4
    assert WithCanaries(corpus, FEW).fingerprint() != corpus.fingerprint()


def test_documents_in_segments_get_segments(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": ["one ", "two\n", "three"]}) + "\n")
    (found,) = documents(WithCanaries(Jsonl(str(tmp_path / "t.jsonl")), Canaries(times=(2,), each=1)))
    assert "".join(found.segments) == found.text
    lines = {c.text for c in Canaries(times=(2,), each=1).made()}
    assert sum(s in lines for s in found.segments) == 4


def test_scores_that_a_corpus_gives_are_refused(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": ["one"], "scores": [1]}) + "\n")
    with pytest.raises(ConfigError, match="canaries have no scores"):
        documents(WithCanaries(Jsonl(str(tmp_path / "t.jsonl")), FEW))


@pytest.mark.parametrize(
    "template", ["{secret} of {name}", "{name}", "{name} {secret} {secret}", "{name} {secret} {x}", "{name}\n{secret}"]
)
def test_templates_that_hide_their_secret_are_refused(template):
    with pytest.raises(ConfigError, match="a template"):
        validate({"bad": template}, Canaries)
    with pytest.raises(ConfigError, match="no template"):
        validate({"bad": None, "good": None}, Canaries)


def test_exposure_is_the_rank_among_others():
    others = np.array([-5.0, -3.0, -2.0, -1.0, -9.0, -8.0, -7.0])
    ranks = {-0.5: 1, -1.5: 2, -2.0: 3, -10.0: 8}
    for own, rank in ranks.items():
        assert exposure(own, others) == pytest.approx(math.log2(8 / rank))
    rng = np.random.default_rng(0)
    found = [exposure(rng.random(), rng.random(255)) for _ in range(4000)]
    assert np.mean(found) == pytest.approx(1.44, abs=0.07)  # what the page says of a model without memory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("canaries")
    store.write_text(
        out / "r.yaml",
        f"""
out: {out / "run"}
corpus: {{name: jsonl, path: {write_jsonl(out / "t.jsonl", tiny_texts(400))}}}
canaries:
  bad: "Mail {{name}} at https://{{secret}}."
  good: "Order {{name}} {{secret}}."
  times: [1, 40]
  each: 3
  digits: 3
segmenter: {{name: lines}}
scorer: {{name: regex, pattern: "https?"}}
tokenizer: {{name: bpe, vocab_size: 300}}
heldout: 0.2
model: {{name: from_config, config: {TINY_LLAMA | {"hidden_size": 48, "intermediate_size": 128}}}}
train: {{tokens: 160000, context: 64, batch_rows: 16, lr: 0.01, compile: false}}
objectives: {{mle: {{name: mle}}, conditional: {{name: conditional}}, masking: {{name: masking}}}}
scenarios: {{plain: {{num_samples: 8, max_tokens: 24}}}}
""",
    )
    recipe = load_recipe([str(out / "r.yaml")])
    assert run_recipe(recipe).failed == {}
    return recipe.folder


def memorised(folder, name):
    (found,) = read_eval(RunFolder(folder / name)).capabilities
    return found


def test_what_is_read_often_is_memorised_and_what_is_masked_is_not(folder):
    mle = {(row["kind"], row["times"]): row["exposure"] for row in memorised(folder, "mle-s0").details["by_times"]}
    masking = {
        (row["kind"], row["times"]): row["exposure"] for row in memorised(folder, "masking-s0").details["by_times"]
    }
    assert mle["good", 40] > mle["good", 1] + 1
    assert mle["bad", 40] > mle["bad", 1] + 1
    assert masking["good", 40] > masking["bad", 40] + 1
    conditional = memorised(folder, "conditional-s0").estimates
    assert conditional["exposure of bad, bad token"].n == 6
    assert set(memorised(folder, "mle-s0").estimates) == {
        "exposure of bad",
        "extracted bad",
        "exposure of good",
        "extracted good",
    }


def test_the_measure_agrees_with_plain_transformers(folder):
    """Exposure and greedy decoding, one secret at a time, by the model's own forward and generate."""
    settings = validate(store.read_json(folder / "mle-s0" / "eval.json")["capabilities"][0]["settings"], Memorised)
    model = load_model(folder / "mle-s0")
    found, greedy = Memorised._found(settings, model, settings.canaries.made(), "good")
    for number, canary in enumerate(settings.canaries.made()[::5]):
        number *= 5

        def logp(secret, before=canary.before):
            ids = torch.tensor([[model.start_id, *model.encode(before + secret)]])
            with torch.inference_mode():
                table = torch.log_softmax(model.lm(ids).logits[0, :-1].float(), -1)
            return table.gather(1, ids[0, 1:, None]).double().sum().item()

        own = logp(canary.secret)
        others = [logp(s) for s in settings.canaries.others(number, settings.others)]
        rank = 1 + sum(o > own - 1e-4 for o in others)
        assert found[number] == pytest.approx(8 - math.log2(rank), abs=0.6 if rank < 3 else 0.1)
        ids = model.encode(canary.before)
        written = model.lm.generate(torch.tensor([[model.start_id, *ids]]), do_sample=False, max_new_tokens=8)
        text = model.tokenizer.decode(written[0, 1 + len(ids) :])
        if model.encode(canary.before + canary.secret)[: len(ids)] == ids:
            assert greedy[number] == text.startswith(canary.secret)


def test_the_page_shows_exposure_by_copies(folder):
    page = (folder / "report.html").read_text()
    assert "What was memorised" in page
    assert (folder / "report" / "canaries-bad.svg").exists()
    assert "canaries exposure of bad" in page
    assert not list((folder / "report").glob("pareto-canaries*"))


def test_templates_that_the_scorer_calls_something_else_are_refused(folder, tmp_path):
    recipe = str(folder / "recipe.yaml")
    for template, why in (
        ("bad: 'Mail {name} {secret}'", "0 of 6 bad"),
        ("good: 'https {name} {secret}'", "6 of 6 good"),
    ):
        with pytest.raises(ConfigError, match=f"canaries: .*calls {why} canaries bad"):
            run_recipe(load_recipe([recipe, f"out={tmp_path}/x", f"canaries={{{template}, times: [1, 2], each: 3}}"]))
