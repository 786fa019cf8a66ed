"""A transfer between accounts over asyncpg, and its event, in one transaction.

pip install "tracevault[asyncpg,binary]"
DATABASE_URL_WRITE=postgresql://... python transfer.py ann bea 30
"""

import asyncio
import os
import sys

import asyncpg

import tracevault
from tracevault import start_tracevault


async def transfer(payer: str, payee: str, amount: int) -> None:
    async with start_tracevault(connection_string=os.environ["DATABASE_URL_WRITE"]) as audit:
        connection = await asyncpg.connect(os.environ["DATABASE_URL_WRITE"])
        await connection.execute("CREATE TABLE IF NOT EXISTS accounts (owner text PRIMARY KEY, money int NOT NULL)")
        await connection.execute(
            "INSERT INTO accounts VALUES ($1, 100), ($2, 100) ON CONFLICT DO NOTHING", payer, payee
        )
        with tracevault.context(actor={"id": payer, "type": "user"}):
            try:
                async with connection.transaction():
                    change = "UPDATE accounts SET money = money + $2 WHERE owner = $1 RETURNING money"
                    await connection.execute(change, payee, amount)
                    left = await connection.fetchval(change, payer, -amount)
                    await audit.emit(
                        "money.transferred",
                        target={"id": payee, "type": "account"},
                        data={"amount": amount},
                        connection=connection,  # in the transaction: it is taken back with it
                    )
                    if left < 0:
                        raise ValueError(f"{payer} has not that much")
            except ValueError as error:
                await audit.emit("transfer.denied", data={"amount": amount, "why": str(error), "outcome": "failure"})
        for record in await audit.query.find_many(actor_id=payer):
            print(record.event, record.data)
        await connection.close()


if __name__ == "__main__":
    asyncio.run(transfer(sys.argv[1], sys.argv[2], int(sys.argv[3])))
