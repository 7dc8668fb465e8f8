"""Judge a model: misalignment, held-out loss, KL, diversity, capabilities."""
