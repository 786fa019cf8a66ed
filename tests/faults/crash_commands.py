"""Commands of the victim that fork, or end its process."""

from __future__ import annotations
