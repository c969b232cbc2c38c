"""``earmark train``: from inputs with labels to a model (start at ``run``).

plan ─▶ clips ─▶ stages ─▶ output        run.py joins them
          │        │
        data/    stages/                 run imports both, neither imports what is above it
"""
