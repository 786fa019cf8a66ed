"""Who may see what, and the log's own record of who looked."""

from __future__ import annotations

import inspect
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request

from tracevault import Actor, AsyncQuery, AsyncScope, AsyncTracevault, TracevaultError, declare

VIEWED = "audit_log.viewed"
EXPORTED = "audit_log.exported"
declare(VIEWED, EXPORTED, description="Who looked at the log in the viewer, or exported it.")
# Seconds for which the same look at the log is not recorded again, and how many looks are remembered.
_AGAIN = 60.0
_REMEMBERED = 10_000

_log = logging.getLogger("tracevault")


@dataclass(frozen=True)
class Access:
    """What somebody may see of the log; applied in SQL.

    ``scopes`` are names of scopes (None: all of the vault); ``tenant_ids`` are those whose events are seen (None: all,
    also of no tenant); ``hidden`` are columns and paths in payloads, as `AsyncQuery.restricted` takes them; ``actor``
    is who looks, for the log's own record.
    """

    scopes: Sequence[str] | None = None
    tenant_ids: Sequence[str] | None = None
    hidden: Sequence[str] = ()
    may_export: bool = False
    actor: Actor | Mapping[str, str] | None = None


Authorize = Callable[[Request], "Access | Awaitable[Access | None] | None"]


class Guard:
    """Asks ``authorize`` at every request, and notes what was looked at."""

    def __init__(
        self, audit: AsyncTracevault, scopes: Sequence[str], authorize: Authorize, *, audit_reads: bool
    ) -> None:
        self._audit = audit
        self._scopes = tuple(scopes)
        self._authorize = authorize
        self._audit_reads = audit_reads
        self._noted: OrderedDict[tuple[Any, ...], float] = OrderedDict()

    async def access(self, request: Request) -> Access:
        """Return what may be seen; raise 403 if that is nothing. Whatever ``authorize`` raises denies as well."""
        try:
            found = self._authorize(request)
            access = await found if inspect.isawaitable(found) else found
        except HTTPException:
            raise
        except Exception:  # noqa: BLE001 - whatever it is, nobody gets in by it
            _log.exception("the viewer's `authorize` failed, so access is denied")
            access = None
        if not isinstance(access, Access):
            raise HTTPException(403, "You may not see this audit log.")
        return access

    def scopes(self, access: Access) -> list[str]:
        """Return the scopes that may be seen."""
        return [name for name in self._scopes if access.scopes is None or name in access.scopes]

    def scope(self, access: Access, name: str) -> tuple[AsyncScope, AsyncQuery]:
        """Return a scope, and the query that sees no more of it than it may; 404 for one that may not be seen."""
        if name not in self.scopes(access):
            raise HTTPException(404, "There is no such log.")
        scope = self._audit.get_scope(name)
        return scope, scope.query.restricted(tenant_ids=access.tenant_ids, hidden=access.hidden)

    async def note(self, access: Access, scope: AsyncScope, event: str, what: Mapping[str, Any]) -> None:
        """Record a look at the log, or an export. An export that cannot be recorded is not made."""
        if not self._audit_reads:
            return
        actor = _actor(access)
        key = (scope.name, event, repr(actor), repr(sorted(what.items())))
        if event == VIEWED:
            now = time.monotonic()
            if self._noted.get(key, -_AGAIN) > now - _AGAIN:
                return
            self._noted[key] = now
            self._noted.move_to_end(key)
            while len(self._noted) > _REMEMBERED:
                self._noted.popitem(last=False)
        tenant = access.tenant_ids[0] if access.tenant_ids is not None and len(access.tenant_ids) == 1 else None
        try:
            await scope.emit(
                event, actor=actor, data=dict(what), tenant_id=tenant, mode="async" if event == VIEWED else "sync"
            )
        except TracevaultError:
            if event != VIEWED:
                raise
            _log.exception("that the audit log was viewed could not be recorded")


def _actor(access: Access) -> dict[str, str] | None:
    actor = access.actor
    if actor is None:
        return None
    return {"id": actor.id, "type": actor.type} if isinstance(actor, Actor) else dict(actor)
