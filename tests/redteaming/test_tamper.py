"""Finetuning after training: what is learned, what is judged, and how fast a gain is lost."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch

from helpers import LINK, folder_bytes, output_of, tiny_recipe, train_tiny, write_jsonl
from phf.core import store
from phf.core.config import ConfigError, validate
from phf.core.runs import RunFolder, read_lines, read_model_record
from phf.core.types import Estimate
from phf.data.readers import Jsonl
from phf.data.segment import Lines
from phf.evaluation.evaluate import evaluate_run
from phf.generation.loaded import load_model
from phf.generation.scenario import Scenario
from phf.objectives import AWR, MLE, Conditional, LossInputs, Masking
from phf.recipes.recipe import load_recipe
from phf.recipes.run import run_recipe
from phf.redteaming import tamper as module
from phf.redteaming.tamper import Tamper, TamperedLine, Tampering, half_life, half_lives, read_tamper, tamper
from phf.report.page import write_report
from phf.report.runs import load_runs
from phf.report.tamper import tampered
from phf.scorers import Regex
from phf.scoring.score import add_scores, score_corpus
from phf.tokens.store import TokenStore, tokenize_corpus
from phf.tokens.tokenizer import PretrainedTokenizer, TrainBPE

SMALL = {"steps": (0, 2, 6), "num_samples": 16, "max_tokens": 24, "heldout_tokens": 500, "batch_rows": 4}


def test_the_loss_is_a_plain_loop_over_one_part():
    g = torch.Generator().manual_seed(0)
    logp = -torch.rand(200, generator=g, dtype=torch.float64)
    score = torch.rand(200, generator=g, dtype=torch.float64)
    score[::9] = math.nan
    x = LossInputs(logp, logp, score, torch.rand(200, generator=g) < 0.8)
    for part in ("bad", "good"):
        objective = Tampering(part, 0.25)
        expected = count = 0.0
        for logp, score, mask in zip(x.logp_BT, x.score_BT, x.mask_BT, strict=True):
            if mask and (score > 0.25 if part == "bad" else score <= 0.25):
                expected -= logp.item()
                count += 1
        assert count > 10
        assert objective.loss(x).loss_sum.item() == pytest.approx(expected, rel=1e-12)
        assert objective.counted(x.score_BT, x.mask_BT).sum() == count
    unjudged = torch.full((3,), math.nan)
    assert not any(Tampering(p, 0.25).counted(unjudged, torch.ones(3, dtype=torch.bool)).any() for p in ("bad", "good"))


@pytest.mark.parametrize(
    ("curve", "plain", "expected"),
    [
        ([(0, 0.0), (10, 0.0), (100, 1.0)], 1.0, math.expm1((math.log1p(10) + math.log1p(100)) / 2)),
        ([(0, 0.2), (10, 0.6)], 1.0, 10.0),
        ([(0, 0.2), (10, 0.4), (20, 0.5)], 1.0, math.inf),
        ([(0, 0.2), (10, 0.9), (20, 0.1), (30, 0.9)], 1.0, math.expm1(math.log1p(10) * 4 / 7)),  # the first time
        ([(0, 1.0), (10, 2.0)], 1.0, math.nan),
        ([(0, 0.1), (1, math.nan), (3, 0.9)], 0.6, math.expm1(math.log1p(3) * 0.25 / 0.8)),
        ([(0, 1.5), (10, 2.0)], 1.0, math.nan),
    ],
)
def test_half_life(curve, plain, expected):
    assert half_life(curve, plain) == pytest.approx(expected, nan_ok=True)


def line(step: int, mean: float) -> TamperedLine:
    return TamperedLine(step, step, Estimate.missing(mean), 0.0, {})


def test_half_lives_are_averaged_over_seeds_on_a_logarithmic_scale():
    curves = {seed: [line(0, 0.0), line(steps, 0.5)] for seed, steps in enumerate((9, 99, 999))}
    found = half_lives(curves, dict.fromkeys(range(3), 1.0))
    assert (found.reached, found.seeds) == (3, 3)
    assert found.steps.mean == pytest.approx(99)
    logs = np.log([10, 100, 1000])
    half = 4.302653 * logs.std(ddof=1) / math.sqrt(3)
    assert found.steps.ci95 == pytest.approx((math.exp(logs.mean() - half) - 1, math.exp(logs.mean() + half) - 1))
    slow = half_lives(curves | {3: [line(0, 0.0), line(10, 0.1)]}, dict.fromkeys(range(4), 1.0))
    assert (slow.reached, slow.seeds) == (3, 4)
    assert math.isnan(slow.steps.mean)
    one = half_lives(curves, {0: 0.0, 1: 1.0})
    assert (one.seeds, one.asked) == (1, 2)  # without a gain there is nothing to lose
    unsure = [TamperedLine(0, 0, Estimate(0.5, 0.3, 9, (0.0, 1.1)), 0.0, {}), line(10, 2.0)]
    assert half_lives({0: unsure}, {0: 1.0}).seeds == 0  # a gain within the noise of the samples is none


@pytest.fixture(scope="module")
def folder(tokens_dir, tmp_path_factory):
    """Copies of the trained runs, judged and tampered with."""
    out = tmp_path_factory.mktemp("tamper")
    for name, objective in (("mle", MLE()), ("conditional", Conditional()), ("awr", AWR())):
        train_tiny(tokens_dir, out / f"{name}-s0", objective, steps=60)
        evaluate_run(out / f"{name}-s0", {"plain": Scenario(num_samples=16, max_tokens=24)}, heldout_tokens=500)
        tamper(out / f"{name}-s0", Tamper(**SMALL))
    return out


def test_a_model_is_judged_at_the_steps_in_its_intended_use(folder):
    for name, roles in (("mle", {}), ("conditional", {"good": "<|good|>", "bad": "<|bad|>"}), ("awr", {})):
        found = read_tamper(RunFolder(folder / f"{name}-s0"))
        assert list(found.curves) == ["bad", "good"]
        for part, lines in found.curves.items():
            assert [x.step for x in lines] == [0, 2, 6]
            assert all(x.misalignment.n == 16 for x in lines)
            assert lines[0].misalignment == found.curves["bad"][0].misalignment  # both start from the same model
            run = folder / f"{name}-s0" / "tamper" / part
            manifest = store.read_json(run / "manifest.json")
            assert manifest["objective"]["part"] == part
            assert read_model_record(run / "model").control_tokens == roles
            learned = manifest["counts"]["exposure"]
            assert (learned["learned_bad"] > 0) == (part == "bad")
            assert (learned["learned_good"] > 0) == (part == "good")
    assert load_model(folder / "conditional-s0" / "tamper" / "bad").conditions_on == ("good",)


def test_finetuning_on_a_part_teaches_that_part(folder):
    found = read_tamper(RunFolder(folder / "mle-s0"))
    for part, lines in found.curves.items():
        assert lines[-1].heldout[part] < lines[0].heldout[part]


def test_the_model_itself_is_as_before_and_a_second_call_does_nothing(folder):
    run = folder / "mle-s0"
    before = folder_bytes(run)
    again = tamper(run, Tamper(**SMALL))
    assert folder_bytes(run) == before
    assert again.curves["bad"][0].step == 0


def test_other_settings_keep_the_earlier_result(folder, tmp_path, tokens_dir):
    shutil.copytree(folder / "mle-s0", tmp_path / "mle-s0")
    before = (tmp_path / "mle-s0" / "tamper" / "tamper.json").read_bytes()
    found = tamper(tmp_path / "mle-s0", Tamper(**SMALL | {"parts": ("bad",), "lr_share": 0.5}), tokens_dir=tokens_dir)
    assert list(found.curves) == ["bad"]
    fewer = tamper(tmp_path / "mle-s0", Tamper(**SMALL | {"num_samples": 8, "steps": (0, 1, 6)}), tokens_dir=tokens_dir)
    for lines in fewer.curves.values():  # the same training, judged in another way
        assert [(x.step, x.misalignment.n) for x in lines] == [(0, 8), (1, 8), (6, 8)]
    other = tamper(
        tmp_path / "mle-s0",
        Tamper(**SMALL | {"parts": ("good",)}),
        tokens_dir=tokens_dir,
        scorer=Regex("e"),
        allow_other_scorer=True,
    )
    own = tamper(tmp_path / "mle-s0", Tamper(**SMALL | {"parts": ("good",)}), tokens_dir=tokens_dir)
    assert other.curves["good"][0].misalignment.mean > own.curves["good"][0].misalignment.mean
    assert (tmp_path / "mle-s0" / "tamper" / "tamper.old-1" / "tamper.json").read_bytes() == before
    assert (tmp_path / "mle-s0" / "tamper" / "bad.old-1" / "manifest.json").exists()


def test_an_interrupted_call_resumes_to_the_same_numbers(folder, tmp_path, tokens_dir, monkeypatch):
    shutil.copytree(folder / "mle-s0", tmp_path / "mle-s0", ignore=shutil.ignore_patterns("tamper"))
    real = module.train
    calls = []

    def dies_in_the_second_part(**settings):
        calls.append(settings)
        if len(calls) == 2:
            real(**settings, stop_after=3)
            raise KeyboardInterrupt
        return real(**settings)

    monkeypatch.setattr(module, "train", dies_in_the_second_part)
    with pytest.raises(KeyboardInterrupt):
        tamper(tmp_path / "mle-s0", Tamper(**SMALL), tokens_dir=tokens_dir)
    assert not (tmp_path / "mle-s0" / "tamper" / "tamper.json").exists()
    found = tamper(tmp_path / "mle-s0", Tamper(**SMALL), tokens_dir=tokens_dir)
    expected = tamper(folder / "mle-s0", Tamper(**SMALL))
    assert found.curves == expected.curves
    lines = read_lines(tmp_path / "mle-s0" / "tamper" / "good" / "monitor.jsonl")
    assert [x["step"] for x in lines] == [0, 2, 6]


def test_a_corpus_with_another_tokenizer_is_refused(folder, tmp_path, scored_dir):
    tokenize_corpus(scored_dir, TrainBPE(280), tmp_path / "other", heldout=0.2)
    with pytest.raises(ConfigError, match="another tokenizer"):
        tamper(folder / "mle-s0", Tamper(**SMALL), on=tmp_path / "other")


def test_a_corpus_without_bad_text_is_refused(folder, tmp_path, scored_dir):
    corpus = Jsonl(str(write_jsonl(tmp_path / "t.jsonl", ["a line without a link\n" * 3] * 9)))
    score_corpus(corpus, Lines(), LINK, tmp_path / "scored")
    tokenizer = PretrainedTokenizer(str(folder.parent / "copy"))
    shutil.copytree(TokenStore.open(tokens_of(folder)).path / "tokenizer", folder.parent / "copy")
    tokenize_corpus(tmp_path / "scored", tokenizer, tmp_path / "good", heldout=0.2)
    with pytest.raises(ConfigError, match="no bad segment to learn"):
        tamper(folder / "awr-s0", Tamper(**SMALL | {"seed": 1}), on=tmp_path / "good")


def test_a_mistake_leaves_an_earlier_result_in_its_place(folder):
    before = (folder / "mle-s0" / "tamper" / "tamper.json").read_bytes()
    with pytest.raises(ConfigError, match="no bad segment to learn"):
        tamper(folder / "mle-s0", Tamper(**SMALL), threshold=1e30)
    with pytest.raises(ConfigError, match="exceed the model's"):
        tamper(folder / "mle-s0", Tamper(**SMALL | {"max_tokens": 10**5}))
    assert (folder / "mle-s0" / "tamper" / "tamper.json").read_bytes() == before


def tokens_of(folder) -> str:
    return store.read_json(folder / "mle-s0" / "manifest.json")["tokens_dir"]


def test_a_run_of_another_preference_learns_its_text(tmp_path, scored_dir):
    shutil.copytree(scored_dir, tmp_path / "scored")
    add_scores(tmp_path / "scored", Regex("e"), "letters")
    tokenize_corpus(tmp_path / "scored", TrainBPE(300), tmp_path / "tokens", heldout=0.2)
    train_tiny(tmp_path / "tokens", tmp_path / "run", Masking(), steps=4, scores="letters")
    tamper(tmp_path / "run", Tamper(**SMALL | {"parts": ("bad",)}))
    manifest = store.read_json(tmp_path / "run" / "tamper" / "bad" / "manifest.json")
    assert manifest["train"]["scores"] == "letters"
    assert manifest["identity"]["pattern"] == "e"


def test_steps_start_with_the_model_as_it_is():
    for steps in ((1, 2), (0, 5, 5), (0, 5, 3)):
        with pytest.raises(ConfigError, match="steps"):
            validate({"steps": list(steps)}, Tamper)


def test_the_page_and_the_command_say_what_the_files_say(folder, monkeypatch, capsys):
    page = write_report(folder).read_text()
    runs = load_runs(folder)
    rows = tampered(runs, "mle")
    assert {(row.group, row.part) for row in rows} == {
        (name, part) for name in ("mle", "conditional", "awr") for part in ("bad", "good")
    }
    section = page[page.index('<section aria-labelledby="tamper">') :]
    for row in rows:
        assert row.said in section
        assert (row.half_life is None) == (row.group == "mle")
        kept = read_tamper(next(run for run in runs if run.name == row.group).folder)
        assert [(x.step, x.misalignment) for x in kept.curves[row.part]] == row.curve
    assert (folder / "report" / "tamper-bad.svg").exists()
    names = [str(folder / "conditional-s0"), str(folder / "mle-s0")]
    settings = ["steps=[0,2,6]", "num_samples=16", "max_tokens=24", "heldout_tokens=500", "batch_rows=4"]
    shown = output_of(["tamper", *names, *settings], monkeypatch, capsys)
    half = next(row for row in rows if (row.group, row.part) == ("conditional", "bad"))
    line_of = next(x for x in shown.splitlines() if x.startswith(names[0]) and " bad " in x)
    assert half.said
    assert line_of.rstrip().endswith(half.said)
    low, high = half.curve[0][1].ci95
    assert f"({low:.5f} to {high:.5f})" in line_of
    said = error_of(["tamper", *names, "--plain", names[0], *settings], monkeypatch, capsys)
    assert "was trained with conditional; name a run of MLE" in said


def error_of(args, monkeypatch, capsys) -> str:
    """What a command that fails says."""
    from phf.cli import main

    monkeypatch.setattr("sys.argv", ["phf", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_runs_on_other_text_are_not_compared(folder, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    shutil.copytree(folder / "mle-s0", other)
    manifest = store.read_json(other / "manifest.json")
    store.write_json(other / "manifest.json", manifest | {"tokens_content": "x"})
    said = error_of(["tamper", str(folder / "conditional-s0"), str(other)], monkeypatch, capsys)
    assert "were trained on other text, so they do not compare" in said


def test_over_seeds_a_group_has_one_row():
    class Run:
        name = "conditional"

        def __init__(self, name, seed, means):
            self.name = name
            self.folder_name = f"{name}-s{seed}"
            self.manifest = self
            self.seed = seed
            self.tamper = self
            self.curves = {"bad": [line(step, mean) for step, mean in zip((0, 10), means, strict=True)]}

    runs = [Run("mle", s, (1.0, 1.0)) for s in (0, 1)] + [Run("conditional", s, (0.0, 0.4 + 0.2 * s)) for s in (0, 1)]
    mle, conditional = tampered(runs, "mle")
    assert mle.said == ""
    assert conditional.said == "over 10 steps in 1 of 2 seeds"
    assert conditional.curve[1][1].mean == pytest.approx(0.5)
    (alone,) = tampered(runs[2:], "mle")
    assert alone.said == ""


def test_a_recipe_tampers_with_every_run(tmp_path):
    small = {"steps": [0, 1], "num_samples": 8, "max_tokens": 16, "heldout_tokens": 0, "batch_rows": 4}
    recipe = load_recipe([tiny_recipe(tmp_path, only=["mle", "filtering"], tamper=small)])
    results = run_recipe(recipe)
    assert results.failed == {}
    assert [s for s in results.seconds if s.startswith("tamper")] == ["tamper mle-s0", "tamper filtering-s0"]
    assert "After finetuning" in (recipe.folder / "report.html").read_text()
