"""What Earmark is measured beside, as people write it: programs that label a folder of recordings.

    python -m benchmarks.peer_programs NAME '{"model": "model/", "audio": "clips/", …}'

``peers`` and ``gpu`` start them, each run in a process of its own. Every recording is a window
(longer ones are not given to them), decoded by libsndfile and resampled by soxr, as Earmark does
it: what is compared is what surrounds the model. A program prints a line of JSON.

* ``hugging_face``: ``pipeline("audio-classification")`` over a dataset;
* ``hugging_face_sweep``: the same, at every batch size and precision that is asked for, to find the
  best;
* ``hugging_face_timed_sweep``: the same with many workers, each setting for as many seconds;
* ``data_loader``: a loop over a DataLoader, features made in its workers, as in AST's own code;
* ``openvino``: OpenVINO on features that are ready before the clock starts, nothing else: no read,
  no rows;
* ``openvino_sweep``: the same, at every batch size, synchronous and asynchronous;
* ``write_model``: the model that all of them run.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import soxr
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

RATE_HZ = 16_000
TOP_K = 10  # as Earmark
MAX_TENSORS = 32  # distinct windows of ready features, 0.5 MB each
MAX_TIMED_CLIPS = 1_000_000  # of a sweep by time, which ends before
MIN_ROUNDS = 2  # after the first one, of such a sweep
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Keeps scores between 0.05 and 0.95, and clips apart; the seed is fixed.
WEIGHT_SCALE = 0.025
AST_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "frequency_stride": 10,
    "time_stride": 10,
    "id2label": {index: f"label {index}" for index in range(527)},
}


@dataclass(frozen=True)
class Job:
    """What a program is to do.

    Attributes:
        model: The checkpoint's folder.
        audio: A folder of recordings of a window each.
        output: The Parquet file to write.
        device: As torch names it.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        batch_size: Windows at once.
        workers: Processes that read, decode and make features; 0 for none beside the model's own.
        scores: Also write every label's score.
        precisions: Those that a sweep tries.
        batch_sizes: Those that a sweep tries.
        num_clips: How many clips a sweep measures at each setting, or OpenVINO computes.
        seconds: How long a sweep measures each setting of a GPU; see ``hugging_face_timed_sweep``.
        sweep_s: Seconds after which such a sweep starts no other setting.
        graph: Whose conversion OpenVINO runs: ``earmark`` or ``transformers``.
        mode: How OpenVINO is called: ``sync``, one batch after another, or ``async``, as many at
            once as it advises.
        converted: Where the conversions lie.
    """

    model: str
    audio: str = ""
    output: str = ""
    device: str = "cpu"
    precision: str = "fp32"
    batch_size: int = 1
    workers: int = 0
    scores: bool = False
    precisions: Sequence[str] = ()
    batch_sizes: Sequence[int] = ()
    num_clips: int = 0
    seconds: float = 0.0
    sweep_s: float = 0.0
    graph: str = "earmark"
    mode: str = "sync"
    converted: str = ""


# Recordings in, rows out


def recordings(job: Job) -> list[Path]:
    return sorted(Path(job.audio).iterdir())


def decode(path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Mono samples at the model's rate."""
    samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    resampled: np.ndarray[Any, np.dtype[np.float32]] = soxr.resample(
        samples.mean(axis=1), rate_hz, RATE_HZ
    )
    return resampled


class RowWriter:
    """A Parquet file of the best labels of each recording, and of every score if asked for."""

    def __init__(self, path: str, store_scores: bool) -> None:
        best = pa.list_(pa.struct([("name", pa.string()), ("score", pa.float32())]))
        fields = [("file", pa.string()), ("labels", best)]
        fields += [("scores", pa.list_(pa.float32()))] if store_scores else []
        self._schema = pa.schema(fields)
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")

    def write(
        self, files: Sequence[Path], labels: Sequence[object], scores: Sequence[object] | None
    ) -> None:
        columns = {"file": [file.name for file in files], "labels": labels}
        columns |= {} if scores is None else {"scores": scores}
        self._writer.write_table(pa.table(columns, self._schema))

    def close(self) -> None:
        self._writer.close()


# The Hugging Face pipeline


