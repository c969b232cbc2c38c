"""URLs and messages lose what signs a request, and nothing else."""

from __future__ import annotations

from urllib.parse import quote

import pytest

from transforms.storage import secrets
from transforms.storage.secrets import public_uri

AWS = "https://b.s3.amazonaws.com/a%20b.wav"
AZURE = "https://acc.blob.core.windows.net/c/a.wav"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            f"{AWS}?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA%2F20260101%2Feu-west-1"
            "%2Fs3%2Faws4_request&X-Amz-Date=20260101T000000Z&X-Amz-Expires=3600"
            "&X-Amz-SignedHeaders=host&X-Amz-Security-Token=IQoJ&X-Amz-Signature=0f3a",
            AWS,
        ),
        (f"{AWS}?versionId=3&X-Amz-Signature=0f3a", f"{AWS}?versionId=3"),
        (f"{AWS}?AWSAccessKeyId=AKIA&Signature=vjb%3D&Expires=1141889120", AWS),
        (
            "https://storage.googleapis.com/b/a.wav?X-Goog-Algorithm=GOOG4-RSA-SHA256"
            "&X-Goog-Credential=x&X-Goog-Signature=ab&X-Goog-Expires=900&generation=7",
            "https://storage.googleapis.com/b/a.wav?generation=7",
        ),
        (
            "https://storage.googleapis.com/b/a.wav?GoogleAccessId=x%40y&Expires=9&Signature=ab",
            "https://storage.googleapis.com/b/a.wav",
        ),
        (
            "https://d111.cloudfront.net/a.wav?size=large&Policy=eyJ&Signature=nit&Key-Pair-Id=K2",
            "https://d111.cloudfront.net/a.wav?size=large",
        ),
        (
            f"{AZURE}?sv=2024-11-04&st=2026-01-01T00%3A00Z&se=2026-01-02T00%3A00Z&sr=b&sp=r"
            "&spr=https&skoid=1&sktid=2&skt=3&ske=4&sks=b&skv=5&sig=Zm9v%3D&snapshot=9",
            f"{AZURE}?snapshot=9",
        ),
        ("https://h/a.wav?token=s3cret&alt=media", "https://h/a.wav?alt=media"),
        ("https://h/a.wav?access_token=s3cret#t=3", "https://h/a.wav#t=3"),
        ("https://user:pass@h/a.wav", "https://h/a.wav"),
        ("https://ghp_secret@h/a.wav", "https://h/a.wav"),
        ("sftp://user:pass@h/a.wav", "sftp://h/a.wav"),
        ("sftp://user:p@ss@h/a@2x.wav", "sftp://h/a@2x.wav"),
        ("https://user:p@ss@h/a@2x.wav", "https://h/a@2x.wav"),
        ("simplecache::https://ghp_secret@h/a.wav", "simplecache::https://h/a.wav"),
        ("https://h/a.wav?id=1&password=x&jwt=y&client_secret=z", "https://h/a.wav?id=1"),
        ("https://h/a.wav?id=1;sig=x;v=2", "https://h/a.wav?id=1;v=2"),
        ("https://h/a.wav?sig=x;v=2", "https://h/a.wav?v=2"),
        ("https://h/a;sig=x/b;v=2.wav", "https://h/a/b;v=2.wav"),
        ("https://h/a.wav#access_token=x&state=7", "https://h/a.wav#state=7"),
        ("https://h/a.wav?id=1#access_token=x", "https://h/a.wav?id=1"),
        ("https://h/a.wav#", "https://h/a.wav#"),
        ("https://h/a.wav?#t=3", "https://h/a.wav?#t=3"),
        # What is not a signature is part of the name.
        ("sftp://user@h/a.wav", "sftp://user@h/a.wav"),
        ("https://h/get?id=7&expires=soon&st=1&se=2", "https://h/get?id=7&expires=soon&st=1&se=2"),
        ("https://h/a@2x.wav?q=a@b:c@d", "https://h/a@2x.wav?q=a@b:c@d"),
        ("abfs://c@acc.dfs.core.windows.net/a", "abfs://c@acc.dfs.core.windows.net/a"),
        ("hf://datasets/u/r@main/a.wav", "hf://datasets/u/r@main/a.wav"),
        ("s3://b/what?.wav", "s3://b/what?.wav"),
        ("gs://b/a;sig=1#token=2.wav", "gs://b/a;sig=1#token=2.wav"),
        ("https://h/a;v=1.wav?q=1;2#t=1,2", "https://h/a;v=1.wav?q=1;2#t=1,2"),
        ("/data/a?token=x.wav", "/data/a?token=x.wav"),
    ],
)
def test_public_uri_drops_signatures_and_nothing_else(url: str, expected: str) -> None:
    assert public_uri(url) == expected


def test_an_encoded_signature_in_a_librarys_words_is_scrubbed() -> None:
    url = "s3://bucket/a b.wav?X-Amz-Signature=0a1b2c3d4e&X-Amz-Credential=KEY%2F2026&v=1"
    query = quote(url.partition("?")[2], safe="")
    words = secrets.scrub(f"no connection to http://host/bucket/a%20b.wav%3F{query} (2 tries)", url)
    assert "0a1b2c3d4e" not in words
    assert "KEY" not in words
    assert words.endswith("(2 tries)")
