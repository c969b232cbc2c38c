"""``earmark evaluate``: truth, metrics, and their picture."""
