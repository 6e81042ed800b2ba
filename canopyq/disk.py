"""Small files that several programs may write at once: replaced whole or not at all, and a lock for longer changes."""

from __future__ import annotations

import errno
import os
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

PATIENCE = 5.0  # seconds to wait for a lock that another program holds


def write_atomic(path: str | Path, content: bytes) -> None:
    """Make ``content`` the file ``path``: at every moment, whatever is interrupted, the old or the new one is there.

    The new file is written beside the old one under a name of its own, brought to the disk, and renamed. Where ``path``
    is a symbolic link, the file that it points to is replaced. The old file's mode is kept.

    Raises:
        OSError: if that fails, or if the old file may not be written. The old file is then as it was.
    """
    real = Path(os.path.realpath(path))
    part = real.with_name(f".{real.name}.{uuid.uuid4().hex[:8]}.part")
    if real.exists() and not real.is_file():  # a rename would put a file in a device's place
        raise OSError(errno.EINVAL, "it is no regular file", str(real))
    if real.exists() and not os.access(real, os.W_OK):
        raise PermissionError(errno.EACCES, "the file is read-only", str(real))
    try:
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if real.exists():
            os.chmod(part, stat.S_IMODE(real.stat().st_mode))
        os.replace(part, real)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Keep every other program that asks for it out of the file ``path``, which need not exist.

    The lock is a file ``.NAME.lock`` beside it, which is removed afterwards. On POSIX systems the system itself holds
    the lock, and lets it go when the program ends; elsewhere the file's existence is the lock.

    Raises:
        TimeoutError: if another program holds it for `PATIENCE` seconds.
        OSError: if no file can be made there.
    """
    real = Path(os.path.realpath(path))
    lock = real.with_name(f".{real.name}.lock")
    end = time.monotonic() + PATIENCE
    while (held := _try(lock)) is None:
        if time.monotonic() > end:
            raise TimeoutError(errno.ETIMEDOUT, f"another program holds {lock}; if none does, delete it", str(lock))
        time.sleep(0.005)
    try:
        yield
    finally:
        if fcntl is None:  # there an open file cannot be removed
            os.close(held)
            lock.unlink(missing_ok=True)
        else:  # the name goes first: whoever opened the file before sees that it has none, and makes a new one
            lock.unlink(missing_ok=True)
            os.close(held)


def _try(lock: Path) -> int | None:
    """The open lock file, or None if another program has it."""
    if fcntl is None:
        try:
            return os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except (FileExistsError, PermissionError):
            if lock.parent.is_dir() and os.access(lock.parent, os.W_OK):
                return None
            raise
    held = os.open(lock, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(held), os.stat(lock)):
            return held
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(held)
        raise
    os.close(held)
    return None
