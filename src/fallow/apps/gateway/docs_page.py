"""A page that shows the OpenAPI document to people. It loads nothing from anywhere."""

from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #4a7c2a; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; padding: .4rem .8rem }
summary { cursor: pointer } code, pre { font: 14px/1.45 ui-monospace, monospace }
pre { background: var(--soft); padding: .8rem; border-radius: 6px; overflow-x: auto }
.method { display: inline-block; min-width: 3.2rem; font-weight: 700; color: var(--accent) }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .25rem .6rem .25rem 0; border-top: 1px solid var(--line); vertical-align: top }
"""
EXAMPLE = """curl {base}/v1/chat/completions \\
  -H "Authorization: Bearer $FALLOW_API_KEY" -H "Content-Type: application/json" \\
  -d '{{"model": "MODEL", "messages": [{{"role": "user", "content": "Hello"}}]}}'"""


def render(schema: dict[str, Any]) -> str:
    """The page."""
    by_tag: dict[str, list[str]] = {}
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            if isinstance(operation, dict) and "responses" in operation:
                tag = (operation.get("tags") or ["other"])[0]
                by_tag.setdefault(tag, []).append(_operation(path, method, operation, schema))
    order = sorted(by_tag, key=lambda tag: (tag != "calls", tag))
    sections = "".join(f"<h2>{escape(tag.capitalize())}</h2>{''.join(by_tag[tag])}" for tag in order)
    info = schema["info"]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(info['title'])} API</title><style>{STYLE}</style>"
        f"<h1>{escape(info['title'])} API</h1><p>Version {escape(info['version'])}. An OpenAI client works as it is: "
        "give it this address with <code>/v1</code> as its base URL, and your key. Anthropic's takes the bare address. "
        "The whole description is in <a href='/openapi.json'>openapi.json</a>.</p>"
        f"<pre>{escape(EXAMPLE.format(base='http://HOST:PORT'))}</pre>{sections}</html>"
    )


def _operation(path: str, method: str, operation: dict[str, Any], schema: dict[str, Any]) -> str:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    fields = _fields(_resolve(body, schema), schema) if body else ""
    headers = operation["responses"].get("200", {}).get("headers") or {}
    rows = "".join(f"<tr><td><code>{escape(name)}</code><td>{escape(about.get('description', ''))}" for name, about in headers.items())
    return (
        f"<details><summary><span class=method>{method.upper()}</span> <code>{escape(path)}</code> "
        f"{escape(operation.get('summary') or '')}</summary>"
        + (f"<table><tr><th>Field<th>Type{fields}</table>" if fields else "")
        + (f"<table><tr><th>Header of the answer<th>{rows}</table>" if rows else "")
        + "</details>"
    )


def _resolve(part: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    reference = part.get("$ref")
    return schema["components"]["schemas"][reference.rsplit("/", 1)[1]] if reference else part


def _fields(part: dict[str, Any], schema: dict[str, Any]) -> str:
    required = set(part.get("required", ()))
    return "".join(
        f"<tr><td><code>{escape(name)}</code>{' (required)' if name in required else ''}<td>{escape(_kind(field))}"
        for name, field in part.get("properties", {}).items()
    )


def _kind(field: dict[str, Any]) -> str:
    """A field's type in a few words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_kind(option) for option in field["anyOf"]))
    if "$ref" in field:
        return str(field["$ref"].rsplit("/", 1)[1])
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    limits = [f"{word} {field[key]}" for key, word in (("minimum", "from"), ("maximum", "to")) if key in field]
    kind = str(field.get("type", "any"))
    if kind == "array":
        kind = f"list of {_kind(field.get('items', {}))}"
    return " ".join([kind, *limits])
