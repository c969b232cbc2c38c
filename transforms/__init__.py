"""The steps of labelling, one file per step, in the order an item travels them.

``records`` draws what travels and ``errors`` what can go wrong; then ``storage``, ``sources``,
``decode``, ``windows``, ``fbank``, ``spectrogram_transformer``, ``checkpoints``, ``labels``,
``inference``, ``rows``, ``ledger``, ``commit``; ``label_audio`` joins them, and ``yaml_provider``
gives it to Beam YAML; ``long_files`` cuts a very long file into parts before, by its length from
``header_probe``, and ``join_parts`` makes one clip of them behind; ``live_counts`` is for a
display, ``feature_statistics`` for ``earmark stats``. Four stand on files of their own: ``storage``
on ``retries`` and ``scratch``; ``sources`` on ``inputs``, ``manifests``, ``tar_source``,
``tar_headers``, ``parquet_source``, ``parquet_pages``, ``units``, ``spooling``, ``kept_files`` and
``clip_ids``; ``decode`` on ``decode_process``, ``decode_worker``, ``audio_routes`` and
``audio_readers``; ``checkpoints`` on ``public_checkpoints``, ``bundled``, ``tensor_names``,
``model_files``, ``model_weights`` and ``original_checkpoints``. ``image_checkpoints``, on
``checkpoints``, is for ``earmark train`` alone. Nothing here imports ``pipeline``. What people use
on its own can be imported from here; nothing is loaded until it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transforms.decoding.decode import decode_whole as decode_whole
    from transforms.features.fbank import ASTFeatureExtractor as ASTFeatureExtractor
    from transforms.label_audio import LabelAudio as LabelAudio
    from transforms.models.ast.model import ASTConfig as ASTConfig
    from transforms.models.ast.model import (
        ASTForAudioClassification as ASTForAudioClassification,
    )
    from transforms.models.ast.model import ASTModel as ASTModel

_HOMES = {
    "ASTConfig": "spectrogram_transformer",
    "ASTFeatureExtractor": "fbank",
    "ASTForAudioClassification": "spectrogram_transformer",
    "ASTModel": "spectrogram_transformer",
    "LabelAudio": "label_audio",
    "decode_whole": "decode_worker",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'transforms' has no attribute {name!r}")
    return getattr(importlib.import_module(f"transforms.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
