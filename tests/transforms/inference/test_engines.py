"""The engines: the same scores from each of them, and the same promises kept by each of them."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.cli import main as cli
from tests.support.audio_factory import noise, write
from tests.support.model_factory import write_tiny_model
from tests.transforms.inference.conftest import break_conversion, features
from transforms.inference import backbones, openvino
from transforms.inference.backbones import (
    Embeddings,
    Features,
    InferenceSettings,
    QuantisedModel,
    TorchBackbone,
    embed_windows,
)
from transforms.inference.engine import NOT_FINITE, Engine, load_engine, score_embeddings
from transforms.inference.engines import ENGINES
from transforms.inference.handler import ASTModelHandler
from transforms.models.ast.checkpoints import ModelSpec, load_model, resolve_model
from transforms.process import devices
from transforms.records import FloatArray, PendingPrediction, Prediction

pytestmark = pytest.mark.usefixtures("openvino_as_installed")

# Largest difference of a score from float32's, by precision, for the tiny model.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.02, "fp16": 0.005, "int8": 0.05}

KINDS = [
    ("torch", "fp32"),
    ("torch", "bf16"),
    ("openvino", "fp32"),
    pytest.param(
        "openvino",
        "bf16",
        marks=pytest.mark.skipif(
            not backbones.cpu_has_native_bf16(), reason="this CPU has no native bfloat16"
        ),
    ),
    ("openvino", "int8"),
]


@pytest.fixture(scope="module")
def expected(spec: ModelSpec) -> FloatArray:
    """What torch gives in float32 for ``features(5)``, without any of our engines."""
    with torch.inference_mode():
        logits: torch.Tensor = load_model(spec)(torch.from_numpy(features(5))).logits
    return logits.sigmoid().numpy()


def scores_of(engine: Engine, batch: FloatArray) -> FloatArray:
    return np.stack([prediction.scores for prediction in engine.label(batch)])


# --- The same scores -------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "precision"), KINDS)
def test_scores_are_float32s_whatever_the_engine_and_the_batch(
    load: Callable[..., Engine], expected: FloatArray, engine: str, precision: str
) -> None:
    tolerance = TOLERANCE[precision]
    for batch_size in (4, 1):  # five windows: a full batch and a padded one, then none padded
        loaded = load(engine, precision, batch_size=batch_size)
        assert loaded.name == f"{engine} cpu {precision}"
        np.testing.assert_allclose(scores_of(loaded, features(5)), expected, rtol=0, atol=tolerance)
    alone = np.concatenate([scores_of(loaded, window[None]) for window in features(5)])
    np.testing.assert_allclose(alone, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("pooling", ["pooler_output", "patch_mean"])
@pytest.mark.parametrize("engine", ENGINES)
def test_embeddings_are_the_models_own_and_their_pooling_does_not_change_scores(
    load: Callable[..., Engine], spec: ModelSpec, expected: FloatArray, engine: str, pooling: str
) -> None:
    batch = features(5)
    with torch.inference_mode():
        output = load_model(spec).audio_spectrogram_transformer(torch.from_numpy(batch))
    means = output.last_hidden_state[:, 2:].mean(dim=1)
    predictions = load(engine, "fp32", pooling=pooling).label(batch)
    stored = np.stack([prediction.embedding for prediction in predictions])
    wanted = (means if pooling == "patch_mean" else output.pooler_output).numpy()
    np.testing.assert_allclose(stored, wanted, rtol=0, atol=1e-5)
    scores = np.stack([prediction.scores for prediction in predictions])
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("engine", "precision"), KINDS)
def test_stored_embeddings_of_any_engine_reproduce_the_scores_exactly(
    load: Callable[..., Engine], spec: ModelSpec, engine: str, precision: str
) -> None:
    predictions = load(engine, precision, embedding_dtype="float16").label(features(3))
    stored = np.stack([prediction.embedding for prediction in predictions])
    assert stored.dtype == np.float16
    again = score_embeddings(load_model(spec).classifier, stored, spec.activation)
    np.testing.assert_array_equal(again, np.stack([p.scores for p in predictions]))


@pytest.mark.slow
def test_the_number_of_processes_does_not_change_scores(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    for index in range(6):
        write(tmp_path / "clips" / f"{index}.wav", noise(1.0, seed=index), 16_000)

    def label(*options: str) -> dict[str, list[float]]:
        out = tmp_path / "-".join(("out", *options))
        arguments = ["label", str(tmp_path / "clips"), "-o", str(out), "-m", str(tiny_model)]
        settings = ["--device", "cpu", "--scores", "--set", "units.windows=2", "--quiet"]
        assert cli.main([*arguments, *settings, *options]) == 0
        table = pq.read_table(out / "clips").to_pylist()
        return {Path(row["clip_id"]).name: row["scores"] for row in table}

    expected = label("--precision", "fp32", "--engine", "torch")
    for engine, precision in (("torch", "fp32"), ("openvino", "fp32"), ("openvino", "int8")):
        found = label("--precision", precision, "--engine", engine, "--workers", "2")
        assert found.keys() == expected.keys()
        for name, scores in found.items():
            np.testing.assert_allclose(scores, expected[name], rtol=0, atol=TOLERANCE[precision])


@pytest.mark.slow
def test_torchs_compiler_gives_the_same_scores(
    load: Callable[..., Engine], expected: FloatArray
) -> None:
    compiled = load("torch", "fp32", compile=True)
    assert compiled.backbone.batch_size == 4
    np.testing.assert_allclose(scores_of(compiled, features(5)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"flags": "avx avx2"}, "enable"),
        ({"flags": "avx2 avx512_vnni"}, "first_layer_only"),
        ({"Features": "fp asimd asimddp"}, "first_layer_only"),
        ({}, "enable"),
    ],
)
def test_int8_leaves_room_where_sums_saturate_at_16_bits(
    spec: ModelSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    facts: dict[str, str],
    expected: str,
) -> None:
    nncf, asked = pytest.importorskip("nncf"), []

    def quantize(model: Any, data: Any, *, advanced_parameters: Any, **others: Any) -> Any:
        asked.append(advanced_parameters.overflow_fix.value)
        return model

    monkeypatch.setenv("EARMARK_CACHE", str(tmp_path))
    monkeypatch.setattr(nncf, "quantize", quantize)
    digests = []
    for each in (facts, {"flags": "avx512_vnni"}):
        monkeypatch.setattr(openvino, "processor_facts", lambda facts=each: facts)
        transformer = load_model(spec).audio_spectrogram_transformer
        made = openvino.quantise(transformer, spec, "pooler_output", features(2), tmp_path)
        digests.append(made.digest)
    # A model calibrated for other processors is a different model.
    assert (digests[0] == digests[1]) == (expected == "first_layer_only")
    assert asked == list(dict.fromkeys([expected, "first_layer_only"]))


# --- The same promises -----------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "precision"), KINDS)
def test_a_window_with_nan_fails_alone_in_every_engine(
    load: Callable[..., Engine], expected: FloatArray, engine: str, precision: str
) -> None:
    batch = features(5)
    batch[1, 5, 5] = np.nan
    predictions = load(engine, precision).label(batch)
    assert predictions[1].error == NOT_FINITE
    others = [index for index in range(5) if index != 1]
    found = np.stack([predictions[index].scores for index in others])
    np.testing.assert_allclose(found, expected[others], rtol=0, atol=TOLERANCE[precision])


@pytest.mark.parametrize("engine", ENGINES)
def test_out_of_memory_halves_the_batch_of_every_engine(
    load: Callable[..., Engine], expected: FloatArray, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, sizes = load(engine, "fp32"), list[int]()
    embed = loaded.backbone.embed

    def embed_two(batch: Features) -> Embeddings:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise MemoryError("bad allocation")
        return embed(batch)

    monkeypatch.setattr(loaded.backbone, "embed", embed_two)
    np.testing.assert_allclose(scores_of(loaded, features(5)), expected, rtol=0, atol=1e-5)
    assert [size for size in sizes if size > 2] == [4 if engine == "openvino" else 5]
    sizes.clear()
    np.testing.assert_allclose(scores_of(loaded, features(5)), expected, rtol=0, atol=1e-5)
    assert max(sizes) == 2  # what has once been too much is not tried again


class Fixed:
    """A backbone for three windows, which gives each window's first two values."""

    name, batch_size = "fixed", 3

    def __init__(self) -> None:
        self.batches: list[FloatArray] = []

    def start(self, batch: Features) -> None:
        pass

    def embed(self, batch: Features) -> Embeddings:
        assert isinstance(batch, np.ndarray)
        self.batches.append(batch)
        return Embeddings(batch[:, 0, :2], batch[:, 1, :2])

    def shrink(self, batch_size: int) -> None:
        raise NotImplementedError


