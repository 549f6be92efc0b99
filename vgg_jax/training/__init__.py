"""Training (§3.1): the step, the loop and what they need."""
