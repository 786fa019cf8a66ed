"""Django: a vault made of the settings, a context for each request, models whose changes are events.

``INSTALLED_APPS`` gets ``"tracevault.integrations.django"``, ``MIDDLEWARE`` gets
``"tracevault.integrations.django.middleware.AuditMiddleware"``, and the setting ``TRACEVAULT`` holds the options.
"""

try:
    import django as _django  # noqa: F401
except ImportError as error:
    message = 'this needs Django: pip install "tracevault[django]"'
    raise ImportError(message) from error

from tracevault.integrations.django.models_audited import BulkChangeError, audited
from tracevault.integrations.django.vault import aemit, aemit_diff, emit, emit_diff, get_audit

__all__ = ["BulkChangeError", "aemit", "aemit_diff", "audited", "emit", "emit_diff", "get_audit"]
