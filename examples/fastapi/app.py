"""A shop's prices, with FastAPI: who changed which, in the same transaction as the change.

    pip install "tracevault[starlette,embedded]" fastapi uvicorn
    uvicorn app:app

Without DATABASE_URL_WRITE it runs on a PostgreSQL of its own, in ./.tracevault.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request

import tracevault
from tracevault import AsyncUnitOfWork, start_tracevault
from tracevault.integrations.starlette import AuditMiddleware, get_unit_of_work

audit = start_tracevault(connection_string=os.environ.get("DATABASE_URL_WRITE", "embedded:"))


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    async with audit:
        async with audit.unit_of_work() as unit:
            await unit.connection.execute(
                "CREATE TABLE IF NOT EXISTS prices (item text PRIMARY KEY, price int NOT NULL)"
            )
            await unit.connection.execute("INSERT INTO prices VALUES ('tea', 100) ON CONFLICT DO NOTHING")
        yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(AuditMiddleware, audit=audit, audit_requests=["/admin/*"])

Unit = Annotated[AsyncUnitOfWork, Depends(get_unit_of_work, scope="function")]


def current_user(request: Request) -> str:
    """Stand in for your authentication: tell the log who it is, once known."""
    user = request.headers.get("x-user")
    if user is None:
        raise HTTPException(401)
    tracevault.set_context(actor={"id": user, "type": "user"})
    return user


User = Annotated[str, Depends(current_user)]


@app.get("/")
async def index() -> dict[str, str]:
    return {"try": "PUT /prices/tea/120 with the header X-User"}


@app.put("/prices/{item}/{price}")
async def change_price(item: str, price: int, user: User, unit: Unit) -> dict[str, int]:
    if user == "guest":
        # Not the unit's: it stays, whatever becomes of the transaction.
        await audit.emit("price.denied", target={"id": item, "type": "item"}, data={"outcome": "failure"})
        raise HTTPException(403)
    found = await (
        await unit.connection.execute("SELECT price FROM prices WHERE item = %s FOR UPDATE", [item])
    ).fetchone()
    if found is None:
        raise HTTPException(404)
    await unit.connection.execute("UPDATE prices SET price = %s WHERE item = %s", [price, item])
    await unit.emit_diff(
        "price.changed", target={"id": item, "type": "item"}, before={"price": found[0]}, after={"price": price}
    )
    if price < 0:  # too late, but the transaction takes the change and its event back
        raise HTTPException(422)
    return {"was": found[0], "is": price}


@app.post("/admin/reload")
async def reload(user: User) -> dict[str, str]:
    return {"reloaded by": user}
