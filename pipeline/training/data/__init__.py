"""Labelled clips, decoded once, in batches, augmented."""
