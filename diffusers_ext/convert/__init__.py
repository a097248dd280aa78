"""Published checkpoints of other code bases -> diffusers folders, from local files only."""
