"""The folder of a training run: its metadata, its checkpoints, and how files are written."""
