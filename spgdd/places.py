"""Places in a picture as people name them: the cells of a 3 x 3 grid."""

PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")


def place_of(x: float, y: float) -> str:
    """Name of the cell of a point, in shares of width and height; the cuts belong to the cell before."""
    column, row = (int(value > 1 / 3) + int(value > 2 / 3) for value in (x, y))
    return PLACES[3 * row + column]
