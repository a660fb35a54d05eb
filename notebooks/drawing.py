"""Shapes of a drawn figure as SVG: one style, readable at the width of a phone, in greyscale and without colours."""

from collections.abc import Callable
from functools import wraps
from html import escape
from inspect import cleandoc

WIDTH = 420
INK, PALE, LINE, WHITE = "#1b1f24", "#e9edf2", "#6b7683", "#ffffff"
BLUE, ORANGE, YELLOW, GREEN = "#0072b2", "#d55e00", "#f0c419", "#00805f"  # apart for all eyes, near Okabe and Ito's
HEAD = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    f'<path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>'
)


class Drawing:
    """Shapes at x, y in units from the top left, y downwards, ``WIDTH`` units wide."""

    def __init__(self, height: float, says: str):
        self.height, self.says, self.shapes = height, says, []

    def box(self, x, y, width, height, fill=PALE, edge="none", corner=6):
        self.shapes.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{corner}" fill="{fill}" stroke="{edge}" '
            'stroke-width="1.5"/>'
        )

    def text(self, x, y, words, size=12.0, at="middle", fill=INK, bold=False):
        weight = ' font-weight="bold"' if bold else ""
        place = f'x="{x}" y="{y}" font-size="{size}" text-anchor="{at}" fill="{fill}"{weight}'
        self.shapes.append(f"<text {place}>{escape(words)}</text>")

    def labelled(self, x, y, width, height, title, below="", fill=PALE):
        """A box with a title, and a smaller line under it."""
        self.box(x, y, width, height, fill)
        ink, middle = INK if fill in (PALE, YELLOW) else WHITE, y + height / 2
        self.text(x + width / 2, middle + (-3 if below else 5), title, 13, fill=ink, bold=True)
        self.text(x + width / 2, middle + 14, below, 11.5, fill=ink)

    def line(self, *points, arrow=True, colour=LINE, dash=False):
        """Through points (x, y), with a head at the last."""
        extra = ' marker-end="url(#head)"' * arrow + ' stroke-dasharray="4 3"' * dash
        path = "M" + "L".join(f"{x} {y}" for x, y in points)
        self.shapes.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{extra}/>')

    def dot(self, x, y, radius=5.5, fill=BLUE):
        self.shapes.append(f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{fill}" stroke="{WHITE}"/>')

    def grid(self, x, y, side, count, filled: dict | None = None):
        """A square of count x count cells; ``filled``: {(row, column): colour}."""
        step = side / count
        for row in range(count):
            for column in range(count):
                colour = (filled or {}).get((row, column), PALE)
                left, top = round(x + column * step, 1), round(y + row * step, 1)
                self.box(left, top, step - 1.5, step - 1.5, colour, corner=1)

    def svg(self) -> str:
        """A third larger than its units, and never wider than the page."""
        says, size = escape(self.says), f'width="{4 * WIDTH // 3}" height="{4 * self.height / 3:.0f}"'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {WIDTH} {self.height}" role="img" '
            f'aria-label="{says}" font-family="sans-serif" style="max-width:100%;height:auto"><title>{says}</title>'
            f'{HEAD}<rect width="{WIDTH}" height="{self.height}" fill="{WHITE}"/>{"".join(self.shapes)}</svg>'
        )


def figure(height: float):
    """Makes of a function that draws one that returns the picture, whose alternative text is its docstring."""

    def of(draw: Callable):
        @wraps(draw)
        def show(*given):
            from IPython.display import SVG

            drawing = Drawing(height, cleandoc(draw.__doc__))
            draw(drawing, *given)
            return SVG(drawing.svg())

        return show

    return of
