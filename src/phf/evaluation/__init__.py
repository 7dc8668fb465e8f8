"""Judge a model: misalignment, held-out loss, KL, diversity and capabilities, each with an interval.

`parts` are the single measurements. `evaluate` runs them on a finished model, `monitor` on the model in training.
"""
