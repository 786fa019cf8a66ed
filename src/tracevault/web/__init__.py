"""The viewer: an ASGI app that shows an audit log in a browser, and lets nobody see more than he may.

::

    from starlette.routing import Mount
    from tracevault.web import Access, viewer

    async def authorize(request):
        user = request.user
        return Access(tenant_ids=[user.tenant], hidden=["meta"]) if user.is_auditor else None

    routes = [Mount("/audit", viewer(audit, authorize=authorize))]
"""

from __future__ import annotations

from tracevault.errors import ConfigError

try:
    import jinja2 as _jinja2  # noqa: F401
    import starlette as _starlette  # noqa: F401
except ImportError as error:
    message = 'the viewer needs the extra "web": pip install "tracevault[web]"'
    raise ConfigError(message) from error

from tracevault.web.access import Access
from tracevault.web.app import viewer

__all__ = ["Access", "viewer"]
