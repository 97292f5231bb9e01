"""Directories of vectors: Parquet shards and a manifest.

    manifest.json           what the vectors are; every shard's name, row count and sha256
    shard-00000.parquet     columns `id` (string) and `vector` (fixed-size list of a dtype)

A shard's rows are coded as in `laser_jax.search.codes`. The metadata of its schema holds its
`VectorsInfo`, so that one of another model cannot be mixed in, and a checksum of its rows, which
tells that it is whole where the manifest is lost.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from laser_jax.config import ConfigError, as_dict, from_dict
from laser_jax.data.documents import document_id_fault
from laser_jax.files.durable import checksum_of, write_atomically, written_whole
from laser_jax.files.reading import DataError, import_pyarrow, parse_json, read_object
from laser_jax.search.repeated_ids import RepeatedIds
from laser_jax.settings import require_in

_FORMAT, _VERSION = "laser_jax vectors", 1
MANIFEST_FILE = "manifest.json"
_SCHEMA_KEY = b"laser_jax.vectors"
_WAY_OUT = "laser_jax.encode_corpus makes it again, by the command that wrote the directory"

Role = Literal["documents", "queries"]
"""What the vectors are of: the two are made by different prompts."""


@dataclass(frozen=True)
class VectorsInfo:
    """What all vectors of a directory have in common."""

    model_hash: str
    """A hash of the weights and config that made the vectors."""
    prompt_hash: str
    """A hash of the prompt settings and chat template."""
    num_thinking_steps: int
    dtype: Literal["float32", "float16", "int8"]
    dimension: int
    role: Role

    def __post_init__(self) -> None:
        require_in("[1, inf)", self, "", "num_thinking_steps", "dimension")


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a directory."""

    file: str
    """Its name, without a folder."""
    count: int
    sha256: str
    tokens: int | None = None
    """Tokens of its texts, as the model read them; None where they were not counted."""
    truncated: int | None = None
    """Texts that were shortened."""


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says. The order of the shards is the order of the vectors."""

    info: VectorsInfo
    shards: tuple[Shard, ...]

    @property
    def count(self) -> int:
        return sum(shard.count for shard in self.shards)


def shard_name(number: int) -> str:
    """`shard-00042.parquet`."""
    return f"shard-{number:05d}.parquet"


# --- writing -----------------------------------------------------------------------------------


def _check_shard(where: Path, ids: Sequence[str], vectors_CD: np.ndarray) -> None:
    """Raises a DataError on ids that stand twice or cannot stand in a run, and on vectors that
    are not finite or all zero."""
    seen = set()
    for id_ in ids:
        if fault := "stands twice" if id_ in seen else document_id_fault(id_):
            raise DataError(f"{where}: id {id_!r} {fault}")
        seen.add(id_)
    for broken_C, what in (
        (~np.isfinite(vectors_CD).all(axis=1), "not finite"),
        (~vectors_CD.any(axis=1), "all zero, which has no direction"),
    ):
        if broken_C.any():
            first = f"the first is that of {ids[int(broken_C.argmax())]!r}"
            which = f"the vectors of {broken_C.sum()} of {len(ids)} ids"
            raise DataError(f"{where}: {which} are {what}, {first}")


def write_shard(
    directory: str | Path,
    file: str,
    ids: Sequence[str],
    vectors_CD: np.ndarray,
    info: VectorsInfo,
    *,
    origin: Mapping[str, Any] | None = None,
) -> Shard:
    """Writes one shard, whole or not at all, and returns its entry for `write_manifest`. The same
    rows give the same bytes (with the same pyarrow). Raises a DataError, which names the shard and
    the id, on ids or vectors that cannot be used, and an OSError where the disk is full.
    `vectors_CD` are coded by `encode_vectors` as `info.dtype`; `origin`, of JSON types, is what
    else the shard is to tell about itself (`recovered_shard`), with `tokens` and `truncated`."""
    path = Path(directory) / file
    shape = len(ids), info.dimension
    if vectors_CD.dtype != info.dtype or vectors_CD.shape != shape:
        got = f"{vectors_CD.dtype} of shape {vectors_CD.shape}"
        raise DataError(f"{path}: wanted {info.dtype} of shape {shape}, got {got}")
    _check_shard(path, ids, vectors_CD)
    told = {**as_dict(info), **(origin or {})}
    told["checksum"] = _rows_checksum(ids, vectors_CD, told)
    content = _serialised(path, ids, vectors_CD, told)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        part.write_bytes(content)
    return _entry(file, content, len(ids), told)


def _entry(file: str, content: bytes, count: int, told: Mapping[str, Any]) -> Shard:
    digest = hashlib.sha256(content).hexdigest()
    return Shard(file, count, digest, told.get("tokens"), told.get("truncated"))


def _serialised(
    path: Path, ids: Sequence[str], vectors_CD: np.ndarray, told: Mapping[str, Any]
) -> bytes:
    """The Parquet file of the shard at `path` that tells `told` about itself."""
    pyarrow = import_pyarrow(path)
    values = pyarrow.array(np.ascontiguousarray(vectors_CD).reshape(-1))
    vectors = pyarrow.FixedSizeListArray.from_arrays(values, vectors_CD.shape[1])
    table = pyarrow.table({"id": pyarrow.array(ids, pyarrow.string()), "vector": vectors})
    table = table.replace_schema_metadata({_SCHEMA_KEY: json.dumps(told, sort_keys=True)})
    buffer = io.BytesIO()
    # vectors do not compress; a dictionary of them would only be built and thrown away
    pyarrow.parquet.write_table(table, buffer, compression="none", use_dictionary=False)
    return buffer.getvalue()


def _rows_checksum(ids: Sequence[str], vectors_CD: np.ndarray, told: Mapping[str, Any]) -> str:
    """The sha256 of all that a shard holds."""
    digest = hashlib.sha256(json.dumps([dict(told), list(ids)], sort_keys=True).encode())
    digest.update(np.ascontiguousarray(vectors_CD).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def shard_values(shard: Shard) -> dict[str, Any]:
    """What a file of JSON says of a shard; `shard_of` reads it."""
    return {key: value for key, value in vars(shard).items() if value is not None}


def write_manifest(directory: str | Path, manifest: Manifest) -> None:
    """Writes `manifest.json`, which makes the directory a finished one."""
    values = {"format": _FORMAT, "version": _VERSION, **as_dict(manifest.info)}
    values |= {"count": manifest.count, "shards": [*map(shard_values, manifest.shards)]}
    write_atomically(Path(directory) / MANIFEST_FILE, json.dumps(values, indent=1) + "\n")


# --- reading -----------------------------------------------------------------------------------


def read_manifest(directory: str | Path, role: Role | None = None) -> Manifest:
    """Reads `manifest.json`; `role` is what the vectors must be of, None takes either. Raises a
    FileNotFoundError when there is none, and a DataError when it is not one of this version, its
    parts do not fit together, or the vectors are of the other role."""
    path = Path(directory) / MANIFEST_FILE
    if not path.is_file():
        no_vectors = f"{directory} is no finished directory of vectors"
        raise FileNotFoundError(f"{path} is missing: {no_vectors}")
    try:
        values = read_object(path)
    except DataError as error:
        raise DataError(f"{error}. {_WAY_OUT}") from error
    if values.pop("format", None) != _FORMAT:
        raise DataError(f"{path}: no manifest of vectors: 'format' must be {_FORMAT!r}")
    if (version := values.pop("version", None)) != _VERSION:
        raise DataError(f"{path}: version {version}, this program reads {_VERSION}")
    count, entries = values.pop("count", None), values.pop("shards", None)
    if not isinstance(entries, list):
        raise DataError(f"{path}: 'shards' must be a list of objects")
    shards = tuple(shard_of(entry, f"{path}: shards[{n}]") for n, entry in enumerate(entries))
    try:
        manifest = Manifest(from_dict(VectorsInfo, values, source=str(path)), shards)
    except ConfigError as error:
        raise DataError(str(error)) from error
    if (held := manifest.count) != count:
        raise DataError(f"{path}: the shards hold {held} vectors, 'count' is {count}. {_WAY_OUT}")
    if role not in (None, manifest.info.role):
        raise DataError(
            f"{directory}: holds vectors of {manifest.info.role}, and {role} are wanted here. "
            f"Exchange the two directories, or encode with --texts {role}"
        )
    return manifest


def shard_of(values: Any, where: str) -> Shard:
    """The shard of which a file of JSON says these values, or a DataError that begins with `where`.
    (`from_dict` takes milliseconds, and a manifest may have 30,000.)"""
    needed = {"file": str, "count": int, "sha256": str}
    known = needed | {"tokens": int, "truncated": int}
    found = {key: type(v) for key, v in values.items()} if isinstance(values, dict) else {}
    if not needed.items() <= found.items() <= known.items():
        raise DataError(f"{where}: wanted file, count and sha256, got {values}")
    if re.fullmatch(r"[\w.-]+\.parquet", values["file"]) is None:
        raise DataError(f"{where}: shard name {values['file']!r} is no file name.parquet")
    return Shard(**values)


def is_intact(directory: str | Path, shard: Shard) -> bool:
    """Whether the shard's file is there and has the bytes that it was written with."""
    path = Path(directory) / shard.file
    return path.is_file() and checksum_of(path) == shard.sha256


