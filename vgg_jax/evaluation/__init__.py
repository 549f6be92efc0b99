"""The evaluation of the paper (§3.2) and predictions."""
