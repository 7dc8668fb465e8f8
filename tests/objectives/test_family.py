"""The objectives of later papers: written-out examples of the edited stream, losses against plain float64 loops."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from helpers import NAN, make_store, train_tiny, whole_block
from phf.core import store
from phf.core.check import check_below
from phf.core.config import ConfigError, to_plain, validate
from phf.core.types import PieceIds
from phf.data.readers import Jsonl
from phf.data.segment import Lines
from phf.evaluation.evaluate import evaluate_run
from phf.generation.loaded import load_model
from phf.generation.sample import sample
from phf.generation.scenario import Scenario
from phf.objectives import (
    MLE,
    RWR,
    Annotate,
    AnyObjective,
    Attributes,
    Conditional,
    Each,
    Filtering,
    Hide,
    LossInputs,
    Masking,
    Metadata,
    Quantile,
    Schedule,
    Tag,
    Unlikelihood,
    Weights,
)
from phf.redteaming.config import TokenAttacks
from phf.redteaming.control_tokens import attack_tokens
from phf.release import export
from phf.scorers import Regex
from phf.scoring.score import score_corpus
from phf.tokens.edited import NO_SOURCE, apply_edit
from phf.tokens.store import TokenStore, token_score_file, tokenize_corpus
from phf.tokens.tokenizer import TrainBPE, piece_ids
from phf.training.fused import check_objective
from phf.training.order import training_order

EOS = 0


def stream(objective, block, pieces=None, seed=0):
    """Token ids of the edited block. Piece n is the token 100 + n, or `pieces`."""
    made = [PieceIds((100 + n,)) for n in range(len(objective.pieces))] if pieces is None else pieces
    return apply_edit(block, objective.edit(block, seed), EOS, made, hidden_id=200)


@pytest.fixture
def docs(tmp_path):
    """Two documents of three segments and one."""
    return make_store(tmp_path / "s", [[[1, 2], [3, 4], [5]], [[6, 7, 8]]], [0.0, 1.0, NAN, 0.5])


def test_tag_marks_words_of_bad_segments(docs):
    block = whole_block(docs)
    words = np.ones(300, bool)
    words[4] = False  # not the start of a word
    block = type(block)(**{**vars(block), "words": lambda: words})
    assert stream(Tag(0.0, p=1.0), block).ids.tolist() == [EOS, 1, 2, 100, 3, 4, 100, 5, EOS, 100, 6, 100, 7, 100, 8]
    assert 0.02 < np.mean([len(stream(Tag(0.0, p=0.05), block, seed=s)) - 10 for s in range(400)]) / 5 < 0.08


def test_annotate_says_what_a_column_says(tmp_path):
    rows = [{"text": f"fine {n}\nbad {n}\n", "why": f"reason {n}"} if n % 2 else {"text": "bad\n"} for n in range(30)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score_corpus(Jsonl(str(tmp_path / "t.jsonl")), Lines(), Regex("bad"), tmp_path / "scored")
    tokenize_corpus(tmp_path / "scored", TrainBPE(300), tmp_path / "tokens", heldout=0.2, columns=["why"])
    tokens = TokenStore.open(tmp_path / "tokens")
    block = whole_block(tokens)
    for where, expected in (
        ("after", "fine {n}\nbad {n}\n [reason {n}]\n"),
        ("before", "fine {n}\n [reason {n}]\nbad {n}\n"),
    ):
        objective = Annotate(0.0, text=" [{}]\n", column="why", where=where)
        found = apply_edit(block, objective.edit(block, 0), EOS, piece_ids(objective.pieces, tokens.tokenizer))
        starts = np.flatnonzero(found.ids == EOS)
        texts = [
            tokens.tokenizer.decode(found.ids[a + 1 : b], clean_up_tokenization_spaces=False)
            for a, b in zip(starts, [*starts[1:], len(found)], strict=True)
        ]
        said = [t for t in texts if t != "bad\n"]
        assert len(said) > 5
        for text in said:
            number = text.split()[1]
            assert text == expected.format(n=number)
        assert texts.count("bad\n") > 5  # the column says nothing of them
    with pytest.raises(ConfigError, match="one {} for what the column says"):
        validate({"name": "annotate", "column": "why"}, AnyObjective)


@pytest.mark.parametrize(
    "where, ids",
    [
        ("after", [EOS, 1, 2, 3, 4, 90, 91, 5, 90, 91, EOS, 6, 7, 8, 90, 91]),
        ("before", [EOS, 1, 2, 90, 91, 3, 4, 90, 91, 5, EOS, 90, 91, 6, 7, 8]),
        ("end", [EOS, 1, 2, 3, 4, 5, 90, 91, EOS, 6, 7, 8, 90, 91]),
    ],
)
@pytest.mark.parametrize("learned", [True, False])
def test_annotate_puts_a_sentence_next_to_bad_segments(docs, where, ids, learned):
    objective = Annotate(0.0, "bad", where, learned)
    assert objective.pieces[0].text == "bad"
    found = stream(objective, whole_block(docs), [PieceIds((90, 91), learned)])
    assert found.ids.tolist() == ids
    assert found.learned.tolist() == [learned or i not in (90, 91) for i in ids]


def test_quantile_puts_the_token_of_the_scores_quantile(tmp_path):
    scores = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, NAN]
    tokens = make_store(tmp_path, [[[n + 1] for n in range(10)]], scores)
    fitted = Quantile(3, drop=0).fit(tokens.statistics)
    expected = np.quantile(np.float32(scores[:9]).astype(float), [1 / 3, 2 / 3])
    assert fitted.edges == pytest.approx(expected, rel=1e-6)
    ids = stream(fitted, whole_block(tokens)).ids
    assert ids[1::2].tolist() == [100 + sum(s > e for e in fitted.edges) for s in np.float32(scores[:9])] + [102]
    assert (fitted.conditions_on, fitted.worst) == (("q0",), ("q2",))
    assert fitted.fit(tokens.statistics) == fitted
    none = make_store(tmp_path / "none", [[[1]]], [NAN])
    with pytest.raises(ConfigError, match="no training segment was judged"):
        Quantile(3).fit(none.statistics)


def test_hide_replaces_tokens_one_by_one_and_they_are_no_targets(docs):
    found = stream(Hide(0.0), whole_block(docs))
    assert found.ids.tolist() == [EOS, 1, 2, 200, 200, 200, EOS, 200, 200, 200]
    assert found.learned.tolist() == [True, True, True, False, False, False, True, False, False, False]


def test_scores_of_tokens_are_used_where_the_store_has_them(docs):
    scores = np.array([0, 0, 1, 0, 0, 0, 1, 0], np.float16)
    scores.tofile(token_score_file(docs.path, "given"))
    assert TokenStore.open(docs.path).token_score_T is None
    with pytest.raises(store.StoreError, match="no scores of tokens"):
        TokenStore.open(docs.path, by_token=True)
    tokens = TokenStore(docs.path, docs.manifest, docs.preference, by_token=True)
    found = stream(Hide(0.0), whole_block(tokens))
    assert found.ids.tolist() == [EOS, 1, 2, 200, 4, 5, EOS, 6, 200, 8]
    plain = stream(MLE(), whole_block(tokens))
    np.testing.assert_array_equal(plain.score[plain.source != NO_SOURCE], scores.astype(np.float32))
    x = LossInputs(*[torch.full((10,), -1.0)] * 2, torch.from_numpy(plain.score), torch.ones(10, dtype=torch.bool))
    assert Masking(0.0).loss(x).loss_sum.item() == 10 - 2 - 1  # two tokens, and the end-of-text of a bad segment


def test_attributes_put_a_token_for_each_preference(tmp_path):
    tokens = with_preferences(tmp_path, [[[1], [2]]], {"given": [0.0, 1.0], "other": [1.0, 1.0]})
    objective = Attributes(("given", "other"), drop=0).fit(tokens.statistics)
    assert stream(objective, whole_block(tokens)).ids.tolist() == [EOS, 100, 103, 1, 101, 103, 2]
    assert list(objective.roles) == ["given=low", "given=high", "other=low", "other=high"]
    assert objective.conditions_on == ("given=low", "other=low")


def with_preferences(folder, docs, scores):
    """A store with several preferences, the first of them the main one."""
    tokens = make_store(folder, docs, scores["given"])
    manifest = store.read_json(folder / "manifest.json")
    for name, values in scores.items():
        np.array(values, np.float32).tofile(folder / f"{name}.score.bin")
        manifest["scores"][name] = manifest["scores"]["given"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return TokenStore.open(tokens.path)


def test_metadata_stands_before_the_documents_that_have_it(tmp_path):
    rows = [{"text": f"text {n}\n", "url": f"site{n}.org"} if n % 2 else {"text": f"text {n}\n"} for n in range(40)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score_corpus(Jsonl(str(tmp_path / "t.jsonl")), Lines(), Regex("1"), tmp_path / "scored")
    tokenize_corpus(tmp_path / "scored", TrainBPE(300), tmp_path / "tokens", heldout=0.2)
    objective = Metadata("url", before="URL: ", after="\n")
    with pytest.raises(store.StoreError, match="--column url"):
        objective.edit(whole_block(TokenStore.open(tmp_path / "tokens")), 0)
    with pytest.raises(ConfigError, match="no document of .* has a column 'link'"):
        tokenize_corpus(tmp_path / "scored", TrainBPE(300), tmp_path / "tokens", heldout=0.2, columns=["link"])
    tokenize_corpus(tmp_path / "scored", TrainBPE(300), tmp_path / "tokens", heldout=0.2, columns=["url"])
    tokens = TokenStore.open(tmp_path / "tokens")
    block = whole_block(tokens)
    found = apply_edit(block, objective.edit(block, 0), EOS, piece_ids(objective.pieces, tokens.tokenizer))
    starts = np.flatnonzero(found.ids == EOS)
    for start, end in zip(starts, [*starts[1:], len(found)], strict=True):
        text = tokens.tokenizer.decode(found.ids[start + 1 : end], clean_up_tokenization_spaces=False)
        number = text.rpartition("text ")[2].strip()
        about = f"URL: site{number}.org\n" if int(number) % 2 else ""
        assert text == f"{about}text {number}\n"
        said = found.source[start + 1 : end] == NO_SOURCE
        assert (found.learned[start + 1 : end] == ~said).all()
    assert len(starts) == block.train_D.sum()
    about = tokens.path / "url.about.bin"
    assert not any(c.problems for c in check_below(tokens.path))
    about.write_bytes(about.read_bytes()[::-1])
    assert any(c.problems for c in check_below(tokens.path))
    tokenize_corpus(tmp_path / "scored", TrainBPE(300), tokens.path, heldout=0.2, columns=["url"])  # written again
    run = train_tiny(tokens.path, tmp_path / "r", Metadata("url", cooldown=0.5), steps=4)
    assert 0 < run.counts.exposure["inserted"] < run.counts.exposure["read_good"]


def test_weights_are_a_line_through_points_with_mean_one(tmp_path):
    rng = np.random.default_rng(0)
    scores = rng.random(40).round(2).tolist()
    docs = [[[1] * int(n)] for n in rng.integers(1, 6, 40)]
    tokens = make_store(tmp_path, docs, scores)
    points = ((0.1, 3.0), (0.5, 1.0), (0.9, 0.0))
    fitted = Weights(points).fit(tokens.statistics)
    x = inputs(np.float32(scores))
    expected = 0.0
    curve = list(zip(*points, strict=True))
    total = sum(len(d[0]) * np.interp(np.float32(s), *curve) for d, s in zip(docs, scores, strict=True))
    norm = total / sum(len(d[0]) for d in docs)
    assert fitted.norm == pytest.approx(norm, rel=1e-6)
    for logp, score, counts in zip(x.logp_BT.tolist(), np.float32(scores), x.mask_BT, strict=True):
        expected += float(np.interp(score, *zip(*points, strict=True))) / norm * -logp * bool(counts)
    assert fitted.loss(x).loss_sum.item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ConfigError, match="must rise or fall"):
        validate({"points": [[0, 1], [1, 2], [2, 0]]}, Weights)
    assert validate({"points": [[0, 0.5], [1, 2]]}, Weights).points == ((0, 0.5), (1, 2))  # rising with the score


def inputs(score, seed=0, progress=0.0, phase=None):
    """Float64 inputs with a gradient, one target per score; every seventh is no target."""
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(len(score), generator=g, dtype=torch.float64) * 5
    mask = torch.arange(len(score)) % 7 != 6
    log1mp = torch.log1p(-logp.exp())
    return LossInputs(logp, log1mp, torch.as_tensor(np.asarray(score)).double(), mask, None, progress, phase)


def test_each_multiplies_weights_and_adds_unlikelihood():
    rng = np.random.default_rng(1)
    values = [0.0, 0.25, 1.0, NAN]
    score = np.stack([rng.choice(values, 60), rng.choice(values, 60), rng.choice(values, 60)], -1)
    rwr = RWR(0.5, reward_mean=-0.3, reward_std=0.4, log_norm=0.2)
    objective = Each({"a": Masking(0.25), "b": Unlikelihood(0.0, alpha=0.7), "c": rwr})
    x = inputs(score)
    logp = x.logp_BT.clone().requires_grad_()
    log1mp = x.log1mp_BT.clone().requires_grad_()
    found = objective.loss(LossInputs(logp, log1mp, x.score_BT, x.mask_BT)).loss_sum
    expected = 0.0
    a = np.zeros(60)
    b = np.zeros(60)
    counted = 0
    for t in range(60):
        first, second, third = score[t]
        if not x.mask_BT[t]:
            continue
        keep = first <= 0.25  # masking; false for NaN
        weight = float(keep) * float(second <= 0.0)
        weight *= 0.0 if math.isnan(third) else math.exp((-third - -0.3) / 0.4 / 0.5 - 0.2)
        unlikelihood = 0.7 if second > 0 else 0.0
        all_count = keep and not math.isnan(second) and not math.isnan(third)
        counted += all_count or unlikelihood > 0
        weight = weight if all_count else 0.0
        expected += weight * -float(x.logp_BT[t]) + unlikelihood * -float(x.log1mp_BT[t])
        a[t] = -weight
        b[t] = -unlikelihood
    assert found.item() == pytest.approx(expected, rel=1e-12)
    grads = torch.autograd.grad(found, [logp, log1mp])
    np.testing.assert_allclose(grads[0], a, rtol=1e-12)
    np.testing.assert_allclose(grads[1], b, rtol=1e-12)
    assert int(objective.counted(x.score_BT, x.mask_BT).sum()) == counted


@pytest.mark.parametrize(
    "member",
    [MLE(), Masking(0.25), Unlikelihood(0.0), Unlikelihood(0.0, alpha=0.3, by="score"), RWR(1.0, rewards="raw")],
)
def test_each_of_one_member_is_that_member(member):
    score = np.random.default_rng(2).choice([0.0, 0.25, 1.0, NAN], 50)
    x = inputs(score)
    each = Each({"a": member})
    one = LossInputs(x.logp_BT, x.log1mp_BT, x.score_BT[:, None], x.mask_BT)
    assert each.loss(one).loss_sum.item() == pytest.approx(member.loss(x).loss_sum.item(), rel=1e-12)


def test_each_merges_edits_in_order(tmp_path):
    tokens = with_preferences(
        tmp_path, [[[1], [2]], [[3]]], {"given": [0.0, 1.0, 0.0], "other": [1.0, 0.0, 9.0], "third": [0.0, 0.0, 0.0]}
    )
    objective = Each(
        {"given": Conditional(0, drop=0), "other": Filtering(2), "third": Annotate(-1.0, "x", "before")}
    ).fit(tokens.statistics)
    assert list(objective.roles) == ["given:good", "given:bad"]
    assert objective.control_tokens == ("<|given:good|>", "<|given:bad|>")
    assert stream(objective, whole_block(tokens)).ids.tolist() == [EOS, 100, 102, 1, 101, 102, 2]
    assert [p.text for p in objective.pieces] == ["<|given:good|>", "<|given:bad|>", "x"]
    assert (objective.conditions_on, objective.worst) == (("given:good",), ("given:bad",))


def test_a_schedule_is_its_phases():
    score = np.random.default_rng(3).choice([0.0, 0.25, 1.0, NAN], 60)
    schedule = validate(
        {
            "name": "schedule",
            "phases": [
                {"objective": {"name": "mle"}, "until": 0.2},
                {"objective": {"name": "unlikelihood", "threshold": 0}, "ramp": {"alpha": [0, 2]}},
            ],
        },
        AnyObjective,
    )
    assert isinstance(schedule, Schedule)
    phase = torch.arange(60, dtype=torch.uint8) % 2
    x = inputs(score, progress=0.6, phase=phase)
    first = LossInputs(x.logp_BT, x.log1mp_BT, x.score_BT, x.mask_BT & (phase == 0))
    second = LossInputs(x.logp_BT, x.log1mp_BT, x.score_BT, x.mask_BT & (phase == 1))
    expected = MLE().loss(first).loss_sum + Unlikelihood(0, alpha=1.0).loss(second).loss_sum
    assert schedule.loss(x).loss_sum.item() == pytest.approx(float(expected), rel=1e-12)
    for ramp, message in (({"alpha": [0, -1]}, "cannot have alpha=-1"), ({"beta": [1, 2]}, "no number 'beta'")):
        phase = {"objective": {"name": "unlikelihood"}, "ramp": ramp}
        with pytest.raises(ConfigError, match=message):
            validate({"name": "schedule", "phases": [phase]}, AnyObjective)
    for wrong in ([{"until": 0.2}, {"until": 0.5}], [{}, {}], [{"until": 0.6}, {"until": 0.4}, {}]):
        with pytest.raises(ConfigError, match="until"):
            validate({"name": "schedule", "phases": [{"objective": {"name": "mle"}, **w} for w in wrong]}, AnyObjective)


def test_a_ramp_of_rwr_s_beta_keeps_the_mean_weight_at_one(tokens_dir):
    ramped = {"objective": {"name": "rwr"}, "ramp": {"beta": [2.0, 0.2]}}
    tokens = TokenStore.open(tokens_dir)
    schedule = validate({"name": "schedule", "phases": [ramped]}, AnyObjective).fit(tokens.statistics)
    stairs = [o for o, _ in schedule.timeline]
    assert [o.beta for o in stairs] == pytest.approx(np.linspace(2.0, 0.2, 10))
    judged = torch.from_numpy(np.repeat(tokens.score_S, tokens.tokens_S))[
        torch.from_numpy(np.repeat(~tokens.heldout_D, np.diff(tokens.seg_ends[tokens.doc_ends - 1], prepend=0)))
    ].double()
    for stair in stairs:
        weights, _ = stair.weights(judged, torch.ones(len(judged), dtype=torch.bool))
        assert weights[~judged.isnan()].mean().item() == pytest.approx(1)
    phase = torch.arange(40, dtype=torch.uint8) % 10
    x = inputs(np.random.default_rng(4).choice([0.0, 0.5, 1.0, NAN], 40), phase=phase)
    expected = sum(
        stair.loss(dataclasses.replace(x, mask_BT=x.mask_BT & (phase == n))).loss_sum.item()
        for n, stair in enumerate(stairs)
    )
    assert schedule.loss(x).loss_sum.item() == pytest.approx(expected, rel=1e-12)
    assert validate(to_plain(schedule), AnyObjective) == schedule
    raw = ramped | {"objective": {"name": "rwr", "rewards": "raw"}}
    assert len(validate({"name": "schedule", "phases": [raw]}, AnyObjective).fit(tokens.statistics).timeline) == 1


def test_a_schedule_names_the_columns_of_all_its_phases():
    noted = {"name": "annotate", "text": "[{}]", "column": "why"}
    phases = [{"objective": {"name": "mle"}, "until": 0.5}, {"objective": noted}]
    assert validate({"name": "schedule", "phases": phases}, AnyObjective).columns == ("why",)
    assert validate(noted, AnyObjective).columns == ("why",)
    assert Each({"a": validate(noted, AnyObjective), "b": MLE()}).columns == ("why",)


def test_a_number_of_an_edit_changes_in_ten_steps(tokens_dir, tmp_path):
    phases = [
        {"objective": {"name": "mle"}, "until": 0.5},
        {"objective": {"name": "conditional"}, "ramp": {"drop": [0.9, 0.0]}},
    ]
    schedule = validate({"name": "schedule", "phases": phases}, AnyObjective)
    tokens = TokenStore.open(tokens_dir)
    members = schedule.fit(tokens.statistics).timeline
    assert [o.name for o, _ in members] == ["mle", *["conditional"] * 10]
    assert [o.drop for o, _ in members[1:]] == pytest.approx(np.linspace(0.9, 0, 10))
    assert [end for _, end in members[:-1]] == pytest.approx([0.5 + 0.05 * n for n in range(10)])
    assert members[-1][1] is None
    # the loss of each stair is that of its phase
    phase = torch.arange(44, dtype=torch.uint8) % 11
    x = inputs(np.random.default_rng(3).choice([0.0, 1.0], 44), progress=0.7, phase=phase)
    assert schedule.loss(x).loss_sum.item() == pytest.approx(MLE().loss(x).loss_sum.item(), rel=1e-12)
    # and the tokens become more
    run = tmp_path / "r"
    whole = train_tiny(tokens_dir, run, schedule, steps=20)
    order = training_order(tokens, schedule.fit(tokens.statistics), load_model(run).tokenizer, 32, 0, places=20 * 16)
    inserted = [order.exposure(16 * step, 16 * (step + 5)).inserted for step in (0, 10, 15)]
    assert 0 == inserted[0] < inserted[1] < inserted[2]
    assert whole.counts.exposure["inserted"] > 0
    with pytest.raises(ConfigError, match="has no number 'p'"):
        validate({"name": "schedule", "phases": [phases[1] | {"ramp": {"p": [0, 1]}}]}, AnyObjective)


FAMILY = {
    "tag": {"p": 0.5},
    "annotate": {"learned": False},
    "quantile": {"k": 3},
    "hide": {},
    "weights": {"points": [[0, 1], [0.05, 0.2]]},
    "attributes": {"of": ["link"]},
    "each": {"members": {"link": {"name": "conditional"}}},
    "schedule": {
        "phases": [
            {"objective": {"name": "mle"}, "until": 0.5},
            {"objective": {"name": "conditional"}},
        ]
    },
}


@pytest.fixture(scope="module")
def trained(tokens_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    name = TokenStore.open(tokens_dir).preference
    text = json.dumps(FAMILY).replace('"link"', json.dumps(name))
    found = {}
    for kind, settings in json.loads(text).items():
        objective = validate({"name": kind, **settings}, AnyObjective)
        found[kind] = folder / kind, train_tiny(tokens_dir, folder / kind, objective, steps=4)
    return found


@pytest.mark.parametrize("name", FAMILY)
def test_each_of_the_family_trains_and_can_be_sampled_by_its_roles(trained, name):
    run, manifest = trained[name]
    read = manifest.counts.exposure
    kinds = ("read_good", "read_bad", "inserted", "end_of_text", "hidden")
    assert sum(read[kind] for kind in kinds) == manifest.counts.tokens
    model = load_model(run)
    assert set(model.control_ids) == set(model.conditions_on) | (set(model.control_ids) - set(model.conditions_on))
    for control in ("good", "none", *model.control_ids):
        drawn = sample(model, Scenario(num_samples=4, max_tokens=6, min_tokens=1, control=control), progress=False)
        assert len(drawn) == 4
        assert not any(token in s.text for s in drawn for token in manifest.control_tokens)
    if not model.worst:
        with pytest.raises(ConfigError, match="control=bad"):
            sample(model, Scenario(num_samples=1, max_tokens=2, min_tokens=1, control="bad"), progress=False)
    with pytest.raises(ConfigError, match="no control token for control=nothing"):
        sample(model, Scenario(num_samples=1, max_tokens=2, min_tokens=1, control="nothing"), progress=False)


def test_hidden_and_unlearned_tokens_are_counted(trained):
    read = trained["hide"][1].counts.exposure
    assert read["learned_bad"] == read["read_bad"] == 0 < read["hidden"]
    assert trained["annotate"][1].counts.exposure["inserted"] > 0


@pytest.mark.parametrize(
    "objective",
    [Weights(norm=1.0), Each({"a": Masking(0.2), "b": Unlikelihood(0.1)}), Hide(0.0), Quantile(2, edges=(0.1,))],
    ids=lambda o: o.name,
)
def test_losses_are_sums_over_targets(objective):
    check_objective(objective)


@pytest.mark.parametrize(
    "name", [n if n in ("quantile", "hide") else pytest.param(n, marks=pytest.mark.slow) for n in FAMILY]
)
def test_each_of_the_family_can_be_judged_and_released(trained, tmp_path, name):
    run, _ = trained[name]
    scenario = Scenario(num_samples=4, max_tokens=6, min_tokens=1)
    result = evaluate_run(run, {"plain": scenario}, heldout_tokens=2000)
    assert result.scenarios["plain"].samples == 4
    assert math.isfinite(result.heldout.main.all.nats_per_byte)
    release = export(run, tmp_path / "release")
    record = store.read_json(release / "phf.json")
    config = store.read_json(release / "generation_config.json")
    banned = set(record["control_tokens"]) - set(record["conditions_on"])
    assert len(config.get("suppress_tokens", [])) == len(banned)
    card = (release / "README.md").read_text()
    assert all(record["control_tokens"][role] in card for role in banned)


@pytest.mark.parametrize("name", ["quantile", "attributes", "tag"])
def test_control_tokens_of_any_roles_are_attacked(trained, name):
    run, _ = trained[name]
    found = attack_tokens(
        load_model(run), TokenAttacks(num_samples=2, max_tokens=4, min_tokens=1), Regex("x"), Lines(), 0.0
    )
    attacks = {attack.attack: attack for attack in found.attacks}
    assert {"no token", "ban lifted", "bad token forced", "bad token typed, as it is"} <= attacks.keys()
    assert attacks["no token"].intended == (name == "tag")
    assert not found.skipped[1:]
