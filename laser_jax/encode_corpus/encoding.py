"""One shard after the other: documents in, a file of vectors out."""

from __future__ import annotations

import hashlib
import json
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from laser_jax.config import (
    ConfigError,
    Dtype,
    MeshConfig,
    RetrieverConfig,
    as_dict,
    load_retriever_config,
)
from laser_jax.data.pipeline import tokenization_settings
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer
from laser_jax.encode_corpus.directory import CorpusDirectory, Record
from laser_jax.encode_corpus.documents import Corpus, Fields, Located
from laser_jax.encode_corpus.plan import Plan, Settings, differing, query_instruction, read_planned
from laser_jax.files.durable import Digest
from laser_jax.hf.directory import read_backbone_config, resolve_directory
from laser_jax.hf.reading import find_params, load_adapter
from laser_jax.inference.batch_encoder import NotFiniteError
from laser_jax.inference.retriever import (
    LatentRetriever,
    Tally,
    local_mesh,
    require_matching,
    require_positions,
)
from laser_jax.search.codes import encode_vectors
from laser_jax.search.vectors import VectorsError, VectorsInfo, shard_name, write_shard


@dataclass(frozen=True)
class RayConfig:
    """The workers of `--engine ray`. Each holds the model and encodes a shard at a time."""

    workers: int = 1
    cpus: int = 1
    """Cores of a worker, which computes with no more threads than that."""
    gpus: int = 0
    """GPUs of a worker; it sees no other. 0 computes on the CPU."""
    address: str | None = None
    """A running cluster: `auto` or host:port. None starts one on this machine for the while."""
    restarts: int = 10
    """How often a worker that died is started again before the run gives up."""

    def __post_init__(self) -> None:
        if self.workers < 1 or self.cpus < 1 or self.gpus < 0 or self.restarts < 0:
            raise ConfigError(
                "ray.workers and ray.cpus must be at least 1, ray.gpus and ray.restarts at least "
                f"0, got {self.workers}, {self.cpus}, {self.gpus} and {self.restarts}"
            )


