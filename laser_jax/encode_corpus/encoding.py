"""One shard after the other: documents in, a file of vectors out."""

import logging
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import jax
import numpy as np

from laser_jax.config import RetrieverConfig, as_dict
from laser_jax.data.pipeline import tokenization_settings
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer
from laser_jax.encode_corpus.directory import CorpusDirectory
from laser_jax.encode_corpus.documents import Corpus, Fields, Located
from laser_jax.encode_corpus.plan import PLAN_FILE, Plan, Settings, query_instruction, read_planned
from laser_jax.files.durable import Digest, digest_of
from laser_jax.files.reading import DataError
from laser_jax.hf.directory import read_backbone_config
from laser_jax.hf.reading import find_params, load_adapter
from laser_jax.inference.batch_encoder import NotFiniteError
from laser_jax.inference.options import EncoderOptions, LimitKey, require_positions
from laser_jax.inference.retriever import EncodingStats, LatentRetriever, require_matching
from laser_jax.models.directory import model_directory
from laser_jax.search.codes import encode_vectors
from laser_jax.search.vectors import Role, Shard, VectorsInfo, shard_name, write_shard
from laser_jax.settings import changes, kinds_of, listed, require, require_in

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayConfig:
    """Workers of a Ray cluster. Each holds the model and encodes a shard at a time."""

    workers: int = 1
    cpus: int = 1
    """Cores of a worker, which computes with no more threads than that."""
    gpus: int = 0
    """GPUs of a worker; it sees no other. 0 computes on the CPU."""
    address: str | None = None
    """A running cluster: `auto` or host:port. None starts one on this machine for the while."""

    def __post_init__(self) -> None:
        require_in("[1, inf)", self, "ray.", "workers", "cpus")
        require_in("[0, inf)", self, "ray.", "gpus")


@dataclass(frozen=True)
class CorpusConfig(EncoderOptions):
    """Encodes a corpus into a directory of vectors. (`--verify DIR` alone checks one.)

    The same command goes on with what an interrupted one has left.
    """

    input: str
    """A .jsonl, .jsonl.gz or .parquet, a BEIR directory, or a directory of such files."""
    output: str
    """A directory, empty or of the same corpus, model and settings."""
    shard: str | None = None
    """`i/n`, for array jobs, encodes every n-th shard from the i-th on, counted from 0; whoever
    comes last finishes the directory. `none` encodes nothing: the corpus is read and cut."""
    store_dtype: Literal["float32", "float16", "int8"] = "float32"
    """What the vectors are stored as."""
    texts: Role = "documents"
    """`queries` encodes a queries.jsonl, for `laser_jax.search`."""
    instruction: str | None = None
    """The task, for all queries. None: each query's own field `instruction`."""
    fields: tuple[str, str, str] = ("_id", "text", "title")
    """Fields, or columns, of a document: for its id, text, and title, which may be absent."""
    skip_bad_lines: bool = False
    """Leaves out, shows and counts lines that are no documents. Otherwise the first is an error."""
    shard_documents: int = 32_768
    """Documents a shard."""
    ray: RayConfig | None = None
    """Any of these settings spreads the shards over workers of a Ray cluster."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_in("[1, inf)", self, "", "shard_documents")
        if self.texts == "queries":
            default = self.fields == CorpusConfig.fields
            require(default, "fields name those of documents; queries have _id and text")
        else:
            require(self.instruction is None, "an instruction goes with queries: --texts queries")
        self.part_of(1)

    def part_of(self, shards: int) -> range:
        """The numbers of those of so many shards that are this process's. Raises a ConfigError on a
        `shard` that is neither i/n nor none."""
        if self.shard == "none":
            return range(0)
        found = re.fullmatch(r"(\d+)/(\d+)", self.shard or "0/1")
        i, n = (int(number) for number in found.groups()) if found else (0, 0)
        wanted = "shard must be none, or i/n with 0 <= i < n, such as 0/8"
        require(i < n, f"{wanted}, got {self.shard!r}")
        return range(i, shards, n)


# --- what a run depends on ---------------------------------------------------------------------


def settings_of(config: CorpusConfig) -> Settings:
    """Reads what the vectors depend on from the model's files, a tensor at a time. What can be told
    to fail is refused here, as no other settings may follow in a directory that has a plan. Raises
    a FileNotFoundError or ValueError where the model's directory cannot be used, or not with these
    settings."""
    directory, model = model_directory(config.model), config.retriever_config()
    prompts = PromptTokenizer(load_tokenizer(directory), model.prompt)
    require_matching(model, prompts)
    limit: LimitKey = "query_max_length" if config.texts == "queries" else "document_max_length"
    require_positions(model, limit, _thinking_steps(config, model))
    prompts.require_room([config.instruction or ""], explicit=False)
    info = _vectors_info(config, model, prompts, weights_hash(directory, config.adapter))
    made: dict[str, Any] = {"info": info, "fields": Fields(*config.fields)}
    return Settings(**{n: getattr(config, n) for n in kinds_of(Settings) if n not in made}, **made)


def weights_hash(directory: str | Path, adapter: str | Path | None) -> str:
    """The hash that `load_pretrained` finds while it reads the same directories."""
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
        *identity(model, prompts, weights),
        num_thinking_steps=_thinking_steps(config, model),
        dtype=config.store_dtype,
        dimension=model.backbone.hidden_size,
        role=config.texts,
    )


def _thinking_steps(config: CorpusConfig, model: RetrieverConfig) -> int:
    """K of what is encoded: the one asked for, or the model's."""
    own = model.num_thinking_steps if config.texts == "queries" else model.documents_at
    return config.num_thinking_steps or own


