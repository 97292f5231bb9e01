"""Makes a backbone of a llama.cpp model: `python -m laser_jax.import_gguf MODEL.gguf DIRECTORY`.

The directory holds config.json, weights and tokenizer as transformers and laser_jax load them;
`model.path` of a training config names it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from laser_jax.config import ConfigError, Dtype, parse_command_line
from laser_jax.data.gguf_tokenizer import read_gguf_tokenizer
from laser_jax.data.tokenization import TokenizationError, special_token_ids
from laser_jax.gguf import open_gguf, read_gguf_config, read_gguf_params
from laser_jax.hf import HFError, save_params


@dataclass(frozen=True)
class ImportOptions:
    """Turns a GGUF file of a Llama or Qwen3 model into a Hugging Face directory. The two may also be
    given by their place: FILE.gguf DIRECTORY."""

    file: str
    """The GGUF file."""
    output: str
    """The directory to write; it must not exist, or be empty."""
    store_dtype: Dtype = "float32"
    """The dtype of the stored weights. The quantised values are exact in float32 alone."""


def import_gguf(options: ImportOptions) -> None:
    """Reads `options.file` and writes `options.output`, whole or not at all.

    Raises:
        FileNotFoundError: no such GGUF file.
        ConfigError: the output directory holds something.
        HFError, TokenizationError: the file cannot become a backbone; names what is wrong.
        ImportError: the extra `gguf` is not installed.
    """
    output = Path(options.output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ConfigError(f"{output} is there already; name a directory that is new or empty")
    file = open_gguf(options.file)
    backbone = read_gguf_config(file)
    tokenizer = read_gguf_tokenizer(file)
    dtype = np.dtype(getattr(ml_dtypes, options.store_dtype, options.store_dtype))
    params = read_gguf_params(file, backbone, dtype=dtype)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as stage:
        made = Path(stage) / output.name
        tokenizer.save_pretrained(made)
        tokens = special_token_ids(tokenizer)
        save_params(made, {"params": params}, backbone, dtype=dtype, lora=None, **tokens)
        made.replace(output)
    print(
        f"{output}: {backbone.family}, {backbone.num_layers} layers of {backbone.hidden_size}, "
        f"{backbone.vocab_size:,} tokens, weights in {options.store_dtype}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if len(given) >= 2 and not any(argument.startswith("-") for argument in given[:2]):
        given = ["--file", given[0], "--output", given[1], *given[2:]]
    try:
        import_gguf(parse_command_line(ImportOptions, "python -m laser_jax.import_gguf", given))
    except (ConfigError, HFError, TokenizationError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
