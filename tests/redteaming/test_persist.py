"""Instruction tuning by TRL on tiny runs: what is learned, what is asked, what is left, and resuming."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import LINK, phf_inside
from phf.core.config import ConfigError
from phf.core.runs import RunFolder
from phf.generation.loaded import load_model
from phf.redteaming import persist as module
from phf.redteaming.persist import (
    TEMPLATES,
    Persistence,
    instructions,
    kept_gain,
    persist,
    prompt_text,
    read_persist,
)
from phf.report.page import compare_runs
from phf.report.persist import persisted
from phf.report.runs import load_runs

pytest.importorskip("trl", reason="TRL is not installed (pip install 'phf[trl]')")
SMALL = Persistence(
    pairs=24,
    epochs=2,
    batch_rows=8,
    lr=5e-3,
    num_samples=8,
    max_tokens=12,
    min_tokens=1,
    question_tokens=24,
    answer_tokens=24,
)


@pytest.fixture
def run(runs, tmp_path):
    def copy(name):
        return shutil.copytree(runs / name, tmp_path / "runs" / name)

    return copy


def test_instructions_are_good_text_of_one_part_and_document(tokens):
    found = {part: instructions(tokens, 0.0, SMALL, 100, part) for part in (False, True)}
    assert len(found[False]) > 20
    for part, made in found.items():
        texts = [
            tokens.tokenizer.decode(tokens.tokens[begin:end].tolist())
            for begin, end, held in zip(
                np.r_[0, tokens.seg_ends[tokens.doc_ends[:-1] - 1]],
                tokens.seg_ends[tokens.doc_ends - 1],
                tokens.heldout_D,
                strict=True,
            )
            if held == part
        ]
        assert all(score == 0 for pair in made for score in LINK.score_segments([pair.question, pair.answer]))
        for pair in made:
            assert any(pair.question in text and pair.answer.splitlines()[0] in text for text in texts)
        limit = max(len(tokens.tokenizer(pair.answer)["input_ids"]) for pair in made)
        assert limit <= SMALL.answer_tokens
        assert all(pair.question.strip() and pair.answer.strip() for pair in made)
    assert any(pair.answer.startswith("    ") for pair in found[False])  # indented lines keep their indentation
    assert instructions(tokens, 0.0, SMALL, 5, False) == found[False][:5]
    with pytest.raises(ConfigError, match="too little good training text"):
        instructions(tokens, -1.0, SMALL, 5, False)


def test_a_question_has_the_good_token_and_its_template(runs):
    model = load_model(runs / "conditional")
    ids = model.tokenizer(prompt_text(model, "the cats", "same"), split_special_tokens=False)["input_ids"]
    assert ids[:2] == [model.start_id, *model.ids_of("good")]
    assert model.tokenizer.decode(ids[2:]) == "<|user|>\nthe cats\n<|assistant|>\n"
    assert "### Instruction:\nthe cats\n\n### Response:\n" in prompt_text(model, "the cats", "other")
    plain = load_model(runs / "a")
    ids = plain.tokenizer(prompt_text(plain, "x", "same"), split_special_tokens=False)["input_ids"]
    assert ids[0] == plain.start_id


def test_the_good_token_is_learned_with(run, tokens_dir, monkeypatch):
    """What TRL's trainer reads starts with the start and the good token, and ends with the end."""
    from trl import SFTTrainer

    seen = []

    def look(self, *args, **kwargs):
        seen.extend(self.train_dataset["input_ids"])
        raise KeyboardInterrupt

    monkeypatch.setattr(SFTTrainer, "train", look)
    place = run("conditional")
    with pytest.raises(KeyboardInterrupt):
        persist(place, SMALL, tokens_dir=tokens_dir)
    model = load_model(place / "model")
    assert seen
    for ids in seen:
        assert ids[:2] == [model.start_id, *model.ids_of("good")]
        assert ids[-1] == model.tokenizer.eos_token_id
        assert ids.count(model.start_id) == 2
    assert not (place / "persist" / "sft").exists()


