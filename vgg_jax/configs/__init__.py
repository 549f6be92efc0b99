"""Everything that a run, a net or an evaluation can be told, as frozen data."""
