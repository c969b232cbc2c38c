"""What a configuration is made of: sections of checked keys, rules between keys, and problems.

A command's whole configuration is a ``Config``, as ``label`` and ``train`` define them; ``load``
makes one from YAML, ``--set`` and options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)


def _as_tuple(value: Any) -> Any:
    """Return one text as a list of one, and a list of YAML's as a tuple."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _any_text(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Accept every text: pydantic refuses a name with bytes that are not UTF-8."""
    return value if isinstance(value, str) else check(value)


Place = Annotated[str, WrapValidator(_any_text)]  # a path or URL
Texts = Annotated[tuple[Place, ...], BeforeValidator(_as_tuple)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Strict, so that ``top_k: true`` or ``hop_s: "5"`` is an error rather than a guess."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        serialize_by_alias=True,
    )


@dataclass(frozen=True)
class Rule:
    """What must hold between keys.

    Attributes:
        keys: The keys that it compares; the first is the one reported as wrong.
        broken: From their values to something false where all is well, else to what ``wanted`` has
            braces for.
        wanted: What the first must be.
    """

    keys: tuple[str, ...]
    broken: Callable[..., object]
    wanted: str


class Setting(NamedTuple):
    """The value of a dotted key, and its origin: ``run.yaml:7``, ``--set limit=3``, ``--limit``."""

    key: str
    value: Any
    origin: str


class Config(Section):
    """The whole configuration of a command, valid with nothing given.

    ``places`` are the keys that hold a path or URL, or a list of them.
    """

    command: ClassVar[str]
    rules: ClassVar[tuple[Rule, ...]] = ()
    places: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        problems = list(self.broken_rules(flatten(self.model_dump(mode="json")), {}))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def resolved(self) -> dict[str, Any]:
        """Return the whole configuration as plain dicts and lists, its URLs without signatures.

        It is itself a valid YAML configuration.
        """
        from transforms.storage.secrets import public_uri  # imports fsspec

        flat = flatten(self.model_dump(mode="json"))
        for key in self.places:
            value = flat[key]
            if isinstance(value, list):
                flat[key] = [public_uri(text) for text in value]
            elif value is not None:
                flat[key] = public_uri(value)
        return nest(flat)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return every dotted key with its default, in order; none of an open section."""
        return flatten(cls().model_dump(mode="json"))

    @classmethod
    def open_sections(cls) -> set[str]:
        """Return the sections whose keys someone else defines: ``beam``."""
        fields = cls.model_fields.items()
        return {name for name, field in fields if field.default_factory is dict}

    @classmethod
    def sections(cls) -> set[str]:
        """Return the names of all sections."""
        fields = cls.model_fields.items()
        closed = {name for name, field in fields if isinstance(field.default, Section)}
        return cls.open_sections() | closed

    @classmethod
    def has_key(cls, key: str) -> bool:
        """Return whether a dotted key can be set."""
        section, _, name = key.partition(".")
        return key in cls.defaults() or (section in cls.open_sections() and bool(name))

    @classmethod
    def broken_rules(cls, values: Mapping[str, Any], origins: Mapping[str, str]) -> Iterator[str]:
        """Yield each problem between the values; rules on absent keys are skipped."""
        for rule in cls.rules:
            if not all(key in values for key in rule.keys):
                continue
            broken = rule.broken(*(values[key] for key in rule.keys))
            if broken:
                key = rule.keys[0]
                wanted = rule.wanted.format(broken)
                yield f"{describe(key, values[key], origins.get(key))}; {wanted}"


# --- Rules that several commands share --------------------------------------------------------


def not_empty(key: str, wanted: str = "must not be empty") -> Rule:
    """Return the rule that no text of a key, one or a list, is empty."""
    return Rule(
        (key,),
        lambda given: any(not text.strip() for text in _as_tuple(given) or ()),
        f"{wanted}, as an unset variable gives it; the current folder is .",
    )


def not_empty_inputs(key: str) -> Rule:
    """Return the rule that no text of a list of inputs is empty."""
    return not_empty(key, "must hold no empty text")


NO_GAPS = Rule(
    ("window.hop_s", "window.length_s"),
    lambda hop_s, length_s: None not in (hop_s, length_s) and hop_s > length_s and length_s,
    "must be in (0, {:g}] (window.length_s), else audio between windows is lost",
)


# --- Dotted keys ------------------------------------------------------------------------------


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted keys with their values; every mapping counts as a section, ``beam`` too."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{key}.")
        else:
            flat[key] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections with their values: the reverse of ``flatten``."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, dot, name = key.partition(".")
        if dot:
            nested.setdefault(section, {})[name] = value
        else:
            nested[section] = value
    return nested


# --- Problems ---------------------------------------------------------------------------------

# What pydantic finds wrong, as what the value must be.
_EXPECTED = {
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_type": "a whole number",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "string_too_short": "text that is not empty",
    "string_type": "text (in quotes, if YAML takes it for something else)",
    "tuple_type": "a list of text",
}
_EXPECTED_IN_OPEN_SECTION = "a number, text, true, false, null, or a list of these"


def describe(key: str, value: object, origin: str | None) -> str:
    """Return ``window.hop_s is 12.0 (--hop-s)``: the value as YAML writes it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    shown = text.removesuffix("...\n").strip()  # PyYAML ends a lone scalar's document with it
    return f"{key} is {shown} ({origin})" if origin else f"{key} is {shown}"


def unknown_key(key: str, origin: str, among: Iterable[str]) -> str:
    """Return that there is no such key, and which one was probably meant."""
    # The last part alone counts as well: `hop_s` means `window.hop_s`, the first that ends so.
    meant = {known: known for known in among}
    for known in list(meant):
        meant.setdefault(known.rpartition(".")[2], known)
    close = get_close_matches(key, meant, n=1) or get_close_matches(
        key.rpartition(".")[2], meant, n=1
    )
    hint = f"did you mean {meant[close[0]]}?" if close else "nothing has a similar name"
    return f"{key} ({origin}) is not a key; {hint}"


def wrong_values(error: ValidationError, config: type[Config]) -> dict[str, str]:
    """Return each wrong key with what it must be, from what pydantic found."""
    wanted: dict[str, dict[str, None]] = {}  # of a value of several possible types, each
    for detail in error.errors(include_url=False):
        if not detail["loc"]:
            continue  # a rule between keys, reported apart with its origins
        loc = [str(part) for part in detail["loc"]]
        key = ".".join(loc[:2]) if loc[0] in config.sections() else loc[0]
        if loc[0] in config.open_sections():
            text = _EXPECTED_IN_OPEN_SECTION
        else:
            template = _EXPECTED.get(detail["type"])
            text = template.format(**detail.get("ctx", {})) if template else detail["msg"]
        wanted.setdefault(key, {})[text] = None
    return {key: f"must be {' or '.join(texts)}" for key, texts in wanted.items()}
