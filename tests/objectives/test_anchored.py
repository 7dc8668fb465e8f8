"""Anchored training: the loss against a plain float64 loop, and the log-probabilities of the reference model."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from helpers import NAN, TINY_LLAMA, make_store, train_tiny, weights_of
from phf.core import folders
from phf.core.check import check_below
from phf.core.config import ConfigError
from phf.core.types import Edit
from phf.evaluation import reference
from phf.evaluation.reference import prepare_reference, write_reference
from phf.generation.loaded import load_model
from phf.objectives import MLE, Anchored, LossInputs, Unlikelihood
from phf.objectives.compose import PhaseOf, Schedule
from phf.tokens.edited import Stream, apply_edit
from phf.tokens.store import TokensManifest, TokenStore, reference_file, tokenize_corpus
from phf.tokens.tokenizer import TrainBPE
from phf.training.fused import fused_loss, unfused_loss
from phf.training.lm import FromConfig


def by_loop(logits, target, score, mask, ref, threshold, beta):
    total = 0.0
    for n in range(len(target)):
        if not mask[n] or math.isnan(score[n]):
            continue
        p = math.exp(logits[n][target[n]]) / sum(math.exp(z) for z in logits[n])
        if score[n] <= threshold or math.isnan(ref[n]):
            total += -math.log(p)
        else:
            r = math.exp(ref[n])
            total += beta * (r * math.log(r / p) + (1 - r) * math.log((1 - r) / (1 - p)))
    return total


def numbers(count=40, vocabulary=7, width=3):
    g = torch.Generator().manual_seed(4)
    hidden = torch.randn(count, width, generator=g, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=g, dtype=torch.float64)
    target = torch.randint(0, vocabulary, (count,), generator=g)
    rng = np.random.default_rng(4)
    score = torch.tensor(rng.choice([0.0, 0.5, 1.0, NAN], count), dtype=torch.float32)
    mask = torch.tensor(rng.random(count) < 0.9)
    ref = torch.tensor(np.where(rng.random(count) < 0.2, NAN, np.log(rng.uniform(0.01, 0.99, count))))
    return hidden, weight, target, score, mask, ref


def test_values_and_gradients_are_those_of_a_loop():
    hidden, weight, target, score, mask, ref = numbers()
    objective = Anchored(0.25, reference="r", beta=1.7)

    def loop(hidden):
        return by_loop((hidden @ weight.T).tolist(), target.tolist(), score.tolist(), mask, ref.tolist(), 0.25, 1.7)

    leaf = hidden.clone().requires_grad_()
    out = fused_loss(leaf, weight, None, target, score, mask, None, objective, chunk=7, reference_N=ref).loss_sum
    assert out.item() == pytest.approx(loop(hidden), rel=1e-9)
    (gradient,) = torch.autograd.grad(out, leaf)
    slow = unfused_loss(leaf, weight, None, target, score, mask, None, objective, reference_N=ref).loss_sum
    torch.testing.assert_close(gradient, torch.autograd.grad(slow, leaf)[0], rtol=1e-9, atol=1e-12)
    for place in ((0, 0), (7, 2), (31, 1)):
        step = torch.zeros_like(hidden)
        step[place] = 1e-6
        slope = (loop(hidden + step) - loop(hidden - step)) / 2e-6
        assert gradient[place].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_it_is_zero_where_the_model_is_the_reference_and_finite_where_the_reference_is_sure():
    logp = torch.tensor([-0.1, -2.0, -9.0], dtype=torch.float64)
    bad, mask = torch.ones(3), torch.ones(3, dtype=torch.bool)
    at_home = LossInputs(logp, torch.log(-torch.expm1(logp)), bad, mask, reference_BT=logp)
    assert Anchored(0.0, reference="r").loss(at_home).loss_sum.item() == pytest.approx(0, abs=1e-12)
    sure = LossInputs(logp, torch.log(-torch.expm1(logp)), bad, mask, reference_BT=torch.zeros(3))
    out = Anchored(0.0, reference="r").loss(sure).loss_sum.item()
    assert out == pytest.approx(-logp.sum().item(), rel=1e-4)


@pytest.fixture(scope="module")
def own_tokens(tokens_dir, tmp_path_factory):
    """A copy of the store, which gets a reference."""
    folder = tmp_path_factory.mktemp("anchored") / "tokens"
    shutil.copytree(tokens_dir, folder)
    return folder


@pytest.fixture(scope="module")
def mle(own_tokens, tmp_path_factory):
    run = tmp_path_factory.mktemp("mle") / "run"
    train_tiny(own_tokens, run, steps=8)
    return run


def test_the_log_probabilities_are_those_of_each_document_alone(own_tokens, mle):
    name = write_reference(own_tokens, str(mle), context=64)
    tokens = TokenStore.open(own_tokens).with_reference(str(mle))
    model = load_model(mle)
    checked = 0
    for d in range(len(tokens.doc_ends)):
        first, last = (int(tokens.doc_ends[d - 1]) if d else 0), int(tokens.doc_ends[d])
        low, high = (int(tokens.seg_ends[first - 1]) if first else 0), int(tokens.seg_ends[last - 1])
        found = np.asarray(tokens.reference_T[low:high]).astype(np.float64)
        if tokens.heldout_D[d]:
            assert np.isnan(found).all()
            continue
        assert not np.isnan(found).any()
        if checked == 0:  # the first document of a block has nothing before it
            ids = torch.tensor([[tokens.end_of_text_id, *np.asarray(tokens.tokens[low:high]).tolist()]])[:, :65]
            with torch.no_grad():
                logp = model.lm(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            assert found[: len(logp)] == pytest.approx(logp.numpy(), abs=0.01)  # float16
            checked += 1
    assert checked
    assert not any(c.problems for c in check_below(own_tokens))
    file = own_tokens / name
    whole = file.read_bytes()
    assert write_reference(own_tokens, str(mle)) == name  # done before
    file.write_bytes(b"\0\0" + whole[2:])
    assert any(c.problems for c in check_below(own_tokens))
    file.write_bytes(whole)


def test_an_interrupted_computation_gives_the_same_bytes(own_tokens, mle, monkeypatch):
    name = write_reference(own_tokens, str(mle), context=64)
    whole = (own_tokens / name).read_bytes()
    manifest = folders.read_manifest(own_tokens, TokensManifest)

    def again(context, dies_at):
        (own_tokens / name).unlink(missing_ok=True)
        blocks = []
        plain = reference._block

        def block(model, stream, k, context):
            blocks.append(k)
            if k == dies_at:
                raise KeyboardInterrupt
            return plain(model, stream, k, context)

        with monkeypatch.context() as m:
            m.setattr(TokenStore, "block_segments", property(lambda self: 8))
            m.setattr(reference, "_block", block)
            if dies_at is not None:
                with pytest.raises(KeyboardInterrupt):
                    write_reference(own_tokens, str(mle), context)
            else:
                write_reference(own_tokens, str(mle), context)
        return blocks

    assert again(64, None)[0] == 0
    small = (own_tokens / name).read_bytes()
    assert len(small) == len(whole)
    assert again(64, 2) == [0, 1, 2]
    partial = own_tokens / f"{name}.part"
    with open(partial, "r+b") as file:  # half of a block was written
        file.seek(0, os.SEEK_END)
        file.write(b"\1\1\1\1")
    assert again(64, None)[0] == 2
    assert (own_tokens / name).read_bytes() == small
    again(64, 2)
    assert again(32, None)[0] == 0  # other rows
    (own_tokens / name).write_bytes(whole)
    folders.store.write_json(own_tokens / folders.MANIFEST, manifest)
    assert not list(own_tokens.glob("reference*.part*"))


def test_another_context_is_refused_once_the_log_probabilities_are_there(tokens_dir, mle, tmp_path):
    shutil.copytree(tokens_dir, tmp_path / "t", ignore=shutil.ignore_patterns("reference-*"))
    name = write_reference(tmp_path / "t", str(mle), context=64)
    assert write_reference(tmp_path / "t", str(mle)) == write_reference(tmp_path / "t", str(mle), context=64) == name
    for other in (32, 65):
        with pytest.raises(ConfigError, match="was computed with --context 64"):
            write_reference(tmp_path / "t", str(mle), context=other)
    (tmp_path / "t" / name).rename(tmp_path / "kept.bin")
    write_reference(tmp_path / "t", str(mle), context=10**6)
    positions = load_model(mle).positions
    assert write_reference(tmp_path / "t", str(mle), context=positions) == name  # as many as the model has
    assert not any(c.problems for c in check_below(tmp_path / "t"))


def test_computations_at_the_same_time_wait_for_each_other(tokens_dir, mle, tmp_path):
    shutil.copytree(tokens_dir, tmp_path / "t", ignore=shutil.ignore_patterns("reference-*"))
    train_tiny(tokens_dir, tmp_path / "other", steps=2)
    code = "import sys; from phf.evaluation.reference import write_reference; write_reference(sys.argv[1], sys.argv[2])"
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "t"), str(model)])
        for model in (mle, mle, tmp_path / "other")
    ]
    assert [process.wait(120) for process in started] == [0, 0, 0]
    known = TokenStore.open(tmp_path / "t").manifest.references
    assert set(known) == {reference_file(str(model)) for model in (mle, tmp_path / "other")}
    assert not any(c.problems for c in check_below(tmp_path / "t"))


def test_a_finished_run_outlives_its_reference(tokens_dir, mle, tmp_path):
    shutil.copytree(tokens_dir, tmp_path / "t")
    shutil.copytree(mle, tmp_path / "mle")
    objective = Anchored(reference=str(tmp_path / "mle"))
    prepare_reference(tmp_path / "t", str(tmp_path / "mle"), tmp_path / "r")
    made = train_tiny(tmp_path / "t", tmp_path / "r", objective, steps=2)
    shutil.rmtree(tmp_path / "mle")
    prepare_reference(tmp_path / "t", str(tmp_path / "mle"), tmp_path / "r")
    assert train_tiny(tmp_path / "t", tmp_path / "r", objective, steps=2) == made
    with pytest.raises(ConfigError, match="no weights there"):
        train_tiny(tmp_path / "t", tmp_path / "r", objective, steps=3)
    with pytest.raises(ConfigError, match="no weights there"):
        prepare_reference(tmp_path / "t", str(tmp_path / "mle"), tmp_path / "new")


def test_a_run_is_anchored_to_its_reference(own_tokens, mle, tmp_path):
    """With a large weight, bad text gets the loss of the reference; unlikelihood drives it away."""
    with pytest.raises(ConfigError, match="no weights there"):
        train_tiny(own_tokens, tmp_path / "x", Anchored(reference=str(tmp_path / "nowhere")))
    write_reference(own_tokens, str(mle))
    objective = Anchored(reference=str(mle), beta=3.0)
    train_tiny(own_tokens, tmp_path / "whole", objective, steps=20)
    train_tiny(own_tokens, tmp_path / "parts", objective, steps=20, stop_after=7)
    train_tiny(own_tokens, tmp_path / "parts", objective, steps=20)
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    assert weights_of(tmp_path / "whole") != weights_of(mle)
    moved = tmp_path / "moved"
    (tmp_path / "whole").rename(moved)
    renamed = tmp_path / "mle2"
    os.symlink(mle, renamed)
    before = weights_of(moved)
    train_tiny(own_tokens, moved, Anchored(reference=str(renamed), beta=3.0), steps=20)  # the same weights elsewhere
    assert not (tmp_path / "moved.old-1").exists()
    assert weights_of(moved) == before


def test_it_works_as_a_phase_and_with_inserted_tokens(own_tokens, mle, tmp_path):
    write_reference(own_tokens, str(mle))
    schedule = Schedule(
        phases=(PhaseOf(Unlikelihood(), until=0.5), PhaseOf(Anchored(reference=str(mle)), ramp={"beta": (0.0, 2.0)}))
    )
    assert schedule.reference_model == str(mle)
    run = train_tiny(own_tokens, tmp_path / "s", schedule, steps=4)
    assert run.counts.exposure["learned_bad"] > 0
    with pytest.raises(ValidationError, match="different reference models"):
        Schedule(phases=(PhaseOf(Anchored(reference="a"), until=0.5), PhaseOf(Anchored(reference="b"))))
    with pytest.raises(ValidationError, match="reference is missing"):
        Anchored()


def test_tokens_keep_their_log_probability_through_an_edit(tmp_path):
    from dataclasses import replace

    from phf.core.types import Insertions, PieceIds

    tokens = make_store(tmp_path / "s", [[[1, 2], [3]], [[4, 5]]], [0.0, 1.0, 1.0])
    block = replace(tokens.block(0), reference_T=np.array([-1, -2, -3, -4, -5], np.float32))
    edit = Edit(times_D=np.array([1, 2]), insertions=Insertions.before(np.array([-1, 0, -1])))
    found = apply_edit(block, edit, 0, [PieceIds((9,))])
    assert found.ids.tolist() == [0, 1, 2, 9, 3, 0, 4, 5, 0, 4, 5]
    assert np.nan_to_num(found.reference).tolist() == [0, -1, -2, 0, -3, 0, -4, -5, 0, -4, -5]
    assert Stream(tokens, lambda block: Edit()).block(0).reference is None


def test_a_reference_with_another_tokenizer_or_none_is_an_error(own_tokens, scored_dir, tmp_path):
    tokenize_corpus(scored_dir, TrainBPE(290), tmp_path / "other", heldout=0.2)
    train_tiny(tmp_path / "other", tmp_path / "run", steps=2, model=FromConfig(TINY_LLAMA))
    with pytest.raises(ConfigError, match="has another tokenizer than"):
        write_reference(own_tokens, str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="run `phf reference"):
        train_tiny(own_tokens, tmp_path / "x", Anchored(reference=str(tmp_path / "run")))
    assert reference_file(str(tmp_path / "run")) not in TokenStore.open(own_tokens).manifest.references
    assert MLE().reference_model is None
