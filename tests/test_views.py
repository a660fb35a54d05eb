"""Boxes where the defect is: positions survive the model's square, tiles and the way back, at any aspect ratio."""

import numpy as np
import pytest
import torch
from PIL import Image

from fake_model import FakeModel, part
from spgdd.diagnosis import Diagnoser, load
from spgdd.errors import SpgddError
from spgdd.imagebind.preprocess import to_pixels
from spgdd.model import Seen, _split_square
from spgdd.selfprompt import Evidence
from spgdd.selfprompt.focuser import enlarge
from spgdd.selfprompt.memory import on_grid
from spgdd.views import Views, align


@pytest.mark.parametrize("size", [(300, 600), (900, 400), (224, 224), (61, 50), (1000, 999)])
@pytest.mark.parametrize("fit", ["squash", "crop"])
def test_positions_agree_with_the_preprocessing(size, fit):
    """A picture that holds its own coordinates as colours gets them back through the model's square."""
    columns, rows = (np.arange(side) + 0.5 for side in size)
    colours = np.zeros((size[1], size[0], 3))
    colours[..., 0], colours[..., 1] = columns / size[0] * 255, rows[:, None] / size[1] * 255
    square = to_pixels(Image.fromarray(np.rint(colours).astype(np.uint8)), fit).numpy().astype(np.float32)
    views = Views(*size, fit)
    for axis in (0, 1):
        returned = views.to_picture(square[axis])
        assert returned.shape == (size[1], size[0]) and returned.dtype == np.float32
        seen = np.isfinite(returned)
        assert seen.mean() == pytest.approx(views.seen_share, abs=0.02)
        assert (fit == "squash") <= seen.all()
        inner = seen & (np.minimum(columns, size[0] - columns) > 0.02 * size[0])
        inner &= (np.minimum(rows, size[1] - rows) > 0.02 * size[1])[:, None]
        # 255 colours over the picture; half a pixel of the square is the least that a shifted map is off
        assert np.abs(returned - colours[..., axis])[inner].mean() < 0.35


