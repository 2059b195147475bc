"""The commands; imported by all of them, so it imports nothing."""

CHECKPOINT_CALLBACKS = ("best_model", "last_checkpoint", "recovery_checkpoint")
"""The callbacks of `enstack fit` that save checkpoints, by their names on the command line."""
