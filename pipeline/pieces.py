"""Pieces of a report page: tables, figures with their note, numbers as a person reads them, the style sheet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

_MAX_TEXT = 60_000
_MAX_ROWS = 400


def figure(inner: str, note: str) -> str:
    return f'<figure><div class="scroll">{inner}</div><figcaption>{escape(note)}</figcaption></figure>'


def absent(text: str) -> str:
    return f'<p class="absent">{escape(text)}</p>'


def collapsed(title: str, text: str) -> str:
    if len(text) > _MAX_TEXT:
        text = f"{text[:_MAX_TEXT]}\n… ({len(text) - _MAX_TEXT} more characters in the file itself)"
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], note: str, left: int = 1) -> str:
    """A table whose first ``left`` columns are words and the others numbers; ``note`` stands below it."""

    def line(cells: Iterable[str], tag: str) -> str:
        marks = ("" if i < left else ' class="n"' for i in range(len(head)))
        return "<tr>" + "".join(
            f"<{tag}{m}>{escape(c)}</{tag}>" for c, m in zip(cells, marks, strict=False)
        ) + "</tr>"  # fmt: skip

    if len(rows) > _MAX_ROWS:
        note += f" Shown are {_MAX_ROWS} of {len(rows)} rows; all are in metrics.json."
    body = "".join(line(row, "td") for row in rows[:_MAX_ROWS])
    return (
        f'<div class="scroll"><table><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>'
        f'<p class="note">{escape(note)}</p>'
    )


def as_float(value: object) -> float | None:
    """A finite number, or None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def number(value: object, form: str) -> str:
    x = as_float(value)
    return "–" if x is None else format(x, form).replace("-", "−")


def percent(value: object, digits: int = 1) -> str:
    x = as_float(value)
    return "–" if x is None else number(100 * x, f".{digits}f") + " %"


def signed(value: object) -> str:
    x = as_float(value)
    return "–" if x is None else number(100 * x, "+.2f") + " %"


def p_value(value: object) -> str:
    x = as_float(value)
    return "–" if x is None else "< 0.001" if x < 0.001 else f"{x:.3f}"


def as_dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def flat(value: dict[str, Any], before: str = "") -> dict[str, str]:
    """Nested values as one level of text: ``{"test": {"since": …}}`` becomes ``test since``."""
    out: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            out |= flat(item, f"{before}{key} ")
        else:
            out[f"{before}{key}"] = ", ".join(map(str, item)) if isinstance(item, list) else str(item)
    return out


CSS = """
:root{color-scheme:light dark;--page:#fff;--card:#f5f6f8;--ink:#1b1f24;--soft:#59636e;--grid:#d5dae0;
--ours:#1f66b5;--other:#bd5200;--third:#5b7f2b;--warn:#fff1d6;--warnink:#5c3a00}
@media (prefers-color-scheme:dark){:root{--page:#14171b;--card:#1e2329;--ink:#e6e9ed;--soft:#a3adb8;--grid:#3a424c;
--ours:#6fb0f5;--other:#f2994a;--third:#a7cc6d;--warn:#4a3408;--warnink:#ffe4ae}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif}
main{max-width:68rem;margin:0 auto;padding:1.5rem 1.1rem 3rem}
h1{font-size:1.9rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:1.3rem;margin:2.6rem 0 .7rem;padding-bottom:.25rem;border-bottom:1px solid var(--grid)}
.kind{margin:0;color:var(--soft);font-size:.85rem;text-transform:uppercase;letter-spacing:.06em}
.run{margin:.2rem 0 0;color:var(--soft);font-family:ui-monospace,monospace;font-size:.85rem;overflow-wrap:anywhere}
nav{margin-top:1.1rem;font-size:.88rem;color:var(--soft)}a{color:var(--ours)}
.banner{background:var(--warn);color:var(--warnink);border-left:6px solid var(--other);padding:.8rem 1rem;
margin:1.2rem 0 0;border-radius:4px}
.verdict{font-size:1.15rem;background:var(--card);border-left:6px solid var(--soft);border-radius:4px;
padding:1rem 1.1rem;margin:0}
.verdict span{font-weight:700;text-transform:uppercase;font-size:.85rem;letter-spacing:.05em;margin-right:.5rem}
.verdict.weak,.verdict.strong{border-color:var(--ours)}
.verdict.weak span,.verdict.strong span{color:var(--ours)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(11.5rem,1fr));gap:.8rem;margin-top:.9rem}
.tiles div{background:var(--card);border-radius:4px;padding:.75rem .9rem}
.tiles b{display:block;font-size:1.45rem;line-height:1.3;font-variant-numeric:tabular-nums}
.tiles small{color:var(--soft);line-height:1.4;display:block}
.scroll{overflow-x:auto}
figure{margin:1rem 0 1.6rem}
figcaption,.note{color:var(--soft);font-size:.86rem;line-height:1.45;max-width:52rem;margin:.4rem 0 0}
.note{margin-bottom:1.4rem}
.absent{color:var(--soft);font-style:italic;overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto;min-width:34rem;max-width:52rem}
svg *{stroke-linejoin:round;stroke-linecap:butt}
svg text{font-family:"DejaVu Sans",Verdana,system-ui,sans-serif}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:.8rem}
.grid svg{min-width:0}
.grid.small{grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));max-width:68rem}
.grid.small svg{max-width:22rem}
table{border-collapse:collapse;font-size:.9rem;min-width:24rem;font-variant-numeric:tabular-nums}
th,td{padding:.34rem .8rem .34rem 0;text-align:left;border-bottom:1px solid var(--grid);white-space:nowrap}
th{color:var(--soft);font-weight:600;vertical-align:bottom}
.n{text-align:right;padding-left:.8rem}
details{margin:.7rem 0}summary{cursor:pointer}
pre{background:var(--card);border-radius:4px;padding:.8rem;overflow-x:auto;font-size:.8rem;line-height:1.4}
footer{margin-top:3rem;color:var(--soft);font-size:.86rem;border-top:1px solid var(--grid)}
@media print{:root{color-scheme:light;--page:#fff;--card:#f5f6f8;--ink:#000;--soft:#444;--grid:#ccc;--ours:#1f66b5;
--other:#bd5200;--third:#5b7f2b;--warn:#fff1d6;--warnink:#5c3a00}nav{display:none}main{max-width:none;padding:0}
figure,table,.verdict,.tiles div{break-inside:avoid}h2{break-after:avoid}.scroll{overflow:visible}
svg{min-width:0}pre{white-space:pre-wrap}table{font-size:.75rem}
.banner,.verdict,.tiles div{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
