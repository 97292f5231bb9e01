"""What the documentation names is there: files, programs, links, and names that are imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
TOLD = [
    *PAGES,
    *(
        file
        for folder in ("configs", "launch", "examples", "benchmarks")
        for file in sorted((REPOSITORY / folder).rglob("*"))
        if file.suffix in (".py", ".sh", ".sbatch", ".yaml") or file.name == "Dockerfile"
    ),
]
PLACEHOLDERS = {"laser_jax.NAME", "laser_jax.tar.gz"}
FOLDERS = "laser_jax|tests|docs|configs|launch|examples|benchmarks"


def named(file: Path, text: str) -> Iterator[str]:
    """The files of the repository that a page names, and those of the package that it names by
    their last parts. "`benchmarks/x.py` of commit 1a2b3c" is of another time."""
    now = r"\b(?!` of commit)"
    kinds = r"\.(?:py|md|yaml|sh|sbatch)"
    yield from re.findall(rf"(?<![\w./-])(?:{FOLDERS})(?:/[\w.-]+)+{kinds}{now}", text)
    if file.suffix == ".md":
        yield from re.findall(rf"`((?!src/)[\w/]+\.py){now}`", text)  # src/ is another project's


def missing_files(file: Path, text: str) -> list[str]:
    known = [path.as_posix() for path in (REPOSITORY / "laser_jax").rglob("*.py")]
    return [
        name
        for name in dict.fromkeys(named(file, text))
        if not (REPOSITORY / name).is_file()
        and not (REPOSITORY / name.removeprefix("laser_jax/")).is_file()  # in a clone of that name
        and not any(path.endswith(f"/{name}") for path in known)
    ]


def missing_programs(text: str) -> list[str]:
    """The modules that are started, and that `python -m` cannot start."""
    started = dict.fromkeys(re.findall(r"-m ((?:laser_jax|benchmarks)(?:\.\w+)+)", text))
    places = {name: REPOSITORY / name.replace(".", "/") for name in started}
    return [
        name
        for name, place in places.items()
        if name not in PLACEHOLDERS
        and not place.with_suffix(".py").is_file()
        and not (place / "__main__.py").is_file()
    ]


def defined(module: Path) -> set[str]:
    """The names at the top of a module, those that it gives away lazily included."""
    tree = ast.parse(module.read_text())
    nodes = ast.walk(tree)
    names = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def is_there(dotted: str) -> bool:
    """Whether laser_jax has this module, or a module has this name; of a class's own names nothing
    is said."""
    place, parts = REPOSITORY, dotted.split(".")
    while parts and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    if parts and (place / f"{parts[0]}.py").is_file():
        place = place / f"{parts.pop(0)}.py"
    module = place / "__init__.py" if place.is_dir() else place
    return not parts or parts[0] in defined(module)


def missing_names(file: Path, text: str) -> list[str]:
    dotted = re.findall(r"(?<![\w./-])laser_jax(?:\.[A-Za-z_]\w*)+(?![\w/])", text)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL) if file.suffix == ".md" else []
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("laser_jax"):
                dotted += [f"{node.module}.{alias.name}" for alias in node.names]
    wanted = dict.fromkeys(name for name in dotted if name not in PLACEHOLDERS)
    return [name for name in wanted if not is_there(name)]


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def dead_links(page: Path, text: str) -> list[str]:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("file", TOLD, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_what_is_named_is_there(file: Path) -> None:
    text = file.read_text()
    assert missing_files(file, text) == []
    assert missing_programs(text) == []
    assert missing_names(file, text) == []
    if file.suffix == ".md":
        assert dead_links(file, text) == []


def test_what_is_not_there_is_found() -> None:
    page = REPOSITORY / "README.md"
    text = (
        "`laser_jax/hf.py`, `gone.py`, [it](docs/gone.md), [there](docs/architecture.md#gone), "
        "[here](docs/architecture.md#rooms), `thinking.py`, python -m laser_jax.gone x, "
        "python -m laser_jax.train, `laser_jax.views.latent_view`, `laser_jax.losses.gone`, "
        "`benchmarks/old.py` of commit 1a2b3c\n"
        "```python\nfrom laser_jax.losses import pool, lost\n```\n"
    )
    assert missing_files(page, text) == ["laser_jax/hf.py", "docs/gone.md", "gone.py"]
    assert missing_programs(text) == ["laser_jax.gone"]
    names = ["laser_jax.gone", "laser_jax.losses.gone", "laser_jax.losses.lost"]
    assert missing_names(page, text) == names
    assert dead_links(page, text) == ["docs/gone.md", "docs/architecture.md#gone"]
