"""Command lines: settings from YAML files and flags, the log, and the door to all programs.

Every program takes `--config FILE.yaml`, more than once if need be, and a dotted flag for every
setting; what comes later wins. A flag of text is the text as it is written; other flags are YAML. A
setting that is yes or no may stand alone. `--print_config` shows the settings and ends.
"""

import ast
import dataclasses
import importlib
import inspect
import re
import runpy
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import yaml

from laser_jax.config import Config
from laser_jax.files.reading import DataError, parse_yaml, read_yaml
from laser_jax.files.terminal import configure_logging, fail, printable
from laser_jax.settings import (
    ConfigError,
    MissingSettings,
    as_dict,
    build,
    check,
    defaults_of,
    describe,
    group_of,
    keys_of,
    kinds_of,
    members_of,
    require,
)

C = TypeVar("C")
_ROOMS = ("train", "encode_corpus", "search", "serve", "evaluate", "think", "mine", "annotate")
_ROOMS += ("rewrite", "prepare", "pretrain", "quickstart", "import_gguf", "export")
COMMANDS = {room.removesuffix("_corpus").replace("_", "-"): room for room in _ROOMS}
"""Command -> its room, whose docstring says in a line what it is for."""


# --- the programs ------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """`laser COMMAND ...`, which runs `python -m laser_jax.ROOM ...` in this process."""
    rooms = {c: importlib.import_module(f"laser_jax.{room}") for c, room in COMMANDS.items()}
    purposes = {command: (room.__doc__ or "").strip() for command, room in rooms.items()}
    command, rest = chosen("laser", purposes, arguments)
    sys.argv = [f"laser {command}", *rest]
    runpy.run_module(f"laser_jax.{COMMANDS[command]}", run_name="__main__")


def chosen(
    program: str, purposes: Mapping[str, str], arguments: Sequence[str] | None
) -> tuple[str, list[str]]:
    """The command of `program` that the first argument names, and the arguments behind it. None, or
    `--help`, prints what each is for and ends the process; so does another word, as an error."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    lines = [f"  {command:<12} {purpose}" for command, purpose in purposes.items()]
    usage = "\n".join([f"usage: {program} COMMAND [--help | options]", "", *lines])
    if not given or given[0] in ("-h", "--help"):
        print(usage)
        sys.exit()
    command, *rest = given
    if command not in purposes:
        named = command.removeprefix("--").partition("=")[0]
        hint = f"; write {program} {named} ..." if named in purposes else ""
        sys.exit(f"error: {program} has no command {command!r}{hint}\n{usage}")
    return command, rest


def program_of(room: str) -> str:
    """How the program of a room was begun: `laser COMMAND`, or `python -m laser_jax.ROOM`."""
    begun = sys.argv[0]
    return begun if begun.startswith("laser ") else f"python -m laser_jax.{room}"


@contextmanager
def ended_in_a_line(stopped: str = "stopped") -> Iterator[None]:
    """What a program refuses, and an interrupt (with the message `stopped`), end the process with
    status 1 and a message instead of a traceback. Every program raises a ValueError at bad input,
    settings that cannot work and an output that is another run's (OutputError), an OSError where a
    file is missing or the disk is full, and an ImportError for an extra that is not installed; the
    message names what is meant."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(stopped)


# --- settings ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Invocation:
    """How one process of `python -m laser_jax.train` is started: no part of the run, so that it may
    differ between its processes and when it is resumed."""

    dry_run: bool | str = False
    """Compile for the asked mesh, print what it takes, train nothing. Alone it is for the devices
    that are here; `--dry_run 8` is for so many CPU devices, `--dry_run v5e:4x4` for absent TPUs."""
    distributed: bool | str = False
    """This is one of several processes. Alone it lets jax find them (Slurm, Cloud TPU, GKE, Open
    MPI); elsewhere `--distributed 3/16@HOST:PORT` says that this is number 3, counted from 0, of
    16, and where process 0 runs."""

    def __post_init__(self) -> None:
        wanted = "--dry_run wants a number of CPU devices, or TPUs such as v5e:4x4"
        require(str(self.dry_run).strip("0") != "", f"{wanted}, got {self.dry_run!r}")
        fault = "--dry_run takes one process; `--dry_run DEVICES` gives the devices of all"
        require(not (self.dry_run and self.distributed), fault)
        index, count, _ = self.process
        require(
            isinstance(self.distributed, bool) or (index is not None and index < (count or 0)),
            f"--distributed {self.distributed} is no INDEX/COUNT@HOST:PORT such as 3/16@node0:1234",
        )

    @property
    def process(self) -> tuple[int | None, int | None, str | None]:
        """Which process this is, of how many, and HOST:PORT of process 0, as far as given."""
        found = re.fullmatch(r"([0-9]+)/([0-9]+)@(.+:[0-9]+)", str(self.distributed))
        return (int(found[1]), int(found[2]), found[3]) if found else (None, None, None)


