"""ArrayRecord files and the tf.Examples in them, read without tensorflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from laser_jax.data.schema import FIELDS, DataError


def open_array_record(file: Path) -> Any:
    """The records of a file, as bytes by index. Raises a RuntimeError or ValueError if damaged."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource([str(file)])


def example_values(record: bytes, where: str) -> dict[str, Any]:
    """The fields of a training row, and its `origin`, in a tf.Example, whose features are lists.
    Raises a DataError where the record is none, or a text of it is not UTF-8."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    messages: Any = tf_example_pb2
    try:
        features = messages.Example.FromString(record).features.feature
        lists = {
            name: [text.decode() for text in features[name].bytes_list.value]
            for name in (*FIELDS, "origin")
            if name in features
        }
    except DecodeError as error:
        raise DataError(
            f"{where}: neither a JSON object nor a tf.Example of training rows: {error}"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error}") from error
    return {
        name: texts[0] if not name.endswith("passages") and len(texts) == 1 else texts
        for name, texts in lists.items()
    }
