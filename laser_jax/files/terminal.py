"""What programs say: texts of data are shown, not obeyed, and progress goes to stderr."""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from tqdm import tqdm

# Control characters but tab and line feed, and those that turn the direction of writing.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: object) -> str:
    """The text with its control characters as Python writes them (`\\x1b`).

    A document, a query or an id is written by others. Printed as it is, an escape sequence in it
    could move the cursor over what was said, set the clipboard, or hide a part of the text.
    """
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], str(text))


class _OnStderr(logging.Handler):
    """Writes to what `sys.stderr` is at the time, above the bars that are shown there, with control
    characters of data made visible."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(printable(self.format(record)), file=sys.stderr)


def configure_logging(process_index: int = 0) -> None:
    """Sends progress, and the warnings of libraries, to stderr with time and process index. The
    root's plain handler, which some libraries install, would say everything twice and goes."""
    handler = _OnStderr()
    handler.setFormatter(logging.Formatter(f"%(asctime)s [{process_index}] %(message)s"))
    root = logging.getLogger()
    kept = [h for h in root.handlers if type(h) not in (logging.StreamHandler, _OnStderr)]
    root.handlers = [*kept, handler]
    logging.getLogger("laser_jax").setLevel(logging.INFO)


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Around imports of what an extra of the package brings: an ImportError says that `what` needs
    it, and how it is installed."""
    try:
        yield
    except ImportError as error:
        if f"{error.name}.".startswith("laser_jax."):
            raise  # no package is absent
        way_out = f"pip install 'laser-jax[{name}]'"
        raise ImportError(f"{what} needs {error.name or error}: {way_out}") from error


def fail(error: object) -> NoReturn:
    """Ends a program with an error's message, which may quote data."""
    sys.exit(f"error: {printable(error)}")