def _read_table(
    directory: str | Path, shard: Shard, columns: list[str], *, check: bool = False
) -> Any:
    """Columns of a shard, whose checksum is compared to `check` it. Raises a FileNotFoundError when
    it is missing, and a DataError when it is damaged or has no such columns."""
    pyarrow, path = import_pyarrow(directory), Path(directory) / shard.file
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, and {MANIFEST_FILE} names it")
    source: Any = path
    if check:
        source = pyarrow.BufferReader(content := path.read_bytes())
        if hashlib.sha256(content).hexdigest() != shard.sha256:
            fault = f"damaged: its sha256 is not that of {MANIFEST_FILE}"
            raise DataError(f"{path}: {fault}. Encode this shard again")
    try:
        return pyarrow.parquet.read_table(source, columns=columns).select(columns)
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        raise DataError(f"{path}: no shard of vectors: {error}") from error


def read_shard(
    directory: str | Path, shard: Shard, info: VectorsInfo
) -> tuple[list[str], np.ndarray]:
    """Reads one shard, its ids and its vectors [C, D] coded as `info.dtype`, and checks all of it:
    checksum, model, ids and vectors. Raises a FileNotFoundError when it is missing, and a DataError
    when it is damaged or not what the manifest says."""
    pyarrow, path = import_pyarrow(directory), Path(directory) / shard.file
    table = _read_table(directory, shard, ["id", "vector"], check=True)
    ids, column = table["id"].to_pylist(), table["vector"].combine_chunks()
    stored = parse_json((table.schema.metadata or {}).get(_SCHEMA_KEY, b"{}"), path)
    for key, value in as_dict(info).items():
        if (found := stored.get(key)) != value:
            raise DataError(f"{path}: {key} is {found!r}, and {MANIFEST_FILE} says {value!r}")
    vector_type = pyarrow.list_(pyarrow.from_numpy_dtype(np.dtype(info.dtype)), info.dimension)
    if column.type != vector_type or table.schema.field("id").type != pyarrow.string():
        wanted = f"columns id: string and vector: {vector_type}"
        raise DataError(f"{path}: wanted {wanted}, got {table.schema}")
    if len(ids) != shard.count or column.null_count or table["id"].null_count:
        raise DataError(f"{path}: wanted {shard.count} rows without nulls, got {len(ids)}")
    vectors_CD = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, info.dimension)
    _check_shard(path, ids, vectors_CD)
    return ids, vectors_CD


