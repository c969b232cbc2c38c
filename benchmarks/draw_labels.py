"""Picture of a result: the spectrogram of each clip, with its best labels beside it.

    earmark label samples/ --output out
    python -m benchmarks.draw_labels out docs/labels.png

The spectrogram shows the features that the model is given. A label that is also the name of its
file is blue. The PNG holds the labels as JSON too, so that a test can compare them.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import matplotlib
from PIL import Image
from PIL.PngImagePlugin import PngInfo

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from earmark import ASTFeatureExtractor, decode, read_result

NUM_COLUMNS = 2
NUM_LABELS = 3
NUM_COLOURS = 128  # a PNG of all colours is nearly three times as large
RATE_HZ = 16_000
FRAME_SAMPLES, SHIFT_SAMPLES = 400, 160
RIGHT, OTHER, TRACK, INK, FAINT = "#9ec5fe", "#d8dde3", "#f4f6f8", "#1f2328", "#59636e"


def draw_spectrogram(
    axes: Axes, clip: Mapping[str, Any], extractor: ASTFeatureExtractor, *, with_times: bool
) -> None:
    samples, facts = decode(clip["uri"])
    num_frames = 1 + (len(samples) - FRAME_SAMPLES) // SHIFT_SAMPLES  # what follows is padding
    features = extractor(samples, RATE_HZ, "np")["input_values"][0][:num_frames]
    extent = (0, facts.duration_s, 0, 1)
    axes.imshow(features.T, origin="lower", aspect="auto", cmap="magma", extent=extent)
    name = PurePosixPath(clip["uri"]).name
    axes.set_title(name, loc="left", fontsize=9, weight="bold", color=INK, pad=3)
    axes.spines[:].set_visible(False)
    axes.set_yticks([])
    seconds = range(int(facts.duration_s) + 1) if with_times else []
    axes.set_xticks(seconds, [f"{second} s" for second in seconds])
    axes.tick_params(labelsize=7, color=FAINT, labelcolor=FAINT, length=2.5, pad=2)


def draw_labels(axes: Axes, clip: Mapping[str, Any]) -> None:
    axes.set(xlim=(0, 1.05), ylim=(NUM_LABELS - 0.5, -0.5))
    axes.axis("off")
    for place, label in enumerate(clip["labels"][:NUM_LABELS]):
        is_right = label["name"] == PurePosixPath(clip["uri"]).stem
        axes.barh(place, 1, height=0.86, color=TRACK)
        axes.barh(place, label["score"], height=0.86, color=RIGHT if is_right else OTHER)
        style: dict[str, Any] = {"va": "center_baseline", "fontsize": 8, "color": INK}
        style["weight"] = "bold" if place == 0 else "normal"
        axes.text(0.03, place, label["name"], **style)
        axes.text(0.97, place, f"{label['score']:.2f}", ha="right", **style)


def draw(clips: Sequence[Mapping[str, Any]], extractor: ASTFeatureExtractor) -> Image.Image:
    num_rows = -(-len(clips) // NUM_COLUMNS)
    figure, grid = plt.subplots(
        num_rows,
        2 * NUM_COLUMNS,
        figsize=(8, 0.78 * num_rows + 0.15),
        width_ratios=[1.45, 1] * NUM_COLUMNS,
        layout="constrained",
        squeeze=False,
    )
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05, wspace=0.01, hspace=0.0)
    for axes in grid.flat:
        axes.axis("off")
    for place, clip in enumerate(clips):
        column, row = divmod(place, num_rows)
        spectrogram, labels = grid[row, 2 * column : 2 * column + 2]
        spectrogram.axis("on")
        is_last = row == num_rows - 1 or place == len(clips) - 1
        draw_spectrogram(spectrogram, clip, extractor, with_times=is_last)
        draw_labels(labels, clip)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=200)
    plt.close(figure)
    return Image.open(drawn).convert("RGB").quantize(NUM_COLOURS, dither=Image.Dither.NONE)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", help="the output of earmark label")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("--model", default="esc10", help="the model that labelled the clips")
    given = parser.parse_args(arguments)

    clips = read_result(given.result, "clips", ["uri", "labels"]).to_pylist()
    clips.sort(key=lambda clip: str(clip["uri"]))
    labels = {
        PurePosixPath(clip["uri"]).name: {
            label["name"]: round(label["score"], 2) for label in clip["labels"][:NUM_LABELS]
        }
        for clip in clips
    }
    text = PngInfo()
    text.add_text("labels", json.dumps(labels))
    picture = draw(clips, ASTFeatureExtractor.from_pretrained(given.model))
    picture.save(given.picture, optimize=True, pnginfo=text)


if __name__ == "__main__":
    main()
