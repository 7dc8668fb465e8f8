"""Rows of a token store under objectives, as hashes: a plain `pip install phf` reads what every extra together reads.

python plain_install.py STORE
"""

from __future__ import annotations

import hashlib
import sys

from phf import MLE, Conditional, Filtering, Hide, TokenStore, training_order
from phf.core.config import validate
from phf.objectives import AnyObjective
from phf.tokens.tokenizer import add_control_tokens

LATER = {"name": "conditional", "threshold": 0.0}
SCHEDULE = {"name": "schedule", "phases": [{"objective": {"name": "mle"}, "until": 0.5}, {"objective": LATER}]}
OBJECTIVES = [
    MLE(),
    Conditional(threshold=0.0),
    Filtering(threshold=0.0),
    Hide(threshold=0.0),
    validate(SCHEDULE, AnyObjective, "objective"),
]

tokens = TokenStore.open(sys.argv[1])
for objective in OBJECTIVES:
    fitted = objective.fit(tokens.statistics)
    tokenizer = tokens.tokenizer
    ids = add_control_tokens(tokenizer, list(fitted.control_tokens))
    batch = training_order(tokens, fitted, tokenizer, context=64, seed=1, places=20).batch(0, 20)
    digest = hashlib.sha256()
    for array in (batch.input_BT, batch.target_BT, batch.score_BT, batch.mask_BT):
        digest.update(array.tobytes())
    print(fitted.name, ids, digest.hexdigest())