def test_the_last_batch_is_padded_and_cut() -> None:
    backbone, batch = Fixed(), features(7)
    embeddings = embed_windows(backbone, batch)
    assert [len(each) for each in backbone.batches] == [3, 3, 3]
    assert not backbone.batches[-1][1:].any()
    np.testing.assert_array_equal(embeddings.pooled, batch[:, 0, :2])
    np.testing.assert_array_equal(embeddings.patch_mean, batch[:, 1, :2])


# --- Running ahead ---------------------------------------------------------------------------


class Ahead:
    """A backbone whose device computes by itself: a batch is done when it is waited for."""

    name, batch_size = "ahead", 3

    def __init__(self, inner: Any) -> None:
        self.inner, self.steps = inner, list[str]()
        self.fault: Exception | None = None

    def embed(self, batch: Features) -> Embeddings:
        self.steps.append("embed")
        embeddings: Embeddings = self.inner.embed(batch)
        return embeddings

    def start(self, batch: Features) -> Callable[[], Embeddings]:
        self.steps.append("start")
        assert len(batch) == 3
        fault, self.fault = self.fault, None

        def wait() -> Embeddings:
            self.steps.append("wait")
            if fault is not None:
                raise fault
            embeddings: Embeddings = self.inner.embed(batch)
            return embeddings

        return wait

    def shrink(self, batch_size: int) -> None:
        self.batch_size = batch_size


