"""XLA, malloc and signals: the settings of the process."""
