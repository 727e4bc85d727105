"""``/docs``: the interface as one plain page, made from its OpenAPI description, that loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
section { border-top: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding: .5rem 0 1rem; }
h2 { font-size: 1.05rem; overflow-wrap: anywhere; } code { font-family: ui-monospace, monospace; }
.method { display: inline-block; min-width: 3.5rem; font-weight: 700; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td, th { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; }
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
DOCS_CSP = f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def render_docs(schema: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI description."""
    info = schema["info"]
    operations = "".join(_operation(*found) for found in _operations(schema))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(info['title'])}</title><style>{_STYLE}</style><h1>{escape(info['title'])}</h1>"
        f"<p>{escape(info.get('summary', ''))} The same for programs: <a href='/openapi.json'>/openapi.json</a>. "
        "Errors are JSON: <code>{&quot;error&quot;: {&quot;reason&quot;, &quot;detail&quot;}}</code>.</p>"
        f"{operations}</html>"
    )


def _operations(schema: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield path, method.upper(), operation


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> str:
    rows = "".join(_parameter(parameter) for parameter in operation.get("parameters", ()))
    answers = "".join(
        f"<tr><td>{escape(code)}</td><td>{escape(answer.get('description', ''))}</td></tr>"
        for code, answer in operation["responses"].items()
    )
    parameters = f"<table><tr><th>Parameter<th>Form<th>Meaning</tr>{rows}</table>" if rows else ""
    return (
        f'<section><h2><span class="method">{method}</span> <code>{escape(path)}</code></h2>'
        f"<p>{escape(operation.get('description', ''))}</p>{parameters}"
        f"<table><tr><th>Answer<th>Meaning</tr>{answers}</table></section>"
    )


def _parameter(parameter: Mapping[str, Any]) -> str:
    schema = parameter.get("schema", {})
    default = f", default {schema['default']}" if schema.get("default") is not None else ""
    required = ", required" if parameter.get("required") else ""
    return (
        f"<tr><td><code>{escape(parameter['name'])}</code></td><td>{escape(_form(schema) + required + str(default))}</td>"
        f"<td>{escape(parameter.get('description', ''))}</td></tr>"
    )


def _form(schema: Mapping[str, Any]) -> str:
    """The type of a value in words."""
    if "anyOf" in schema:
        return " or ".join(form for choice in schema["anyOf"] if (form := _form(choice)) != "null")
    if "enum" in schema:
        return " | ".join(str(choice) for choice in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    return str(schema.get("type", "text"))