@pytest.fixture
def ahead(load: Callable[..., Engine], spec: ModelSpec) -> Engine:
    backbone = Ahead(load("torch", "fp32").backbone)
    return Engine(backbone, load_model(spec).classifier, spec.activation)


def begun_scores(waits: Callable[[], list[Prediction]] | None) -> FloatArray:
    assert waits is not None
    return np.stack([prediction.scores for prediction in waits()])


def test_a_started_batch_is_waited_for_later(ahead: Engine, expected: FloatArray) -> None:
    first, second = ahead.begin(features(5)[:3]), ahead.begin(features(5)[3:])
    assert ahead.backbone.steps == ["start", "start"]  # type: ignore[attr-defined]
    np.testing.assert_allclose(begun_scores(first), expected[:3], rtol=0, atol=1e-5)
    np.testing.assert_allclose(begun_scores(second), expected[3:], rtol=0, atol=1e-5)
    assert ahead.backbone.steps == ["start", "start", "wait", "wait"]  # type: ignore[attr-defined]


def test_an_engine_on_a_cpu_starts_nothing_ahead(load: Callable[..., Engine]) -> None:
    for engine in ENGINES:
        assert load(engine, "fp32").begin(features(5)) is None


def test_a_batch_that_fails_ahead_is_computed_again(ahead: Engine, expected: FloatArray) -> None:
    ahead.backbone.fault = RuntimeError("no such kernel")  # type: ignore[attr-defined]
    waits = ahead.begin(features(3))
    np.testing.assert_allclose(begun_scores(waits), expected[:3], rtol=0, atol=1e-5)
    assert ahead.backbone.steps == ["start", "wait", "embed"]  # type: ignore[attr-defined]


