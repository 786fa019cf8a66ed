"""The log of a test."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self

from tracevault import vault as vaults
from tracevault.engine import Stored
from tracevault.errors import TracevaultError
from tracevault.events.prepare import Prepared, unstored_record
from tracevault.events.record import RECORD_COLUMNS, AuditRecord
from tracevault.testing.compare import Difference, described, differences, expectation, line, table
from tracevault.testing.memory import AsyncMemoryEngine, BlockingMemoryEngine
from tracevault.vault import AsyncTracevault, Tracevault

# The newest is where vaults in memory keep their events, also one that an earlier test has made and somebody held.
_active: list[AuditLog] = []


class _Kept(NamedTuple):
    record: AuditRecord
    scope: str
    stored: Stored

    def values(self) -> dict[str, Any]:
        values = {name: getattr(self.record, name) for name in RECORD_COLUMNS}
        return {**values, "scope": self.scope, "stored": self.stored}


def _current() -> AuditLog:
    if not _active:
        raise TracevaultError(
            "this vault is in memory and its test has ended: use the fixture `audit_log` here as well, or set "
            "`tracevault_in_memory = true` for the whole run"
        )
    return _active[-1]


class AuditLog:
    """What is emitted while it is entered: every vault that is made meanwhile keeps its events here, in memory.

    Everything but the database is real: events are checked, masked, and take the context. A unit of work keeps what it
    emitted when it ends well. With a ``connection`` of the test's own an event is kept at once, whatever becomes of the
    transaction. Reading is refused.
    """

    def __init__(self) -> None:
        """Make a log; ``with AuditLog() as log:`` begins it."""
        self._kept: list[_Kept] = []
        self._asserted: list[bool] = []
        self._stack = ExitStack()
        self._vault: Tracevault | None = None
        self._async_vault: AsyncTracevault | None = None

    def __enter__(self) -> Self:
        """Begin."""
        _active.append(self)
        self._stack.callback(_active.remove, self)
        self._replace(vaults, "AsyncEngine", partial(AsyncMemoryEngine, current=_current))
        self._replace(vaults, "BlockingEngine", partial(BlockingMemoryEngine, current=_current))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End: vaults that are made from now on have a database, and captured ones theirs again."""
        self._stack.close()

    @property
    def events(self) -> tuple[AuditRecord, ...]:
        """What was emitted, in order; ``created_at`` is None."""
        return tuple(kept.record for kept in self._kept)

    @property
    def vault(self) -> Tracevault:
        """A blocking vault, for code that is given one."""
        if self._vault is None:
            self._vault = Tracevault(connection_string="in memory")
        return self._vault

    @property
    def async_vault(self) -> AsyncTracevault:
        """A vault for asyncio, started."""
        if self._async_vault is None:
            self._async_vault = AsyncTracevault(connection_string="in memory")
            self._async_vault._engine.state = "open"
        return self._async_vault

    def capture(self, vault: AsyncTracevault | Tracevault) -> None:
        """Let a vault that was made before keep its events here, until the end; its database is not touched."""
        kind: Callable[..., Any] = AsyncMemoryEngine if isinstance(vault, AsyncTracevault) else BlockingMemoryEngine
        theirs = list(vault._servers.engines)
        ours = [kind(replace(engine.config, seal=None), current=_current) for engine in theirs]
        for engine, real in zip(ours, theirs, strict=True):
            engine.state, engine.elsewhere = "open", real.elsewhere
        _set_engines(vault, ours)
        self._stack.callback(_set_engines, vault, theirs)

    def clear(self) -> None:
        """Forget what was emitted so far."""
        self._kept.clear()
        self._asserted.clear()

    def assert_emitted(self, event: Any = None, /, **fields: Any) -> AuditRecord:
        """Assert that an event with these fields was emitted, and return it; the next such assertion wants another one.

        ``event`` is a name, a declared class, or a typed event, which stands for its name and its data. ``actor`` and
        ``target`` may be ``"user:1"``, or a mapping. Mappings, such as ``data``, may hold more than is expected of
        them; ``before``, ``after`` and ``diff`` are those of `emit_diff`. None: the event has no such field.
        """
        __tracebackhide__ = True
        name, expected = expectation(event, fields)
        found = [differences(kept.values(), name, expected) for kept in self._kept]
        for place, different in enumerate(found):
            if not different and not self._asserted[place]:
                self._asserted[place] = True
                return self._kept[place].record
        raise AssertionError(self._not_emitted(name, expected, found))

    def assert_not_emitted(self, event: Any = None, /, **fields: Any) -> None:
        """Assert that no event with these fields was emitted."""
        __tracebackhide__ = True
        name, expected = expectation(event, fields)
        if any(not differences(kept.values(), name, expected) for kept in self._kept):
            raise AssertionError("\n".join([f"this was emitted: {described(name, expected)}", "", *self._all()]))

    def assert_no_more(self) -> None:
        """Assert that every event that was emitted has been asserted."""
        __tracebackhide__ = True
        more = self._asserted.count(False)
        if more:
            raise AssertionError(
                "\n".join([f"{more} {'event' if more == 1 else 'events'} more than was asserted", "", *self._all()])
            )

    def keep(self, scope: str, prepared: Prepared, stored: Stored) -> None:
        """Keep an event; vaults call it."""
        self._kept.append(_Kept(unstored_record(prepared), scope, stored))
        self._asserted.append(False)

    def _not_emitted(self, name: str | None, expected: dict[str, Any], found: list[list[Difference]]) -> str:
        lines = [f"no such event was emitted: {described(name, expected)}"]
        if not found:
            return "\n".join([*lines, "", "nothing was emitted at all"])

        def far(place: int) -> tuple[bool, int, bool, int]:
            different = found[place]
            return any(each.path == "event" for each in different), len(different), self._asserted[place], place

        nearest = min(range(len(found)), key=far)
        lines.append("")
        if found[nearest]:
            lines.append(f"the nearest is number {nearest + 1}:")
            lines += [f"    {row}" for row in table(found[nearest])]
        else:
            lines.append(f"number {nearest + 1} is such an event, but was asserted before; there is no other one")
        return "\n".join([*lines, "", *self._all()])

    def _all(self) -> list[str]:
        lines = ["all that was emitted (+ asserted, - not):"]
        for number, kept in enumerate(self._kept, 1):
            lines.append(f"  {'+' if self._asserted[number - 1] else '-'} {number}. {line(kept.values())}")
        return lines

    def _replace(self, where: Any, name: str, value: Any) -> None:
        self._stack.callback(setattr, where, name, getattr(where, name))
        setattr(where, name, value)


def _set_engines(vault: Any, engines: list[Any]) -> None:
    vault._servers.engines[:] = engines
    for scope in vault._scopes.values():
        scope._engine = engine = vault._servers.of(scope.name)
        scope.query = type(scope.query)(engine, scope.name, scope.table)
