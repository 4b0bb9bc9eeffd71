"""Hansa: merchants learn customer segments together and keep their books."""
