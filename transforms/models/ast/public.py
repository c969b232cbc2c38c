"""The checkpoints published by the authors of AST; others of AST's shape work too."""

from __future__ import annotations

from dataclasses import dataclass

SAMPLING_RATE_HZ = 16_000

AUDIOSET_STATS = (-4.2677393, 4.5689974)
SPEECH_COMMANDS_STATS = (-6.845978, 5.5654526)


@dataclass(frozen=True)
class PublicCheckpoint:
    """A checkpoint published by the authors of AST; its shape is given as in ``ASTConfig``.

    Attributes:
        hub_id: Value for ``--model``; None if it was published as a file only.
        file_name: Name of the original ``.pth`` file.
        labels: ``audioset`` or ``speech_commands``.
        mean, std: Of the training features, before normalising.
        published: Published value of the metric on the evaluation set, in [0, 1].
        license: License of the weights, according to their page on the hub.
    """

    hub_id: str | None
    file_name: str
    frequency_stride: int
    time_stride: int
    max_length: int
    labels: str
    num_labels: int
    mean: float
    std: float
    metric: str
    published: float
    license: str = "BSD-3-Clause"

    @property
    def window_s(self) -> float:
        """Length of a window in seconds."""
        return window_length_s(self.max_length)


def _audioset(
    hub_name: str | None, file_name: str, stride: int, mean_ap: float
) -> PublicCheckpoint:
    hub_id = f"MIT/ast-finetuned-audioset-{hub_name}" if hub_name else None
    geometry = (stride, stride, 1024)
    return PublicCheckpoint(
        hub_id, file_name, *geometry, "audioset", 527, *AUDIOSET_STATS, "mAP", mean_ap
    )


# Sources: YuanGongND/ast README (files and figures); the hub pages of the MIT organisation.
PUBLIC_CHECKPOINTS: tuple[PublicCheckpoint, ...] = (
    _audioset("10-10-0.4593", "audioset_10_10_0.4593.pth", 10, 0.4593),
    _audioset("10-10-0.450", "audioset_10_10_0.4495.pth", 10, 0.4495),
    _audioset("10-10-0.448", "audioset_10_10_0.4483.pth", 10, 0.4483),
    _audioset("10-10-0.448-v2", "audioset_10_10_0.4475.pth", 10, 0.4475),
    _audioset("12-12-0.447", "audioset_12_12_0.4467.pth", 12, 0.4467),
    _audioset("14-14-0.443", "audioset_14_14_0.4431.pth", 14, 0.4431),
    _audioset("16-16-0.442", "audioset_16_16_0.4422.pth", 16, 0.4422),
    PublicCheckpoint(
        "MIT/ast-finetuned-speech-commands-v2",
        "speechcommands_10_10_0.9812.pth",
        *(10, 10, 128),
        *("speech_commands", 35),
        *SPEECH_COMMANDS_STATS,
        *("accuracy", 0.9812),
    ),
)
# By the name of the ``.pth`` file. The last (balanced training) is not on the hub.
PUBLISHED_FILES = {
    entry.file_name: entry
    for entry in (
        *PUBLIC_CHECKPOINTS,
        _audioset(None, "audioset_bal_10_10_0.3499.pth", 10, 0.3499),
    )
}


def window_length_s(num_frames: int) -> float:
    """Return the seconds of audio that frames of 25 ms, one every 10 ms, cover."""
    return ((num_frames - 1) * 160 + 400) / SAMPLING_RATE_HZ
