"""``earmark models``: what can be used as ``--model``."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from transforms.models.ast.bundled import bundled_models
from transforms.models.ast.public import PUBLIC_CHECKPOINTS

TABLE_WIDTH = 200  # more than the table needs


def print_models_json() -> None:
    """Print the models as a JSON list."""
    print(json.dumps([*_bundled(), *_public()], indent=2))


def print_models() -> None:
    """Print the models as a table, or as lines where the terminal is too narrow for it."""
    console = Console(highlight=False)
    table = Table("--model", "window", "trained on", "published", "licence", title="Public models")
    bundled = _bundled()
    lines = []
    for model in [*bundled, *_public()]:
        facts = [
            f"{model['window_s']:.3f} s",
            f"{model['labels']} ({model['num_labels']} labels)",
            f"{model['metric']} {model['published']:.4f}",
            model["license"],
        ]
        table.add_row(model["name"], *facts)
        lines.append(f"{model['name']}\n  {' · '.join(facts)}")
    wide = console.options.update(width=TABLE_WIDTH)
    if not console.is_terminal:  # a pipe has no width to fit into
        console = Console(width=TABLE_WIDTH, highlight=False)
        console.print(table)
    elif console.measure(table, options=wide).maximum <= console.width:
        console.print(table)
    else:  # an id is there to be copied: it is never cut or wrapped
        console.print("\n".join(lines), soft_wrap=True, markup=False)
    source = "the Hugging Face hub"
    if bundled:
        inside = ", ".join(model["name"] for model in bundled)
        source = f"inside Earmark for {inside}, {source} for the others"
    console.print(
        f"Source: {source}. A folder (config.json, model.safetensors, "
        "preprocessor_config.json) or an original .pth file can be used as well."
    )


def _bundled() -> list[dict[str, Any]]:
    return [
        {
            "name": model.name,
            "source": "bundled",
            "max_length": model.max_length,
            "window_s": model.window_s,
            "labels": model.dataset,
            "num_labels": model.num_labels,
            "metric": model.metric,
            "published": model.value,
            "license": model.license,
        }
        for model in bundled_models()
    ]


def _public() -> list[dict[str, Any]]:
    return [
        {
            "name": entry.hub_id,
            "source": "hub",
            **dataclasses.asdict(entry),
            "window_s": entry.window_s,
        }
        for entry in PUBLIC_CHECKPOINTS
    ]