class _Clips(Dataset[dict[str, Any]]):
    """Decoded recordings, as the pipeline takes them."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"raw": decode(self._files[index]), "sampling_rate": RATE_HZ}


def _load_pipeline(job: Job, precision: str) -> Any:
    from transformers import pipeline

    return pipeline(
        "audio-classification", model=job.model, device=job.device, dtype=DTYPES[precision]
    )


def _run_pipeline(
    classify: Any, files: Sequence[Path], job: Job, batch_size: int, top_k: int | None
) -> Iterator[list[dict[str, Any]]]:
    found: Iterator[list[dict[str, Any]]] = classify(
        _Clips(files), batch_size=batch_size, num_workers=job.workers, top_k=top_k
    )
    return found


def hugging_face(job: Job) -> dict[str, Any]:
    """Label the recordings with transformers' pipeline."""
    classify, files = _load_pipeline(job, job.precision), recordings(job)
    found = _run_pipeline(classify, files, job, job.batch_size, None if job.scores else TOP_K)
    places = {name: index for index, name in classify.model.config.id2label.items()}
    writer = RowWriter(job.output, job.scores)
    for file, labels in zip(files, found, strict=True):
        scores = None
        if job.scores:
            scores = [[0.0] * len(places)]
            for entry in labels:
                scores[0][places[entry["label"]]] = entry["score"]
        best = [{"name": entry["label"], "score": entry["score"]} for entry in labels[:TOP_K]]
        writer.write([file], [best], scores)
    writer.close()
    return {}


def hugging_face_sweep(job: Job) -> dict[str, Any]:
    """Seconds for each clip at each precision and batch size, once a first batch is through."""
    files, settings = recordings(job), []
    for precision in job.precisions:
        classify = _load_pipeline(job, precision)
        for batch_size in job.batch_sizes:
            setting = {"precision": precision, "batch_size": batch_size}
            num_clips = max(job.num_clips, batch_size)

            def seconds(num: int, classify: Any = classify, batch_size: int = batch_size) -> float:
                began_s = time.perf_counter()
                for _ in _run_pipeline(classify, _cycled(files, num), job, batch_size, TOP_K):
                    pass
                return time.perf_counter() - began_s

            try:
                seconds(batch_size)
                all_s = seconds(num_clips)
            except torch.OutOfMemoryError as error:
                settings.append({**setting, "error": str(error).splitlines()[0]})
            else:
                settings.append({**setting, "clip_s": all_s / num_clips})
    return {"settings": settings}


def hugging_face_timed_sweep(job: Job) -> dict[str, Any]:
    """Seconds for each clip at each batch size and precision, without the start of the workers.

    After every setting all that has been found by then is printed: the sweep may be cut off.
    """
    began_s = time.perf_counter()
    files, settings, left_out = recordings(job), [], []
    pipelines: dict[str, Any] = {}
    for batch_size, precision in itertools.product(job.batch_sizes, job.precisions):
        setting = {"precision": precision, "batch_size": batch_size}
        passed_s = time.perf_counter() - began_s
        longest_s = max((each["took_s"] for each in settings), default=0.0)
        if settings and passed_s + longest_s > job.sweep_s:
            left_out.append(setting)
            continue
        if precision not in pipelines:
            pipelines[precision] = _load_pipeline(job, precision)
        try:
            figures = {"clip_s": _steady_clip_s(pipelines[precision], files, job, batch_size)}
        except torch.OutOfMemoryError as error:
            figures = {"error": str(error).splitlines()[0]}
        took_s = time.perf_counter() - began_s - passed_s
        settings.append({**setting, **figures, "took_s": took_s})
        print(json.dumps({"settings": settings, "left_out": left_out}), flush=True)
    return {"settings": settings, "left_out": left_out}


def _steady_clip_s(classify: Any, files: Sequence[Path], job: Job, batch_size: int) -> float:
    """Seconds for each clip, over whole rounds of one batch from every worker.

    The workers start together, and so their batches come in bursts: a rate holds from the end of a
    burst to the end of another. The first round is the start.
    """
    round_clips = max(1, job.workers) * batch_size
    ends: list[float] = []
    found = _run_pipeline(classify, _cycled(files, MAX_TIMED_CLIPS), job, batch_size, TOP_K)
    for number, _ in enumerate(found, start=1):
        if number % round_clips == 0:
            ends.append(time.perf_counter())
            if len(ends) > MIN_ROUNDS and ends[-1] - ends[0] >= job.seconds:
                break
    return (ends[-1] - ends[0]) / (len(ends) - 1) / round_clips


