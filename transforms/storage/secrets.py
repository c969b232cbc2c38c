"""URLs and messages without signatures, passwords and tokens."""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

from transforms.storage.urls import is_local

# A URL without one of these cannot hold a secret.
_SIGNING_MARK = re.compile("[?#;@]")
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://[^\s'\"<>]+")
# Parameters that sign a request, in lower case. Names with another meaning elsewhere (``expires``,
# ``st``) count only beside the parameter that makes the URL a signed one.
_SECRET_PREFIXES = ("x-amz-", "x-goog-")
_SECRET_NAMES = {
    *("awsaccesskeyid", "googleaccessid", "key-pair-id", "signature", "sig", "token"),
    *("access_token", "access-token", "accesstoken", "auth_token", "auth-token", "authtoken"),
    *("id_token", "refresh_token", "oauth_token", "sas_token", "security_token", "session_token"),
    *("api_token", "private_token", "api_key", "api-key", "apikey", "password", "passwd", "pwd"),
    *("secret", "client_secret", "jwt", "authorization", "jsessionid"),
}
_BESIDE_SIGNATURE = {"expires", "policy", "hash-algorithm", "security-token"}
# Azure service, account and user-delegation SAS.
_BESIDE_SIG = {
    *("se", "sp", "sv", "sr", "st", "spr", "sip", "ss", "srt", "si", "ses", "skoid", "sktid"),
    *("skt", "ske", "sks", "skv", "saoid", "suoid", "scid", "sdd", "sduoid", "skdutid", "rscc"),
    *("rscd", "rsce", "rscl", "rsct"),
}


def public_uri(url: str) -> str:
    """Return ``url`` without its secrets, safe to write and print.

    The known signature parameters (AWS, Google Cloud, CloudFront, Azure SAS, tokens, passwords) and
    ``user:password@`` are dropped; over ``http(s)`` also those in a fragment (``#token=``) and in a
    path (``;sig=``). Any other query string is part of the name and stays. Local paths are returned
    unchanged.
    """
    if _SIGNING_MARK.search(url) is None or is_local(url):
        return url
    url = re.sub(r"((?:^|::)https?://)[^/?#]*@", r"\1", url, flags=re.IGNORECASE)
    url = re.sub(r"(://)[^/?#@]*:[^/]*@", r"\1", url)
    is_web = re.match(r"(?:.*::)?https?://", url, re.IGNORECASE | re.DOTALL) is not None
    base, mark, query = url.partition("?")
    hash_mark = fragment = ""
    if mark:
        query, hash_mark, fragment = query.partition("#")
    elif is_web:
        base, hash_mark, fragment = base.partition("#")
    secret = _secret_names(re.split("[&;]", query))
    if is_web:
        base = re.sub(
            r";([^;/=]*)=[^;/]*", lambda pair: "" if _is_secret(pair[1], secret) else pair[0], base
        )
        fragment_left = _without_secrets(fragment, secret | _secret_names(fragment.split("&")))
        hash_mark, fragment = hash_mark if fragment_left or not fragment else "", fragment_left
    query_left = _without_secrets(query, secret)
    return base + (mark if query_left or not query else "") + query_left + hash_mark + fragment


def _secret_names(pairs: list[str]) -> set[str]:
    """Return the names that are secret beside these parameters."""
    names = {_parameter_name(pair) for pair in pairs}
    secret = _SECRET_NAMES.copy()
    if names & {"signature", "key-pair-id"}:
        secret |= _BESIDE_SIGNATURE
    if "sig" in names:
        secret |= _BESIDE_SIG
    return secret


def _without_secrets(text: str, secret: set[str]) -> str:
    """Return the parameters and their separators without the secret ones."""
    pairs = re.findall(r"(?:^|[&;])[^&;]*", text)
    kept = [pair for pair in pairs if not _is_secret(pair.lstrip("&;"), secret)]
    return text if len(kept) == len(pairs) else "".join(kept).lstrip("&;")


def _is_secret(pair: str, secret: set[str]) -> bool:
    name = _parameter_name(pair)
    return name.startswith(_SECRET_PREFIXES) or name in secret


def _parameter_name(pair: str) -> str:
    return unquote(pair.partition("=")[0]).lower()


def public_text(text: str) -> str:
    """Return ``text`` with ``public_uri`` applied to every URL in it."""
    if "://" not in text:
        return text
    return _URL_IN_TEXT.sub(lambda match: public_uri(match.group()), text)


def scrub(text: str, url: str) -> str:
    """Return a library's ``text`` about ``url`` without secrets, in any of their encodings."""
    text = text.replace(url, public_uri(url))
    for secret in _secret_values(url):
        # A store that takes the query for a part of the object's name encodes it once more.
        for written in (secret, quote(secret, safe=""), quote(secret), unquote(secret)):
            text = text.replace(written, "…")
    return public_text(text).strip()


def _secret_values(url: str) -> list[str]:
    """Return the values that ``public_uri`` drops, except those too short to search for."""
    pairs = re.split("[?&;#]", url)[1:]
    secret = _secret_names(pairs)
    values = [pair.partition("=")[2] for pair in pairs if _is_secret(pair, secret)]
    return sorted((value for value in values if len(value) >= 6), key=len, reverse=True)