def test_the_handler_returns_pending_predictions_only_on_request(
    ahead: Engine, spec: ModelSpec, expected: FloatArray
) -> None:
    batch = [None, *features(3)]
    for runs_ahead in (False, True):
        handler = ASTModelHandler(spec, InferenceSettings(device="cpu"), runs_ahead=runs_ahead)
        nothing, *found = handler.run_inference(batch, ahead)
        assert nothing is None
        assert [type(each) is PendingPrediction for each in found] == [runs_ahead] * 3
        # Beam pickles some of them, which waits for them.
        there = [pickle.loads(pickle.dumps(each)) for each in found]
        scores = np.stack([each.scores for each in there])
        np.testing.assert_allclose(scores, expected[:3], rtol=0, atol=1e-5)


def test_batches_too_large_for_the_memory_are_not_started(ahead: Engine, spec: ModelSpec) -> None:
    class Small(Ahead):
        def embed(self, batch: Features) -> Embeddings:
            if len(batch) > 1:
                raise MemoryError("bad allocation")
            return super().embed(batch)

        def start(self, batch: Features) -> Callable[[], Embeddings]:
            self.steps.append("start")
            raise MemoryError("bad allocation")

    small = Small(ahead.backbone.inner)  # type: ignore[attr-defined]
    engine = Engine(small, ahead.head, ahead.activation)
    handler = ASTModelHandler(spec, InferenceSettings(device="cpu"), runs_ahead=True)
    for _ in range(3):
        assert len([*handler.run_inference([*features(3)], engine)]) == 3
    assert small.steps.count("start") == 1


@pytest.mark.gpu
def test_a_gpu_gives_the_same_scores_ahead(
    spec: ModelSpec, expected: FloatArray, needs_gpu: None
) -> None:
    settings = InferenceSettings(device="cuda", precision="fp32", compile=False, batch_size=4)
    engine = load_engine(load_model(spec), spec, settings)
    begun = [engine.begin(features(5)) for _ in range(3)]
    for waits in begun:
        np.testing.assert_allclose(begun_scores(waits), expected, rtol=0, atol=1e-4)


def torch_backbone(spec: ModelSpec, **changes: Any) -> TorchBackbone:
    settings = InferenceSettings(device="cpu", batch_size=4, **changes)
    return TorchBackbone(load_model(spec).audio_spectrogram_transformer, settings, "fp32")


