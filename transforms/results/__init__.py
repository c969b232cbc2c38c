"""Predictions to committed Parquet: rows, the parts of a unit, its commit."""
