"""The run: optimizer steps, checkpoints, signals, and what is left in the run folder."""
