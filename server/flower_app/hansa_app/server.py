"""The operator's side: the coordinator of the installed Hansa, not of this bundle."""

from server.app import app

__all__ = ["app"]
