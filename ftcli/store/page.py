"""The frame of an HTML page that needs nothing else, no network and no script; legible in the dark and on a phone."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #59636e; --line: #d1d9e0;
  --trained: #d7f5dd; --trained-ink: #0a5224; --cut-ink: #b3261e; --special: #7a2da8; --panel: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --soft: #9ea7b3; --line: #30363d;
  --trained: #14361f; --trained-ink: #9be9ae; --cut-ink: #ff8e85; --special: #d6a8ff; --panel: #161b22; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .2rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { margin: .2rem 0; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem .2rem 0; text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--line); }
td:first-child, th:first-child, td.text, th.text { text-align: left; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .6rem 0; background: var(--panel); }
summary { cursor: pointer; padding: .45rem .8rem; overflow-wrap: anywhere; }
"""


def frame_page(title: str, lines: Iterable[str], *, style: str = "") -> str:
    """The whole page around ``lines`` of its body; ``style`` is CSS of its own."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{write_text(title)}</title><style>{_STYLE}{style}</style></head><body>",
        *lines,
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def write_text(text: str) -> str:
    """``text`` as HTML, without characters that would turn the reading direction of what follows."""
    return escape("".join(char if char.isprintable() or char in "\n\t" else "�" for char in text))
