"""Migrations of a shop; what is ours is include_name."""

import os

from alembic import context
from sqlalchemy import Column, Integer, MetaData, Table, Text, create_engine

from tracevault.integrations.alembic import leave_audit_tables

metadata = MetaData()
Table("products", metadata, Column("id", Integer, primary_key=True), Column("name", Text, nullable=False))

url = os.environ["DATABASE_URL_WRITE"].replace("postgresql:", "postgresql+psycopg:", 1)
include_name = leave_audit_tables("audit_logs", "audit_user_events")

if context.is_offline_mode():
    context.configure(url=url, literal_binds=True, target_metadata=metadata, include_name=include_name)
    with context.begin_transaction():
        context.run_migrations()
else:
    with create_engine(url).connect() as connection:
        context.configure(connection=connection, target_metadata=metadata, include_name=include_name)
        with context.begin_transaction():
            context.run_migrations()
