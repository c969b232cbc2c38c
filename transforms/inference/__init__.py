"""Features to predictions: engines, RunInference's handler, the precision check."""