def parse_command_line(
    cls: type[C],
    program: str,
    arguments: Sequence[str] | None,
    positional: str | Sequence[str] = (),
) -> C:
    """The settings `cls` from `--config FILE.yaml` and dotted flags, later ones winning.

    Exits with status 2 and a message on unknown keys, missing keys and wrong types. Raises a
    ConfigError on an impossible value. `program` is how it is called, for the messages; the
    arguments are this process's where they are None. `positional` is the setting that those
    without a flag make, a tuple of texts; or the settings that they are one by one.
    """
    return _parse([cls], program, arguments, positional)[0]


def program(
    room: str,
    cls: type[C],
    run: Callable[[C], object],
    positional: str | Sequence[str] = (),
    *,
    stopped: str = "stopped",
) -> Callable[..., None]:
    """The `main` of a room: `run` is given the settings, and ends as `ended_in_a_line` says."""

    def main(arguments: Sequence[str] | None = None) -> None:
        with ended_in_a_line(stopped):
            run(parse_command_line(cls, program_of(room), arguments, positional))

    return main


def parse_train_command(arguments: Sequence[str] | None) -> tuple[Config, Invocation]:
    """The command line of `laser train`; errors as those of `parse_command_line`."""
    config, invocation = _parse([Config, Invocation], program_of("train"), arguments)
    configure_logging(invocation.process[0] or 0)
    return config, invocation


def _parse(
    classes: Sequence[type],
    program: str,
    arguments: Sequence[str] | None,
    positional: str | Sequence[str] = (),
) -> list[Any]:
    configure_logging()
    given = list(_arguments(sys.argv[1:] if arguments is None else arguments))
    if ("help", None) in given:
        print("\n".join(_help(classes, program)))
        sys.exit(0)
    kinds = {name: kind for cls in classes for name, kind in kinds_of(cls).items()}
    try:
        values = _values(kinds, given, positional)
    except (ConfigError, DataError, OSError) as error:
        _refuse(program, error)
    parts = [{n: v for n, v in values.items() if n in kinds_of(cls)} for cls in classes]
    try:
        settings = [build(cls, part) for cls, part in zip(classes, parts, strict=True)]
    except MissingSettings as error:
        _refuse(program, error)
    if ("print_config", None) in given:
        print("".join(yaml.safe_dump(as_dict(part), sort_keys=False) for part in settings), end="")
        sys.exit(0)
    return settings


def _refuse(program: str, error: Exception) -> NoReturn:
    sys.stderr.write(f"error: {printable(error)}\n{program} --help shows all settings\n")
    sys.exit(2)


