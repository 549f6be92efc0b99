"""Evaluation as in the paper (§3.2), and predictions."""
