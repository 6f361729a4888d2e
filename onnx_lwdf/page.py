"""A report as one HTML page without anything beside it: text, tables, and error over size as an inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, MARGIN = 640, 360, 50  # of the picture, in pixels
STYLE = (
    ":root{color-scheme:light dark}body{font:14px sans-serif;margin:2em;max-width:90em}p{overflow-wrap:anywhere}"
    "div{overflow-x:auto}table{border-collapse:collapse;margin:1em 0;font-variant-numeric:tabular-nums}"
    "td,th{border:1px solid #8886;padding:2px 8px;text-align:left;white-space:nowrap}td:last-child{white-space:normal}"
    "td:nth-child(n+5):last-child{min-width:16em}"  # the notes
    "svg{max-width:100%;height:auto}svg text{font:12px sans-serif;fill:currentColor}"
)
VIEW = '<meta name="viewport" content="width=device-width"/>'  # a phone shows it at reading size

Table = tuple[Sequence[str], Sequence[tuple[str, ...]]]  # column names, rows


def html(
    title: str, paragraphs: Sequence[str], layers: Table, tradeoff: Table, points: Sequence[tuple[int, float, bool]]
) -> str:
    """The page. points: bytes of the file, predicted dB, whether it is the chosen one; nothing is drawn without them."""
    body = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(text)}</p>" for text in paragraphs)]
    if points:
        body += [_picture(points), _table(tradeoff)]
    body.append(_table(layers))
    head = f'<meta charset="utf-8">{VIEW}<title>{escape(title)}</title><style>{STYLE}</style>'
    return "\n".join(["<!DOCTYPE html>", f'<html lang="en"><head>{head}</head><body>', *body, "</body></html>", ""])


def _table(table: Table) -> str:
    columns, rows = table
    lines = ["".join(f"<th>{escape(name)}</th>" for name in columns)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return "<div><table>\n" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table></div>"


def _picture(points: Sequence[tuple[int, float, bool]]) -> str:
    """Predicted dB over size; the chosen file is the large dot."""
    across = _scale([size for size, _, _ in points], MARGIN, WIDTH - MARGIN)
    up = _scale([decibels for _, decibels, _ in points], HEIGHT - MARGIN, MARGIN)
    places = list(zip(across, up, strict=True))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [
        f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" ',
        'aria-label="predicted dB over file size">',
        f'<polyline points="{line}" fill="none" stroke="#47d"/>',
    ]
    for (x, y), (size, decibels, chosen) in zip(places, points, strict=True):
        label = f"<title>{size:,} bytes, {decibels:.2f} dB</title>"
        radius, colour = (7, "#d44") if chosen else (3, "#47d")
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}">{label}</circle>')
    sizes, heights = [size for size, _, _ in points], [decibels for _, decibels, _ in points]
    base = HEIGHT - MARGIN / 2
    parts += [
        f'<text x="{MARGIN}" y="{base}">{min(sizes):,}</text>',
        f'<text x="{WIDTH - MARGIN}" y="{base}" text-anchor="end">{max(sizes):,} bytes</text>',
        f'<text x="4" y="{HEIGHT - MARGIN}">{min(heights):.1f}</text>',
        f'<text x="4" y="{MARGIN}">{max(heights):.1f} dB</text>',
        "</svg>",
    ]
    return "\n".join(parts)


def _scale(values: Sequence[float], start: float, stop: float) -> list[float]:
    """The values brought linearly into [start, stop], the smallest to start; all to the middle where none differs."""
    low, width = min(values), max(values) - min(values)
    return [start + (stop - start) * ((value - low) / width if width else 0.5) for value in values]
