"""Settings as frozen dataclasses: built from plain values, strictly, checked and compared.

Everything that is read as settings passes through `from_dict`: YAML files, flags, the JSON files
that travel with models, vectors and runs. Nothing in such a file can name code.
"""

import dataclasses
import difflib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from types import MappingProxyType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

C = TypeVar("C")


class ConfigError(ValueError):
    """A setting that cannot work. The message names the key, the value and the way out."""


class MissingSettings(ConfigError):
    """Settings that have no default are left out."""


# --- impossible values -------------------------------------------------------------------------


def require(condition: bool, message: str) -> None:
    """Raises a ConfigError where the condition does not hold."""
    if not condition:
        raise ConfigError(message)


def require_in(interval: str, settings: Any, prefix: str, *names: str) -> None:
    """Raises a ConfigError where one of the named numbers of `settings` lies outside of an interval
    such as `[0, 1)` or `[1, inf)`; a number that is not finite lies in none. Of a tuple all are
    checked, None is left out. `prefix` stands before the names in the message."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    wanted = f"lie in {interval}" if high < float("inf") else f"be at least {low:g}"
    wanted = "be a positive number" if interval == "(0, inf)" else wanted
    for name in names:
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None:
                above = number >= low if interval[0] == "[" else number > low
                below = number <= high if interval[-1] == "]" else number < high
                require(above and below, f"{prefix}{name} must {wanted}, got {value}")


# --- plain values to settings ------------------------------------------------------------------


@functools.cache
def kinds_of(cls: type) -> dict[str, Any]:
    """The types of a dataclass's settings, by name."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def members_of(kind: Any) -> tuple[Any, ...]:
    """The types that a union holds; any other type alone."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def group_of(kind: Any) -> Any:
    """The dataclass among the types that a setting may have, or None."""
    return next(filter(dataclasses.is_dataclass, members_of(kind)), None)


def keys_of(kinds: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted names of settings and of those in their groups, each with its type."""
    for name, kind in kinds.items():
        yield prefix + name, kind
        if group := group_of(kind):
            yield from keys_of(kinds_of(group), f"{prefix}{name}.")


def describe(kind: Any) -> str:
    """What a setting of this type must be, in words."""
    if len(members := members_of(kind)) > 1:
        return " or ".join(map(describe, members))
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) in (tuple, list):
        fixed = get_origin(kind) is tuple and ... not in get_args(kind)
        return f"a list of {len(get_args(kind))}" if fixed else "a list"
    words = {str: "a text", bool: "true or false", type(None): "null", Any: "anything"}
    return (words | {int: "an integer", float: "a number"}).get(kind, "keys and values")


def check(kinds: Mapping[str, Any], values: Any) -> None:
    """Raises a ConfigError where plain values, of which some may be missing, are no settings of
    these types by name: an unknown key, or a value of another type."""
    require(isinstance(values, dict), f"keys and values are wanted, got {values!r:.60}")
    _typed_values(kinds, values, "", whole=False)


