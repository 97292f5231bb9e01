"""The files of an export: a Hugging Face directory, one of sentence-transformers, StableHLO."""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from laser_jax.config import LoraConfig, RetrieverConfig, save_retriever_config
from laser_jax.data.tokenization import (
    PromptTokenizer,
    Tokenizer,
    load_tokenizer,
    special_token_ids,
)
from laser_jax.data.tokenizer_files import save_tokenizer
from laser_jax.encoder import encode, load_pretrained
from laser_jax.files.durable import json_text
from laser_jax.hf.adapters import MERGED_KEY, merge_lora, merged_adapters
from laser_jax.hf.directory import CONFIG_FILE, RETRIEVER_TYPE
from laser_jax.hf.reading import find_params, load_adapter
from laser_jax.hf.writing import save_params
from laser_jax.inference.retriever import require_matching

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PACKAGE = Path(__file__).resolve().parents[1]
_CODE = ("export/laser_retriever.py", "data/prompts.py", "data/control_tokens.py")
# What that code imports of laser_jax, and what takes its place where laser_jax is not.
_IMPORTS = {
    "from laser_jax.data.prompts ": "from .prompts ",
    "from laser_jax.data.control_tokens ": "from .control_tokens ",
    "from laser_jax.config import PromptConfig": "PromptConfig = object",
    "from laser_jax.data.tokenizer_files import": "TokenizationError = ValueError  #",
}


@dataclass(frozen=True)
class Source:
    """A model that has been read whole, so that nothing can be wrong with it any more."""

    directory: Path
    config: RetrieverConfig
    tokenizer: Tokenizer
    variables: dict[str, Any]
    """{"params": ...} and, with an adapter, "lora", as host arrays in the dtype of the files."""
    dtype: str
    """Of the stored weights."""
    lora: LoraConfig | None

    @classmethod
    def read(cls, directory: Path, config: RetrieverConfig, adapter: str | None) -> Self:
        """Raises as `LatentRetriever.from_pretrained`."""
        tokenizer = load_tokenizer(directory)
        require_matching(config, PromptTokenizer(tokenizer, config.prompt))
        stored = {tensor.dtype for tensor in find_params(directory, config.backbone).values()}
        dtype: Any = _DTYPES[stored.pop()] if len(stored) == 1 else "float32"
        variables, _ = load_pretrained(directory, config=replace(config, dtype=dtype))
        lora = None
        if adapter is not None:
            variables["lora"], lora = load_adapter(adapter, config.backbone, base=directory)
        return cls(directory, config, tokenizer, variables, dtype, lora)


def write_hf(source: Source, folder: Path) -> None:
    """What a training run leaves in model/: merged weights, tokenizer and laser_config.json."""
    save_params(
        folder,
        source.variables,
        source.config.backbone,
        dtype=jnp.dtype(source.dtype),
        lora=source.lora,
        tokens=special_token_ids(source.tokenizer),
        merged=merged_adapters(source.directory),
    )
    _write_prompts(source, folder)


def write_sentence_transformers(source: Source, folder: Path) -> None:
    """The same with the code that thinks (`laser_retriever.py`), under a config.json that whatever
    knows backbones alone refuses, since it would pool the prompt's states."""
    write_hf(source, folder)
    backbone = json.loads((folder / CONFIG_FILE).read_text())
    kept = {key: backbone.pop(key) for key in (MERGED_KEY,) if key in backbone}
    refused = {"model_type": RETRIEVER_TYPE, "hidden_size": "see backbone"}
    family = {"backbone_type": backbone.pop("model_type")}  # transformers would look for it inside
    prompt = source.config.prompt
    files = {
        CONFIG_FILE: {**refused, **family, "backbone": backbone, **kept},
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "laser_retriever.LaserRetriever"}
        ],
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "prompts": {"query": prompt.query_template, "document": prompt.document_template},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    for name, values in files.items():
        (folder / name).write_text(json_text(values), encoding="utf-8")
    for name in _CODE:
        code = (_PACKAGE / name).read_text(encoding="utf-8")
        for line, replacement in _IMPORTS.items():
            code = code.replace(line, replacement)
        (folder / Path(name).name).write_text(code, encoding="utf-8")


def write_stablehlo(source: Source, folder: Path) -> None:
    """`encode` as one program for any number of rows and tokens (encode.bin; where the model has
    another K for documents, encode_documents.bin too), its weights in the order of its arguments
    (weights.npz, bfloat16 as uint16), tokenizer and laser_config.json. Raises an ImportError where
    the extra `export` is not installed."""
    config, dtype = source.config, jnp.dtype(source.config.dtype)
    params = source.variables["params"]
    if source.lora is not None:
        params = merge_lora(params, source.variables["lora"], source.lora.scale)
    leaves, tree = jax.tree.flatten({"params": params})
    leaves = [np.asarray(leaf, dtype) for leaf in leaves]
    stored = [leaf.view(np.uint16) if dtype == jnp.bfloat16 else leaf for leaf in leaves]

    def program(
        stored: list[jax.Array], ids_BT: jax.Array, mask_BT: jax.Array, *, K: int
    ) -> jax.Array:
        leaves = [jax.lax.bitcast_convert_type(leaf, dtype) for leaf in stored]
        variables = jax.tree.unflatten(tree, leaves)
        return encode(variables, ids_BT, mask_BT, config=config, num_thinking_steps=K)

    batch = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, t"), np.int32)
    weights = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in stored]
    files = {config.documents_at: "encode_documents.bin", config.num_thinking_steps: "encode.bin"}
    for K, name in files.items():
        jitted = jax.jit(partial(program, K=K))
        export = jax.export.export(jitted, platforms=("cpu", "cuda", "tpu"))
        (folder / name).write_bytes(export(weights, batch, batch).serialize())
    np.savez(folder / "weights.npz", *stored)
    _write_prompts(source, folder)


def _write_prompts(source: Source, folder: Path) -> None:
    save_tokenizer(source.tokenizer, folder)
    save_retriever_config(source.config, folder)
