"""What a run shows and records: metrics, trackers, progress, device use, logging. No torch."""
