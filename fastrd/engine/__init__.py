"""Training: one step, the run around it, and its checkpoints."""
