"""The report of an evaluation: one HTML file that holds its pictures, so that it can be sent and opened anywhere."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 0.8rem 0 1.6rem; }
th, td { padding: 0.2rem 0.9rem 0.2rem 0; text-align: right; border-bottom: 1px solid #e4e4e4; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
img { max-width: 100%; }
.note { color: #666; }
"""


def html_report(
    title: str,
    facts: Mapping[str, Any],
    notes: Sequence[str],
    tables: Mapping[str, Sequence[Sequence[Any]]],
    pictures: Mapping[str, bytes],
) -> bytes:
    """Return a page with facts, notes, tables (the first row is the head) and PNG pictures by heading."""
    parts = [f"<!doctype html><meta charset='utf-8'><title>{escape(title)}</title><style>{_STYLE}</style>"]
    parts.append(f"<h1>{escape(title)}</h1>")
    parts.append(_table([[name, value] for name, value in facts.items()], head=False))
    parts += [f"<p class='note'>{escape(note)}</p>" for note in notes]
    first, *rest = tables.items()
    parts += [f"<h2>{escape(first[0])}</h2>", _table(first[1])]
    for heading, picture in pictures.items():
        encoded = base64.b64encode(picture).decode()
        parts.append(f"<h2>{escape(heading)}</h2><img alt='{escape(heading)}' src='data:image/png;base64,{encoded}'>")
    for heading, rows in rest:
        parts += [f"<h2>{escape(heading)}</h2>", _table(rows)]
    return "\n".join(parts).encode()


def _table(rows: Sequence[Sequence[Any]], *, head: bool = True) -> str:
    lines = []
    for i, row in enumerate(rows):
        tag = "th" if head and i == 0 else "td"
        lines.append("<tr>" + "".join(f"<{tag}>{escape(str(value))}</{tag}>" for value in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"