def _arguments(given: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """The flags of a command line with their values: None for a flag that stands alone, and "" for
    the flag of a value that has none."""
    rest = ["--help" if argument == "-h" else argument for argument in given]
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            yield "", name + equals + value
        elif equals:
            yield name[2:], value
        elif rest and not rest[0].startswith("--") and name not in ("--help", "--print_config"):
            yield name[2:], rest.pop(0)
        else:
            yield name[2:], None


def _values(
    kinds: Mapping[str, Any],
    given: Sequence[tuple[str, str | None]],
    positional: str | Sequence[str],
) -> dict[str, Any]:
    """What files and flags say, as nested plain values of the right types."""
    values: dict[str, Any] = {}
    known, places = dict(keys_of(kinds)), iter(positional)
    for name, text in given:
        if name == "config":
            require(text is not None, "--config wants a file")
            values = _laid_over(values, settings_file(kinds, Path(text or "")))
        elif name not in ("help", "print_config"):
            if name:
                layer = _nested(name, _flag(name, text, known.get(name)))
            elif isinstance(positional, str):
                layer = {positional: [*values.get(positional, ()), text]}
            else:
                place = next(places, "")
                require(place != "", f"unexpected argument {text}")
                layer = {place: text}
            check(kinds, layer)
            values = _laid_over(values, layer)
    return values


def settings_file(kinds: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a YAML file of settings says, as nested plain values of the right types. Raises a
    ConfigError or a DataError, which name it, and an OSError where it cannot be read."""
    found, values = read_yaml(path), {}
    try:
        require(isinstance(found, dict | None), f"keys and values are wanted, got {found!r:.60}")
        for key, value in _dotted(found or {}):
            below, above = values, _nested(key, value)
            values = _laid_over(below, above)
            require(values == _laid_over(above, below), f"{key} stands twice; take one of them out")
        check(kinds, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return values


def _dotted(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _flag(name: str, text: str | None, kind: Any) -> Any:
    """The plain value of a flag. Only the word null is no value, and a text of the first level is
    not even then: nested, it takes back what a file has set."""
    members = members_of(kind)
    if text is None:
        require(kind is None or bool in members, f"--{name} wants a value")
        return True
    if bool in members and text in ("true", "false"):
        return text == "true"
    if str in members:
        return None if text == "null" and "." in name and type(None) in members else text
    if any(text in get_args(member) for member in members if get_origin(member) is Literal):
        return text
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return text
    return text if value is None and text.strip() != "null" else value


def _nested(key: str, value: Any) -> dict[str, Any]:
    """A value under its dotted key."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _laid_over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values, of which those `above` win."""
    laid = dict(below)
    for name, value in above.items():
        group = isinstance(value, dict) and isinstance(laid.get(name), dict)
        laid[name] = _laid_over(laid[name], value) if group else value
    return laid


# --- help --------------------------------------------------------------------------------------


def _help(classes: Sequence[type], program: str) -> Iterator[str]:
    yield f"usage: {program} [--config FILE.yaml] [--print_config] [--KEY VALUE] ...\n"
    yield f"{inspect.cleandoc(classes[0].__doc__ or '')}\n"
    sections = set() if Config in classes else {*map(group_of, kinds_of(Config).values())} - {None}
    for cls in classes:
        yield from _settings(cls, "", sections)


def _settings(cls: type, prefix: str, sections: Collection[type]) -> Iterator[str]:
    """The settings of a class, without those of the `sections` that all programs share with a
    training: `laser train --help` lists them once."""
    texts, defaults = _docstrings(cls), defaults_of(cls)
    for name, kind in kinds_of(cls).items():
        group, flag = group_of(kind), f"  --{prefix}{name}"
        text = " ".join((texts.get(name) or (group and group.__doc__) or "").split())
        if group in sections:
            yield f"{flag}.KEY VALUE"
            text += " The keys of this section: `laser train --help`."
        elif group and group is kind:
            yield f"  {prefix}{name}"  # a heading: its keys are the flags
        elif group:
            yield f"{flag}  null, or"
        else:
            default = str(defaults.get(name)).replace("\n", "\\n")
            given = f"default: {default}" if name in defaults else "must be given"
            yield f"{flag}  {describe(kind)} ({given})"
        yield from textwrap.wrap(text, 94, initial_indent=" " * 6, subsequent_indent=" " * 6)
        if group and group not in sections:
            yield from _settings(group, f"{prefix}{name}.", sections)


def _docstrings(cls: type) -> dict[str, str]:
    """The texts below the settings of a dataclass, by their names."""
    texts = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        found: Any = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        for above, below in pairwise(found.body):
            if isinstance(above, ast.AnnAssign) and isinstance(below, ast.Expr):
                texts[ast.unparse(above.target)] = ast.literal_eval(below.value)
    return texts
