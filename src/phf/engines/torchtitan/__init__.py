"""phf's objectives in torchtitan's own trainer (torchtitan 0.3).

    python -m torchtitan.train --module phf.engines.torchtitan --config llama3_debugmodel \\
        --dataloader.tokens tokens/ --dataloader.objective "{name: conditional, threshold: 0}"

Read `rows_and_loss`, which needs no GPU, and `config_registry` (the trainer). docs/engines.md says what is refused.
"""