@pytest.mark.parametrize("size", [(300, 600), (900, 400), (224, 224)])
@pytest.mark.parametrize("fit", ["squash", "crop"])
def test_a_rectangle_is_where_its_mask_is(size, fit):
    views, box = Views(*size, fit), (size[0] // 3, size[1] // 4, size[0] // 2, size[1] - 20)
    mask = np.zeros(size[::-1], bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    inside = views.inside(box, views.side).numpy()
    assert 0 < inside.sum() and np.abs(inside - views.to_map(mask)).mean() < 0.01  # half a pixel along the edges
    assert views.inside(box, 32).shape == (32, 32)
    for nothing in ((20, 20, 20, 90), (size[0] + 9, 0, size[0] + 50, 50)):
        with pytest.raises(SpgddError, match=f"{size[0]} x {size[1]}"):
            views.inside(nothing, views.side)


def marker_error(found, x, y, patch):
    """Distance of the map's half-height centroid from a place, in patches, x and y."""
    heat = np.nan_to_num(found.anomaly_map)
    rows, columns = np.nonzero(heat > heat.max() / 2)
    return np.abs([(columns.mean() + 0.5 - x) / patch[0], (rows.mean() + 0.5 - y) / patch[1]])


@pytest.mark.parametrize("size", [(300, 600), (900, 400), (224, 224)])
@pytest.mark.parametrize("fit", ["squash", "crop"])
@pytest.mark.parametrize("corner", [(0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5)])
def test_marker_is_found_where_it_is(size, fit, corner):
    diagnoser = Diagnoser(FakeModel(fit))
    patch = [side / 16 for side in size] if fit == "squash" else [min(size) / 16] * 2
    span = size if fit == "squash" else [min(size)] * 2  # a centre crop: the corners of what is seen
    x, y = (
        (whole - seen) / 2 + p / 2 + c * (seen - p) for whole, seen, p, c in zip(size, span, patch, corner, strict=True)
    )
    found = diagnoser.diagnose(
        part(size, [(x, y, patch[0] / 2, patch[1] / 2)]), [part(size, seed=s) for s in (1, 2, 3, 4)]
    )
    assert found.anomaly_map.shape == (size[1], size[0])
    assert marker_error(found, x, y, patch).max() < 0.15
    x0, y0, x1, y1 = found.regions[0].box
    assert x0 <= x <= x1 and y0 <= y <= y1
    assert max((x1 - x0) / patch[0], (y1 - y0) / patch[1]) <= 4
    if fit == "crop" and size[0] != size[1]:
        assert np.isnan(found.anomaly_map).any() and any("not seen" in note for note in found.notes)
    else:
        assert np.isfinite(found.anomaly_map).all() and not found.notes


def test_align_puts_every_patch_value_on_its_patch():
    values = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    aligned = align(enlarge(values)[0, 0]).numpy()
    centres = slice(7, 224, 14)  # the patch's centre lies between pixels 6 and 7
    expected = values[0, 0].numpy()
    middle = (aligned[6:223:14, 6:223:14] + aligned[centres, centres]) / 2
    assert np.abs(middle - expected).max() < 0.12  # bilinear kinks lie between pixels
    np.testing.assert_allclose(aligned[0, 0], expected[0, 0], atol=1e-6)
    np.testing.assert_allclose(aligned[-1, -1], expected[-1, -1], atol=1e-6)


def test_regions_are_separate_sorted_and_free_of_specks():
    square = np.zeros((224, 224), np.float32)
    square[10:40, 20:60] = 0.6
    square[150:224, 200:224] = 0.9
    square[100:103, 100:103] = 0.95  # a speck
    square[60:90, 150:180] = 0.3  # above the outline, but never reaches the verdict's limit
    regions = Views(448, 224, "squash").regions(square, 0.2, 0.5)
    assert [region.box for region in regions] == [(400, 150, 448, 224), (40, 10, 120, 40)]
    assert [region.place for region in regions] == ["bottom right", "top left"]
    assert regions[1].area_share == pytest.approx(30 * 40 / 224**2)
    assert regions[0].peak == pytest.approx(0.9)
    square[:] = 0
    square[100:103, 100:103] = 0.95
    assert len(Views(224, 224, "squash").regions(square, 0.2, 0.5)) == 1  # nothing else is there
    assert Views(224, 224, "squash").regions(square, 0.99, 0.99) == ()


@pytest.mark.parametrize(
    ("box", "place"),
    [((0, 0, 200, 200), "top left"), ((100, 0, 300, 10), "top"), ((99, 149, 101, 151), "left"),
     ((200, 0, 201, 10), "top right"), ((199, 290, 201, 300), "bottom"), ((0, 99, 1, 102), "left"),
     ((149, 149, 151, 151), "center"), ((0, 99, 0, 101), "top left"), ((201, 201, 300, 300), "bottom right")],
)  # fmt: skip
def test_places_are_cut_at_thirds_and_the_cut_belongs_to_the_lower_cell(box, place):
    assert Views(300, 300, "squash").place_of(box) == place


# Corners, with the weights of mini


@pytest.fixture(scope="module")
def mini():
    return load("mini", device="cpu")


@pytest.mark.parametrize("size", [(300, 600), (900, 400)])
@pytest.mark.parametrize("turned", [False, True])
def test_mini_finds_a_marker_in_each_corner_within_a_patch(mini, tmp_path, size, turned):
    reference = mini.reference([part(size, seed=seed) for seed in (1, 2, 3)], "plate")
    patch = np.array(size) / 16
    for corner in [(0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5)]:
        x, y = patch / 2 + np.array(corner) * (size - patch)
        picture, options = part(size, [(x, y, *patch / 2)]), {}
        if turned:  # as a phone held upright stores it: shown after a quarter turn clockwise
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = 6
            picture = picture.transpose(Image.Transpose.ROTATE_90)
        picture.save(tmp_path / "phone.png", **options)
        found = mini.diagnose(tmp_path / "phone.png", reference, max_new_tokens=1)
        row, column = np.unravel_index(found.anomaly_map.argmax(), found.anomaly_map.shape)
        assert abs(column + 0.5 - x) <= patch[0] and abs(row + 0.5 - y) <= patch[1]
        assert found.verdict == "defective"


# Tiles


@pytest.mark.parametrize("size", [(640, 480), (300, 600)])
@pytest.mark.parametrize("fit", ["squash", "crop"])
@pytest.mark.parametrize("tiles", [2, 3])
def test_tiles_cover_the_square_and_are_put_back_where_they_were(size, fit, tiles):
    """Views of a picture that holds its own coordinates as colours, taken as maps, give the coordinates back."""
    columns, rows = (np.arange(side) + 0.5 for side in size)
    colours = np.zeros((size[1], size[0], 3))
    colours[..., 0], colours[..., 1] = columns / size[0] * 255, rows[:, None] / size[1] * 255
    views = Views(*size, fit, tiles)
    pixels = torch.stack(views.pixels(Image.fromarray(np.rint(colours).astype(np.uint8))))
    assert pixels.shape == (1 + tiles**2, 3, 224, 224) and views.side == 224 + (tiles - 1) * 196
    places = (np.arange(16) + 0.5) * 14 - 0.5
    for axis in (0, 1):
        patches = torch.tensor(pixels[:, axis].float().numpy()[:, places.astype(int)][:, :, places.astype(int)])
        square = views.join(Evidence(patches[:, None], "distance")).square_map
        assert square.shape == (views.side,) * 2
        returned = views.to_picture(square)
        inner = np.isfinite(returned) & (np.abs(columns / size[0] - 0.5) < 0.3)
        inner &= (np.abs(rows / size[1] - 0.5) < 0.3)[:, None]
        assert np.abs(returned - colours[..., axis])[inner].mean() < 4  # patches are 16 grey values apart, tiles 8


@pytest.mark.parametrize("size", [(640, 480), (300, 600)])
@pytest.mark.parametrize("fit", ["squash", "crop"])
def test_joint_tiles_are_parts_of_one_large_square(size, fit):
    """As above; the tiles' patches are those of the square at twice the size, whose positions they keep."""
    columns, rows = (np.arange(side) + 0.5 for side in size)
    colours = np.zeros((size[1], size[0], 3))
    colours[..., 0], colours[..., 1] = columns / size[0] * 255, rows[:, None] / size[1] * 255
    picture, model = Image.fromarray(np.rint(colours).astype(np.uint8)), FakeModel(fit, tiles=2, joint=2)
    views = Views.of(picture, model.profile, 2)
    pixels = views.pixels(picture)
    assert [tuple(view.shape) for view in pixels] == [(3, 224, 224), (3, 448, 448)] and views.side == 448
    patches = model.look([pixels, pixels])[1].patches[0, :, 0]  # (5, 256, 4)
    assert model.encoded == 4 and len(patches) == 5
    for axis in (0, 1):
        square = views.join(Evidence(on_grid(patches[..., axis])[:, None] * 255, "distance")).square_map
        returned = views.to_picture(square)
        inner = np.isfinite(returned) & (np.abs(columns / size[0] - 0.5) < 0.3)
        inner &= (np.abs(rows / size[1] - 0.5) < 0.3)[:, None]
        assert np.abs(returned - colours[..., axis])[inner].mean() < 2.5  # a large patch is 8 grey values from the next


@pytest.mark.parametrize("side", [2, 3])
def test_text_is_told_of_the_large_square_that_joint_tiles_are_parts_of(side):
    large, whole = torch.randn(1, 4, (16 * side) ** 2, 5), torch.randn(1, 4, 256, 5)
    patches = torch.cat([whole[:, None], _split_square(large, side)], dim=1)  # (1, V, L, N, D)
    for joint, expected in ((True, large), (False, whole)):
        assert torch.equal(Seen(torch.zeros(6), patches, joint).told, expected[0])


def test_whole_view_and_tiles_count_as_they_have_patches():
    views, values = Views(640, 480, "squash", 2, True), torch.zeros(5, 1, 16, 16)
    values[3], values[0, 0, 5, 5] = 1, 2
    for share, whole in [(0, 2.0), (1, 2 / 256)]:  # the highest value, and the mean
        assert views.join(Evidence(values, "distance"), share).score == pytest.approx((whole + 4 * 1) / 5, abs=0.02)
    values = torch.tensor([0.2, 0.6, 0.6, 0.6, 0.6]).view(5, 1, 1, 1).expand(5, 1, 16, 16)
    joined = views.join(Evidence(values, "distance"))
    assert torch.allclose(joined.square_map, torch.tensor((0.2 + 4 * 0.6) / 5))
    assert joined.prompt_map.shape == (1, 1, 224, 224)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("tiles", [2, 3])
def test_no_seam_shows_where_tiles_meet(tiles, joint):
    """A slope over the whole picture, seen in tiles, is a slope: the step across a border is as between other rows."""
    views = Views(640, 480, "squash", tiles, joint)
    side, step = views.side // 14, 16 if joint else 14
    slope = torch.linspace(0, 1, side).expand(side, side)
    parts = [slope[y : y + 16, x : x + 16] for y in range(0, side - 15, step) for x in range(0, side - 15, step)]
    values = torch.stack([slope[:16, :16] * 0, *parts])[:, None]
    square = views.join(Evidence(values, "distance")).square_map
    steps = square[:, 14:-14].diff(dim=1)
    assert steps.max() < 1.1 * steps.mean() and steps.min() > 0.9 * steps.mean()


def test_one_tile_changes_nothing():
    values = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    score, square, told = Views(640, 480, "squash").join(Evidence(values, "distance"))
    assert score == enlarge(values).max() and torch.equal(square, align(enlarge(values)[0, 0]))
    assert torch.equal(told, enlarge(values))
    assert len(Views(640, 480, "squash").pixels(part((640, 480)))) == 1


@pytest.mark.parametrize("corner", [(0, 0), (1, 1), (0.7, 0.2)])
def test_a_speck_in_a_large_picture_is_found_with_tiles_only(corner):
    size, half = (1600, 1200), 5
    x, y = (half + c * (side - 2 * half) for c, side in zip(corner, size, strict=True))
    picture = part(size, [(x, y, half, half)], seed=9)
    found = {}
    for tiles in (1, 4):
        diagnoser = Diagnoser(FakeModel(tiles=tiles))
        reference = diagnoser.reference([part(size, seed=seed) for seed in (1, 2)])
        assert reference.tiles == tiles and reference.bank.tokens.shape[2] == 2 * 256 * (17 if tiles > 1 else 1)
        found[tiles] = diagnoser.diagnose(picture, reference)
    assert found[4].score > 5 * found[1].score and found[4].verdict == "defective"
    left, top, right, bottom = found[4].regions[0].box
    assert left <= x <= right and top <= y <= bottom and right - left < 150
    assert found[4].anomaly_map.shape == (1200, 1600)


def test_masks_lie_where_the_model_sees_the_defect_with_tiles_too():
    mask = np.zeros((480, 640), bool)
    mask[40:100, 500:620] = True
    for tiles in (1, 2, 3):
        views = Views(640, 480, "squash", tiles)
        coverage = views.to_map(mask)
        assert coverage.shape == (views.side,) * 2 and coverage.mean() == pytest.approx(mask.mean(), rel=0.01)
        rows, columns = np.nonzero(coverage > 0.5)
        assert columns.min() == pytest.approx(500 / 640 * views.side, abs=1)
        assert rows.max() + 1 == pytest.approx(100 / 480 * views.side, abs=1)
