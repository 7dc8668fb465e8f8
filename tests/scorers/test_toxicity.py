"""Classifiers as scorers: against plain transformers, text by text, and against Detoxify itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from helpers import WORDS, tiny_classifier
from phf.core.config import ConfigError
from phf.scorers import AnyScorer, Toxicity
from phf.scorers.toxicity import load_classifier
from phf.scoring.judge import judge_documents

TEXTS = ["the cat sat", "you are an awful bird !", "a", "who sings and sat on a mat , the cat .", "zzz"]


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifiers")
    return {
        family: tiny_classifier(folder / family, family, ["toxic", "insult", "fine"]) for family in ("bert", "roberta")
    }


def one_by_one(path: Path, texts: list[str]) -> np.ndarray:
    """Logits by plain transformers, one text at a time, without padding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        return np.stack([model(**tokenizer(t, return_tensors="pt")).logits[0].numpy() for t in texts]).astype(
            np.float64
        )


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("budget", [1, 24, 512])
def test_probabilities_equal_plain_transformers_for_any_batching(classifiers, family, budget):
    logits = one_by_one(classifiers[family], TEXTS)
    common = {"model": str(classifiers[family]), "dtype": "float32", "tokens_per_batch": budget}
    sigmoid = Toxicity(labels=("toxic", "insult"), activation="sigmoid", **common)
    np.testing.assert_allclose(sigmoid.score_texts(TEXTS), (1 / (1 + np.exp(-logits[:, :2]))).max(1), rtol=1e-5)
    softmax = Toxicity(labels=("insult",), activation="softmax", **common)
    expected = np.exp(logits[:, 1]) / np.exp(logits).sum(1)
    np.testing.assert_allclose(softmax.score_texts(TEXTS), expected, rtol=1e-5)


def test_bfloat16_is_close(classifiers):
    exact = Toxicity(model=str(classifiers["bert"]), labels=("toxic",), activation="sigmoid", dtype="float32")
    near = Toxicity(model=str(classifiers["bert"]), labels=("toxic",), activation="sigmoid", dtype="bfloat16")
    np.testing.assert_allclose(near.score_texts(TEXTS), exact.score_texts(TEXTS), atol=0.05)
    assert near.identity() != exact.identity()


@pytest.mark.parametrize("family, limit", [("bert", 48), ("roberta", 48)])
def test_a_long_segment_is_judged_in_windows_instead_of_truncated(classifiers, family, limit):
    """Its score is that of its worst window. RoBERTa's reserved positions are not used."""
    scorer = Toxicity(
        model=str(classifiers[family]), labels=("toxic",), activation="sigmoid", dtype="float32", overlap=8
    )
    loaded = load_classifier(scorer)
    assert loaded.max_tokens == limit
    text = " ".join(WORDS[:17]) * 1 + " " + " ".join(["the cat"] * 60) + " you are an awful bird !"
    windows, owner = loaded.windows([text, "a"])
    assert len(windows) > 3
    assert owner.tolist() == [0] * (len(windows) - 1) + [1]
    assert all(len(w) <= limit for w in windows)
    inner = [w[1:-1] for w in windows[:-1]]
    joined = inner[0] + [t for w in inner[1:] for t in w[8:]]
    assert joined == loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    logits, _ = loaded.logits([text])
    assert scorer.score_texts([text])[0] == pytest.approx((1 / (1 + np.exp(-logits[:, 0].astype(np.float64)))).max())


def test_documents_are_scored_together_and_empty_segments_are_not_judged(classifiers):
    scorer = Toxicity(model=str(classifiers["bert"]), labels=("toxic",), activation="sigmoid", dtype="float32")
    documents = [["the cat ", "sat"], [], ["", "awful bird"]]
    judged = judge_documents(scorer, documents)
    assert [len(found.scores) for found in judged] == [2, 0, 2]
    assert np.isnan(judged[2].scores[0])
    np.testing.assert_allclose(judged[0].scores, [scorer.score_text("the cat "), scorer.score_text("sat")], rtol=1e-5)


def test_the_identity_holds_the_weights(classifiers, tmp_path):
    first = Toxicity(model=str(classifiers["bert"]), labels=("toxic",), activation="sigmoid").identity()
    assert (
        first["weights"]
        == Toxicity(model=str(classifiers["bert"]), labels=("insult",), activation="sigmoid").identity()["weights"]
    )
    other = tiny_classifier(tmp_path / "other", "bert", ["toxic", "x", "y", "z"])
    assert first["weights"] != Toxicity(model=str(other), labels=("toxic",), activation="sigmoid").identity()["weights"]


def test_missing_settings_are_errors(classifiers, tmp_path):
    path = str(classifiers["bert"])
    with pytest.raises(ConfigError, match="scorer.model: name a classifier"):
        Toxicity().identity()
    with pytest.raises(ConfigError, match=r"which of the labels of .* mean bad\? .*known: toxic, insult, fine"):
        Toxicity(model=path).identity()
    with pytest.raises(ConfigError, match=r"has no label 'toxik' \(did you mean 'toxic'\?\)"):
        Toxicity(model=path, labels=("toxik",)).identity()
    with pytest.raises(ConfigError, match="sigmoid .* or softmax"):
        Toxicity(model=path, labels=("toxic",)).identity()
    with pytest.raises(ConfigError, match="not a local folder"):
        Toxicity(model=str(tmp_path / "none")).identity()
    with pytest.raises(ValidationError, match="overlap"):
        Toxicity(model=path, max_tokens=32, overlap=30)
    two = tiny_classifier(tmp_path / "two", "bert", ["good", "bad"])
    identity = Toxicity(model=str(two)).identity()
    assert (identity["labels"], identity["activation"]) == (["bad"], "softmax")
    assert TypeAdapter(AnyScorer).validate_python({"name": "toxicity", "model": path}) == Toxicity(model=path)


