# SPDX-License-Identifier: Apache-2.0
"""HTML from data: everything is escaped unless it was made here, and there is one style for light and dark."""

from __future__ import annotations

import html
import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from typing import Any

from .card_text import ABSENT, figure


class Html(str):
    """A string that is HTML already; any other is text."""

    __slots__ = ()


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --muted: #57606a; --paper: #ffffff; --line: #d8dee4;
  --soft: #f6f8fa; --accent: #0b62a4; --warn: #b34700; --warn-paper: #fff4ec; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --muted: #9da7b3; --paper: #0d1117; --line: #30363d;
  --soft: #161b22; --accent: #6cb6ff; --warn: #ffab70; --warn-paper: #2b1d12; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; overflow-wrap: break-word; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { margin: .6rem 0; } a { color: var(--accent); }
.lead { font-size: 1.1rem; } .note { color: var(--muted); font-size: .92rem; }
.warning { border-left: 4px solid var(--warn); background: var(--warn-paper); padding: .7rem 1rem; margin: 1rem 0; }
.warning strong { color: var(--warn); }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); padding-bottom: .3rem; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { padding-left: .2rem; }
th { font-weight: 600; } thead th { color: var(--muted); vertical-align: bottom; }
td, tbody th { white-space: nowrap; } .left { text-align: left; }
td.left:last-child { white-space: normal; min-width: 14rem; } tr.this { background: var(--soft); font-weight: 600; }
figure { margin: 1rem 0; } img { display: block; width: 100%; height: auto; background: #fff; border-radius: 6px;
  border: 1px solid var(--line); }
figcaption { color: var(--muted); font-size: .9rem; margin-top: .4rem; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; overflow-x: auto; }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
code { font: .88em ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--accent); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: .8rem 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 34rem) { main { padding: 1.2rem .9rem 3rem; } dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; } th, td { padding: .3rem .5rem; } }
"""


def text(value: Any) -> Html:
    """Text of any origin as HTML; what is HTML already stays."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def tag(name: str, *content: Any, **attributes: str) -> Html:
    """An element around its content; `class_` and `aria_label` are the attributes `class` and `aria-label`."""
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    said = "".join(f' {key}="{html.escape(value)}"' for key, value in named.items())
    return Html(f"<{name}{said}>{''.join(map(text, content))}</{name}>")


def joined(*parts: Any) -> Html:
    """HTML one after the other; what is `None` is left out."""
    return Html("\n".join(text(part) for part in parts if part is not None))


def number(value: Any, digits: int = 2) -> str:
    """Spells a number as `card_text.figure` does; anything else as it is."""
    if value is None:
        return ABSENT
    return figure(value, digits) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], *, left: int = 1, marked: int | None = None) -> Html:
    """A table that scrolls inside the page where it is too wide.

    Args:
        head: Column names.
        rows: Cells; the first of a row names it.
        left: So many columns are flush left, the others right.
        marked: The number of the row that stands out.
    """
    lines = [tag("tr", *(_cell("th", cell, place < left, "col") for place, cell in enumerate(head)))]
    body = [
        tag(
            "tr",
            *(_cell("td" if place else "th", cell, place < left, "row") for place, cell in enumerate(row)),
            **({"class_": "this"} if index == marked else {}),
        )
        for index, row in enumerate(rows)
    ]
    inner = tag("table", tag("thead", *lines), tag("tbody", *body))
    return tag("div", inner, class_="wide", tabindex="0", role="group", aria_label="table")


def _cell(name: str, content: Any, left: bool, scope: str) -> Html:
    attributes = {"scope": scope} if name == "th" else {}
    return tag(name, content, **attributes, **({"class_": "left"} if left else {}))


def pairs(entries: Iterable[tuple[str, Any]]) -> Html | None:
    """A list of names and what they are; `None` if there is none."""
    cells = [cell for name, value in entries if value is not None for cell in (tag("dt", name), tag("dd", value))]
    return tag("dl", *cells) if cells else None


def section(title: str, *parts: Any) -> Html | None:
    """A heading with what belongs to it; `None` where there is nothing."""
    content = [part for part in parts if part is not None]
    if not content:
        return None
    name = re.sub(r"[^a-z]+", "-", title.lower()).strip("-")
    return tag("section", tag("h2", title, id=name), joined(*content), aria_labelledby=name)


def folded(title: str, *parts: Any) -> Html:
    """Content that shows when one asks for it; needs no script."""
    return tag("details", tag("summary", title), joined(*parts))


def paragraph(*content: Any, kind: str | None = None) -> Html:
    """A paragraph, of the class `kind`."""
    return tag("p", *content, **({"class_": kind} if kind else {}))


def picture(png: bytes, words: str, note: str) -> Html:
    """A picture inside the page, with words for those who do not see it."""
    source = f"data:image/png;base64,{b64encode(png).decode()}"
    image = Html(f'<img src="{source}" alt="{html.escape(words)}">')
    return tag("figure", image, tag("figcaption", note))


def whole_page(title: str, body: Html) -> str:
    """The document: one file that asks for nothing from anywhere."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}: pruning report</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
