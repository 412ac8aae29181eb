"""Pictures of matplotlib as inline SVG whose colors are CSS variables."""

import re

from markupsafe import Markup, escape

from customized_grpo.report import style

COLOURS = {
    getattr(style, name): f"var(--{name.lower()})"
    for name in (
        "PAPER",
        "INK",
        "MUTED",
        "RULE",
        "AXIS",
        "PROMPT",
        "IDENTITY",
        "CONFLICT",
        "BAD",
        "ALARM",
        "OTHER1",
        "OTHER2",
        "OTHER3",
        "OTHER4",
    )
}


def inline_svg(name: str, svg: str, label: str) -> Markup:
    """Return a figure as an element of the page: with its colours, and ids of its own."""
    drawing = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    box = re.search(r'viewBox="[\d. ]+"', drawing)
    head = f'<svg class="chart" role="img" aria-label="{escape(label)}" {box[0] if box else ""}>'
    drawing = re.sub(r"<svg\b[^>]*>", head, drawing, count=1)
    drawing = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", drawing)
    drawing = re.sub(r": (#[0-9a-f]{6})", lambda found: f": {COLOURS.get(found[1], found[1])}", drawing)
    return Markup(drawing.replace("xlink:href", "href"))
