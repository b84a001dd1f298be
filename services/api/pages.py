"""The two pages for people: the entrance and the reference, rendered here from the OpenAPI document.

Plain HTML and CSS in one file: nothing is fetched from anywhere, no script runs, and both follow the reader's choice of
light or dark. Pure.
"""

import html
from collections.abc import Iterator
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --text: light-dark(#1d2630, #e4e9ee); --soft: light-dark(#5b6875, #93a0ad);
  --page: light-dark(#fbfbf9, #14181d); --card: light-dark(#fff, #1b2128); --line: light-dark(#e2e5e1, #2d353e);
  --accent: light-dark(#0b6e74, #5cc8cd); }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 54rem; padding: 3rem 1.25rem 5rem; background: var(--page); color: var(--text);
  font: 1rem/1.6 system-ui, sans-serif }
h1 { font-size: 2.1rem; letter-spacing: -.02em; margin: 0 0 .25rem } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem }
p { max-width: 42rem } a { color: var(--accent) } .soft { color: var(--soft) }
code, pre { font: .86em/1.55 ui-monospace, monospace }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .9rem 1rem;
  overflow: auto }
nav { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1.5rem 0 }
nav a { border: 1px solid var(--line); border-radius: .5rem; padding: .4rem .9rem; text-decoration: none;
  background: var(--card) }
details { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; margin: .5rem 0 }
summary { cursor: pointer; padding: .55rem .9rem; display: flex; flex-wrap: wrap; gap: .25rem .8rem }
summary b { color: var(--accent); font: 700 .8rem/1.9 ui-monospace, monospace; min-width: 3.6rem }
summary span { color: var(--soft); flex-basis: 100% }
summary::after { content: "▸"; color: var(--soft); order: 1; margin-left: auto }
details[open] > summary::after { content: "▾" }
summary span { order: 2 }
details > div { border-top: 1px solid var(--line); padding: .3rem .9rem .9rem }
dl { display: grid; grid-template-columns: minmax(8rem, auto) 1fr; gap: .15rem 1rem; margin: .5rem 0 }
dt { font: .86em/1.75 ui-monospace, monospace } dd { margin: 0; color: var(--soft) }
"""

_HOME = """<h1>Sluice</h1>
<p class="soft">version {version}</p>
<p>This is the API of an upload pipeline. Pictures come in by batches, each fact about them goes into a log, and what
you read here is what the log says. Nothing that was accepted is lost, and progress is told live.</p>
<nav><a href="/docs">Reference</a><a href="/openapi.json">OpenAPI</a><a href="/v1/config">Limits</a>
<a href="/readyz">Health</a></nav>
<h2>Try it</h2>
<p>With a token from <code>sluice token --user you</code> in <code>SLUICE_TOKEN</code>, send a picture and look at
what became of it:</p>
<pre>curl -H "Authorization: Bearer $SLUICE_TOKEN" -F files=@picture.jpg {address}/v1/batches
curl -H "Authorization: Bearer $SLUICE_TOKEN" {address}/v1/batches
curl -H "Authorization: Bearer $SLUICE_TOKEN" {address}/v1/status</pre>"""


def home(*, version: str, address: str) -> str:
    """The entrance; `address` is where the reader reached it, such as http://127.0.0.1:8080."""
    return _page("Sluice", _HOME.format(version=html.escape(version), address=html.escape(address)))


def reference(document: dict[str, Any]) -> str:
    """Every call of an OpenAPI document: what it takes, what it answers."""
    parts = [
        "<h1>Reference</h1>",
        *(f"<p>{_prose(text)}</p>" for text in document["info"]["description"].split("\n\n")),
        '<nav><a href="/">Home</a><a href="/openapi.json">OpenAPI</a></nav>',
    ]
    for tag in ("Batches", "Uploads", "Service"):
        parts.append(f"<h2>{tag}</h2>")
        parts += _calls(document, tag)
    parts.append("<h2>Shapes</h2>")
    parts += [_shape(name, schema) for name, schema in sorted(document["components"]["schemas"].items())]
    return _page("Sluice: reference", "\n".join(parts))


def _calls(document: dict[str, Any], tag: str) -> Iterator[str]:
    for path, calls in document["paths"].items():
        for method, call in calls.items():
            if tag in call.get("tags", ()):
                yield _entry(
                    f"<b>{method.upper()}</b><code>{html.escape(path)}</code><span>{_prose(call['summary'])}</span>",
                    [*_taken(call), *_answered(call)],
                )


def _taken(call: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for parameter in call.get("parameters", ()):
        where = {"query": "?", "header": "header "}.get(parameter["in"], "")
        yield f"{where}{parameter['name']}", parameter.get("description") or _type(parameter["schema"])
    for kind, body in call.get("requestBody", {}).get("content", {}).items():
        yield "body", f"{kind}: {_type(body['schema'])}"


def _answered(call: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for status, says in call["responses"].items():
        shapes = ", ".join(_type(body.get("schema", {})) for body in says.get("content", {}).values())
        yield f"→ {status}", shapes if shapes and status < "300" else says["description"]


def _shape(name: str, schema: dict[str, Any]) -> str:
    members = [
        (member, ". ".join(text for text in (_type(shape), shape.get("description", "")) if text))
        for member, shape in schema.get("properties", {}).items()
    ]
    return _entry(f"<code>{html.escape(name)}</code>", members)


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(str(each) for each in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if schema.get("properties") and "title" not in schema:
        return f"fields {', '.join(schema['properties'])}"
    return str(schema.get("format") or schema.get("type", "anything"))


def _entry(head: str, members: list[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{_prose(says)}</dd>" for name, says in members)
    return f"<details><summary>{head}</summary><div><dl>{rows}</dl></div></details>"


def _prose(text: str) -> str:
    """Escaped text with `code` between backticks."""
    pieces = html.escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if place % 2 else piece for place, piece in enumerate(pieces))


def _page(title: str, body: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>{body}</body></html>"
    )
