"""The log in the admin, to be read. The viewer shows more of it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.contrib import admin
from django.core.paginator import Paginator
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.functional import cached_property
from django.utils.timezone import is_aware, localtime

from tracevault.events.record import RECORD_COLUMNS
from tracevault.integrations.django.models import AuditEvent

# Events that are counted; to count more takes longer than anybody looks at a page.
_COUNTED = 10_000


# Columns that are shown by a method of the admin's.
_TIMES = {"occurred_at": "occurred", "created_at": "created"}


def _to_the_second(moment: datetime) -> str:
    """Return the time in Django's current time zone, with its offset."""
    local = localtime(moment) if is_aware(moment) else moment
    return local.isoformat(" ", "seconds")


def _named(type_: str | None, id_: str | None) -> str | None:
    return f"{type_}/{id_}" if type_ and id_ else id_ or type_


class _CheapPaginator(Paginator):
    """Counts no more than the first rows of a log that has many millions."""

    @cached_property
    def count(self) -> int:
        return len(self.object_list.order_by()[:_COUNTED].values_list("pk"))


class _OutcomeFilter(admin.SimpleListFilter):
    title = "outcome"
    parameter_name = "outcome"

    def lookups(self, _request: HttpRequest, _model_admin: Any) -> list[tuple[str, str]]:
        return [("success", "success"), ("failure", "failure")]

    def queryset(self, _request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset if self.value() is None else queryset.filter(outcome=self.value())


@admin.register(AuditEvent)
class AuditEventAdmin(admin.ModelAdmin):
    """Lists events, newest first; a search is for a whole event name or a whole id, which an index answers."""

    list_display = ("occurred", "event", "actor", "target", "outcome")
    list_filter = (_OutcomeFilter,)
    search_fields = ("event__exact", "actor_id__exact", "target_id__exact", "correlation_id__exact")
    search_help_text = "A whole event name, actor id, target id or correlation id."
    ordering = ("-occurred_at", "-id")
    fields = readonly_fields = tuple(_TIMES.get(name, name) for name in RECORD_COLUMNS)
    list_per_page = 50
    show_full_result_count = False
    paginator = _CheapPaginator
    show_facets = getattr(admin, "ShowFacets", None) and admin.ShowFacets.NEVER  # from Django 5 on: they count all
    actions = None

    @admin.display(description="occurred at", ordering="occurred_at")
    def occurred(self, event: Any) -> str:
        """Return the time with its seconds, which formats of the locale leave out."""
        return _to_the_second(event.occurred_at)

    @admin.display(description="created at", ordering="created_at")
    def created(self, event: Any) -> str:
        """Return the time with its seconds."""
        return _to_the_second(event.created_at)

    @admin.display(ordering="actor_id")
    def actor(self, event: Any) -> str | None:
        """Return type and id."""
        return _named(event.actor_type, event.actor_id)

    @admin.display(ordering="target_id")
    def target(self, event: Any) -> str | None:
        """Return type and id."""
        return _named(event.target_type, event.target_id)

    def has_add_permission(self, _request: HttpRequest) -> bool:
        """Nobody adds to the log by hand."""
        return False

    def has_change_permission(self, _request: HttpRequest, _obj: Any = None) -> bool:
        """Nobody changes it."""
        return False

    def has_delete_permission(self, _request: HttpRequest, _obj: Any = None) -> bool:
        """Nobody deletes from it."""
        return False
