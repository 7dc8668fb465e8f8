"""Attack a model: with prompts that a search finds (`search`), and through its control tokens (`control_tokens`).

`attackers` write the prompts, `target` is the model under attack, and `attack` runs it all.
"""
