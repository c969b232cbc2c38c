"""``earmark train``: from inputs with labels to a model (start at ``run``)."""
