"""The tfds dataset `reasoning_retrieval`: training rows as ArrayRecord, without tensorflow.

    import laser_jax.data.reasoning_retrieval  # registers it
    builder = tfds.builder("reasoning_retrieval", source="train.jsonl", data_dir="data")
    builder.download_and_prepare()
    tfds.data_source("reasoning_retrieval", split="train", data_dir="data")

`python -m laser_jax.prepare` writes the same features and files, shard by shard.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import example_serializer, naming, splits

from laser_jax.data.schema import FIELDS, TrainingRow
from laser_jax.data.sources import Source, open_source

NAME = "reasoning_retrieval"
VERSION = "1.0.0"
_DESCRIPTION = (
    "Queries with a written chain of thought, an instruction, positive passages and hard negatives."
)


def text_features() -> tfds.features.FeaturesDict:
    """The features of a training row, and `origin`, the file and line that it came from."""
    text = tfds.features.Text()
    texts = tfds.features.Sequence(text)
    of_field = {name: texts if name.endswith("passages") else text for name in FIELDS}
    return tfds.features.FeaturesDict({**of_field, "origin": text})


def origin(source: Source, index: int) -> str:
    """File and line of a row, without the folder."""
    folder = source.path if source.path.is_dir() else source.path.parent
    return source.where(index).removeprefix(str(folder)).lstrip("/: ")


def example_of(row: TrainingRow, origin: str) -> dict[str, Any]:
    """The row as values of `text_features`."""
    values = {name: getattr(row, name) for name in FIELDS}
    values |= {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
    return {**values, "origin": origin}


class ReasoningRetrieval(tfds.core.GeneratorBasedBuilder):
    """Prepares any source that `open_source` reads; see the module's text."""

    VERSION = tfds.core.Version(VERSION)
    # tfds finds it by importlib_resources, which it does not bring along
    code_path: Any = epath.Path(__file__)

    def __init__(self, *, source: str | os.PathLike[str] | None = None, **kwargs: Any):
        """`source` is wanted only to prepare. The files are ArrayRecord unless told otherwise."""
        self._source = source
        super().__init__(**{"file_format": "array_record", **kwargs})

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=text_features(),
            disable_shuffling=True,  # rows keep the order of their file
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterable[Any]]:
        if self._source is None:
            raise ValueError(
                "reasoning_retrieval has no file to prepare; pass its path: "
                'tfds.builder("reasoning_retrieval", source="train.jsonl", data_dir=...)'
            )
        return {"train": self._generate_examples(self._source)}

    def _generate_examples(self, path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
        source = open_source(Path(path))
        for index, row in enumerate(source):
            yield index, example_of(row, origin(source, index))


def shard_path(directory: Path, shard: int, num_shards: int) -> Path:
    """The file of a shard, where tfds looks for it."""
    return directory / f"{NAME}-train.array_record-{shard:05d}-of-{num_shards:05d}"


def write_shard(
    path: Path, features: tfds.features.FeaturesDict, examples: Iterable[dict[str, Any]]
) -> int:
    """Writes an ArrayRecord file and returns the bytes of its records, before compression; the same
    examples give the same file. Raises an OSError where it cannot be written, as on a full disk."""
    from array_record.python.array_record_module import ArrayRecordWriter

    specs: Any = features.get_serialized_info()
    serializer = example_serializer.ExampleSerializer(specs)
    num_bytes = 0
    with _named(path):
        writer = ArrayRecordWriter(str(path), "group_size:1")
    for example in examples:
        encoded: Any = features.encode_example(example)
        # tfds' own serialisation leaves the order of the features open
        record = serializer.get_tf_example(encoded).SerializeToString(deterministic=True)
        with _named(path):
            writer.write(record)
        num_bytes += len(record)
    with _named(path):
        writer.close()
    return num_bytes


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns what ArrayRecord says of a file that cannot be written into an OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def write_description(directory: Path, shard_lengths: list[int], num_bytes: int) -> None:
    """Writes `features.json` and `dataset_info.json`, with which tfds reads the shards."""
    info = ReasoningRetrieval(data_dir=str(directory)).info
    template = naming.ShardedFileTemplate(
        data_dir=epath.Path(directory),
        dataset_name=NAME,
        split="train",
        filetype_suffix="array_record",
    )
    split = splits.SplitInfo(
        name="train", shard_lengths=shard_lengths, num_bytes=num_bytes, filename_template=template
    )
    info.set_splits(splits.SplitDict([split]))
    info.write_to_directory(directory)
