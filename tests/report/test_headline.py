"""The sentences that a page starts with: made from the numbers, cautious where intervals overlap."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from phf.report.headline import headline
from phf.report.measures import Group, Value, plain_name
from phf.report.runs import equal_budgets


def group(name, misalignment, good, bad, spread=0.05, objective=None):
    def value(mean, spread=spread):
        return Value(mean, ci95=(mean * (1 - spread), mean * (1 + spread)))

    return Group(
        name=name,
        objective=objective or name,
        share=1.0,
        runs=(f"{name}-s0",),
        values={"misalignment": value(misalignment), "good": value(good, spread / 10), "bad": value(bad)},
        samples=512,
        unjudged=0,
        empty=0,
        tokens=1,
        tokens_before=0,
        text_tokens=1,
        epochs=1.0,
        exposure={},
        seconds=1.0,
        tokens_per_s=None,
        is_plain=name == "mle",
    )


UNIT = "entities per character"
MLE = group("mle", 0.0134, 1.45, 1.30)


def test_the_best_at_the_same_loss_comes_first_and_the_lowest_second():
    rows = [MLE, group("conditional", 0.00063, 1.451, 1.31), group("unlikelihood", 0.00003, 1.48, 2.5)]
    found = headline(rows, UNIT, "pii")
    assert found.sentences == [
        "Conditional training wrote 21 times less personal data than plain training (0.630 against 13.4 per 1,000 "
        "characters) at about the same loss on good text (1.451 against 1.450 nats per byte).",
        "Unlikelihood training wrote 447 times less personal data than plain training (0.0300 against 13.4 per 1,000 "
        "characters) at a loss on good text that is 2.1% higher (1.480 against 1.450 nats per byte). It no longer "
        "models bad text (2.50 against 1.30).",
    ]
    assert (found.best, found.baseline) == ("conditional", "mle")


def test_what_overlaps_is_not_called_better():
    near = group("filtering", 0.0130, 1.46, 1.46)
    found = headline([MLE, near], UNIT, "pii")
    assert found.sentences == [
        "No objective wrote less personal data than plain training (13.4 per 1,000 characters): the 95% intervals "
        "overlap."
    ]
    assert found.best is None
    found = headline([MLE, near, group("masking", 0.004, 1.45, 1.4)], UNIT, "pii")
    assert found.sentences[-1] == "Not clearly less than plain training: Filtering."
    assert found.sentences[0].startswith("Loss masking wrote 3.4 times less")


def test_the_ratio_over_seeds_decides_and_is_named_with_its_interval():
    """The unpaired intervals overlap, the paired ratio does not reach 1; the sentence says what the table says."""
    plain = Value(10.0, ci95=(7.0, 13.0), points=(9.0, 10.0, 11.0))
    own = Value(7.5, ci95=(4.5, 10.5), points=(6.5, 7.5, 8.5))
    rows = [group("mle", 10, 1.4, 1.3), group("filtering", 7.5, 1.41, 1.3, spread=0.5)]
    rows[0].values["misalignment"] = plain
    rows[1].values.update({"misalignment": own, "ratio": Value(0.74, ci95=(0.5, 0.8), points=(0.7, 0.75, 0.77))})
    said = headline(rows, "probability", "toxicity").sentences
    assert said[0].startswith(
        "Filtering wrote 1.4 (1.2 to 2.0; geometric mean over 3 seeds) times less toxic text than plain training"
    )
    assert "at about the same loss on good text" in said[0]
    apart = Value(2.0, ci95=(1.0, 3.0), points=(1.0, 2.0, 3.0))
    rows[1].values.update({"misalignment": apart, "ratio": Value(0.2, ci95=(0.01, 1.5), points=(0.1, 0.2, 0.3))})
    assert "overlap" in headline(rows, "probability", "toxicity").sentences[0]  # the ratio alone decides
    rows[1].values["ratio"] = Value(0.01, ci95=(0.0, 0.02), points=(0.0, 0.01, 0.02))
    assert headline(rows, "probability", "toxicity").sentences[0].startswith("Filtering wrote at least 50 times less")
    rows[1].values.update({"misalignment": own, "ratio": Value(0.74, ci95=(0.5, 0.8), points=(0.7, 0.75, 0.77))})
    rows[1].values["good"] = Value(1.45, ci95=(1.3, 1.6))
    assert (
        "with no clear difference in the loss on good text (1.450 against" in headline(rows, UNIT, "pii").sentences[0]
    )
    rows[1].values["ratio"] = Value(0.74, ci95=(0.5, 1.1), points=(0.7, 0.75, 0.77))
    assert headline(rows, UNIT, "pii").best is None


def test_where_nothing_was_found_nothing_is_compared():
    found = headline([group("mle", 0.0, 1.4, 1.3), group("masking", 0.0, 1.4, 1.3)], UNIT, "pii")
    assert found.sentences == ["No run wrote any personal data, so there is nothing to compare: judge more samples."]


@pytest.mark.parametrize(
    "unit, scorer, start",
    [
        (
            "probability",
            "toxicity",
            "mine wrote 4.0 times less toxic text than plain training (0.100 against 0.400 on average)",
        ),
        ("probability", "fitted", "mine wrote 4.0 times less bad text"),
    ],
)
def test_units_and_names(unit, scorer, start):
    rows = [group("mle", 0.4, 1.4, 1.3), group("mine", 0.1, 1.3, 1.3, objective="conditional")]
    said = headline(rows, unit, scorer).sentences
    assert said[0].startswith(start)
    assert "at a lower loss on good text (1.300 against 1.400" in said[0]


def test_none_at_all_and_nothing_to_compare():
    said = headline([MLE, group("unlikelihood", 0.0, 1.45, 1.3)], UNIT, "pii").sentences
    assert said[0].startswith(
        "Unlikelihood training wrote no personal data in 512 samples (plain training 13.4 per 1,000"
    )
    assert headline([MLE], UNIT, "pii").sentences == []
    assert headline([group("a", 1, 1, 1), group("b", 1, 1, 1)], UNIT, "pii").sentences == []


def test_plain_training_is_found_by_its_objective():
    def run(name, objective, before=0):
        manifest = SimpleNamespace(objective_name=objective, counts=SimpleNamespace(tokens_before=before))
        return SimpleNamespace(name=name, manifest=manifest)

    assert plain_name([run("ours", "conditional"), run("base", "mle")]) == "base"
    assert plain_name([run("mask", "mle"), run("mle", "mle")]) == "mle"
    assert plain_name([run("later", "mle", before=5)]) is None


def test_seeds_with_equal_source_text_are_one_group_whatever_they_insert():
    def manifest(tokens, source):
        exposure = {} if source is None else {"source": source}
        return SimpleNamespace(counts=SimpleNamespace(tokens=tokens, exposure=exposure))

    assert equal_budgets([manifest(100, None), manifest(100, None)])
    assert equal_budgets([manifest(1_404_928, 1_399_950), manifest(1_402_880, 1_400_010)])
    assert not equal_budgets([manifest(100, None), manifest(101, None)])
    assert not equal_budgets([manifest(200, 1_400_000), manifest(100, 700_000)])
