"""Trusts nobody: reads evidence and recomputes."""