def recovered_shard(
    directory: str | Path, file: str, info: VectorsInfo
) -> tuple[Shard, dict[str, Any]] | None:
    """The entry of a shard whose own is lost, and what it tells about itself (`write_shard`). None
    unless it is there, whole by its own checksum, and of `info`."""
    pyarrow, path = import_pyarrow(directory), Path(directory) / file
    try:
        content = path.read_bytes()
        metadata = pyarrow.parquet.read_metadata(pyarrow.BufferReader(content))
        told = json.loads(metadata.metadata[_SCHEMA_KEY])
        shard = _entry(file, content, metadata.num_rows, told)
        ids, vectors_CD = read_shard(directory, shard, info)
    except (OSError, pyarrow.ArrowException, KeyError, TypeError, ValueError):
        return None
    rest = {key: value for key, value in told.items() if key != "checksum"}
    whole = told.get("checksum") == _rows_checksum(ids, vectors_CD, rest)
    same_bytes = content == _serialised(path, ids, vectors_CD, told)
    return (shard, rest) if whole and same_bytes else None


def read_shards(
    directory: str | Path, manifest: Manifest
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yields what `read_shard` gives, shard by shard; one of them is in memory at a time."""
    for shard in manifest.shards:
        yield read_shard(directory, shard, manifest.info)


def read_ids(directory: str | Path, manifest: Manifest) -> list[str]:
    """The ids of all vectors, in order. Reads no vector. Raises a FileNotFoundError or DataError
    where a shard is missing or is no Parquet, or an id stands twice; then it names both shards."""
    file_of: dict[str, str] = {}
    for id_, file in _placed_ids(directory, manifest.shards):
        if id_ in file_of:
            raise DataError(_twice(directory, id_, file, file_of[id_]))
        file_of[id_] = file
    return list(file_of)


def _placed_ids(directory: str | Path, shards: Iterable[Shard]) -> Iterator[tuple[str, str]]:
    """(id, file of its shard)."""
    for shard in shards:
        for id_ in _read_table(directory, shard, ["id"])["id"].to_pylist():
            yield id_, shard.file


def _twice(directory: str | Path, id_: str, file: str, first: str) -> str:
    return f"{Path(directory) / file}: id {id_!r} stands twice, it is in {first} too"


def verify(directory: str | Path) -> list[str]:
    """What is wrong with a finished directory, of which every byte is checked with one shard in
    memory at a time: a message a shard, and one for each of the first hundred repeated ids. Raises
    as `read_manifest`."""
    manifest = read_manifest(directory)
    faults: list[str] = []
    readable: list[Shard] = []
    with RepeatedIds() as repeated:
        for shard in manifest.shards:
            try:
                ids, _ = read_shard(directory, shard, manifest.info)
            except (DataError, OSError) as error:
                faults.append(str(error))
                continue
            readable.append(shard)
            for id_ in ids:
                repeated.add(id_)
        twice = repeated.found(lambda: _placed_ids(directory, readable))
        faults += [_twice(directory, *found) for found in twice]
    named = {shard.file for shard in manifest.shards}
    files = sorted(Path(directory).glob("*.parquet"))
    return faults + [f"{f}: not named by {MANIFEST_FILE}" for f in files if f.name not in named]
