"""What a run prints: progress, where the time went, precision; the standard streams."""
