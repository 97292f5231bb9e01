"""Command lines: files and flags, what is refused, the help, the log, the door to the programs."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from laser_jax import command_line
from laser_jax.command_line import (
    COMMANDS,
    Invocation,
    configure_logging,
    main,
    parse_command_line,
    parse_train_command,
)
from laser_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    ObjectiveConfig,
    PromptConfig,
    as_dict,
    from_dict,
)
from laser_jax.evaluate.run import PURPOSES as EVALUATIONS
from laser_jax.evaluate.run import main as evaluate
from laser_jax.pretrain.run import PretrainConfig
from laser_jax.settings import group_of, keys_of, kinds_of

REPOSITORY = Path(__file__).resolve().parents[1]
NEEDED = ("--model.path", "model", "--data.train", "train.jsonl")


def parse(*arguments: str) -> Config:
    return parse_command_line(Config, "train", [*NEEDED, *arguments])


def test_later_files_and_flags_win(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("train: {seed: 1, batch_size: 8}\nobjective: {temperature: 0.5}\n")
    second.write_text("train: {seed: 2}\n")
    config = parse("--config", str(first), "--config", str(second), "--train.log_every", "3")
    assert (config.train.seed, config.train.batch_size, config.train.log_every) == (2, 8, 3)
    assert config.objective == ObjectiveConfig(temperature=0.5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--data.trian", "x"), "unknown key data.trian; did you mean data.train?"),
        (
            ("--objective.temprature=1",),
            "objective.temprature; did you mean objective.temperature?",
        ),
        (("--lora.rnak", "2"), "unknown key lora.rnak; did you mean lora.rank?"),
        (("--zzz", "2"), "unknown key zzz\n"),
        (("--train.steps", "many"), "train.steps"),
        (("--train.seed", "1.5"), "train.seed"),
        (("--optimizer.betas", "[0.9]"), "optimizer.betas must be a list of 2, got [0.9]"),
        (("--objective.method", "colbert"), "objective.method"),
        (("--config", "absent.yaml"), "absent.yaml"),
    ],
)
def test_unknown_keys_and_wrong_types_exit_and_are_named(arguments, named, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert caught.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            b"objective: {weights: {latnt: 0.02}}",
            "unknown key objective.weights.latnt; did you mean objective.weights.latent?",
        ),
        (b"model: {scratch: {num_layer: 2}}", "did you mean model.scratch.num_layers?"),
        (b"train: \xff", "not UTF-8: 'utf-8' codec can't decode byte 0xff"),
        (b"train: {", "not a YAML file: "),
        (b"train: {seed: 1}\nmodel: {path: x}\ntrain: {seed: 2}", "the key 'train' stands twice"),
        (b"data: {mixture: [{path: a, path: b}]}", "the key 'path' stands twice"),
        (b"train.seed: 1\ntrain: {seed: 2}", "train.seed stands twice"),
        (b"lora.rank: 1\nlora: null", "lora stands twice"),
        (b"train: {profile_steps: [5]}", "profile_steps must be a list of 2 or null, got [5]"),
        (b"data: {mixture: [{path: a, wait: 2}]}", "did you mean data.mixture.weight?"),
        (b"train: {seed: 1_0}", "train.seed must be an integer in ASCII digits, got '1_0'"),
        ("train: {seed: ٣}".encode(), "train.seed must be an integer in ASCII digits, got '٣'"),
        (b"train: " + b"[" * 1000, "not a YAML file: "),
    ],
)
def test_a_bad_file_is_named_with_its_key(tmp_path: Path, text, message, capsys) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(text + b"\n")
    for arguments in (("--config", str(file)), (f"--config={file}",)):
        with pytest.raises(SystemExit) as caught:
            parse(*arguments)
        assert caught.value.code == 2
        said = capsys.readouterr().err
        assert f"{file}: " in said
        assert message in said


def parse_train(*arguments: str) -> tuple[Config, Invocation]:
    return parse_train_command([*NEEDED, *arguments])


def test_how_a_run_is_started_is_no_part_of_its_config() -> None:
    config, plain = parse_train("--train.seed", "3")
    assert plain == Invocation()
    dry, invocation = parse_train("--train.seed", "3", "--dry_run", "8")
    assert invocation == Invocation(dry_run="8")
    assert dry == config == parse("--train.seed", "3")
    assert parse_train("--dry_run=true")[1] == parse_train("--dry_run")[1] == Invocation(True)
    assert parse_train("--dry_run", "v5e:4x4")[1] == Invocation(dry_run="v5e:4x4")
    found = parse_train("--distributed", "true")[1]
    assert (found, found.process) == (Invocation(distributed=True), (None, None, None))
    assert parse_train("--distributed", "3/16@[::1]:80")[1].process == (3, 16, "[::1]:80")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dry_run": "0"}, "--dry_run wants a number of CPU devices, .* got '0'"),
        ({"dry_run": "00"}, "--dry_run wants a number of CPU devices, .* got '00'"),
        ({"dry_run": ""}, "--dry_run wants a number of CPU devices, .* got ''"),
        ({"dry_run": True, "distributed": True}, "--dry_run takes one process"),
        ({"distributed": "a:1"}, "--distributed a:1 is no INDEX/COUNT@HOST:PORT"),
        ({"distributed": "2/2@a:1"}, "--distributed 2/2@a:1 is no INDEX/COUNT@HOST:PORT"),
        ({"distributed": ""}, "--distributed  is no INDEX/COUNT@HOST:PORT"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Invocation(**values)


def test_evaluation_while_training_is_read_from_the_command() -> None:
    flags = ("--train.eval_every=5", "--train.patience=3", "--train.export=best")
    train = parse(*flags, "--train.profile_steps=[2, 4]", "--mesh.fsdp=2").train
    assert (train.eval_every, train.patience, train.export) == (5, 3, "best")
    assert train.profile_steps == (2, 4)
    assert (parse().mesh.fsdp, parse("--mesh.fsdp=2").mesh.fsdp) == ("auto", 2)
    defaults = parse().train
    assert (defaults.eval_every, defaults.patience, defaults.export) == (None, None, "last")


@dataclasses.dataclass(frozen=True)
class Choices:
    """A command line that needs nothing."""

    loud: bool = False
    often: int = 1


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], Choices()),
        (["--loud"], Choices(loud=True)),
        (["--loud", "--often", "2"], Choices(loud=True, often=2)),
        (["--often", "2", "--loud"], Choices(loud=True, often=2)),
        (["--loud", "false"], Choices()),
        (["--loud=false", "--often=3"], Choices(often=3)),
    ],
)
def test_a_bool_may_stand_alone_and_so_may_the_program(arguments, wanted) -> None:
    assert parse_command_line(Choices, "choices", arguments) == wanted


@dataclasses.dataclass(frozen=True)
class Texts:
    """Every kind of text that a program takes."""

    plain: str = "a"
    optional: str | None = None
    prompt: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)


@pytest.mark.parametrize(
    "text",
    [
        "# md heading",
        "&x",
        "~",
        "null",
        "1e3",
        "yes",
        "null # c",
        "{a: 1}",
        "[x",
        " x ",
        "'q'",
        "-",
    ],
)
def test_a_flag_of_text_is_the_text_as_it_is_written(text: str) -> None:
    names = ("plain", "optional", "prompt.separator", "data.eval")
    read = parse_command_line(Texts, "x", [f"--{name}={text}" for name in names])
    assert (read.plain, read.optional, read.prompt.separator) == (text, text, text)
    # a key that a settings file may have set can be taken back
    assert read.data.eval == (None if text == "null" else text)


def test_a_group_may_be_taken_back_by_the_word_null() -> None:
    arguments = ["--model.scratch.vocab_size=300", "--model.scratch", "null", "--lora=null"]
    assert parse(*arguments).model.scratch is None


def test_a_text_of_how_a_run_is_started_is_no_yaml_either() -> None:
    arguments = [*NEEDED, "--dry_run", "# none"]
    assert parse_train_command(arguments)[1].dry_run == "# none"


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train: {seed: 3}\n", encoding="utf-8-sig")
    assert parse("--config", str(file)).train.seed == 3


NAMES_A_CLASS: tuple[dict[str, Any], ...] = (
    {"prompt": "imported_by_name.Class"},
    {"prompt": {"class_path": "imported_by_name.Class"}},
    {"lora": "imported_by_name.Class"},
    {"lora": {"class_path": "imported_by_name.Class"}},
    {"data": {"mixture": ["imported_by_name.Class"]}},
    {"data": {"mixture": [{"class_path": "imported_by_name.Class"}]}},
    {"data.mixture": ["imported_by_name.Class"]},
)


@pytest.mark.parametrize("values", NAMES_A_CLASS, ids=str)
def test_no_setting_imports_what_it_names(tmp_path, monkeypatch, values) -> None:
    (tmp_path / "imported_by_name.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"must be |unknown key"):
        from_dict(Config, values, source="laser_config.json")
    (key, value), *_ = values.items()
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(values))
    for arguments in (["--config", str(file)], [f"--{key}={json.dumps(value)}"]):
        with pytest.raises(SystemExit) as caught:
            parse(*arguments)
        assert caught.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--often"], "--often wants a value"),
        (["--config"], "--config wants a file"),
        (["twice"], "unexpected argument twice"),
        (["--often", "1.0"], "often must be an integer, got 1.0"),
        (["--often", "true"], "often must be an integer, got True"),
        (["--loud", "3"], "loud must be true or false, got 3"),
    ],
)
def test_a_flag_without_its_value_is_refused(arguments, named, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command_line(Choices, "choices", arguments)
    assert caught.value.code == 2
    assert named in capsys.readouterr().err


def test_a_missing_setting_exits_and_is_named(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command_line(PretrainConfig, "pretrain", ["--model.path=x", "--output=y"])
    assert caught.value.code == 2
    assert "error: texts must be given" in capsys.readouterr().err


def test_a_group_keeps_the_defaults_of_its_place() -> None:
    arguments = ["--model.path=x", "--texts=t", "--output=y", "--optimizer.betas=[0.8, 0.9]"]
    optimizer = parse_command_line(PretrainConfig, "pretrain", arguments).optimizer
    assert (optimizer.learning_rate, optimizer.betas) == (1e-3, (0.8, 0.9))


def test_dotted_keys_of_a_file_are_nested_ones(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train.seed: 3\ntrain: {steps: 4}\nobjective: {weights.output: 5}\n")
    read = parse("--config", str(file))
    assert (read.train.seed, read.train.steps, read.objective.weights.output) == (3, 4, 5)


def test_what_stands_without_a_flag_goes_where_the_program_says() -> None:
    @dataclasses.dataclass(frozen=True)
    class Many:
        names: tuple[str, ...] = ()
        often: int = 1

    arguments = ["a", "--often", "2", "b=c", "null"]
    read = parse_command_line(Many, "many", arguments, positional="names")
    assert read == Many(("a", "b=c", "null"), 2)


def test_the_settings_are_printed_as_a_file_that_gives_them_again(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--train.seed=7", "--print_config", "--lora.rank=3")
    assert caught.value.code == 0
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    again = parse_command_line(Config, "train", ["--config", str(file)])
    assert again == parse("--train.seed=7", "--lora.rank=3")
    assert as_dict(again) == yaml.safe_load(file.read_text())


def test_help_names_every_setting_with_its_meaning(capsys) -> None:
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as caught:
            parse_train_command([flag])
        assert caught.value.code == 0
        said = capsys.readouterr().out
        assert "  --train.batch_size  an integer (default: 32)\n      Queries in an optim" in said
        assert "  --model.dtype  float32 or bfloat16 or float16 (default: float32)" in said
        assert (
            "  --dry_run  true or false or a text (default: False)\n      Compile for the asked"
            in said
        )


def test_a_section_that_a_training_has_too_is_listed_once(capsys) -> None:
    with pytest.raises(SystemExit):
        parse_command_line(PretrainConfig, "pretrain", ["--help"])
    said = capsys.readouterr().out
    assert "  --optimizer.KEY VALUE\n      AdamW with linear warm-up" in said
    assert "The keys of this section: `laser train --help`." in said
    assert "--optimizer.betas" not in said
    assert "  --row_length  an integer (default: 128)\n" in said
    with pytest.raises(SystemExit):
        parse_train_command(["--help"])
    said = capsys.readouterr().out
    assert "  optimizer\n      AdamW" in said
    assert "  --optimizer.betas  a list of 2 (default: (0.9, 0.999))\n" in said
    assert "  --lora  null, or\n" in said


# --- the log -----------------------------------------------------------------------------------


def test_progress_goes_to_stderr_with_time_and_process(capsys) -> None:
    configure_logging(3)
    logging.getLogger("laser_jax").info("%d rows of \x1b[2J", 5)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \[3\] 5 rows of \\x1b\[2J\n", err)
    parse()
    logging.getLogger("laser_jax").info("again")
    assert re.fullmatch(r"\S+ \S+ \[0\] again\n", capsys.readouterr().err)


# --- the programs ------------------------------------------------------------------------------


def test_laser_lists_its_commands_and_refuses_others(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(COMMANDS)
    assert all(len(line.split()) > 3 for line in lines[2:])
    with pytest.raises(SystemExit, match="laser has no command 'fly'"):
        main(["fly"])


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[type]]:
    """Program -> the classes of its settings."""
    found: dict[str, list[type]] = {}

    def note(classes: Sequence[type], *_: Any) -> None:
        found.setdefault(program, []).extend(classes)
        sys.exit()

    monkeypatch.setattr(command_line, "_parse", note)
    words = {"evaluate": list(EVALUATIONS), "encode_corpus": ["", "--verify"]}
    for room in COMMANDS.values():
        module = importlib.import_module(f"laser_jax.{room}.run")
        for word in words.get(room, [""]):
            program = f"{room} {word}" if room == "evaluate" else room
            with pytest.raises(SystemExit):
                module.main([word] if word else [])
    return found


def test_all_programs_together_have_at_most_200_flags(declared) -> None:
    """By name: two programs that mean the same by a flag share it."""
    assert len(declared) == len(COMMANDS) - 1 + len(EVALUATIONS)
    flags = {"config", "print_config"}
    for cls in (cls for classes in declared.values() for cls in classes):
        # a group is a heading, unless it may be null
        flags |= {key for key, kind in keys_of(kinds_of(cls)) if group_of(kind) is not kind}
    assert len(flags) <= 200, sorted(flags)


def told_commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(program, its flags) of the command lines on a page. A flag may stand in the brackets of what
    can be left out; values, which are often placeholders, are not looked at."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    commands = re.findall(r"(?:\blaser |-m laser_jax[. ])([a-z][\w-]*)((?: [^\n`|;&#]*)?)", text)
    for command, rest in commands:
        room = COMMANDS.get(command, command)
        if room in COMMANDS.values():
            word = f" {rest.split()[0]}" if room == "evaluate" and rest.strip() else ""
            yield room + word, re.findall(r"(?:^|[ \[])--([a-z][\w.]*)", rest)


def test_the_flags_of_every_command_line_in_the_documentation_are_there(declared) -> None:
    pages = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    told = [(page.name, *command) for page in pages for command in told_commands(page)]
    assert len(told) > 60
    assert sum(len(flags) for *_, flags in told) > 150
    unknown = []
    for page, program, flags in told:
        known = {"config", "print_config", "help"}
        known |= {key for cls in declared.get(program, ()) for key, _ in keys_of(kinds_of(cls))}
        unknown += [f"{page}: {program} --{flag}" for flag in flags if flag not in known]
    assert unknown == []


def test_laser_runs_a_program_as_python_does(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["laser"])
    with pytest.raises(SystemExit) as caught:
        main(["search", "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: laser search [")


def test_an_interrupted_evaluation_ends_in_one_line(monkeypatch) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    with pytest.raises(SystemExit, match=r"^stopped$"):
        evaluate(["run"])
