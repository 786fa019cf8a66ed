"""A catalogue, with Starlette and SQLAlchemy: every change of a product is an event, in the transaction of the change.

pip install "tracevault[starlette,sqlalchemy,binary]" uvicorn
DATABASE_URL_WRITE=postgresql://... uvicorn app:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import update
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tracevault import start_tracevault
from tracevault.integrations.sqlalchemy import BulkChangeError, audit_models
from tracevault.integrations.starlette import AuditMiddleware

URL = os.environ["DATABASE_URL_WRITE"]


class Base(DeclarativeBase):
    pass


class Product(Base):
    __tablename__ = "product"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    price: Mapped[int]


audit = start_tracevault(connection_string=URL)
engine = create_async_engine(URL.replace("postgresql:", "postgresql+psycopg:", 1))
sessions = async_sessionmaker(engine, expire_on_commit=False)
audit_models(sessions, audit, models=[Product])


async def create(request: Request) -> JSONResponse:
    async with sessions.begin() as session:
        product = Product(name=request.path_params["name"], price=100)
        session.add(product)
        await session.flush()
        return JSONResponse({"id": product.id})


async def change(request: Request) -> JSONResponse:
    async with sessions.begin() as session:
        product = await session.get_one(Product, request.path_params["id"])
        product.price = request.path_params["price"]
        # An event of your own goes into the same transaction.
        await audit.emit("price.approved", target={"id": str(product.id), "type": "product"}, connection=session)
        await session.flush()
        if product.price > 1000:
            await audit.emit("price.denied", data={"price": product.price})  # stays, though the rest is rolled back
            raise ValueError("too expensive")
    return JSONResponse({"price": product.price})


async def sale(_request: Request) -> JSONResponse:
    async with sessions.begin() as session:
        await session.execute(update(Product).values(price=1))  # would leave no event for any product: refused
    return JSONResponse({})


async def refused(_request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, status_code=422)


@asynccontextmanager
async def lifespan(_app: Starlette) -> AsyncIterator[None]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with audit:
        yield
    await engine.dispose()


def user_of(connection: HTTPConnection) -> dict[str, str] | None:
    user = connection.headers.get("x-user")  # yours: connection.user, or what the session says
    return None if user is None else {"id": user, "type": "user"}


app = Starlette(
    lifespan=lifespan,
    routes=[
        Route("/products/{name}", create, methods=["POST"]),
        Route("/products/{id:int}/{price:int}", change, methods=["PUT"]),
        Route("/sale", sale, methods=["POST"]),
    ],
    exception_handlers={ValueError: refused, BulkChangeError: refused},
)
app.add_middleware(AuditMiddleware, audit=audit, actor=user_of)
