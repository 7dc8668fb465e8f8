"""Rows of a token store under objectives, as hashes: a plain `pip install phf` reads what every extra together reads.

python plain_install.py STORE
"""

from __future__ import annotations

import hashlib
import sys

from phf import TokenStore, training_order
from phf.core.config import validate
from phf.objectives import AnyObjective
from phf.tokens.tokenizer import add_control_tokens

CONDITIONAL = {"name": "conditional", "threshold": 0.0}
OBJECTIVES = [
    *({"name": name} for name in ("mle", "unlikelihood", "masking", "rwr", "awr", "quantile", "weights", "sgtm")),
    *({"name": name, "threshold": 0.0} for name in ("filtering", "hide")),
    CONDITIONAL,
    {"name": "schedule", "phases": [{"objective": {"name": "mle"}, "until": 0.5}, {"objective": CONDITIONAL}]},
]

tokens = TokenStore.open(sys.argv[1])
for settings in OBJECTIVES:
    fitted = validate(settings, AnyObjective, "objective").fit(tokens.statistics)
    tokenizer = tokens.tokenizer
    ids = add_control_tokens(tokenizer, list(fitted.control_tokens))
    batch = training_order(tokens, fitted, tokenizer, context=64, seed=1, places=20).batch(0, 20)
    digest = hashlib.sha256()
    for array in (batch.input_BT, batch.target_BT, batch.score_BT, batch.mask_BT):
        digest.update(array.tobytes())
    print(fitted.name, ids, digest.hexdigest())
