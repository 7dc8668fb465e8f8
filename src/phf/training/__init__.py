"""Training: the fused loss, the model around a causal LM, and the run.

Read `fused` (the loss), `lm` and `model` (what is trained), `trainer` (the Hugging Face Trainer) and `train` (a run).
"""