@dataclass(frozen=True)
class CorpusConfig:
    """Encodes a corpus into a directory of vectors. (`--verify DIR` alone checks one.)

    The same command goes on with what an interrupted one has left.
    """

    model: str
    """A directory as `laser_jax.train` exports it, or a name on the Hugging Face hub."""
    input: str
    """A .jsonl, .jsonl.gz or .parquet, a BEIR directory, or a directory of such files."""
    output: str
    """A directory, empty or of the same corpus, model and settings."""
    shard: str | None = None
    """`i/n`: encodes every n-th shard from the i-th on, counted from 0, for array jobs. Whoever
    comes last finishes the directory."""
    plan_only: bool = False
    """Reads the corpus, cuts it into shards and stops."""
    dtype: Literal["float32", "float16", "int8"] = "float32"
    """What the vectors are stored as."""
    num_thinking_steps: int | None = None
    """K. None: the model's."""
    adapter: str | None = None
    """A directory with a LoRA adapter, merged into the model."""
    compute_dtype: Dtype | None = None
    """What the model computes in. None: its own."""
    texts: Literal["documents", "queries"] = "documents"
    """`queries` encodes a queries.jsonl, for `laser_jax.search`."""
    instruction: str | None = None
    """The task, for all queries. None: each query's own field `instruction`."""
    fields: Fields = field(default_factory=Fields)
    """The fields of a document, or columns."""
    skip_bad_lines: bool = False
    """Leaves out, shows and counts lines that are no documents. Otherwise the first is an error."""
    shard_documents: int = 32_768
    """Documents a shard."""
    batch_size: int = 64
    """The most rows of a batch."""
    batch_tokens: int = 8192
    """The most tokens of a batch."""
    length_multiple: int = 32
    """Widths of batches are multiples of it."""
    devices: int | None = None
    """Local devices that share every batch. None: all of them."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How those devices share weights and rows; by default rows alone."""
    engine: Literal["local", "ray"] = "local"
    """`ray` spreads the shards over a Ray cluster."""
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        counts = ("shard_documents", "batch_size", "batch_tokens", "length_multiple", "devices")
        for name in (*counts, "num_thinking_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.texts == "documents" and self.instruction is not None:
            raise ConfigError("an instruction goes with queries: --texts queries")
        if self.texts == "queries" and self.fields != Fields():
            raise ConfigError("fields name those of documents; queries have _id and text")
        part_of(self.shard)
        if self.shard is not None and (self.engine == "ray" or self.plan_only):
            raise ConfigError("shard i/n goes with neither --engine ray nor --plan_only true")


def part_of(shard: str | None) -> tuple[int, int]:
    """(i, n) of "i/n"; (0, 1) of None. Raises a ConfigError on anything else."""
    found = re.fullmatch(r"(\d+)/(\d+)", shard if shard is not None else "0/1")
    i, n = (int(number) for number in found.groups()) if found else (0, 0)
    if i >= n:
        raise ConfigError(f"shard must be i/n with 0 <= i < n, such as 0/8, got {shard!r}")
    return i, n


# --- what a run depends on ---------------------------------------------------------------------


def settings_of(config: CorpusConfig) -> Settings:
    """Reads what the vectors depend on from the model's files. Of the weights a tensor is in memory
    at a time.

    What can be told without them to fail is refused here, as no other settings may follow in a
    directory that has a plan.

    Raises:
        FileNotFoundError, ValueError: the model's directory cannot be used, or not with these
            settings; names the file or the setting.
    """
    directory = resolve_directory(config.model)
    of_model = load_retriever_config(directory)
    of_model = replace(of_model, dtype=config.compute_dtype or of_model.dtype)
    prompts = PromptTokenizer(load_tokenizer(directory), of_model.prompt)
    steps = config.num_thinking_steps or of_model.num_thinking_steps
    require_matching(of_model, prompts)
    require_positions(
        of_model,
        "query_max_length" if config.texts == "queries" else "document_max_length",
        steps,
    )
    prompts.require_room([config.instruction or ""], explicit=False)
    info = _vectors_info(config, of_model, prompts, weights_hash(directory, config.adapter))
    names = [name for name in Settings.__dataclass_fields__ if name != "info"]
    return Settings(info, **{name: getattr(config, name) for name in names})


def weights_hash(directory: str | Path, adapter: str | Path | None) -> str:
    """The hash that `load_pretrained` finds while it reads the same directories. A tensor is in
    memory at a time."""
    weights, backbone = Digest(), read_backbone_config(directory)
    for slot, tensor in find_params(Path(directory), backbone).items():
        weights.add(slot.name, tensor.read())
    if adapter is not None:
        lora, lora_config = load_adapter(adapter, backbone)
        weights.add_tree({"scale": lora_config.scale, **lora}, "lora")
    return weights.hexdigest()


def _vectors_info(
    config: CorpusConfig, model: RetrieverConfig, prompts: PromptTokenizer, weights: str
) -> VectorsInfo:
    """What vectors are made with; `weights` is the hash of a `Digest`."""
    return VectorsInfo(
        model_hash=_hash([as_dict(model.backbone), model.pooling, model.dtype, weights]),
        prompt_hash=_hash(tokenization_settings(prompts)),
        num_thinking_steps=config.num_thinking_steps or model.num_thinking_steps,
        dtype=config.dtype,
        dimension=model.backbone.hidden_size,
        role=config.texts,
    )


def _hash(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def open_corpus(config: CorpusConfig, on_bad_line: Callable[[str], object]) -> Corpus:
    """The corpus of `config`. `on_bad_line` is given the message of every line that is skipped."""
    return Corpus(
        config.input,
        texts=config.texts,
        fields=config.fields,
        skipped=on_bad_line if config.skip_bad_lines else None,
    )


# --- encoding ----------------------------------------------------------------------------------


class ShardEncoder:
    """A model that turns shards of a plan into files.

    A shard's batches are made of its own documents alone, by a fixed rule, so its bytes are the
    same whoever encodes it, and whenever, on the same kind of machine.
    """

    def __init__(self, config: CorpusConfig, plan: Plan, directory: CorpusDirectory):
        """Loads the model.

        Raises:
            FileNotFoundError, ValueError: it cannot be used, or what was loaded is not the model of
                the plan; the message says why.
        """
        self._config, self._plan, self._directory = config, plan, directory
        self._corpus = open_corpus(config, lambda message: None)  # the plan has shown and counted
        mesh = local_mesh(config.mesh, config.devices)
        settings, weights = plan.settings, Digest()
        self.retriever = LatentRetriever.from_pretrained(
            config.model,
            adapter=config.adapter,
            dtype=config.compute_dtype,
            batch_size=settings.batch_size,
            batch_tokens=settings.batch_tokens,
            length_multiple=settings.length_multiple,
            mesh=mesh,
            seen=weights,
        )
        model, prompts = self.retriever.encoder.config, self.retriever.prompts
        self._info = _vectors_info(config, model, prompts, weights.hexdigest())
        if changed := differing(settings, replace(settings, info=self._info)):
            raise VectorsError(
                f"{config.model}, as {socket.gethostname()} has loaded it, is not the model that "
                f"{directory.path} was begun with:\n  "
                + "\n  ".join(changed)
                + "\nIt was changed in the meantime, or this machine has another copy there. Bring "
                "the former one back, or choose another --output"
            )
        self.device = f"{mesh.size if mesh else 1} x {jax.local_devices()[0].device_kind}"

    def __enter__(self) -> ShardEncoder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._corpus.close()

    def encode(self, number: int, watch: Callable[[Tally], object] | None = None) -> Record:
        """Writes a shard, whole or not at all, and records it.

        Args:
            watch: called after every batch with the shard's counts up to there.

        Raises:
            DatasetError: the corpus is not the one that the plan was made of.
            VectorsError: a vector is not finite; names the document.
            OSError: the disk is full or the like; no part of the shard is left.
        """
        name, info = shard_name(number), self._info
        documents = read_planned(self._corpus, self._plan.shards[number], name)
        tally = Tally(watch=watch)
        try:
            vectors_CD = self._vectors(documents, tally)
        except NotFiniteError as error:
            first = documents[error.place]
            raise VectorsError(f"{first.where}, id {first.item.id!r}: {error}") from error
        ids = [located.item.id for located in documents]
        codes_CD = encode_vectors(vectors_CD, info.dtype)
        directory = self._directory
        origin = self._plan.origin(number, tally.tokens, tally.truncated)
        try:
            shard = write_shard(directory.path, name, ids, codes_CD, info, origin=origin)
        except FileNotFoundError:
            if directory.is_finished:  # by others, who took our part for one of a killed process
                return directory.finished_shards([number])[number]
            raise
        record = Record(shard.count, shard.sha256, tally.tokens, tally.truncated)
        directory.finish_shard(number, record)
        return record

    def _vectors(self, documents: list[Located], tally: Tally) -> np.ndarray:
        texts = [located.item.text for located in documents]
        steps = self._plan.settings.info.num_thinking_steps
        if self._config.texts == "documents":
            return self.retriever.encode_document(texts, num_thinking_steps=steps, tally=tally)
        return self.retriever.encode_query(
            texts,
            instruction=[query_instruction(d, self._config.instruction) for d in documents],
            num_thinking_steps=steps,
            tally=tally,
        )
