"""Audio classifiers: a family a folder; what their outputs mean."""
