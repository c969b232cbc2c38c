"""Kaldi's data folders: ``wav.scp`` with the recordings, and ``segments`` if they are divided.

    wav.scp    RECORDING PATH
    segments   UTTERANCE RECORDING START END
    text, utt2spk, utt2lang   UTTERANCE VALUE

A recording may be a command whose output is the audio. Commands are never run: such a line is an
error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from transforms.errors import InputError, ReadError
from transforms.sources.tables.text import Lines, lines, open_text
from transforms.storage import filesystem, urls

SCP_NAME = "wav.scp"
SEGMENTS_NAME = "segments"
# Files beside the table that say something of each utterance, and the metadata that they become.
_SIDE_FILES = {"text": "text", "utt2spk": "speaker", "utt2lang": "language"}
_OF_ARCHIVE = re.compile(r"\.(?:ark|scp):\d+$")


def read_kaldi(url: str, uri: str, encoding: str | None) -> Lines:
    """Yield the recordings of a ``wav.scp``, or the segments if ``segments`` lies beside it.

    Raise ``InputError`` if there is no ``wav.scp``.
    """
    if urls.file_name(url) == SEGMENTS_NAME:
        url = urls.join(urls.parent(url), SCP_NAME)
        uri = f"{uri.removesuffix(SEGMENTS_NAME)}{SCP_NAME}"
        if not filesystem.exists(url):
            raise InputError(f"{uri} does not exist; segments need it to name the files")
    folder, folder_uri = urls.parent(url), uri.removesuffix(urls.file_name(url))
    facts = {
        column: dict(_pairs_beside(folder, folder_uri, name, encoding))
        for name, column in _SIDE_FILES.items()
    }
    recordings = _recordings(url, uri, encoding)
    segments = urls.join(folder, SEGMENTS_NAME)
    if not filesystem.exists(segments):
        for line, name, path in recordings:
            if isinstance(path, ReadError):
                yield line, path
            else:
                yield line, {"uri": path, "utterance": name, **_facts_of(name, facts)}
        return
    yield from _segments(segments, f"{folder_uri}{SEGMENTS_NAME}", encoding, recordings, facts)


def _recordings(
    url: str, uri: str, encoding: str | None
) -> Iterator[tuple[str, str, str | ReadError]]:
    """Yield the line, name and path of each recording, or what is wrong with it."""
    with open_text(url, uri, encoding, "\n") as text:
        for number, line in enumerate(lines(text, uri), 1):
            where = f"line {number}"
            if isinstance(line, ReadError):
                yield where, "", line
                continue
            name, path = _pair(line)
            if name:
                yield where, name, _checked(path)


def _checked(path: str) -> str | ReadError:
    if path.endswith("|") or path.startswith("|"):
        return ReadError(
            f"is a command ({path[:200]}), and a table never runs one; write its output to a file "
            "and name that",
            error_type="CommandInTable",
        )
    if not path or path == "-":
        return ReadError("names no file; expected RECORDING PATH")
    if _OF_ARCHIVE.search(path):
        return ReadError(
            f"names a place in a Kaldi archive ({path[:200]}); copy it to audio files with wav-copy"
        )
    return path


def _segments(
    url: str,
    uri: str,
    encoding: str | None,
    recordings: Iterator[tuple[str, str, str | ReadError]],
    facts: Mapping[str, Mapping[str, str]],
) -> Lines:
    """Yield the segments; the lines of both files that cannot be read are errors."""
    paths: dict[str, str] = {}
    bad: set[str] = set()
    for line, name, path in recordings:
        if isinstance(path, ReadError):
            bad.add(name)
            yield line, path
        else:
            paths[name] = path
    with open_text(url, uri, encoding, "\n") as text:
        for number, segment in enumerate(lines(text, uri), 1):
            where = f"{SEGMENTS_NAME} line {number}"
            if isinstance(segment, ReadError):
                yield where, segment
                continue
            fields = segment.split()
            if not fields:
                continue
            if len(fields) not in (4, 5):
                expected = "expected UTTERANCE RECORDING START END"
                yield where, ReadError(f"has {len(fields)} fields; {expected}")
            elif fields[1] in paths:
                yield where, _segment(fields, paths[fields[1]], facts)
            elif fields[1] in bad:
                yield where, ReadError(f"is of {fields[1]}, whose line in {SCP_NAME} is an error")
            else:
                yield where, ReadError(f"is of {fields[1]}, which {SCP_NAME} does not have")


def _segment(
    fields: list[str], path: str, facts: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    name, recording, start_s, end_s, *channel = fields
    values: dict[str, Any] = {"uri": path, "start_s": start_s}
    if end_s != "-1":  # Kaldi's word for the end of the file
        values["end_s"] = end_s
    values |= {"utterance": name, "recording": recording, **_facts_of(name, facts)}
    return values | ({"channel": channel[0]} if channel else {})


def _facts_of(name: str, facts: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    return {column: of[name] for column, of in facts.items() if name in of}


def _pairs_beside(
    folder: str, folder_uri: str, name: str, encoding: str | None
) -> Iterator[tuple[str, str]]:
    """Yield the name and the value in each line of a file beside the table; none if it is not."""
    url = urls.join(folder, name)
    if not filesystem.exists(url):
        return
    uri = f"{folder_uri}{name}"
    with open_text(url, uri, encoding, "\n") as text:
        for line in lines(text, uri):
            if not isinstance(line, ReadError):
                yield _pair(line)


def _pair(line: str) -> tuple[str, str]:
    name, *value = line.split(None, 1)[:2] or ("",)
    return name, value[0].strip() if value else ""