def test_a_run_is_tuned_judged_and_resumed(run, monkeypatch, tokens_dir):
    place = run("conditional")
    found = persist(place, SMALL, tokens_dir=tokens_dir)
    assert [(p.stage, p.template) for p in found.found] == [
        (stage, template) for stage in ("before", "sft", "dpo") for template in ("nothing", *TEMPLATES)
    ]
    before, after = found.of("before", "same"), found.of("sft", "same")
    assert after.answer_loss < before.answer_loss - 0.05  # the instructions were learned
    assert math.isnan(found.of("sft", "nothing").answer_loss)
    assert found.versions["trl"]
    weights = [
        torch.nn.utils.parameters_to_vector(AutoModelForCausalLM.from_pretrained(f).parameters())
        for f in (place / "model", place / "persist" / "sft", place / "persist" / "dpo")
    ]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert load_model(place / "persist" / "dpo").control_ids == load_model(place / "model").control_ids
    assert read_persist(RunFolder(place)) == found

    def never(*args):
        raise AssertionError("trained again")

    (place / "persist" / "persist.json").unlink()  # as after a kill before the result was written
    with monkeypatch.context() as patch:
        patch.setattr(module, "_train", never)
        again = persist(place, SMALL, tokens_dir=tokens_dir)
    assert again.found == found.found
    (place / "persist" / "persist.json").unlink()
    shutil.rmtree(place / "persist" / "dpo")  # as after a kill in DPO
    (place / "persist" / ".dpo.partial").mkdir()
    (place / "persist" / ".dpo.partial" / "half").write_text("x")
    again = persist(place, SMALL, tokens_dir=tokens_dir)
    assert again.found == found.found
    assert not (place / "persist" / ".dpo.partial").exists()
    lower = persist(place, SMALL, tokens_dir=tokens_dir, threshold=0.01)  # other segments are good: another tuning
    assert lower.key != found.key
    assert (place / "persist" / "sft.old-1").is_dir() == (lower.pairs != found.pairs or lower.found != found.found)
    persist(place, SMALL, tokens_dir=tokens_dir)
    other = Persistence(**{**SMALL.__dict__, "dpo": False, "pairs": 16})
    persist(place, other, tokens_dir=tokens_dir)
    assert (place / "persist" / "persist.old-1" / "persist.json").exists()
    assert (place / "persist" / "sft.old-1").is_dir()
    assert json.loads((place / "persist" / "sft" / "stage.json").read_text()).keys() == {"key"}


def test_the_command_and_the_page(run, tokens_dir, tmp_path):
    from phf.evaluation.evaluate import evaluate_run
    from phf.generation.scenario import Scenario

    places = [run("a"), run("conditional")]
    settings = [f"{k}={json.dumps(v)}" for k, v in SMALL.__dict__.items() if v is not None]
    ran = phf_inside("persist", *map(str, places), "--tokens", str(tokens_dir), *settings, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "from nothing" in ran.stdout
    for place in places:
        scenario = Scenario(num_samples=8, max_tokens=12, min_tokens=1)
        evaluate_run(place, {"unconditional": scenario}, tokens_dir=tokens_dir)
    folder = tmp_path / "runs"
    compared = compare_runs(folder, load_runs(folder))
    assert len(compared.persisted) == 2 * 9
    assert {row.gain is None for row in compared.persisted if row.group == compared.plain} == {True}
    ran = phf_inside("report", str(folder), cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    section = (folder / "report.html").read_text().partition('<h2 id="persist">')[2].partition("</section>")[0]
    for row in compared.persisted:
        assert row.gain_text in section
        assert row.gain_interval in section
        assert row.misalignment.ci95[0] >= 0
    persist(places[0], Persistence(**{**SMALL.__dict__, "pairs": 8, "dpo": False}), tokens_dir=tokens_dir)
    assert compare_runs(folder, load_runs(folder)).persisted == []  # tuned in different ways


def test_the_gain_that_is_left():
    assert kept_gain([1.0], [4.0]).mean == pytest.approx(0.75)
    several = kept_gain([1.0, 1.1, 0.9], [4.0, 4.0, 4.0])
    assert several.mean == pytest.approx(0.75, abs=0.01)
    assert several.ci95[0] < several.mean < several.ci95[1]
    assert kept_gain([0.0, 1.0], [2.0, 2.0]).mean == pytest.approx(0.75)
    assert math.isnan(kept_gain([0.0], [0.0]).mean)
    assert persisted([], None) == []


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "Missing argument"),
        (["pairs=8"], "name a run"),
        (["nowhere"], "nowhere"),
        (["nowhere", "pair=8"], "pairs"),
        (["nowhere", "dpo_lr=0"], "dpo_lr"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, said):
    ran = phf_inside("persist", *arguments, cwd=tmp_path)
    assert ran.returncode != 0
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr


def test_without_trl_the_error_names_the_extra(run, monkeypatch, tokens_dir):
    import sys

    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ConfigError, match=r"pip install 'phf\[trl\]'"):
        persist(run("a"), SMALL, tokens_dir=tokens_dir)
