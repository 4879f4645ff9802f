"""Renderers of results, one format a module."""

from __future__ import annotations

from onnxcare.results import Check


def render_check(check: Check, form: str) -> str:
    """Return a check in one of the formats text, json, junit and sarif."""
    if form == "json":
        from onnxcare.report import json

        return json.render_check(check)
    if form == "junit":
        from onnxcare.report import junit

        return junit.render(check)
    if form == "sarif":
        from onnxcare.report import sarif

        return sarif.render(check)
    import io

    from rich.console import Console

    from onnxcare.report import text

    file = io.StringIO()
    text.show_check(check, Console(file=file, width=120, highlight=False, no_color=True))
    return file.getvalue()
