"""A script that emits, and then ends in the way that it is told to. It prints its receipts."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from tests.apps.vaults import Receipts, Vaults, options
from tracevault import start_tracevault


def told(receipts: Receipts) -> None:
    """Print receipts, by one write."""
    os.write(1, (json.dumps(receipts) + "\n").encode())


def returns() -> None:
    told(Vaults().emit_all("script"))


def exits() -> None:
    told(Vaults().emit_all("script"))
    sys.exit(3)


def raises() -> None:
    told(Vaults().emit_all("script"))
    raise LookupError("nobody catches this")


def terminated() -> None:
    """With a handler that exits, as servers have one."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    told(Vaults().emit_all("script"))
    os.kill(os.getpid(), signal.SIGTERM)


def terminated_at_once() -> None:
    told(Vaults().emit_all("script"))
    os.kill(os.getpid(), signal.SIGTERM)


def leaves_a_thread() -> None:
    """While another thread, which the interpreter waits for, emits to the last."""
    vaults, ready = Vaults(), threading.Event()

    def work() -> None:
        ready.set()
        threading.main_thread().join()
        told(vaults.emit_all("thread"))

    threading.Thread(target=work).start()
    ready.wait()
    told(vaults.emit_all("script"))


def closes_the_loop() -> None:
    """`asyncio.run` ends, and nobody has closed the vault."""

    async def work() -> None:
        plain = await start_tracevault(**options(spool=False))
        spooled = await start_tracevault(**options(spool=True))
        for number in range(9):
            vault = plain if number % 3 == 2 else spooled
            receipt = await vault.emit("loop", mode="sync" if number % 3 == 0 else "async")
            told([(str(receipt.id), receipt.stored)])

    asyncio.run(work())


def mixes() -> None:
    """One vault of each kind, used from threads and from event loops in threads, together."""
    vaults = Vaults()

    async def start_and_use() -> None:
        shared = await start_tracevault(**options(spool=True))

        async def elsewhere() -> Receipts:
            receipts = await asyncio.gather(*(shared.emit("elsewhere") for _ in range(5)), shared.emit("elsewhere"))
            receipts.append(await shared.emit("elsewhere", mode="sync"))
            return [(str(receipt.id), receipt.stored) for receipt in receipts]

        with ThreadPoolExecutor(6) as threads:
            running = [
                *(asyncio.to_thread(vaults.emit_all, "thread") for _ in range(3)),
                *(asyncio.to_thread(asyncio.run, elsewhere()) for _ in range(3)),
                elsewhere(),
            ]
            asyncio.get_running_loop().set_default_executor(threads)
            for receipts in await asyncio.gather(*running):
                told(receipts)

    asyncio.run(start_and_use())


def _child(vaults: Vaults | None = None) -> None:
    told((vaults or Vaults()).emit_all("child"))


def forks() -> None:
    """A child of multiprocessing goes on with the vaults of its parent."""
    vaults = Vaults()
    told(vaults.emit_all("parent"))
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_child, args=(vaults,)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0, child.exitcode
    told(vaults.emit_all("parent"))


def spawns() -> None:
    """A child of multiprocessing begins anew, with vaults of its own."""
    vaults = Vaults()
    told(vaults.emit_all("parent"))
    child = multiprocessing.get_context("spawn").Process(target=_child)
    child.start()
    child.join()
    assert child.exitcode == 0, child.exitcode
    told(vaults.emit_all("parent"))


WAYS = {
    way.__name__: way
    for way in (
        returns,
        exits,
        raises,
        terminated,
        terminated_at_once,
        leaves_a_thread,
        closes_the_loop,
        mixes,
        forks,
        spawns,
    )
}

if __name__ == "__main__":
    WAYS[sys.argv[1]]()
