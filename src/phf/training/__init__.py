"""The fused loss, the model around a causal LM, and the training run."""
