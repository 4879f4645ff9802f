"""Renderers of results, one format a module."""
