"""What a run will do: resolve the settings, find the items, leave out what is done.

    INPUT… ─find─▶ items, containers ─compare with commits─▶ units to do
                                          ├─▶ kept: committed and unchanged
                                          ├─▶ redone: units that hold a changed item
                                          └─▶ vanished: committed, no longer in the input

Nothing is written here; ``earmark plan`` stops after it, ``earmark label`` goes on with ``run``.
"""

from __future__ import annotations

