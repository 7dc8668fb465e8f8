"""Attack a model with prompts and with control tokens."""
