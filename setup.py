"""What Earmark installs: the packages, what ships inside them, what they need."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def read_version() -> str:
    """The version in ``pipeline/__init__.py``, read as text: importing could need the extras."""
    text = (HERE / "pipeline" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError('pipeline/__init__.py has no line of the form __version__ = "…"')
    return match.group(1)


def read_readme() -> str:
    """The README's text; empty where only a part of the tree is there (a container's layer)."""
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    name="earmark",
    version=read_version(),
    description="Label audio datasets with the Audio Spectrogram Transformer on Apache Beam",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["pipeline*", "transforms*"]), "pipeline.configs"],
    # configs/ lies at the top of the checkout, and inside the package once installed;
    # pipeline.config.load.config_folder() knows both places.
    package_dir={"pipeline.configs": "configs"},
    package_data={
        "pipeline.configs": ["*.yaml", "train/*.yaml"],
        "transforms.models": ["label_lists/*.csv"],
        "transforms.models.ast": ["bundled_models/*/*"],
    },
    py_modules=["earmark"],
    entry_points={"console_scripts": ["earmark = earmark:main"]},
    install_requires=[
        "apache-beam==2.77.*",
        # The range of torch that torchaudio 2.11.0 loads beside; 2.11.1 needs a later torch.
        "torch>=2.11,<2.13",
        "torchaudio==2.11.0",
        "numpy>=2",
        "soundfile>=0.13",
        "av>=14",
        "soxr>=0.5",
        "fsspec>=2025.3",
        "gcsfs>=2025.3",
        "aiohttp>=3.9",
        "tenacity>=9",
        "pyarrow>=18",
        "pydantic>=2.10,<3",
        "PyYAML>=6",
        "typer>=0.29,<1",
        "rich>=13.9",
        "safetensors>=0.5",
        "scikit-learn>=1.5",
        "matplotlib>=3.9",
        "huggingface_hub>=0.30",
    ],
    extras_require={
        "s3": ["s3fs>=2025.3"],
        "azure": ["adlfs>=2024.12"],
        "gcp": ["apache-beam[gcp]==2.77.*"],
        "yaml": ["apache-beam[yaml]==2.77.*"],
        "openvino": ["openvino>=2025.1", "nncf>=2.16"],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "openvino>=2025.1",
            "nncf>=2.16",
            "transformers>=4.50",
            "kaldi-native-fbank>=1.20",
            "pandas>=2.2",
            "polars>=1.0",
            "duckdb>=1.0",
            "datasets>=3.0",
            # For tests/support/stores; moto's "server" extra is ten times that.
            "moto>=5.1",
            "flask>=3.0",
            "flask-cors>=5.0",
            "s3fs>=2025.3",
            "gcp-storage-emulator>=2026.7",
            # What Beam's DataflowRunner and its YAML import beyond what is here already. The whole
            # extras would bring sixty packages, and an older pandas than the tests read with.
            "google-cloud-dataflow-client>=0.13,<0.14",
            "docstring-parser>=0.15,<1",
            "jsonschema>=4,<5",
            # The first setuptools that builds wheels by itself, as test_packaging.py does.
            "setuptools>=70.1",
            "ruff>=0.17,<0.18",
            "mypy>=2.4,<2.5",
            "types-PyYAML>=6",
            "pandas-stubs>=2.2",
        ],
    },
)
