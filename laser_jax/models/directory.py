"""The name of a model becoming a directory: a path, a model that comes in a package, or the hub's.

A package on PyPI holds SmolLM2-135M-Instruct (`import_gguf.file.PACKAGED`), and a folder beside
this file an adapter for it. What they make together is kept in the user's cache.
"""

import logging
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from filelock import FileLock

from laser_jax.config import RETRIEVER_CONFIG_FILE
from laser_jax.files.durable import checksum
from laser_jax.hf.directory import resolve_directory
from laser_jax.hf.reading import load_adapter, load_params
from laser_jax.hf.writing import save_params
from laser_jax.import_gguf.file import PACKAGED, packaged_file
from laser_jax.import_gguf.run import ImportOptions, import_gguf

SHIPPED = {"smollm2-laser": "smollm2"}
"""Models whose adapter lies beside this file: their name, and that of their backbone."""

_log = logging.getLogger(__name__)


def model_directory(name: str | Path) -> Path:
    """The directory of the model `name`.

    A directory of that name wins. `smollm2` and `smollm2-laser` are made on first use, in some ten
    seconds and 540 MB, under $XDG_CACHE_HOME or ~/.cache; any other name is the Hugging Face hub's.
    Raises a FileNotFoundError where it is nowhere or the package that holds it is not installed, an
    ImportError that names the extra, and an OSError where the cache cannot be written."""
    backbone = SHIPPED.get(str(name), str(name))
    if Path(name).is_dir() or backbone not in PACKAGED:
        return resolve_directory(name)
    source = packaged_file(backbone)
    adapter = shipped_adapter(str(name)) if str(name) in SHIPPED else None
    package = PACKAGED[backbone].partition("==")[0]
    # What it is made of names it: another release of either part is another directory.
    made_of = [version("laser-jax"), version(package), *([checksum(adapter)] if adapter else [])]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "laser_jax"
    target = cache / "-".join([str(name), *(part[:12] for part in made_of)])
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():  # nor has another process made it meanwhile
                _log.info("%s is made once, at %s", name, target)
                _make(source, adapter[0].parent if adapter else None, target)
    return target


def shipped_adapter(name: str) -> list[Path]:
    """The files of a shipped model, all in one folder."""
    return sorted(file for file in (Path(__file__).parent / name).iterdir() if file.is_file())


def _make(source: Path, adapter: Path | None, target: Path) -> None:
    """Imports the backbone and merges the adapter; `target` appears whole. Its lock is held."""
    for leftover in target.parent.glob(f".{target.name}-*"):  # of a killed process
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as stage:
        made = Path(stage) / "model"
        backbone, tokens = import_gguf(ImportOptions(str(source), str(made)))
        if adapter is not None:
            params = load_params(made, backbone, dtype=np.float32)
            tree, lora = load_adapter(adapter, backbone)
            variables = {"params": params, "lora": tree}
            save_params(made, variables, backbone, dtype=np.float32, lora=lora, tokens=tokens)
            shutil.copyfile(adapter / RETRIEVER_CONFIG_FILE, made / RETRIEVER_CONFIG_FILE)
        made.replace(target)
