"""The drawn figures of the course."""

from xml.etree import ElementTree

import pytest

import figures
from drawing import ORANGE


def test_pipeline_marks_the_steps_named_and_no_others():
    svg = figures.pipeline("features", "map").data
    assert svg.count(">you are here<") == 2 and svg.count(f'fill="{ORANGE}" stroke="none"') == 2
    assert all(name in svg for name, _ in figures.STEPS.values())
    with pytest.raises(ValueError, match="no step training"):
        figures.pipeline("training")


DRAWN = [name for name, value in vars(figures).items() if hasattr(value, "__wrapped__")]
PROMPT = [("text before", 30, "text"), ("map tokens", 18, "map")]


@pytest.mark.parametrize("name", [*DRAWN, "prompt"])
def test_figures_say_what_they_show_and_stay_inside_their_frame(name):
    svg = (figures.prompt(PROMPT) if name == "prompt" else getattr(figures, name)()).data
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.get("viewBox").split())
    assert len(root.get("aria-label")) > 40 and "\n" not in root.get("aria-label")
    for shape in root.iter("{*}text"):
        x, y, size = (float(shape.get(key)) for key in ("x", "y", "font-size"))
        length = 0.62 * size * len(shape.text or "")  # of the widest usual font
        left = x - length * {"start": 0, "middle": 0.5, "end": 1}[shape.get("text-anchor")]
        assert -2 <= left and left + length <= width + 12 and size * 0.7 <= y <= height, shape.text
    for shape in root.iter("{*}rect"):
        x, y, w, h = (float(shape.get(key) or 0) for key in ("x", "y", "width", "height"))
        assert 0 <= x and x + w <= width and 0 <= y and y + h <= height
