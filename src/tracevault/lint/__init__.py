"""Reading a project's code for what changes something and leaves no audit event. Nothing of it is run or imported."""

from tracevault.lint.findings import Finding, find

__all__ = ["Finding", "find"]
