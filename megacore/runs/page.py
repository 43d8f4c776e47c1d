"""The HTML around a report: a self-contained page without external requests, in which all text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

MARK = "<!-- megacore report -->"
"""A mark in the first line of each report, so that no other file is replaced by a report."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Content security policy under which no request leaves the page."""

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1600px; margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; vertical-align: top; border-bottom: 1px solid #8884; }
td { font-variant-numeric: tabular-nums; } th { font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); gap: 1rem; }
figure { margin: 0; position: relative; } figcaption { font-weight: 600; } small { font-weight: 400; opacity: .7; }
svg { width: 100%; height: auto; } polyline { fill: none; stroke-width: 1.4; }
.grid { stroke: #8884; } text { font-size: 12px; fill: currentColor; }
.y { text-anchor: end; } .x { text-anchor: middle; }
.cursor { stroke: #888; stroke-dasharray: 3 3; }
.dot { display: inline-block; width: .8em; height: .8em; border-radius: 50%; }
.tip { position: absolute; top: 1.6rem; right: .6rem; background: Canvas; border: 1px solid #8884; padding: .1rem .5rem;
  font-size: 12px; pointer-events: none; }
"""

_SCRIPT = """
for (const box of document.querySelectorAll('input[data-run]'))
  box.addEventListener('change', () => {
    for (const part of document.querySelectorAll('svg .run' + box.dataset.run))
      part.style.display = box.checked ? '' : 'none';
  });
for (const svg of document.querySelectorAll('svg[data-place]')) {
  const [xLow, xHigh, yLow, yHigh, left, right, top, bottom] = JSON.parse(svg.dataset.place);
  const line = document.createElementNS('http://www.w3.org/2000/svg', 'line');
  line.setAttribute('class', 'cursor'); line.setAttribute('y1', top); line.setAttribute('y2', bottom);
  const tip = document.createElement('div'); tip.className = 'tip';
  const curves = {};
  for (const part of svg.querySelectorAll('polyline')) {
    const points = part.getAttribute('points').split(' ').map(point => point.split(',').map(Number));
    (curves[part.getAttribute('class')] ??= []).push(...points);
  }
  svg.addEventListener('pointermove', event => {
    const place = svg.getBoundingClientRect();
    const x = Math.min(right, Math.max(left, (event.clientX - place.left) / place.width * svg.viewBox.baseVal.width));
    line.setAttribute('x1', x); line.setAttribute('x2', x); svg.append(line);
    const iteration = xLow + (x - left) / (right - left) * (xHigh - xLow);
    const lines = ['iteration ' + Math.round(iteration)];
    for (const [run, points] of Object.entries(curves)) {
      const near = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
      const value = yLow + (bottom - near[1]) / (bottom - top) * (yHigh - yLow);
      lines.push(document.querySelector('label.' + run).textContent.trim() + ': ' + value.toPrecision(4));
    }
    tip.replaceChildren(...lines.map(text => Object.assign(document.createElement('div'), { textContent: text })));
    svg.after(tip);
  });
  svg.addEventListener('pointerleave', () => { line.remove(); tip.remove(); });
}
"""


def page(title: str, body: Iterable[str]) -> str:
    """Return a page with the HTML parts ``body``."""
    return (
        f'<!DOCTYPE html>{MARK}\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n"
        + "\n".join(body)
        + f"\n<script>{_SCRIPT}</script></body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of text whose first column names the rows."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for name, *row in rows
    )
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'
