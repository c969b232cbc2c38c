"""A name and a home for a user who has none: a container may run under any user id."""

from __future__ import annotations

import getpass
import os
from pathlib import Path


def settle_user() -> None:
    """Give the user a name and a home in the environment if the system knows none.

    torch's compiler and optimizers, and Beam, name a folder or a job after the user, and fail for a
    user id that has no entry in the password database. Without a home, libraries would make a
    folder named ``~`` in the current one; as in a container, it is then the root folder, which
    such a user usually cannot write. Child processes inherit both.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # before Python 3.13, and since
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = "/"
