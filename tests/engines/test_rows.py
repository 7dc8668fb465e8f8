"""What the adapters share."""

from __future__ import annotations

import pytest
import torch

from phf.core.config import ConfigError
from phf.engines.rows import IGNORED, check_objective, labelled_rows, open_fitted
from phf.objectives import AWR, SGTM, Anchored, Conditional
from phf.training.order import training_order


def test_objectives_that_need_more_than_scores_are_errors():
    with pytest.raises(ConfigError, match="needs a value head, which Mine's models"):
        check_objective(AWR(), "Mine")
    with pytest.raises(ConfigError, match="compares with a reference model"):
        check_objective(Anchored(reference="r"), "Mine")
    with pytest.raises(ConfigError, match="trains a part of the model apart"):
        check_objective(SGTM(), "Mine")
    check_objective(Conditional(), "Mine")


@pytest.mark.parametrize(
    ("given", "name"), [("conditional", "conditional"), ("{name: masking, threshold: 1}", "masking")]
)
def test_objectives_are_given_by_name_or_settings(tokens_dir, given, name):
    tokens, tokenizer, objective = open_fitted(str(tokens_dir), None, given, "Mine")
    assert objective.name == name
    assert all(token in tokenizer.get_vocab() for token in objective.control_tokens)
    order = training_order(tokens, objective, tokenizer, 16, 0)
    batch = order.batch(3, 7)
    rows = labelled_rows(order, objective, 3, 7)
    assert rows["input_ids"].numpy().tolist() == batch.input_BT.tolist()
    kept = rows["labels"] != IGNORED
    counted = objective.counted(torch.from_numpy(batch.score_BT), torch.from_numpy(batch.mask_BT))
    assert torch.equal(kept, counted)
    assert rows["labels"][kept].tolist() == batch.target_BT[kept.numpy()].tolist()
