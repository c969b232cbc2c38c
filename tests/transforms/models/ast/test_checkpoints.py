"""Checkpoints: found, checked, loaded and saved; every fault named."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
import transformers

from tests.transforms.models.ast.factory import (
    NAMES,
    STATS,
    TINY,
    assert_close,
    edit_json,
    edit_weights,
    make_input,
    make_model,
    make_pair,
    states_equal,
)
from transforms.errors import ModelError
from transforms.models.ast.checkpoints import (
    ModelOverrides,
    ModelSpec,
    load_for_finetuning,
    load_model,
    resolve_model,
    save_pretrained,
)
from transforms.models.ast.config import ASTConfig
from transforms.models.ast.model import (
    ASTForAudioClassification,
    ASTModel,
    resize_position_embeddings,
)
from transforms.models.ast.public import PUBLIC_CHECKPOINTS
from transforms.models.ast.tensor_names import Layout, tensor_names, to_layout
from transforms.models.labels import audioset_labels
from transforms.storage import retries

GIVEN = ModelOverrides(labels="audioset", mean=-4.25, std=4.5, frequency_stride=10, time_stride=10)


# --- The folder of a model -----------------------------------------------------------------


def test_a_folder_is_described_in_full(folder: Path) -> None:
    spec = resolve_model(str(folder))
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert (spec.name, spec.source, spec.revision, spec.sha256) == (
        str(folder), "folder", None, digest,
    )  # fmt: skip
    assert [(label.index, label.id, label.name) for label in spec.labels] == [
        (index, None, name) for index, name in enumerate(NAMES)
    ]
    assert (spec.mean, spec.std, spec.activation) == (-3.5, 2.5, "softmax")
    assert (spec.num_labels, spec.hidden_size, spec.num_frames) == (5, 64, 128)
    assert (spec.window_s, spec.sampling_rate) == (1.295, 16_000)
    (note,) = spec.notes
    assert note.startswith("Scores are a softmax: the checkpoint does not say (no problem_type)")


def test_a_pickled_spec_loads_the_same_weights(folder: Path) -> None:
    spec = pickle.loads(pickle.dumps(resolve_model(str(folder))))
    model = load_model(spec)
    assert states_equal(model, make_model())
    assert not model.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert len(pickle.dumps(spec)) < 5_000


def test_a_loaded_model_does_not_depend_on_its_file(folder: Path) -> None:
    model = load_model(resolve_model(str(folder)))
    size = (folder / "model.safetensors").stat().st_size
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(bytes(size))
    assert states_equal(model, make_model())


def test_no_weights_are_drawn_where_a_file_has_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(tensor: torch.Tensor, **_: float) -> None:
        pytest.fail(f"weights of {tuple(tensor.shape)} on {tensor.device} were drawn")

    spec = resolve_model(str(folder))
    monkeypatch.setattr(torch.nn.init, "normal_", draw)
    load_model(spec)


def test_a_remote_folder_loads_like_a_local_one(folder: Path) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/models/tiny", recursive=True)
    spec = resolve_model("memory://models/tiny")
    assert spec.sha256 == resolve_model(str(folder)).sha256
    assert states_equal(load_model(spec), make_model())
    with pytest.raises(ModelError, match=r"memory://models/none: there is no config\.json"):
        resolve_model("memory://models/none")


def test_weights_in_several_files_are_one_model(folder: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    theirs = transformers.ASTForAudioClassification.from_pretrained(folder)
    theirs.save_pretrained(sharded, max_shard_size="20KB")
    shutil.copy(folder / "preprocessor_config.json", sharded)
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 1
    spec = resolve_model(str(sharded))
    lines = [
        f"{name} {hashlib.sha256((sharded / name).read_bytes()).hexdigest()}\n" for name in files
    ]
    assert spec.weight_files == tuple(files)
    assert spec.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert states_equal(load_model(spec), make_model())
    (sharded / files[1]).unlink()
    with pytest.raises(ModelError, match=re.escape(f"{files[1]} does not exist")):
        resolve_model(str(sharded))


def test_a_pickle_of_tensors_is_read(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert states_equal(load_model(resolve_model(str(folder))), make_model())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_become_float32(folder: Path, dtype: torch.dtype) -> None:
    save_pretrained(make_model().to(dtype), folder, **STATS)
    model = load_model(resolve_model(str(folder)))
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype)[6:]
    assert states_equal(model, make_model().to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_half_precision_is_the_same_model_here_and_in_transformers(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    model = make_model()
    save_pretrained(model, tmp_path / "half", **STATS, dtype=dtype)
    save_pretrained(model, tmp_path / "whole", **STATS)
    assert states_equal(model, make_model())  # saving leaves it as it was
    stored = safetensors.torch.load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.6 * sizes[1]
    ours = load_model(resolve_model(str(tmp_path / "half")))
    assert states_equal(ours, make_model().to(dtype).float())
    features = make_input(ours.config)
    # The second is the usual call, in which the config decides the type.
    for options in ({"dtype": torch.float32}, {}):
        theirs = transformers.ASTForAudioClassification.from_pretrained(
            tmp_path / "half", **options
        )
        with torch.no_grad():
            assert_close(ours(features).logits, theirs(features).logits, atol=1e-5)


def test_a_weight_too_large_for_half_precision_is_named_and_nothing_is_written(
    tmp_path: Path,
) -> None:
    model = make_model()
    with torch.no_grad():
        model.classifier.dense.bias[2] = -70_000
    with pytest.raises(
        ModelError, match=r"'classifier\.dense\.bias' holds 70000; float16 goes to 65504\. Save it"
    ):
        save_pretrained(model, tmp_path / "half", **STATS, dtype=torch.float16)
    assert not (tmp_path / "half").exists()
    save_pretrained(model, tmp_path / "half", **STATS, dtype=torch.bfloat16)
    assert load_model(resolve_model(str(tmp_path / "half"))).classifier.dense.bias[2] == -70_144


# --- Names of tensors ----------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"qkv_bias": False}, {"num_hidden_layers": 12}])
@pytest.mark.parametrize("layout", ["original", "disk", "memory"])
def test_every_layout_round_trips_bit_for_bit(
    tmp_path: Path, layout: Layout, fields: dict[str, Any]
) -> None:
    model = make_model(**fields)
    model.config.save_pretrained(tmp_path)
    tensors = to_layout(model.state_dict(), model.config, layout)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert states_equal(ASTForAudioClassification.from_pretrained(tmp_path), model)


def test_every_parameter_has_a_name_in_every_layout() -> None:
    config = ASTConfig(num_labels=527)
    with torch.device("meta"):
        ours = set(ASTForAudioClassification(config).state_dict())
    for layout, count in (("original", 155), ("disk", 203), ("memory", 203)):
        names = tensor_names(config, layout)  # type: ignore[arg-type]
        assert names.keys() == ours
        assert len({stored.name for stored in names.values()}) == count
    assert {s.name for s in tensor_names(config, "memory").values()} == ours


def test_names_on_disk_are_those_that_transformers_writes(folder: Path, tmp_path: Path) -> None:
    theirs = transformers.ASTForAudioClassification.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = safetensors.torch.load_file(folder / "model.safetensors")
    written = safetensors.torch.load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == written.keys()
    assert all(torch.equal(ours[name], written[name]) for name in ours)


def test_the_original_names_are_those_of_the_published_code(shared_data: Path) -> None:
    path = shared_data / "original_ast" / "audio_model.pth"
    original = torch.load(path, weights_only=True)
    model = load_model(resolve_model(str(path), GIVEN))
    again = to_layout(model.state_dict(), model.config, "original")
    assert again.keys() == {name for name in original if ".v.head" not in name}
    assert all(torch.equal(again[name], original[name].float()) for name in again)


# --- To and from transformers --------------------------------------------------------------


def test_transformers_loads_what_we_save(folder: Path) -> None:
    theirs, report = transformers.ASTForAudioClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.id2label == dict(enumerate(NAMES))
    features = make_input(make_model().config)
    with torch.no_grad():
        assert_close(make_model()(features).logits, theirs(features).logits, atol=1e-5)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    assert (extractor.mean, extractor.std, extractor.max_length) == (-3.5, 2.5, 128)


def test_we_load_what_transformers_saves(tmp_path: Path) -> None:
    ours, theirs = make_pair(problem_type="multi_label_classification")
    theirs.save_pretrained(tmp_path)
    transformers.ASTFeatureExtractor(max_length=128, **STATS).save_pretrained(tmp_path)
    spec = resolve_model(str(tmp_path))
    assert states_equal(load_model(spec), ours)
    assert (spec.mean, spec.std, spec.activation) == (-3.5, 2.5, "sigmoid")
    assert states_equal(ASTForAudioClassification.from_pretrained(tmp_path), ours)


def test_a_base_model_is_exchanged_with_transformers(tmp_path: Path) -> None:
    ours, theirs = make_pair()
    theirs.audio_spectrogram_transformer.save_pretrained(tmp_path / "theirs")
    base = ASTModel.from_pretrained(tmp_path / "theirs")
    assert states_equal(base, ours.audio_spectrogram_transformer)
    base.save_pretrained(tmp_path / "ours")
    again, report = transformers.ASTModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert states_equal(again, theirs.audio_spectrogram_transformer)
    with pytest.raises(ModelError, match=r"no tensor 'classifier\.layernorm\.weight'.*fine-tune"):
        ASTForAudioClassification.from_pretrained(tmp_path / "theirs")


def test_a_base_model_is_loaded_from_a_classifier(folder: Path) -> None:
    base = ASTModel.from_pretrained(folder)
    assert states_equal(base, make_model().audio_spectrogram_transformer)
    assert not base.training


def test_a_config_is_saved_and_loaded_alone(tmp_path: Path) -> None:
    config = ASTConfig(**TINY, layer_norm_eps=1e-6, head_layer_norm_eps=1e-5)
    config.save_pretrained(tmp_path / "config")
    assert ASTConfig.from_pretrained(tmp_path / "config") == config


def test_transformers_differs_within_the_stated_tolerance_where_the_head_has_its_own_epsilon(
    tmp_path: Path,
) -> None:
    model = make_model(layer_norm_eps=1e-6, head_layer_norm_eps=1e-5)
    save_pretrained(model, tmp_path, **STATS)
    theirs = transformers.ASTForAudioClassification.from_pretrained(tmp_path)
    assert theirs.config.layer_norm_eps == 1e-6
    features = make_input(model.config, batch_size=16)
    with torch.no_grad():
        embedding = model.embed(features)
        difference = (model(features).logits - theirs(features).logits).abs()
        unbiased = (model.classifier(embedding) - model.classifier.dense.bias).abs()
    # sqrt((var + 1e-5) / (var + 1e-6)), to first order; the rest is float rounding.
    factor = 4.5e-6 / embedding.var(dim=1, correction=0, keepdim=True)
    assert (difference <= factor * (unbiased + 2) + 1e-5).all()
    again = resolve_model(str(tmp_path)).config
    assert (again.layer_norm_eps, again.head_layer_norm_eps) == (1e-6, 1e-5)


# --- Faults of a folder --------------------------------------------------------------------


def set_tensor(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            set_tensor(
                "audio_spectrogram_transformer.embeddings.position_embeddings",
                torch.zeros(1, 1214, 64),
            ),
            r"position_embeddings' has the shape \(1, 1214, 64\); expected \(1, 146, 64\). "
            r"12 by 12 patches and 2 tokens follow from frequency_stride=10.*max_length=128",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if ".layer.1." in name],
            r"there is no tensor '.*layer\.1\..*' \(and 15 more\)",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    edit_weights(folder, edit)
    with pytest.raises(ModelError, match=message):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    ("file_name", "changes", "message"),
    [
        ("config.json", {"model_type": None}, "has no model_type"),
        ("config.json", {"problem_type": "regression"}, "problem_type is 'regression': its outp"),
        ("config.json", {"id2label": None}, "has 2 labels, and the classifier has 5 outputs"),
        ("preprocessor_config.json", {"num_mel_bins": 64}, "num_mel_bins .* is 64; expected 128"),
        (
            "preprocessor_config.json",
            {"feature_extractor_type": "WhisperFeatureExtractor"},
            "is 'WhisperFeatureExtractor'; expected ASTFeatureExtractor",
        ),
    ],
)
def test_a_setting_that_does_not_fit_is_named(
    folder: Path, file_name: str, changes: dict[str, Any], message: str
) -> None:
    edit_json(folder / file_name, **changes)
    with pytest.raises(ModelError, match=message):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "cannot be read as JSON"), (b"[]", "holds a list; expected a JSON object"),
     (b"\xff\xfe", "cannot be read as JSON"), (b"[" * 100_000, "cannot be read as JSON")],
)  # fmt: skip
def test_a_config_that_is_not_json_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        resolve_model(str(folder))


def test_a_name_without_a_model_is_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty: there is no config\.json; expected a folder"):
        resolve_model(str(tmp_path / "empty"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"has no weights; expected model\.safetensors, model\.saf"
    ):
        resolve_model(str(folder))
    with pytest.raises(ModelError, match=r"nowhere: there is no such folder\. Legal names: a hub"):
        resolve_model(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"none\.pth: there is no such file"):
        resolve_model(str(tmp_path / "none.pth"))
    with pytest.raises(ModelError, match=r"config\.json: is a file; expected a folder"):
        resolve_model(str(folder / "config.json"))
    with pytest.raises(ModelError, match="Legal names"):
        resolve_model("just-a-word")
    with pytest.raises(ModelError, match="model is empty"):
        resolve_model("")


# --- Labels, statistics, activation --------------------------------------------------------


def test_missing_statistics_must_be_given(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"no preprocessor_config\.json, and so no mean; add"):
        resolve_model(str(folder))
    with pytest.raises(ModelError, match=r"and so no std; .* --set model\.std="):
        resolve_model(str(folder), ModelOverrides(mean=1.0))
    spec = resolve_model(str(folder), ModelOverrides(mean=1.0, std=2.0))
    assert (spec.mean, spec.std) == (1.0, 2.0)
    assert states_equal(ASTForAudioClassification.from_pretrained(folder), make_model())


def test_do_normalize_false_becomes_statistics_that_change_nothing(folder: Path) -> None:
    edit_json(folder / "preprocessor_config.json", do_normalize=False)
    spec = resolve_model(str(folder))
    assert (spec.mean, spec.std) == (0.0, 0.5)


@pytest.mark.parametrize(
    ("problem_type", "override", "expected"),
    [
        (None, None, "softmax"),
        ("single_label_classification", None, "softmax"),
        ("multi_label_classification", None, "sigmoid"),
        ("multi_label_classification", "softmax", "softmax"),
        (None, "sigmoid", "sigmoid"),
        ("regression", "sigmoid", "sigmoid"),
    ],
)
def test_the_activation_comes_from_the_checkpoint_or_the_user(
    folder: Path, problem_type: str | None, override: Any, expected: str
) -> None:
    edit_json(folder / "config.json", problem_type=problem_type)
    spec = resolve_model(str(folder), ModelOverrides(activation=override))
    assert spec.activation == expected


@pytest.mark.parametrize(
    ("problem_type", "activation"),
    [("single_label_classification", "softmax"), ("multi_label_classification", "sigmoid")],
)
def test_problem_type_and_labels_are_saved_with_the_model(
    tmp_path: Path, problem_type: str, activation: str
) -> None:
    names = ("dog", "sea, waves", "Türklingel", 'µ "x"', "0")
    model = make_model(id2label=dict(enumerate(names)), problem_type=problem_type)
    save_pretrained(model, tmp_path, **STATS, dtype=torch.float16)
    spec = resolve_model(str(tmp_path))
    assert (spec.activation, spec.notes) == (activation, ())
    assert tuple(label.name for label in spec.labels) == names
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (theirs.problem_type, theirs.id2label) == (problem_type, dict(enumerate(names)))
    assert theirs.label2id == {name: index for index, name in enumerate(names)}


@pytest.mark.parametrize(
    ("names", "activation", "first_id"),
    [
        ([label.name for label in audioset_labels()], "sigmoid", "/m/09x0r"),
        ([label.name for label in audioset_labels()][::-1], "softmax", None),
        ([f"LABEL_{index}" for index in range(527)], "softmax", None),
    ],
    ids=["AudioSet", "AudioSet in another order", "no names"],
)
def test_audiosets_labels_mean_sigmoid_and_have_ids(
    tmp_path: Path, names: list[str], activation: str, first_id: str | None
) -> None:
    save_pretrained(make_model(id2label=dict(enumerate(names))), tmp_path, **STATS)
    spec = resolve_model(str(tmp_path))
    assert (spec.activation, spec.labels[0].id) == (activation, first_id)
    assert [label.name for label in spec.labels] == names


def test_labels_from_the_user_take_precedence(folder: Path, tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/labels.txt", b"a\nb\nc\nd\ne\n")
    spec = resolve_model(str(folder), ModelOverrides(labels="memory://labels.txt"))
    assert [label.name for label in spec.labels] == ["a", "b", "c", "d", "e"]
    assert spec.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d", 4: "e"}
    assert load_model(spec).config.id2label[4] == "e"
    with pytest.raises(ModelError, match=r"model\.labels=audioset has 527 labels, and the classif"):
        resolve_model(str(folder), ModelOverrides(labels="audioset"))
    with pytest.raises(ModelError, match=r"'memory://none\.txt', which cannot be read"):
        resolve_model(str(folder), ModelOverrides(labels="memory://none.txt"))


def test_overrides_replace_the_config_s_values(folder: Path) -> None:
    spec = resolve_model(str(folder), ModelOverrides(num_attention_heads=2, layer_norm_eps=1e-6))
    assert (spec.config.num_attention_heads, spec.config.layer_norm_eps) == (2, 1e-6)
    with pytest.raises(ModelError, match=r"expected \(1, 74, 64\).*time_stride=20"):
        resolve_model(str(folder), ModelOverrides(time_stride=20))
    with pytest.raises(ModelError, match=r"num_attention_heads is 7; expected a divisor"):
        resolve_model(str(folder), ModelOverrides(num_attention_heads=7))
    with pytest.raises(
        ModelError, match=r"model\.activation is 'relu'; expected sigmoid or softmax"
    ):
        ModelOverrides(activation="relu")  # type: ignore[arg-type]


# --- Fine-tuning ---------------------------------------------------------------------------


def test_a_checkpoint_starts_a_model_with_another_window_and_labels(folder: Path) -> None:
    spec = resolve_model(str(folder))
    config = ASTConfig(**{**TINY, "max_length": 64, "num_labels": 3}, time_stride=8)
    model = load_for_finetuning(spec, config)
    source = make_model()
    old, new = source.audio_spectrogram_transformer, model.audio_spectrogram_transformer
    expected = resize_position_embeddings(old.embeddings.position_embeddings, (12, 12), (12, 7))
    assert torch.equal(new.embeddings.position_embeddings, expected)
    assert torch.equal(new.layers[1].mlp.fc2.weight, old.layers[1].mlp.fc2.weight)
    assert model.classifier.dense.weight.shape == (3, 64)
    assert model(make_input(config)).logits.shape == (3, 3)


def test_a_head_with_the_same_labels_is_kept(folder: Path) -> None:
    spec = resolve_model(str(folder))
    assert states_equal(load_for_finetuning(spec, spec.config), make_model())


@pytest.mark.parametrize(
    ("field", "value"), [("num_attention_heads", 2), ("intermediate_size", 128)]
)
def test_a_model_with_other_blocks_cannot_start_from_a_checkpoint(
    folder: Path, field: str, value: int
) -> None:
    spec = resolve_model(str(folder))
    found = getattr(spec.config, field)
    message = f"{field} is {found}, and the model to fine-tune has {value}; only strides"
    with pytest.raises(ModelError, match=message):
        load_for_finetuning(spec, ASTConfig(**{**TINY, field: value}))


# --- The published checkpoints -------------------------------------------------------------


def test_the_published_checkpoints_are_listed() -> None:
    assert len(PUBLIC_CHECKPOINTS) == 8
    assert len({entry.hub_id for entry in PUBLIC_CHECKPOINTS}) == 8
    for entry in PUBLIC_CHECKPOINTS:
        assert entry.hub_id
        strides = re.search(r"_(\d+)_(\d+)_(0\.\d+)\.pth", entry.file_name)
        assert strides
        assert [int(strides[1]), int(strides[2])] == [entry.frequency_stride, entry.time_stride]
        assert float(strides[3]) == entry.published
        assert entry.window_s == (10.255 if entry.labels == "audioset" else 1.295)


def test_a_signature_in_a_name_is_never_printed_or_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retries, "RETRY_S", 0.0)
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)
    url = "http://127.0.0.1:9/model.pth?X-Amz-Signature=secretsignature"
    with pytest.raises(ModelError, match=r"model http://127\.0\.0\.1:9/model\.pth: ") as raised:
        resolve_model(url)
    assert "secretsignature" not in str(raised.value)
    spec = ModelSpec(
        "m", "original", url, None, "0", ASTConfig(), audioset_labels(), "sigmoid", 0.0, 1.0
    )
    assert "secretsignature" not in repr(spec)
