"""Settings of nets, training runs, evaluations and exports, as frozen data."""