def _cycled(files: Sequence[Path], num: int) -> list[Path]:
    return list(itertools.islice(itertools.cycle(files), num))


# A loop over a DataLoader


class _Features(Dataset[Tensor]):
    """Features as AST's own ``dataloader.py`` makes them."""

    def __init__(self, files: Sequence[Path], model: str) -> None:
        config = json.loads((Path(model) / "preprocessor_config.json").read_text())
        self._files = files
        self._mean, self._std = config["mean"], config["std"]
        self._num_frames, self._num_mel_bins = config["max_length"], config["num_mel_bins"]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Tensor:
        from torchaudio.compliance import kaldi

        log_mel = kaldi.fbank(
            torch.from_numpy(decode(self._files[index]))[None],
            sample_frequency=RATE_HZ,
            htk_compat=True,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=self._num_mel_bins,
            dither=0.0,
            frame_shift=10,
        )
        missing = self._num_frames - len(log_mel)
        log_mel = nn.functional.pad(log_mel, (0, 0, 0, missing))
        return (log_mel - self._mean) / (2 * self._std)


def data_loader(job: Job) -> dict[str, Any]:
    """Label the recordings with a plain loop."""
    from transformers import ASTForAudioClassification

    dtype = DTYPES[job.precision]
    model = ASTForAudioClassification.from_pretrained(job.model).eval().to(job.device, dtype)
    names, files = model.config.id2label, recordings(job)
    on_gpu = job.device == "cuda"
    batches = DataLoader(
        _Features(files, job.model), job.batch_size, num_workers=job.workers, pin_memory=on_gpu
    )
    writer = RowWriter(job.output, job.scores)
    with torch.inference_mode():
        for number, features in enumerate(batches):
            logits = model(features.to(job.device, dtype, non_blocking=True)).logits
            scores = logits.float().sigmoid().cpu()
            best, places = scores.topk(min(TOP_K, scores.shape[1]))
            labels = [
                [{"name": names[place], "score": score} for place, score in zip(*row, strict=True)]
                for row in zip(places.tolist(), best.tolist(), strict=True)
            ]
            of_batch = files[number * job.batch_size :][: len(scores)]
            writer.write(of_batch, labels, scores.tolist() if job.scores else None)
    writer.close()
    return {}


# OpenVINO, called directly


class _Logits(nn.Module):
    """A model whose output is its logits alone."""

    def __init__(self, model: nn.Module, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._compute = compute

    def forward(self, features: Tensor) -> Tensor:
        return self._compute(features)


def _load_graph(job: Job) -> _Logits:
    """The model as transformers runs it, or as Earmark does, without what no score needs."""
    if job.graph == "earmark":
        from transforms.models.ast.model import ASTForAudioClassification as OurAST

        ours = OurAST.from_pretrained(job.model)
        return _Logits(ours, ours.compute_logits)
    from transformers import ASTForAudioClassification

    theirs = ASTForAudioClassification.from_pretrained(job.model).eval()
    return _Logits(theirs, lambda features: theirs(features).logits)


def _read_graph(job: Job, shape: Sequence[int]) -> Any:
    """The converted model; it is converted once, and kept in the folder that all runs share."""
    from transforms.inference.openvino import import_library  # without telemetry

    openvino = import_library("openvino")
    path = Path(job.converted) / f"{job.graph}.xml"
    if not path.exists():
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing, which OpenVINO does
            model = openvino.convert_model(
                _load_graph(job).eval(),
                example_input=torch.zeros(2, *shape),
                input=[openvino.PartialShape([-1, *shape])],
            )
        openvino.save_model(model, path, compress_to_fp16=False)
    return openvino.Core().read_model(path)


def _compile_graph(job: Job, shape: Sequence[int]) -> Any:
    from transforms.inference.openvino import import_library

    openvino = import_library("openvino")
    core, graph = openvino.Core(), _read_graph(job, shape)
    graph.reshape([job.batch_size, *shape])
    has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return core.compile_model(
        graph,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "bf16" if has_bf16 else "f32",
            "PERFORMANCE_HINT": "LATENCY" if job.mode == "sync" else "THROUGHPUT",
        },
    )


