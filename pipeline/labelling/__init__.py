"""``earmark label``, ``plan`` and ``stats``: find the work, run the graph."""
