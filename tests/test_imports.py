"""The layout: who may import whom, and which library where (see CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "laser_jax"

# A module may import modules of the rows above its own; inside a folder there is no order.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"files", "terminal"}),
    frozenset({"config"}),
    frozenset({"losses", "alignment", "sharding", "kernels"}),
    frozenset({"modeling"}),
    frozenset({"hf", "thinking"}),
    frozenset({"views", "gguf"}),
    frozenset({"data"}),
    frozenset({"encoder"}),
    frozenset({"batch_encoder"}),
    frozenset({"retriever", "generation"}),
    frozenset({"search"}),
    frozenset({"evaluation"}),
    frozenset({"corpus"}),
    frozenset({"inspection"}),
    frozenset({"step"}),
    frozenset({"checkpoint"}),
    frozenset({"training"}),
)
PROGRAMS = frozenset(
    {
        "train",
        "pretrain",
        "prepare",
        "think",
        "quickstart",
        "evaluate",
        "evaluate_mteb",
        "report",
        "rewrite",
        "encode_corpus",
        "import_gguf",
    }
)
# `config` is a table of settings, which one looks up rather than reads. `batch_encoder` and
# `retriever` make the pure `encode` quick and handy for many texts; what it computes stands above.
# `generation` writes the texts of the baseline that the method does without. `kernels` are faster
# forms of what `modeling.attention` says plainly. `gguf` is another kind of file for `hf`.
OUTSIDE_CORE = frozenset(
    {"config", "files", "terminal", "gguf", "data", "batch_encoder", "retriever", "generation"}
    | {"search"}
    | {"evaluation", "inspection", "corpus", "training", "kernels"}
)
CORE_LINES = 2_000

# Library -> the files under laser_jax that may import it.
CONFINED: dict[str, frozenset[str]] = {
    "transformers": frozenset({"data/tokenization.py"}),
    "safetensors": frozenset({"hf.py"}),
    "gguf": frozenset({"gguf.py"}),
    "orbax": frozenset({"checkpoint.py"}),
    "faiss": frozenset({"search/faiss_index.py"}),
    "jinja2": frozenset({"inspection/page.py"}),
    "matplotlib": frozenset({"evaluation/plots.py"}),
    "mteb": frozenset({"evaluation/mteb.py"}),
    "ray": frozenset({"corpus/on_ray.py"}),
    "torch": frozenset(),
    "tensorflow": frozenset(),
}
KEPT_OUT_OF_CONFIG = frozenset({"jax", "jaxlib", "flax", "optax", "numpy"})

Imported = tuple[str, ...]
"""A dotted name, split: ("laser_jax", "modeling", "rope")."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def unit_of(path: Path) -> str:
    """The row entry of a file: its folder under laser_jax, or its own name at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str, package: Imported) -> Iterator[tuple[int, Imported]]:
    """(line, name) of every import anywhere in a file of `package`, relative ones resolved.

    `from a import b` gives a.b: whether b is a module or a name inside a shows in its first parts.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                yield node.lineno, (*base, alias.name)


def imports_of(path: Path) -> list[tuple[int, Imported]]:
    package = ("laser_jax", *path.relative_to(PACKAGE).parent.parts)
    return list(imports(path.read_text(), package))


def level(unit: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if unit in layer), None)


def direction_fault(importer: str, imported: Imported) -> str | None:
    """Why the unit `importer` may not import a name of laser_jax, or None where it may."""
    target = imported[1] if len(imported) > 1 else ""
    if target in PROGRAMS:
        return f"{target} is a program, nobody imports it"
    target_level = level(target)
    if target_level is None:
        return f"laser_jax.{target or '__init__'} is no module of the layout"
    if importer in PROGRAMS or importer == "__init__" or importer == target:
        return None
    importer_level = level(importer)
    if importer_level is not None and target_level >= importer_level:
        return f"{target} is not above {importer}"
    return None


def test_every_module_has_its_row_in_the_layout() -> None:
    known = frozenset({"__init__"}) | PROGRAMS | frozenset().union(*LAYERS)
    assert [name_of(p) for p in modules() if unit_of(p) not in known] == []


def test_modules_import_only_from_rows_above_their_own() -> None:
    faults = [
        f"{name_of(path)}:{line}: {fault}"
        for path in modules()
        for line, imported in imports_of(path)
        if imported[0] == "laser_jax" and (fault := direction_fault(unit_of(path), imported))
    ]
    assert faults == []


def test_confined_libraries_are_imported_only_in_their_file() -> None:
    faults = [
        f"{name_of(path)}:{line}: imports {imported[0]}"
        for path in modules()
        for line, imported in imports_of(path)
        if imported[0] in CONFINED and name_of(path) not in CONFINED[imported[0]]
    ]
    assert faults == []


def test_config_needs_no_array_library() -> None:
    libraries = {imported[0] for _, imported in imports_of(PACKAGE / "config.py")}
    assert libraries & KEPT_OUT_OF_CONFIG == set()


def test_no_file_is_a_catch_all() -> None:
    folders = ("laser_jax", "tests", "benchmarks", "examples", "launch")
    files = [p for folder in folders for p in (REPOSITORY / folder).rglob("*.py")]
    assert [str(p) for p in files if p.stem in {"utils", "util", "common", "helpers"}] == []


def lines_of_code(source: str) -> int:
    """Lines that hold code: neither blank nor only a comment or (part of) a docstring."""
    documentation = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    layout = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in layout
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(code - documentation)


def test_core_is_read_in_an_afternoon() -> None:
    core = [p for p in modules() if unit_of(p) not in PROGRAMS | OUTSIDE_CORE]
    lines = {name_of(p): lines_of_code(p.read_text()) for p in core}
    assert sum(lines.values()) < CORE_LINES, lines


def test_lines_of_code_leave_out_blanks_comments_and_docstrings() -> None:
    source = '"""Doc\nstring."""\n\n# why\nx = (\n    1\n)\n"""About x."""\n'
    assert lines_of_code(source) == 3


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("views", "laser_jax.thinking", True),
        ("modeling", "laser_jax.modeling.rope", True),
        ("train", "laser_jax.checkpoint", True),
        ("thinking", "laser_jax.hf", False),
        ("losses", "laser_jax.views", False),
        ("quickstart", "laser_jax.train.main", False),
        ("encoder", "laser_jax", False),
        ("encoder", "laser_jax.LatentEncoder", False),
    ],
)
def test_the_direction_rule_itself(importer: str, imported: str, allowed: bool) -> None:
    assert (direction_fault(importer, tuple(imported.split("."))) is None) == allowed


def test_imports_are_found_wherever_they_stand() -> None:
    source = (
        "import jax.numpy as jnp\n"
        "def f():\n"
        "    from . import rope\n"
        "    from ..config import Config\n"
        "    from laser_jax import losses\n"
    )
    assert list(imports(source, ("laser_jax", "modeling"))) == [
        (1, ("jax", "numpy")),
        (3, ("laser_jax", "modeling", "rope")),
        (4, ("laser_jax", "config", "Config")),
        (5, ("laser_jax", "losses")),
    ]
