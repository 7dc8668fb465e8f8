"""phf's objectives in torchtitan's own trainer (torchtitan 0.3).

    python -m torchtitan.train --module phf.engines.torchtitan --config llama3_debugmodel \\
        --dataloader.tokens tokens/ --dataloader.objective "{name: conditional, threshold: 0}"

`--config` names a configuration of torchtitan's language models; a configuration of your own calls `with_objective` of
`config_registry`. `rows_and_loss` needs no GPU, the trainer does.

The loader's only state is the number of the next row, so a run that was stopped on two processes continues on one.
torchtitan divides by the targets of all processes, and the labels of targets that the objective does not count are
ignored, so the loss is the objective's own mean. It works bare and in torchtitan's `ChunkedLossWrapper`.

Not supported: value heads (AWR), reference models (anchored), and tensor, context and pipeline parallelism, in which a
process does not hold whole rows or the whole head. torchtitan's validator reads no scores and is switched off.
"""
