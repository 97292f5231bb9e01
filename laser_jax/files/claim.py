"""The one way in which a program takes a directory for its output.

    with Claim(output, "run.json", lambda old: changes(old, config, source="run.json")) as claim:
        ...                     # look at all input: what fails here leaves no trace
        claim.record(text)      # from now on the directory is this run's
        ...                     # write, each file whole (see `durable`)
        sweep(output)           # all is finished; where the directory is its alone

A claim locks the directory, so that a second program is refused. It reads the record, a JSON file
in which an earlier run has said how it was made, and refuses, key by key, what is to be made in
another way. A block that ends without a record removes what was made for it.
"""

import os
import shutil
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self, TextIO

from filelock import lock_descriptor

from laser_jax.files.durable import parts_of, read_state, write_atomically
from laser_jax.settings import Change, listed

WORK_FOLDER = ".work"
"""In a directory that is a program's `alone`: what a rerun goes by, until all is finished."""


class OutputError(ValueError):
    """An output that this run cannot have. Names it and the way out."""


class Claim:
    """A directory, or a file, for the output of one run, held while the context is open.

    The lock is the kernel's (`flock`), so that it ends with the process, however that ends. On NFS
    it holds between machines, on a bucket mounted with gcsfuse only within one. `recorded` is what
    the record holds that was found in `directory`; None without a whole one.
    """

    def __init__(
        self,
        directory: str | Path,
        record: str,
        changed: Callable[[dict[str, Any]], Sequence[Change]],
        *,
        alone: bool = False,
        shared: bool = False,
        file: str | None = None,
    ) -> None:
        """Touches nothing; entering the context does, and makes the directory where it is missing.

        Args:
            record: the name of a JSON file in it, which the program writes with `record`.
            changed: where the run that wrote this record differs from this one, such as
                `settings.changes`. A record on which it raises a KeyError or TypeError is damaged
                and counts as absent; one on which it raises a ValueError is refused.
            alone: whether nothing else may lie in the directory, but hidden files.
            shared: whether several processes write the output together. Of them only the one that
                makes the record holds the lock, and the others wait for it. They do without where
                the file system has no locks, so each must make the same record.
            file: the file in the directory that alone is the output, with a record and a lock of
                its own.
        """
        self.directory = Path(directory)
        self.recorded: dict[str, Any] | None = None
        self._address = str(directory)
        self._record, self._changed = self.directory / record, changed
        self._alone, self._shared = alone, shared
        self._output = self.directory / (file or "")
        self._lock_file = self.directory / (f".{file}.lock" if file else ".lock")
        remains = f"{file} and {record}" if file else "that directory"
        self._way_out = f"Choose another --output, or delete {remains}"
        self._lock: TextIO | None = None
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        """Takes the directory. Raises an OutputError where another process has it, it is none, or
        it holds a run with another config or (`alone`) other files; an OSError, which says what to
        do, where it cannot be made or the file system has no locks."""
        try:
            if self._shared and self._record.is_file():
                with suppress(OSError):  # of a killed process: nobody needs it any more
                    self._lock_file.unlink()
            else:
                self._acquire()
            self._require_ours()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._alone and self._lock is not None and not self._record.is_file():
            sweep(self.directory)
        self._release()

    def record(self, text: str) -> None:
        """Writes the record, which makes the directory this run's: when everything that can be
        wrong with the input has been looked at, and once more at any time."""
        write_atomically(self._record, text)

    def require_same(self, stored: dict[str, Any], source: Path) -> None:
        """Raises an OutputError where the run that `source` tells of cannot be gone on with."""
        self._refuse(self._compared(stored), source)

    def _acquire(self) -> None:
        if "://" in self._address:
            raise OutputError(
                f"output {self._address}: a directory of a file system is wanted. Mount the bucket "
                "and name the directory; gcsfuse needs --implicit-dirs and, for checkpoints, a "
                "bucket with hierarchical namespace or --rename-dir-limit above their files"
            )
        if self.directory.exists() and not self.directory.is_dir():
            raise OutputError(f"{self.directory} is no directory; choose another --output")
        while self._lock is None:
            missing = [p for p in (self.directory, *self.directory.parents) if not p.exists()]
            self.directory.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another run has just removed what it had made
                self._lock = self._locked()
                self._made = missing

    def _locked(self) -> TextIO | None:
        """The lock file, held; None where its last holder removed it while we were opening it."""
        with ExitStack() as stack:
            file = stack.enter_context(open(self._lock_file, "a+", opener=_no_link))
            try:
                is_ours = lock_descriptor(file.fileno(), blocking=self._shared)
            except OSError as error:
                if not self._shared:
                    fault = (
                        f"{error.strerror}: this file system has no locks, so two programs could "
                        "write here at once. Choose a place on a local disk, on NFS with its lock "
                        "service, or on Lustre mounted with -o flock"
                    )
                    raise OSError(error.errno, fault, str(self._lock_file)) from error
                is_ours = True
            if not is_ours:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise OutputError(
                    f"{self._output} is being written by {holder}. Wait for that run or stop it, "
                    "or choose another --output"
                )
            if os.fstat(file.fileno()).st_ino != self._lock_file.stat().st_ino:
                return None
            file.truncate(0)
            with suppress(OSError):  # a full disk: whoever is refused is told less
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
            stack.pop_all()
            return file

    def _require_ours(self) -> None:
        """Reads the record. Raises an OutputError where this run cannot go on with what it has."""
        name = self._record.name
        found = read_state(self._record, lambda values: (dict(values), self._compared(values)))
        if found is None:
            names = sorted(path.name for path in self.directory.iterdir())
            others = [n for n in names if not n.startswith(".") and n != name]
            if self._alone and others:
                raise OutputError(
                    f"{self.directory} holds {others[0]!r} and no whole {name}: it is no directory "
                    f"of this program, or that file is lost. Choose another --output, or bring "
                    f"{name} back from a copy"
                )
            return
        self.recorded, changed = found
        self._refuse(changed, self._record)

    def _refuse(self, changed: Sequence[Change] | ValueError, source: Path) -> None:
        if isinstance(changed, ValueError):
            raise OutputError(f"{source} is no run's config: {changed}. {self._way_out}")
        if changed:
            raise OutputError(
                f"{self._output} holds a run with another config:\n  {listed(changed)}\n"
                f"{self._way_out}"
            )

    def _compared(self, values: dict[str, Any]) -> Sequence[Change] | ValueError:
        """What `changed` says of a record; an error of it, where the record holds other settings
        than any release has had."""
        try:
            return self._changed(values)
        except ValueError as error:
            return error

    def _release(self) -> None:
        """Gives the lock back, and removes what was made for it if no run has left a record."""
        if self._lock is None:
            return
        with suppress(FileNotFoundError):  # or another's: the directory was deleted meanwhile
            if os.path.samestat(os.fstat(self._lock.fileno()), self._lock_file.stat()):
                self._lock_file.unlink()
        if not self._record.is_file():
            with suppress(OSError):  # not empty: somebody else's
                for directory in self._made:
                    directory.rmdir()
        self._lock.close()
        self._lock = None


def _no_link(path: str, flags: int) -> int:
    """An `opener` for locks, whose names others know beforehand: a link that somebody has put there
    is an error instead of being followed."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def sweep(directory: Path) -> None:
    """Removes what only unfinished runs need from a directory that is a program's alone: its
    `WORK_FOLDER`, and the temporary files of processes that were killed."""
    shutil.rmtree(directory / WORK_FOLDER, ignore_errors=True)
    for part in parts_of(directory):
        part.unlink(missing_ok=True)
