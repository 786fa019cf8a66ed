"""The anchor ``command:SHELL COMMAND``: whatever takes a checkpoint on its standard input.

So a checkpoint goes by mail, into a ticket, to a time stamping service or an object store with a lock.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from tempfile import TemporaryFile
from typing import BinaryIO, cast

from tracevault.config import command_environment
from tracevault.errors import SealError
from tracevault.integrity.note import Note, Verifier
from tracevault.sealing.anchors.anchor import LogView, checkpoint_of
from tracevault.sealing.anchors.witness import hide_passwords, shorten

TIMEOUT = 60.0
"""Seconds that a command may take; then it is killed, with the processes that it began."""
MAX_RECEIPT = 4096


class CommandAnchor:
    """A command, run by ``/bin/sh -c`` for each checkpoint.

    ``TRACEVAULT_ORIGIN`` and ``TRACEVAULT_SIZE`` are in its environment, the signing key is not. Exit code 0 means that
    the checkpoint is kept; the receipt is the beginning of what it printed, at most 4,096 bytes.
    """

    def __init__(self, command: str) -> None:
        self.command = command
        self.sink = "command:" + hide_passwords(command)

    def publish(self, note: Note, log: LogView) -> str:
        """Run the command and return what it printed; `SealError` with its last words if it failed."""
        checkpoint = checkpoint_of(note)
        environment = command_environment(TRACEVAULT_ORIGIN=checkpoint.origin, TRACEVAULT_SIZE=str(checkpoint.size))
        try:
            # Files and no pipes: nobody waits for what goes on in the background, or prints without end.
            with TemporaryFile() as given, TemporaryFile() as printed, TemporaryFile() as complaints:
                given.write(str(note).encode())
                given.seek(0)
                code = _run(self.command, environment, *map(_binary, (given, printed, complaints)))
                if code == 0:
                    printed.seek(0)
                    return _text(printed.read(MAX_RECEIPT))
                complaints.seek(max(0, os.fstat(complaints.fileno()).st_size - MAX_RECEIPT))
                last = _text(complaints.read(MAX_RECEIPT)).splitlines()[-1:]
        except OSError as error:
            raise SealError(f"the anchor {self.sink!r} cannot be run: {error.strerror}") from None
        said = f": {shorten(last[0])}" if last else ""
        how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
        raise SealError(f"the anchor {self.sink!r} {how}{said}")

    def newest(self, origin: str, verifiers: Sequence[Verifier] = ()) -> Note | None:
        """Return None: a command cannot be asked."""
        return None


def _run(command: str, environment: dict[str, str], given: BinaryIO, printed: BinaryIO, complaints: BinaryIO) -> int:
    with subprocess.Popen(  # noqa: S603 - the operator's own command is what is asked for
        ["/bin/sh", "-c", command],
        stdin=given,
        stdout=printed,
        stderr=complaints,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            return process.wait(TIMEOUT)
        except BaseException as error:
            # The group has the number of its first process, which is not reaped yet.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                message = f"the anchor 'command:{hide_passwords(command)}' took over {TIMEOUT:g} seconds and was killed"
                raise SealError(message) from None
            raise


def _binary(file: object) -> BinaryIO:
    return cast("BinaryIO", file)


def _text(data: bytes) -> str:
    # What is stored is text of PostgreSQL, which knows no U+0000.
    return data.decode(errors="replace").replace("\0", "\ufffd").strip()
