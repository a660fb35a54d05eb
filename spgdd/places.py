"""Places in a picture as people name them: the cells of a 3 x 3 grid."""

PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")


def place_of(x: float, y: float) -> str:
    """Name of the cell of a point, in shares of width and height; the cuts belong to the cell before."""
    column, row = (int(value > 1 / 3) + int(value > 2 / 3) for value in (x, y))
    return PLACES[3 * row + column]


def extent(x, y, shape: tuple[int, int]) -> dict:
    """Place of the centroid, box and share of the picture (H, W), of pixels given by two integer arrays (n,)."""
    height, width = shape
    return {
        "place": place_of((x.mean() + 0.5) / width, (y.mean() + 0.5) / height),
        "box": (int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1),
        "area": len(x) / (height * width),
    }
