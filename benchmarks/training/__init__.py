"""The benchmark of a training step: its sizes, attentions, model and one run; `benchmarks/training_step.py` runs it."""