def from_dict(cls: type[C], values: Any, *, source: str) -> C:
    """Builds the dataclass `cls` from plain types. What is left out keeps its default. Raises a
    ConfigError, which names `source`, on an unknown or missing key, a wrong type or an impossible
    value."""
    try:
        return build(cls, values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def build(cls: type[C], values: Any) -> C:
    """As `from_dict`, of no source. Raises MissingSettings where one without a default is left
    out, and else a ConfigError."""
    check(kinds_of(cls), values)
    return _typed(cls, values, "", whole=True)


def _typed_values(
    kinds: Mapping[str, Any],
    values: dict[Any, Any],
    prefix: str,
    whole: bool,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    for name in values:
        if name not in kinds:
            known = [prefix + key for key, _ in keys_of(kinds)]
            near = difflib.get_close_matches(f"{prefix}{name}", known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown key {prefix}{name}{hint}")
    return {
        name: _typed(kinds[name], value, prefix + name, whole, defaults.get(name))
        for name, value in values.items()
    }


def _typed(kind: Any, value: Any, key: str, whole: bool, default: Any = None) -> Any:
    """A plain value as the type of its setting. A group becomes a dataclass where it is `whole`;
    what it leaves out is taken of `default`, if that is one."""
    for member in members_of(kind):
        origin, inner = get_origin(member), get_args(member)
        if dataclasses.is_dataclass(member) and isinstance(value, dict):
            return _typed_group(member, value, f"{key}." if key else "", whole, default)
        if member is Any or (member in (str, int, bool, type(None)) and type(value) is member):
            return value
        if member is float and type(value) in (int, float):
            return float(str(value))  # an integer beyond the floats is inf
        if origin is Literal and type(value) in (str, int) and value in inner:
            return value
        if origin in (tuple, list) and isinstance(value, list | tuple):
            kinds = inner if origin is tuple and inner[-1] is not ... else inner[:1] * len(value)
            if len(kinds) == len(value):
                pairs = zip(kinds, value, strict=True)
                return origin(_typed(of, item, key, whole=True) for of, item in pairs)
        if origin is dict and isinstance(value, dict):
            return {n: _typed(inner[1], item, f"{key}.{n}", True) for n, item in value.items()}
    digits = isinstance(value, str) and not {int, float}.isdisjoint(members_of(kind))
    said = f"{describe(kind)}{' in ASCII digits' if digits else ''}"
    raise ConfigError(f"{key} must be {said}, got {value!r:.80}")


def _typed_group(cls: Any, values: dict[Any, Any], prefix: str, whole: bool, default: Any) -> Any:
    kinds = kinds_of(cls)
    if not whole:
        return _typed_values(kinds, values, prefix, whole)
    settings = dict(vars(default)) if isinstance(default, cls) else defaults_of(cls)
    groups = {n: {} for n, k in kinds.items() if n not in settings and dataclasses.is_dataclass(k)}
    settings |= _typed_values(kinds, groups | values, prefix, whole, settings)
    if missing := [prefix + name for name in kinds if name not in settings]:
        raise MissingSettings(f"{', '.join(missing)} must be given")
    return cls(**settings)


def defaults_of(cls: type) -> dict[str, Any]:
    """The settings of a dataclass that have a default, by name."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        made = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if made is not dataclasses.MISSING:
            found[f.name] = made
    return found


# --- settings to plain values ------------------------------------------------------------------


def as_dict(config: Any) -> dict[str, Any]:
    """A dataclass of settings as plain JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


@dataclass(frozen=True)
class Change:
    """A setting that a finished or stopped run has and another config has not."""

    key: str  # dotted
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.old!r:.80}, is {self.new!r:.80}"


def changes(
    stored: dict[str, Any], settings: Any, *, source: str, changeable: Sequence[str] = ()
) -> list[Change]:
    """Where settings differ from those that were stored. Raises a ConfigError, which names the file
    `source`, if `stored` is no such config.

    Args:
        stored: what `as_dict` made of settings of the same class, of this release or an earlier
            one. A setting that the earlier one did not have counts as its default.
        settings: a dataclass; or a dict of plain values, which are compared as they are.
        changeable: patterns of keys, or of groups of them, that may differ, such as `data.*.path`.
    """
    if dataclasses.is_dataclass(settings):
        stored = as_dict(from_dict(type(settings), stored, source=source))
        settings = as_dict(settings)
    return [
        change
        for change in _changes(stored, settings)
        if not any(fnmatch(change.key, p) or fnmatch(change.key, f"{p}.*") for p in changeable)
    ]


def _changes(old: Any, new: Any, prefix: str = "") -> list[Change]:
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))  # one by one
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [Change(prefix, old, new)]
    return [
        change
        for name in sorted({*old, *new})
        for change in _changes(old.get(name), new.get(name), f"{prefix}.{name}".lstrip("."))
    ]


def listed(faults: Sequence[object], most: int = 10) -> str:
    """A line each for a message, at most `most`."""
    more = [f"... and {len(faults) - most} more"] if len(faults) > most else []
    return "\n  ".join([*map(str, faults[:most]), *more])
