"""Several processes: launch, collectives, heartbeats and signals."""