def detoxify_checkpoint(folder: Path, base: Path, classes: list[str], outputs: int) -> Path:
    """A checkpoint like those of Detoxify's training, with random weights."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(base, num_labels=outputs)
    model = AutoModelForSequenceClassification.from_config(config)
    arch = {
        "model_type": str(base),
        "model_name": type(model).__name__,
        "num_classes": outputs,
        "tokenizer_name": "BertTokenizer" if "Bert" in type(model).__name__ else "RobertaTokenizer",
    }
    checkpoint = {
        "config": {"arch": {"args": arch}, "dataset": {"args": {"classes": classes}}},
        "state_dict": model.state_dict(),
    }
    torch.save(checkpoint, folder / "model.ckpt")
    return folder / "model.ckpt"


@pytest.mark.parametrize(
    "family, classes, outputs",
    [("bert", ["toxic", "severe_toxic", "insult"], 3), ("roberta", ["toxicity", "insult"], 5)],
)
def test_detoxify_parity_on_a_fabricated_checkpoint(classifiers, tmp_path, family, classes, outputs):
    """Detoxify's own code on the same file. The second has outputs without a name, like the "unbiased" model."""
    detoxify = pytest.importorskip("detoxify", reason="detoxify is not installed")
    path = detoxify_checkpoint(tmp_path, classifiers[family], classes, outputs)
    if outputs == 5:  # Detoxify reads the number of outputs from this folder
        tiny_classifier(tmp_path / "base", family, list("abcde"))
        base = tmp_path / "base"
    else:
        base = classifiers[family]
    theirs = detoxify.Detoxify(checkpoint=str(path), huggingface_config_path=str(base)).predict(TEXTS)
    ours = Toxicity(checkpoint=str(path), model=str(classifiers[family]), dtype="float32")
    np.testing.assert_allclose(ours.score_texts(TEXTS), theirs["toxicity"], rtol=1e-5)
    insult = Toxicity(checkpoint=str(path), model=str(classifiers[family]), labels=("insult",), dtype="float32")
    np.testing.assert_allclose(insult.score_texts(TEXTS), theirs["insult"], rtol=1e-5)


def test_broken_checkpoints_and_checkpoints_with_code_are_refused(tmp_path):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match="no config and state_dict"):
        Toxicity(checkpoint=str(tmp_path / "a.ckpt")).identity()
    with pytest.raises(ConfigError, match="neither a file nor one of original, unbiased"):
        Toxicity(checkpoint="orignal").identity()

    torch.save({"config": Path, "state_dict": {}}, tmp_path / "b.ckpt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        Toxicity(checkpoint=str(tmp_path / "b.ckpt")).identity()


def test_a_model_that_is_not_a_classifier_is_refused(tmp_path):
    """Its head would be random and differ in every process."""
    from transformers import AutoModel

    tiny_classifier(tmp_path / "c", "bert", ["good", "bad"])
    AutoModel.from_pretrained(tmp_path / "c").save_pretrained(tmp_path / "c")
    with pytest.raises(ConfigError, match="is no sequence classifier: its weights lack classifier"):
        Toxicity(model=str(tmp_path / "c")).identity()


def test_the_overlap_must_be_smaller_than_a_window(classifiers):
    with pytest.raises(ConfigError, match="reads 46 tokens at a time; give a smaller overlap"):
        Toxicity(model=str(classifiers["bert"]), labels=("toxic",), activation="sigmoid", overlap=100).identity()


def test_a_classifier_whose_files_change_is_loaded_again(tmp_path):
    folder = tiny_classifier(tmp_path / "c", "bert", ["good", "bad"])
    before = Toxicity(model=str(folder), dtype="float32").score_texts(["the cat"])
    tiny_classifier(folder, "bert", ["good", "worse", "bad"])
    scorer = Toxicity(model=str(folder), dtype="float32", labels=("bad",), activation="softmax")
    assert scorer.score_texts(["the cat"]) != before


@pytest.mark.parametrize(
    "problem, settings, message",
    [
        ("multi_label_classification", {"labels": ("toxic", "obscene")}, None),
        (None, {"labels": ("toxic", "obscene")}, "names all labels"),
        ("single_label_classification", {"labels": ("toxic", "obscene")}, "names all labels"),
        ("regression", {"labels": ("toxic",)}, "predicts a number"),
        ("regression", {"labels": ("toxic",), "activation": "sigmoid"}, None),
    ],
)
def test_the_models_own_kind_of_problem_decides_its_probabilities(tmp_path, problem, settings, message):
    folder = tiny_classifier(tmp_path / "m", "bert", ["toxic", "obscene"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": problem}))
    scorer = Toxicity(model=str(folder), dtype="float32", **settings)
    if message is not None:
        with pytest.raises(ConfigError, match=message):
            scorer.score_text("a text")
        return
    assert scorer.identity()["activation"] == "sigmoid"
    assert 0 < scorer.score_text("a text") < 1
