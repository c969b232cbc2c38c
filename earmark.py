"""Earmark's public names, each loaded when it is first used."""

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.__main__ import main as main
    from transforms.decoding.decode import decode_whole as decode
    from transforms.label_audio import LabelAudio, LabelSettings, make_settings
    from transforms.models.ast.checkpoints import resolve_model
    from transforms.models.ast.config import ASTConfig
    from transforms.models.ast.feature_extractor import ASTFeatureExtractor
    from transforms.models.ast.model import ASTForAudioClassification, ASTModel
    from transforms.results.read import read_result

__all__ = [
    "ASTConfig",
    "ASTFeatureExtractor",
    "ASTForAudioClassification",
    "ASTModel",
    "LabelAudio",
    "LabelSettings",
    "decode",
    "make_settings",
    "read_result",
    "resolve_model",
]

# Public name: its module, and its name there.
_HOMES = {
    "ASTConfig": ("transforms.models.ast.config", "ASTConfig"),
    "ASTFeatureExtractor": ("transforms.models.ast.feature_extractor", "ASTFeatureExtractor"),
    "ASTForAudioClassification": ("transforms.models.ast.model", "ASTForAudioClassification"),
    "ASTModel": ("transforms.models.ast.model", "ASTModel"),
    "LabelAudio": ("transforms.label_audio", "LabelAudio"),
    "LabelSettings": ("transforms.label_audio", "LabelSettings"),
    "decode": ("transforms.decoding.decode", "decode_whole"),
    "make_settings": ("transforms.label_audio", "make_settings"),
    "read_result": ("transforms.results.read", "read_result"),
    "resolve_model": ("transforms.models.ast.checkpoints", "resolve_model"),
    "main": ("pipeline.__main__", "main"),  # the earmark command
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'earmark' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    _check_not_shadowed(module.partition(".")[0])
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _check_not_shadowed(package: str) -> None:
    """Raise ``ImportError`` if Python finds somebody else's package under the name of ours."""
    own = Path(__file__).resolve().parent / package / "__init__.py"
    spec = importlib.util.find_spec(package)
    if spec is None:
        return  # the import that follows says so
    found = Path(spec.origin or next(iter(spec.submodule_search_locations or [""])))
    if found.resolve() != own:
        raise ImportError(
            f"{found} hides the package {package!r} of Earmark ({own.parent}). Rename it, or start "
            "Python in another folder"
        )
