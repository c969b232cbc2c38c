"""Hostile models: the whole command refuses them before any work, and runs nothing that they hold.

A model is a stranger's file. Each case here is given to ``earmark label`` itself: exit code 2, one
message that names the file, tensor or value and the next step, no output folder, no code run, no
memory taken for what a file only promises.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pipeline.cli import main as cli
from tests.support.fake_hub import serve_hub, use_hub
from tests.support.model_factory import TINY_LABELS, tiny_config
from tests.transforms.models.ast.conftest import Refused
from tests.transforms.models.ast.factory import edit_json, edit_weights
from transforms.models.ast.files import MAX_JSON_BYTES
from transforms.models.ast.model import ASTForAudioClassification
from transforms.models.ast.tensor_names import to_layout

WEIGHTS, CONFIG, FEATURES = "model.safetensors", "config.json", "preprocessor_config.json"
QUERY = "audio_spectrogram_transformer.encoder.layer.0.attention.attention.query.weight"
BIAS = "classifier.dense.bias"
GIB = 1 << 30

Damage = Callable[[Path], Any]


# --- Code ----------------------------------------------------------------------------------


class RunsCode:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


class BuildsLater(RunsCode):
    """An innocent call whose state is set by one that is not."""

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (), None, None, iter([("a", RunsCode(self.marker))])


def save_zip(payload: object, path: Path) -> None:
    torch.save({"module.v.cls_token": payload}, path)


def save_legacy(payload: object, path: Path) -> None:
    """As torch saved before 1.6: pickles one after the other, no zip."""
    torch.save({"module.v.cls_token": payload}, path, _use_new_zipfile_serialization=False)


def save_bare(payload: object, path: Path) -> None:
    path.write_bytes(pickle.dumps({"module.v.cls_token": payload}, protocol=4))


def save_by_hand(payload: object, path: Path) -> None:
    """A zip that torch did not write, whose data.pkl is as one likes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(payload, protocol=2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


def save_scripted(payload: object, path: Path) -> None:
    """TorchScript: a program of its own, which torch.load would hand to torch.jit."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(payload, protocol=2))
        archive.writestr("archive/constants.pkl", pickle.dumps((), protocol=2))
        archive.writestr("archive/code/__torch__.py", "def forward(self): pass\n")
        archive.writestr("archive/version", "3\n")


@pytest.mark.parametrize("payload", [RunsCode, BuildsLater])
@pytest.mark.parametrize("save", [save_zip, save_legacy, save_bare, save_by_hand, save_scripted])
@pytest.mark.parametrize("name", ["evil.pth", "pytorch_model.bin"])
def test_code_in_a_pickle_is_refused_and_not_run(
    model: Path,
    refused: Refused,
    tmp_path: Path,
    payload: type[RunsCode],
    save: Callable[[object, Path], None],
    name: str,
) -> None:
    (model / WEIGHTS).unlink()
    marker = tmp_path / "ran"
    save(payload(marker), model / name)
    words = refused(model if name.endswith(".bin") else model / name)
    assert f"{name} " in words
    assert "refused" in words or "damaged" in words
    assert "safetensors" in words or "get it again" in words
    assert not marker.exists()


def test_the_payloads_of_these_tests_run_if_they_are_allowed_to(tmp_path: Path) -> None:
    for number, payload in enumerate((RunsCode, BuildsLater)):
        marker = tmp_path / f"ran-{number}"
        save_zip(payload(marker), tmp_path / "evil.pth")
        torch.load(tmp_path / "evil.pth", weights_only=False)
        assert marker.exists()


def test_the_command_refuses_a_pickle_with_code_however_torch_is_set(
    tmp_path: Path, clip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    evil = tmp_path / "evil.pth"
    save_zip(RunsCode(tmp_path / "ran"), evil)
    assert cli.main(["label", str(clip), "-o", str(tmp_path / "out"), "-m", str(evil)]) == 2
    message = f"earmark: model {evil}: evil.pth holds more than"
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def add_code(folder: Path, marker: Path) -> None:
    """What a model with code of its own looks like: the code, and a config that asks for it."""
    code = f"import os\nos.mkdir({str(marker)!r})\nclass Model: pass\nclass Config: pass\n"
    for name in ("modeling_x.py", "configuration_x.py", "feature_extraction_x.py", "__init__.py",
                 "conftest.py", "sitecustomize.py", "setup.py"):  # fmt: skip
        (folder / name).write_text(code)
    for name in (CONFIG, FEATURES):
        edit_json(
            folder / name,
            trust_remote_code=True,
            auto_map={
                "AutoConfig": "configuration_x.Config",
                "AutoModelForAudioClassification": "modeling_x.Model",
                "AutoFeatureExtractor": "org/elsewhere--feature_extraction_x.Model",
            },
        )


def test_code_beside_a_model_is_never_imported(
    model: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_code(model, tmp_path / "ran")
    monkeypatch.chdir(model)
    arguments = ["label", str(clip), "-o", str(tmp_path / "out"), "-m", ".", "-q"]
    assert cli.main(arguments) == 0
    assert not (tmp_path / "ran").exists()
    assert not any(name in sys.modules for name in ("modeling_x", "configuration_x"))


def test_code_on_the_hub_is_never_fetched(
    model: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_code(model, tmp_path / "ran")
    with serve_hub(model) as hub:
        use_hub(hub, tmp_path / "cache", monkeypatch)
        out = str(tmp_path / "out")
        assert cli.main(["label", str(clip), "-o", out, "-m", "org/tiny", "-q"]) == 0
        asked = " ".join(hub.requests)
    assert f"{WEIGHTS} " in asked
    assert ".py" not in asked
    assert "elsewhere" not in asked
    assert not list((tmp_path / "cache").rglob("*.py"))
    assert not (tmp_path / "ran").exists()


# --- Safetensors ---------------------------------------------------------------------------


def write_header(folder: Path, header: bytes | dict[str, Any], data: bytes = b"") -> None:
    """Weights with a header of one's own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """The model's own weights behind a changed header."""

    def damage(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        change(header)
        write_header(folder, header, content[8 + size :])

    return damage


def promise_length(num_bytes: int) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", num_bytes) + content[8:])

    return damage


def overlap(header: dict[str, Any]) -> None:
    first, second = sorted(name for name in header if name.endswith("intermediate.dense.weight"))
    header[first]["data_offsets"] = header[second]["data_offsets"]


def name_twice(folder: Path) -> None:
    """The second entry is another tensor's place: then the first is nobody's, which is refused."""
    content = (folder / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    other = next(name for name in header if name.endswith("layer.0.output.dense.bias"))
    entry = json.dumps({**header[BIAS], "data_offsets": header[other]["data_offsets"]})
    twice = content[8 : 8 + size].rstrip()[:-1] + f',"{BIAS}":{entry}}}'.encode()
    write_header(folder, twice, content[8 + size :])


def many_tensors(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    write_header(folder, {f"t{number}": entry for number in range(200_000)})


def set_value(name: str, value: float) -> Damage:
    return partial(edit_weights, edit=lambda tensors: tensors[name].view(-1).__setitem__(-1, value))


def set_tensor(name: str, tensor: torch.Tensor) -> Damage:
    return partial(edit_weights, edit=lambda tensors: tensors.update({name: tensor}))


def drop(name: str) -> Damage:
    return partial(edit_weights, edit=lambda tensors: tensors.pop(name))


NOT_SAFETENSORS = f"{WEIGHTS} cannot be read as safetensors: "


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (promise_length(2**63), NOT_SAFETENSORS),
        (promise_length(2**64 - 1), NOT_SAFETENSORS),
        (promise_length(99_000_000), NOT_SAFETENSORS),
        (change_header(overlap), NOT_SAFETENSORS),
        (change_header(lambda h: h[BIAS].update(shape=[2**62])), NOT_SAFETENSORS),
        (change_header(lambda h: h[BIAS].update(shape=[-5])), NOT_SAFETENSORS),
        (change_header(lambda h: h[BIAS].update(dtype="F65")), NOT_SAFETENSORS),
        (change_header(lambda h: h[BIAS].update(dtype="F64")), NOT_SAFETENSORS),
        (change_header(lambda h: h[BIAS].update(data_offsets=[0, 2**63])), NOT_SAFETENSORS),
        (change_header(lambda h: h[BIAS].update(dtype="I32")), f"'{BIAS}' is torch.int32; exp"),
        (lambda folder: write_header(folder, b"[" * 1_000_000), NOT_SAFETENSORS),
        (lambda folder: write_header(folder, b"[]"), NOT_SAFETENSORS),
        (lambda folder: write_header(folder, {}), "there is no tensor 'audio_spectrogram"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"<!DOCTYPE html>" * 99), NOT_SAFETENSORS),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), NOT_SAFETENSORS),
        (name_twice, NOT_SAFETENSORS),
        (many_tensors, "there is no tensor 'audio_spectrogram"),
        (set_value(QUERY, float("nan")), f"'{QUERY}' holds 1 values that are NaN or infinite, of"),
        (set_value(BIAS, float("-inf")), f"'{BIAS}' holds 1 values that are NaN or infinite, of 5"),
        (set_tensor(BIAS, torch.full((5,), 1e300, dtype=torch.float64)), "holds 5 values that are"),
        (drop(QUERY), f"there is no tensor '{QUERY}'; expected it for num_hidden_layers=2. Is"),
        (drop(BIAS), f"there is no tensor '{BIAS}'; expected it for num_hidden_layers=2. It has no "
                     "classifier: fine-tune it (earmark train)"),
        (set_tensor("lora.a", torch.zeros(1)), "the tensor 'lora.a' is not part of an AST"),
        (set_tensor(QUERY, torch.zeros(32, 31)), f"'{QUERY}' has the shape (32, 31); expected "
                                                 "(32, 32). Its config.json describes another"),
        (set_tensor(QUERY, torch.zeros(())), f"'{QUERY}' has the shape (); expected (32, 32)"),
    ],
)  # fmt: skip
def test_hostile_weights_are_refused_by_name(
    model: Path, refused: Refused, little_memory: None, damage: Damage, words: str
) -> None:
    damage(model)
    said = refused(model)
    assert words in said
    assert len(said) < 1_000  # a message, not a dump


def test_weights_cut_anywhere_are_refused(model: Path, refused: Refused) -> None:
    whole = (model / WEIGHTS).read_bytes()
    for kept in {0, 1, 7, 8, 9, 100, *range(200, len(whole), len(whole) // 40), len(whole) - 1}:
        (model / WEIGHTS).write_bytes(whole[:kept])
        words = refused(model)
        assert NOT_SAFETENSORS in words, kept
        assert "It is cut short or damaged; get it again" in words


def test_a_pickle_cut_anywhere_is_refused(model: Path, refused: Refused, tmp_path: Path) -> None:
    state = safetensors.torch.load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    path = model / "pytorch_model.bin"
    torch.save(state, path)
    whole = path.read_bytes()
    for kept in {0, 1, 3, 4, 100, *range(500, len(whole), len(whole) // 30), len(whole) - 1}:
        path.write_bytes(whole[:kept])
        words = refused(model)
        assert "pytorch_model.bin " in words, kept
        assert "damaged" in words, words


def pickled(**tensors: torch.Tensor) -> Damage:
    """The same model as a pickle, some tensors replaced."""

    def damage(folder: Path) -> None:
        state = safetensors.torch.load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        torch.save({**state, **tensors}, folder / "pytorch_model.bin")

    return damage


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.zeros(1).expand(1 << 20, 1 << 20), "expanded from 4 bytes to the shape (1048576, "),
        (torch.zeros(5).to_sparse(), "sparse_coo on cpu"),
        (torch.empty(5, device="meta"), "strided on meta"),
        (torch.quantize_per_tensor(torch.zeros(5), 0.1, 0, torch.qint8), "quantised"),
    ],
)
def test_a_pickle_that_promises_more_than_it_holds_is_refused(
    model: Path, refused: Refused, little_memory: None, tensor: torch.Tensor, kind: str
) -> None:
    pickled(**{BIAS: tensor})(model)
    words = refused(model)
    assert f"pytorch_model.bin holds the tensor '{BIAS}', which is {kind}" in words
    assert "expected every value to be stored. Save the state_dict()" in words


def test_an_original_checkpoint_cannot_promise_terabytes(
    tmp_path: Path, refused: Refused, little_memory: None
) -> None:
    # Its config is derived from its shapes: a few bytes must not become a million layers.
    model = ASTForAudioClassification(tiny_config())
    state = to_layout(model.state_dict(), model.config, "original")
    path = tmp_path / "model.pth"
    options = ["--set", "model.labels=audioset", "--set", "model.mean=0", "--set", "model.std=1"]
    torch.save({**state, "module.v.cls_token": torch.zeros(1).expand(1, 1, 1 << 30)}, path)
    assert "'module.v.cls_token', which is expanded from 4 bytes" in refused(path, *options)
    block = "module.v.blocks.999999999.norm1.weight"
    torch.save({**state, block: torch.zeros(1)}, path)
    strides = ["--set", "model.frequency_stride=16", "--set", "model.time_stride=16"]
    heads = ["--set", "model.num_attention_heads=2"]
    words = refused(path, *options, *strides, *heads)
    assert "num_hidden_layers is 1000000000; expected at most 1000" in words


# --- Configs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file_name", "changes", "words"),
    [
        (CONFIG, {"hidden_size": 10**9}, "hidden_size is 1000000000; expected at most 1048576"),
        (CONFIG, {"hidden_size": 1 << 20}, "the tensor "),
        (CONFIG, {"intermediate_size": 1 << 20}, "the tensor "),
        (CONFIG, {"max_length": 1 << 20}, "position_embeddings' has the shape (1, 514, 32); exp"),
        (CONFIG, {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000; expected at most 1"),
        (CONFIG, {"num_hidden_layers": 1000}, "there is no tensor "),
        (CONFIG, {"hidden_size": "32"}, "hidden_size is '32' (str); expected a whole number"),
        (CONFIG, {"num_attention_heads": 10**6}, "num_attention_heads is 1000000; expected a div"),
        (CONFIG, {"patch_size": 10**6}, "max_length is 1024; expected at least patch_size"),
        (CONFIG, {"time_stride": 0}, "time_stride is 0; expected a whole number from 1"),
        (CONFIG, {"layer_norm_eps": float("nan")}, "layer_norm_eps is nan; expected a float in"),
        (CONFIG, {"hidden_act": "os.system"}, "hidden_act is 'os.system'; expected one of"),
        (CONFIG, {"model_type": ["x"]}, "model_type is ['x']; expected 'audio-spectrogram-trans"),
        (CONFIG, {"problem_type": "ranking"}, "problem_type is 'ranking'; expected None or one of"),
        (FEATURES, {"std": 0}, "std is 0; expected a finite number above 0"),
        (FEATURES, {"std": float("nan")}, "std is nan; expected a finite number above 0"),
        (FEATURES, {"mean": float("inf")}, "mean is inf; expected a finite number"),
        (FEATURES, {"mean": [1, 2]}, "mean is [1, 2]; expected a finite number"),
        (FEATURES, {"mean": True}, "mean is True; expected a finite number"),
        (FEATURES, {"mean": 10**400}, "mean is "),
        (FEATURES, {"max_length": 10**9}, "max_length in preprocessor_config.json is 1000000000; "),
        (FEATURES, {"sampling_rate": 8000}, "sampling_rate in preprocessor_config.json is 8000; "),
    ],
)
def test_absurd_settings_are_refused_by_name(
    model: Path,
    refused: Refused,
    little_memory: None,
    file_name: str,
    changes: dict[str, Any],
    words: str,
) -> None:
    edit_json(model / file_name, **changes)
    said = refused(model)
    assert words in said
    assert len(said) < 1_000


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({0: "a", 1: "b", 2: "c", 3: "d"}, "id2label in config.json has 4 labels, and the classif"),
        ({0: "a", 1: "b", 2: "c", 3: "d", 5: "e"}, "indices [0, 1, 2, 3, 5]; expected 0 to 4, ea"),
        ({-1: "z", 0: "a", 1: "b", 2: "c", 3: "d"}, "id2label holds '-1': 'z'; expected an index"),
        ({"0": "a", "00": "b", "1": "c", "2": "d", "3": "e"}, "expected 0 to 4, each once"),
        ({0: "a", 1: ["b"], 2: "c", 3: "d", 4: "e"}, "id2label holds '1': ['b']; expected an ind"),
        ({0: "a", 1: "b", 2: "a", 3: "d", 4: "e"}, "has the name 'a' for 0 and 2; expected one"),
        ({0: "a", 1: " ", 2: "c", 3: "d", 4: "e"}, "has the name none for 1; expected one per out"),
        ("dog", "id2label is 'dog'; expected a mapping from index to name"),
        ({}, "has 2 labels, and the classifier has 5 outputs"),
    ],
)  # fmt: skip
def test_labels_that_are_not_one_per_output_are_refused(
    model: Path, refused: Refused, labels: Any, words: str
) -> None:
    edit_json(model / CONFIG, id2label=labels)
    assert words in refused(model)


def test_a_duplicate_key_is_refused(model: Path, refused: Refused) -> None:
    text = (model / CONFIG).read_text()
    (model / CONFIG).write_text(text.replace('"0": "dog"', '"0": "cat", "0": "dog"'))
    assert "config.json cannot be read as JSON: the key '0' occurs twice" in refused(model)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\nb\nc\nd\n", "has 4 labels, and the classifier has 5 outputs; expected one label per"),
        ("a\nb\nc\nd\ne\nf\n", "has 6 labels, and the classifier has 5 outputs"),
    ],
)
def test_a_label_list_that_does_not_fit_is_refused(
    model: Path, refused: Refused, tmp_path: Path, text: str, words: str
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text(text, errors="surrogateescape")
    said = refused(model, "--set", f"model.labels={labels}")
    assert words in said
    assert "labels.txt" in said
    # With the right list the model is accepted.
    labels.write_text("\n".join(reversed(TINY_LABELS)))
    assert "nowhere.wav does not exist" in refused(model, "--set", f"model.labels={labels}")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "'../model.safetensors'; expected a .safe"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names the file '/etc/passwd'; expected"),
        ({"weight_map": {"a": "https://x/model.safetensors"}}, "names the file 'https://x/model.s"),
        ({"weight_map": {"a": "weights.bin"}}, "names the file 'weights.bin'; expected a .safe"),
        ({"weight_map": {"a": 5, "b": "x.safetensors"}}, "names the file 5"),
        ({"weight_map": {"a": "part.safetensors"}}, "part.safetensors does not exist"),
        ({"weight_map": []}, "has no weight_map from tensor to file"),
        ({}, "has no weight_map from tensor to file"),
        ([], "holds a list; expected a JSON object"),
    ],
)  # fmt: skip
def test_an_index_that_points_elsewhere_is_refused(
    model: Path, refused: Refused, index: Any, words: str
) -> None:
    (model / WEIGHTS).rename(model.parent / WEIGHTS)  # where the traversal would find it
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    said = refused(model)
    assert words in said
    assert ".index.json" in said or "does not exist" in said


# --- Files that are none -------------------------------------------------------------------


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def replace_by_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.timeout(60)  # a pipe would be waited for, a device read, without end
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, FEATURES])
@pytest.mark.parametrize(
    ("replace", "words"),
    [
        (replace_by_pipe, "is a pipe, socket or device, a file was expected"),
        (replace_by_device, "is a pipe, socket or device, a file was expected"),
        (replace_by_loop, "Too many levels of symbolic links"),
        (replace_by_folder, "is a folder, a file was expected"),
    ],
)
def test_pipes_devices_and_folders_are_not_read(
    model: Path, refused: Refused, name: str, replace: Damage, words: str
) -> None:
    replace(model / name)
    said = refused(model)
    assert f"{name} cannot be read: " in said
    assert words in said


def test_links_out_of_the_folder_are_followed_as_the_hubs_cache_needs(
    model: Path, clip: Path, tmp_path: Path, refused: Refused
) -> None:
    blob = tmp_path / "blobs" / "1"
    blob.parent.mkdir()
    (model / WEIGHTS).rename(blob)
    (model / WEIGHTS).symlink_to("../blobs/1")
    arguments = ["label", str(clip), "-o", str(tmp_path / "out"), "-m", str(model), "-q"]
    assert cli.main(arguments) == 0
    blob.unlink()
    assert f"has no weights; expected {WEIGHTS}" in refused(model)


def test_a_config_of_gigabytes_is_not_read(
    model: Path, refused: Refused, little_memory: None
) -> None:
    with (model / CONFIG).open("r+b") as file:
        file.truncate(8 * GIB)
    words = refused(model)
    assert f"config.json has {8 * GIB} bytes; expected at most {MAX_JSON_BYTES}" in words
