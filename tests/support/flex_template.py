"""The script that launches the flex template, loaded from its file: it belongs to no package."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from tests.support.paths import ROOT

IMAGE = "us-central1-docker.pkg.dev/proj-1/earmark/earmark:gpu"


def load_launcher() -> ModuleType:
    """Import ``deploy/flex_template/main.py``."""
    spec = importlib.util.spec_from_file_location("launcher", ROOT / "deploy/flex_template/main.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


launcher = load_launcher()