def identity(model: RetrieverConfig, prompts: PromptTokenizer, weights: str) -> tuple[str, str]:
    """`model_hash` and `prompt_hash` of a model's vectors; `weights` is the hash of a `Digest`."""
    made_by = [as_dict(model.backbone), model.pooling, model.dtype, weights]
    return digest_of(made_by)[:32], digest_of(tokenization_settings(prompts))[:32]


def open_corpus(config: CorpusConfig, shown: int = 0) -> Corpus:
    """The corpus of `config`. Of the lines that are skipped the first `shown` are logged."""

    def skip(message: str) -> None:
        if corpus.bad_lines <= shown:
            _log.warning("skipped: %s", message)

    fields, skipped = Fields(*config.fields), skip if config.skip_bad_lines else None
    corpus = Corpus(config.input, texts=config.texts, fields=fields, skipped=skipped)
    return corpus


# --- encoding ----------------------------------------------------------------------------------


class ShardEncoder:
    """A model that turns shards of a plan into files. A shard's batches are made of its own
    documents alone, by a fixed rule, so its bytes are the same whoever encodes it, on the same kind
    of machine."""

    def __init__(self, config: CorpusConfig, plan: Plan, directory: CorpusDirectory):
        """Loads the model. Raises a FileNotFoundError or ValueError where it cannot be used, or
        what was loaded is not the model of the plan."""
        self._config, self._plan, self._directory = config, plan, directory
        self._corpus = open_corpus(config)
        weights = Digest()
        self.retriever = LatentRetriever.from_options(config, seen=weights)
        encoder, prompts = self.retriever.encoder, self.retriever.prompts
        info = _vectors_info(config, encoder.config, prompts, weights.hexdigest())
        if changed := changes(as_dict(plan.settings.info), info, source=PLAN_FILE):
            raise DataError(
                f"{config.model}, as {socket.gethostname()} has loaded it, is not the model that "
                f"{directory.path} was begun with:\n  {listed(changed)}\nIt was changed, or this "
                "machine has another copy. Bring the former one back, or choose another --output"
            )
        devices = encoder.mesh.size if encoder.mesh else 1
        self.device = f"{devices} x {jax.local_devices()[0].device_kind}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._corpus.close()

    def encode(self, number: int, watch: Callable[[EncodingStats], object] | None = None) -> Shard:
        """Writes a shard, whole or not at all, and records it. `watch` is called after every batch
        with the shard's counts up to there. Raises a DataError where the corpus is not the one that
        the plan was made of, or a vector is not finite, and an OSError where the disk is full."""
        name, info = shard_name(number), self._plan.settings.info
        documents = read_planned(self._corpus, self._plan.shards[number], name)
        stats = EncodingStats(watch=watch)
        try:
            vectors_CD = self._vectors(documents, stats)
        except NotFiniteError as error:
            first = documents[error.place]
            raise DataError(f"{first.where}, id {first.item.id!r}: {error}") from error
        ids = [located.item.id for located in documents]
        codes_CD = encode_vectors(vectors_CD, info.dtype)
        directory = self._directory
        origin = self._plan.origin(number, stats.tokens, stats.truncated)
        try:
            shard = write_shard(directory.path, name, ids, codes_CD, info, origin=origin)
        except FileNotFoundError:
            if directory.is_finished:  # by others, who took our part for one of a killed process
                return directory.finished_shards([number])[number]
            raise
        directory.finish_shard(number, shard)
        return shard

    def _vectors(self, documents: list[Located], stats: EncodingStats) -> np.ndarray:
        texts = [located.item.text for located in documents]
        K = self._plan.settings.info.num_thinking_steps
        if self._config.texts == "documents":
            return self.retriever.encode_document(texts, num_thinking_steps=K, stats=stats)
        instructions = [query_instruction(d, self._config.instruction) for d in documents]
        return self.retriever.encode_query(texts, instruction=instructions, stats=stats)