def test_float32_is_not_cut_to_tf32(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch allows TF32 for convolutions on a GPU, and the patches come from one.
    seen: list[bool] = []
    convolve = torch.nn.Conv2d.forward

    def looking(module: torch.nn.Conv2d, values: torch.Tensor) -> torch.Tensor:
        seen.append(torch.backends.cudnn.allow_tf32)
        return convolve(module, values)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", looking)
    assert torch.backends.cudnn.allow_tf32
    true_float32 = backbones.true_float32
    true_float32.__enter__()
    with true_float32:
        true_float32.__exit__()  # of another thread, which leaves before this one
        torch_backbone(spec).embed(features(2))
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32


# --- torch's compiler ------------------------------------------------------------------------


def test_compiled_code_sees_batches_of_one_size(
    spec: ModelSpec, expected: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def compile_nothing(module: torch.nn.Module, *, dynamic: bool) -> Callable[..., Any]:
        assert dynamic is False

        def run(batch: torch.Tensor) -> Any:
            sizes.append(len(batch))
            return module(batch)

        return run

    monkeypatch.setattr(torch, "compile", compile_nothing)
    assert torch_backbone(spec).batch_size is None  # on a CPU only on request
    backbone = torch_backbone(spec, compile=True)
    assert len(embed_windows(backbone, features(5)).pooled) == 5
    backbone.shrink(2)
    embed_windows(backbone, features(5))
    assert sizes == [4, 4, 4, 2, 2, 2]


def test_without_a_compiler_the_model_runs_uncompiled_with_a_warning(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compile_late(module: torch.nn.Module, *, dynamic: bool) -> Callable[..., Any]:
        def run(batch: torch.Tensor) -> Any:
            raise RuntimeError("Failed to find C compiler.\nPlease install one.")

        return run

    monkeypatch.setattr(torch, "compile", compile_late)
    backbone = torch_backbone(spec, compile=True)
    assert len(backbone.embed(features(3)).pooled) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "torch cannot compile the model here (Failed to find C compiler.), so it runs "
        "uncompiled. To skip the attempt: --set inference.compile=false"
    ]


# --- Kept from run to run --------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("EARMARK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def models_in(cache: Path) -> list[Path]:
    return sorted(cache.glob("converted/*/model.xml"))


def test_a_second_start_does_not_convert_again(
    load: Callable[..., Engine], cache: Path, expected: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    load("openvino", "fp32")
    assert len(models_in(cache)) == 1
    break_conversion(monkeypatch)
    # Another batch size and precision start from the same model.
    again = load("openvino", "fp32", batch_size=2)
    np.testing.assert_allclose(scores_of(again, features(5)), expected, rtol=0, atol=1e-5)


def test_another_model_or_pooling_is_cached_separately(
    load: Callable[..., Engine], cache: Path, spec: ModelSpec, tmp_path: Path
) -> None:
    load("openvino", "fp32")
    load("openvino", "fp32", pooling="patch_mean")
    other = resolve_model(str(write_tiny_model(tmp_path / "other", seed=5)))
    load_engine(load_model(other), other, InferenceSettings("fp32", "cpu", "openvino"))
    assert len(models_in(cache)) == 3


@pytest.mark.parametrize("name", ["model.bin", "model.xml", "sha256.json"])
def test_a_damaged_model_is_converted_again(
    load: Callable[..., Engine], cache: Path, expected: FloatArray, name: str
) -> None:
    load("openvino", "fp32")
    (xml,) = models_in(cache)
    damaged = xml.with_name(name)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    again = load("openvino", "fp32")
    np.testing.assert_allclose(scores_of(again, features(5)), expected, rtol=0, atol=1e-5)
    assert bytearray(damaged.read_bytes()) != content


def test_an_engine_runs_without_a_cache(
    load: Callable[..., Engine], cache: Path, expected: FloatArray
) -> None:
    cache.write_text("a file where the folder belongs")
    loaded = load("openvino", "fp32")
    np.testing.assert_allclose(scores_of(loaded, features(5)), expected, rtol=0, atol=1e-5)


def test_int8_is_quantised_once_for_the_same_windows(
    spec: ModelSpec, quantised: QuantisedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        openvino, "load_converted", lambda *arguments: pytest.fail("quantised again")
    )
    arguments = (spec, "pooler_output", features(8, 1), tmp_path)
    assert openvino.quantise(None, *arguments) == quantised  # type: ignore[arg-type]
    missing = openvino.find_quantised(spec, "pooler_output", "another digest", 8)
    assert missing is None


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    uncached = devices._torch_threads.__wrapped__
    monkeypatch.setattr(devices, "_torch_threads", functools.cache(uncached))
    monkeypatch.setattr(devices, "usable_cores", lambda: 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert [devices.threads_of(number) for number in (1, 3, 8, 20)] == [8, 2, 1, 1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # set to it, and asked again
    assert devices.threads_of(4) == 2


def test_the_config_knows_every_engine() -> None:
    assert set(get_args(backbones.EngineName)) == {"auto", *ENGINES}
