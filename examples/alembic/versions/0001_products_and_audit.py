"""The products, and the audit tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "products", sa.Column("id", sa.Integer, primary_key=True), sa.Column("name", sa.Text, nullable=False)
    )
    op.create_audit_table("audit_logs")
    op.create_audit_table("audit_user_events")


def downgrade() -> None:
    op.drop_table("products")  # the log is kept
