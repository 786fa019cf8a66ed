"""The audit tables, as every other way of ours makes them. To go back keeps them: a log is not dropped by mistake."""

from typing import Any

from django.db import migrations

from tracevault import generate_init_sql
from tracevault.integrations.django.conf import conf
from tracevault.integrations.django.models import record_fields, record_options


def create(_apps: Any, schema_editor: Any) -> None:
    """Make the tables that are missing, and upgrade those that are older."""
    found = conf()
    if schema_editor.connection.alias != found.database:
        return
    with schema_editor.connection.cursor() as cursor:
        for table in found.tables:
            cursor.execute(generate_init_sql(table))


class Migration(migrations.Migration):
    """The first step."""

    initial = True
    dependencies = ()
    operations = (
        migrations.RunPython(create, migrations.RunPython.noop, elidable=False),
        migrations.CreateModel("AuditEvent", list(record_fields().items()), record_options()),
    )
