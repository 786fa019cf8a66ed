"""The process around a vault: how it ends, and whether its threads run."""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Callable

_log = logging.getLogger("tracevault")

# Before this version, threads of Python's run in a uWSGI worker only where an option asks for them.
_UWSGI_WITH_THREADS = (2, 0, 27)
_warned: set[str] = set()


def at_exit(callback: Callable[[], None]) -> Callable[[], None]:
    """Have ``callback`` called when the interpreter exits; return a function that takes this back."""
    atexit.register(callback)
    # Children that multiprocessing has forked end without the functions of atexit, in Python 3.11 at least.
    processes = sys.modules.get("multiprocessing.process")
    finalizer = None
    if processes is not None and processes.parent_process() is not None:
        from multiprocessing.util import Finalize  # noqa: PLC0415 - at work already in such a process

        finalizer = Finalize(None, callback, exitpriority=-100)

    def take_back() -> None:
        atexit.unregister(callback)
        if finalizer is not None:
            finalizer.cancel()

    return take_back


def warn_about_threads() -> None:
    """Warn, once, if this is a uWSGI worker whose threads stand still between requests."""
    uwsgi = sys.modules.get("uwsgi")
    if uwsgi is None or tuple(uwsgi.version_info[:3]) >= _UWSGI_WITH_THREADS or "uwsgi" in _warned:
        return
    if not any(name in uwsgi.opt for name in ("enable-threads", "threads", b"enable-threads", b"threads")):
        _warned.add("uwsgi")
        _log.warning(
            "uWSGI lets no threads run between requests here: async events are delivered during later requests and "
            "when the worker exits; set `enable-threads`"
        )