def _infer(
    requests: Sequence[Any], batches: Sequence[Any]
) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """Logits of all batches, in order; the requests take turns.

    An ``AsyncInferQueue`` would do the same, but destroying one may wait for ever for the thread of
    a callback, which waits for Python.
    """
    found: list[np.ndarray[Any, np.dtype[np.float32]]] = []
    running: deque[Any] = deque()

    def take() -> None:
        request = running.popleft()
        request.wait()
        found.append(request.get_output_tensor(0).data.copy())

    for batch, request in zip(batches, itertools.cycle(requests), strict=False):
        if len(running) == len(requests):
            take()
        request.start_async([batch], share_inputs=True)
        running.append(request)
    while running:
        take()
    return found


def _features(job: Job, most: int) -> tuple[list[Path], Any]:
    """Recordings and their features, (clips, num_frames, num_mel_bins)."""
    files = recordings(job)[:most]
    features = _Features(files, job.model)
    return files, torch.stack([features[index] for index in range(len(files))]).numpy()


def _measure_openvino(job: Job, features: Any) -> tuple[float, Any]:
    """Seconds for each window of those that are wanted, and the logits of the first ones."""
    compiled = _compile_graph(job, features.shape[1:])
    num_batches = max(1, round(job.num_clips / job.batch_size))
    places = np.arange(num_batches * job.batch_size) % len(features)
    batches = [features[part] for part in places.reshape(num_batches, job.batch_size)]
    num = 1 if job.mode == "sync" else compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    requests = [compiled.create_infer_request() for _ in range(num)]
    _infer(requests, batches[:1] * 2 * num)
    began_s = time.perf_counter()
    logits = _infer(requests, batches)
    seconds = time.perf_counter() - began_s
    return seconds / len(places), np.concatenate(logits)


def openvino(job: Job) -> dict[str, Any]:
    """Seconds for each window of ready features."""
    files, features = _features(job, MAX_TENSORS)
    clip_s, logits = _measure_openvino(job, features)
    if job.scores:
        files = files[: len(logits)]
        scores = torch.from_numpy(logits[: len(files)]).sigmoid().tolist()
        writer = RowWriter(job.output, store_scores=True)
        writer.write(files, [[]] * len(files), scores)
        writer.close()
    return {"clip_s": clip_s}


def openvino_sweep(job: Job) -> dict[str, Any]:
    """Seconds for each window at each batch size and mode, and of the other graph at the best."""
    features = _features(job, MAX_TENSORS)[1]
    settings: list[dict[str, Any]] = []

    def measure(**setting: Any) -> None:
        clip_s, _ = _measure_openvino(Job(**{**asdict(job), **setting}), features)
        settings.append({"graph": "earmark", **setting, "clip_s": clip_s})

    for batch_size, mode in itertools.product(job.batch_sizes, ("sync", "async")):
        measure(batch_size=batch_size, mode=mode)
    best = min(settings, key=lambda setting: setting["clip_s"])
    measure(batch_size=best["batch_size"], mode=best["mode"], graph="transformers")
    return {"settings": settings}


# The model


def write_model(job: Job) -> dict[str, Any]:
    """AST base with random weights, as transformers writes it."""
    from tests.support.model_factory import write_transformers_model

    write_transformers_model(Path(job.model), scale=WEIGHT_SCALE, **AST_BASE)
    return {}


def write_tiny_model(job: Job) -> dict[str, Any]:
    """A small one, for a look at whether all of this works."""
    from tests.support.model_factory import write_transformers_model

    write_transformers_model(Path(job.model))
    return {}


PROGRAMS: Mapping[str, Callable[[Job], dict[str, Any]]] = {
    program.__name__: program
    for program in (
        *(
            hugging_face,
            hugging_face_sweep,
            hugging_face_timed_sweep,
            data_loader,
            openvino,
            openvino_sweep,
        ),
        *(write_model, write_tiny_model),
    )
}


def main(arguments: Sequence[str]) -> None:
    """Run the program that is named."""
    name, job = arguments
    print(json.dumps(PROGRAMS[name](Job(**json.loads(job)))))


if __name__ == "__main__":
    main(sys.argv[1:])
