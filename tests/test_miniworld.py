"""The mini world: pictures are functions of their seeds, masks and words are true to them."""

import json
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import make_mini_data
from conftest import check
from miniworld import (
    FAMILIES,
    HELD_OUT_FAMILIES,
    HELD_OUT_TYPES,
    SLOTS,
    TYPES,
    draw_product,
    ground_truth,
    photograph,
    possible_types,
    record,
    write_world,
)  # fmt: skip
from miniworld.defects import DEFECTS
from miniworld.noise import CELLS, CHANNELS, TILE, Dice, atlas, cells, noise
from miniworld.objects import OBJECTS
from miniworld.samples import ATTEMPTS
from miniworld.world import CLEAR_RANDOM, CLEAR_REGULAR, clarity, pose
from spgdd.data.describe import contrast_of
from spgdd.data.grammar import SEVERITIES
from spgdd.data.index import index_folder
from spgdd.data.masks import read_mask
from spgdd.data.records import read_records
from spgdd.data.words import names_of
from spgdd.errors import DataError
from spgdd.places import place_of

CPU = torch.device("cpu")


def shoot(family, products, photos, kinds, size=224):
    types = torch.tensor([TYPES.index(kind) if kind != "good" else -1 for kind in kinds])
    return photograph(family, torch.as_tensor(products), torch.as_tensor(photos), types, size)


@pytest.fixture(scope="module")
def gallery():
    """Each family with every defect type it can have, and the same photographs drawn good: (bad, good) by family."""
    shots = {}
    for number, family in enumerate(FAMILIES):
        types = torch.tensor(possible_types(family))
        products = torch.arange(len(types)) + 100 * number
        bad = photograph(family, products, products + 7, types)
        good = photograph(family, products, products + 7, torch.full_like(types, -1))
        shots[family] = bad, good
    return shots


# the numbers behind


def test_dice_are_uniform_independent_and_the_hash_that_they_are_said_to_be():
    dice = Dice(torch.arange(20_000))
    a, b = dice.unit("angle"), dice.unit("size")
    histogram = torch.histc(a, 20, 0, 1) / 1000  # 1000 in each bin are expected
    assert 0.85 < histogram.min() and histogram.max() < 1.15
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03 and abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.03
    assert dice.units("angle", "size").equal(torch.stack((a, b), 1))
    seeds = [1, 2**32 + 5]
    check("mini world: dice", Dice(torch.tensor(seeds)).unit("angle"), hash_of(seeds, "angle"))
    assert dice.integer("sides", 4, 8).unique().tolist() == [4, 5, 6, 7, 8]


def hash_of(seeds, name):
    """The hash in plain Python integers."""
    values = []
    for seed in seeds:
        h = (seed * 0x9E3779B1 + zlib.crc32(name.encode())) % 2**32
        for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (16, 0x297A2D39)):
            h = (h ^ h >> shift) * factor % 2**32
        values.append((h >> 8) / 2**24)
    return values


def test_cells_are_the_nearest_points_of_the_torus():
    from scipy.spatial import cKDTree

    generator = np.random.default_rng(1)
    points = generator.random((CELLS, CELLS, 2))
    nearest, second, number = cells(torch.from_numpy(points).float())
    columns, rows = np.meshgrid(np.arange(CELLS), np.arange(CELLS))
    places = np.stack((points[..., 0] + columns, points[..., 1] + rows), -1).reshape(-1, 2)
    tree = cKDTree(places % CELLS, boxsize=CELLS)
    at = generator.integers(0, TILE, (5000, 2))  # row and column of some pixels
    distance, index = tree.query((at[:, ::-1] + 0.5) * CELLS / TILE, k=2)
    check("mini world: nearest cell", nearest[at[:, 0], at[:, 1]], distance[:, 0], atol=1e-5)
    check("mini world: second cell", second[at[:, 0], at[:, 1]], distance[:, 1], atol=1e-5)
    assert (number[at[:, 0], at[:, 1]].numpy() == index[:, 0]).mean() > 0.999


@pytest.mark.parametrize("channel", CHANNELS)
def test_noise_is_in_range_varied_and_repeats_without_a_seam(channel):
    dice = Dice(torch.tensor([3]))
    x = torch.linspace(0, 16, 1025).expand(1, 8, -1)  # 16 noise units are the period
    y = torch.linspace(0, 9, 8)[None, :, None].expand_as(x)
    values = noise(channel, x, y, dice, "here")
    assert values.min() >= 0 and values.max() <= 1 and values.std() > 0.05
    check(f"mini world: period of {channel}", noise(channel, x - 32, y + 16, dice, "here"), values, atol=2e-3)
    assert atlas(CPU).shape == (len(CHANNELS), TILE + 2, TILE + 2)


# pictures


def test_pictures_are_functions_of_their_seeds_alone():
    for family in ("weave", "gear"):
        kinds = ["good", "bent", "scratch", "hole", "stain", "fray", "good", "pitting", "dent", "crack", "glue"]
        products, photos = torch.arange(11) + 50, torch.arange(11) + 900
        whole = shoot(family, products, photos, kinds)
        again = shoot(family, products, photos, kinds)
        assert all(a.equal(b) for a, b in zip(whole, again, strict=True)), "the same call twice"
        order = torch.tensor([8, 3, 10, 0, 5])
        part = shoot(family, products[order], photos[order], [kinds[i] for i in order])
        difference = (part.images.int() - whole.images[order].int()).abs()
        # the last bit of a sine may depend on where in a vector it stands
        assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3, "the batch made a difference"
        assert (part.masks != whole.masks[order]).float().mean() < 1e-5
        assert part.types.equal(whole.types[order])


def test_a_product_stays_itself_and_another_seed_is_another():
    shots = shoot("pill", [4, 4, 5], [1, 2, 1], ["good"] * 3).images.float() / 255
    colours = shots.flatten(2).mean(2)  # (3, 3)
    same, other = (colours[0] - colours[1]).abs().max(), (colours[0] - colours[2]).abs().max()
    assert not shots[0].equal(shots[1]) and same < other


def test_every_family_and_type_is_drawn_with_contrast(gallery):
    seen = dict.fromkeys(TYPES, 0)
    assert len(FAMILIES) >= 16 and len(TYPES) >= 16
    for family, (bad, good) in gallery.items():
        for shots in (bad, good):
            assert shots.images.shape[1:] == (3, 224, 224) and shots.images.dtype == torch.uint8
            spread = shots.images.float().mean(1).flatten(1).std(1)
            assert spread.median() > 8, f"{family} is flat: {spread.tolist()}"
        assert len({image.float().mean().item() for image in good.images}) > 5, f"one {family} is like the other"
        for kind in bad.types[bad.types >= 0].tolist():
            seen[TYPES[kind]] += 1
    assert min(seen.values()) >= 3, f"a type that hardly ever shows: {seen}"


def test_families_have_only_the_defects_that_they_can_have(gallery):
    assert set(HELD_OUT_FAMILIES) < set(FAMILIES) and set(HELD_OUT_TYPES) < set(TYPES)
    assert {family in OBJECTS for family in HELD_OUT_FAMILIES} == {True, False}, "a texture and an object at least"
    for family in FAMILIES:
        kinds = {TYPES[i] for i in possible_types(family)}
        assert ("missing part" in kinds) == ("chipped edge" in kinds) == (family in OBJECTS)
        assert ("fold" in kinds) == (family not in OBJECTS)
        assert kinds - set(HELD_OUT_TYPES), f"nothing to train {family} on"


def test_random_surfaces_have_no_defect_that_only_moves_them():
    """Leather that is displaced looks like leather: nothing to find, and a mask there would be a false label."""
    moving = {kind for kind, row in DEFECTS.items() if any(row.warp + row.tear) and not row.object_only}
    assert moving == {"bent", "misprint", "fray"}
    shown = {family: moving & {TYPES[i] for i in possible_types(family)} for family in FAMILIES}
    for family in ("leather", "concrete", "asphalt", "paper", "cast_metal", "felt", "pattern", "marble", "terrazzo"):
        assert not shown.pop(family), family
    assert shown.pop("weave") == {"fray"}
    assert set(map(len, shown.values())) == {3}
    with pytest.raises(DataError, match="no bent on a felt"):
        draw_product("felt", 0, ["bent"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_possible_defect_comes_out_visibly(family):
    """Within ATTEMPTS photographs, each of another product."""
    left, products = torch.tensor(possible_types(family)), torch.arange(4)
    for attempt in range(ATTEMPTS // len(products)):
        kinds, parts = left.repeat_interleave(len(products)), (products + 60 * attempt).repeat(len(left))
        shots = photograph(family, parts, parts + 7, kinds)
        area = shots.masks.flatten(2).sum(2)
        assert (area[area > 0] >= 24).all(), "a spot that nobody sees"
        left = left[(shots.types < 0).view(len(left), -1).all(1)]
        if not len(left):
            return
    raise AssertionError(f"{[TYPES[i] for i in left]} on {family} stays invisible")


def test_clarity_is_measured_against_what_the_surface_itself_does():
    generator = torch.Generator().manual_seed(0)
    flat = torch.full((1, 3, 224, 224), 0.5)
    coarse = torch.rand(1, 1, 28, 28, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    fine = torch.rand(1, 1, 224, 224, generator=generator)
    clear = []
    for own in (flat, flat + 0.3 * (fine - 0.5), flat + 0.6 * (coarse - 0.5)):
        stained = own.clone()
        stained[:, :, 60:120, 60:120] -= 0.1
        change = clarity(stained, own)
        assert change.shape == (1, 56, 56) and change[:, :15].max() < 1e-4
        clear.append(change[:, 15:30, 15:30].mean().item())
    check("mini world: clarity on a flat surface", torch.tensor(clear[0]), torch.tensor(0.1 / 0.02), atol=1e-3)
    assert clear[0] > clear[1] > CLEAR_RANDOM, "grain as fine as a pixel hides no stain"
    assert clear[2] < CLEAR_RANDOM, "spots of its size and more contrast hide it"
    assert CLEAR_REGULAR < CLEAR_RANDOM


def test_what_changes_lies_inside_the_masks(gallery):
    clear, outside = dict.fromkeys(TYPES, 0), dict.fromkeys(TYPES, 0)
    for family, (bad, good) in gallery.items():
        change = (bad.images.int() - good.images.int()).abs().amax(1)  # (B, S, S)
        mask = bad.masks.any(1)
        assert not good.masks.any() and (good.types == -1).all() and (good.contrast == 0).all()
        near = torch.nn.functional.max_pool2d(mask.float(), 9, 1, 4) > 0
        for row, kind in enumerate(bad.types.tolist()):
            if kind < 0:
                assert change[row].max() == 0 and not mask[row].any(), f"a {family} that counts as good was changed"
                continue
            assert change[row][mask[row]].float().mean() > 8, f"{TYPES[kind]} on {family}: nothing to see in its mask"
            clear[TYPES[kind]] += (change[row] > 30).sum().item()
            outside[TYPES[kind]] += ((change[row] > 30) & ~near[row]).sum().item()
    shares = {kind: outside[kind] / clear[kind] for kind in TYPES}
    soft = shares.pop("bent")  # fades out slowly; its mask is where at least a fifth of it is
    assert soft < 0.25 and max(shares.values()) < 0.06, shares


def test_faint_defects_leave_no_trace():
    """Neither where all of a picture's defects are too faint, nor where some of several are."""
    photos = torch.arange(120)
    bad = shoot("cast_metal", photos // 3, photos, ["discolouration"] * 120)
    good = shoot("cast_metal", photos // 3, photos, ["good"] * 120)
    faint = bad.types == -1
    assert faint.any() and bad.images[faint].equal(good.images[faint])
    assert not bad.masks[faint].any() and not bad.contrast[faint].any()
    count = Dice(photos).unit("count")
    wanted = 1 + (count > 0.7).long() + (count > 0.9).long()
    shown = bad.masks.flatten(2).any(2).sum(1)
    some = (shown > 0) & (shown < wanted)
    assert some.any() and (shown <= wanted).all()
    for row in some.nonzero()[:, 0].tolist():
        change = (bad.images[row].int() - good.images[row].int()).abs().amax(0)
        near = torch.nn.functional.max_pool2d(bad.masks[row].any(0)[None].float(), 25, 1, 12)[0] > 0
        assert (change[~near] > 8).float().mean() < 0.002, "a defect without a mask was drawn"


def test_up_to_three_defects_each_with_its_mask(gallery):
    shown = torch.cat([bad.masks.flatten(2).any(2).sum(1)[bad.types >= 0] for bad, _ in gallery.values()])
    counts = torch.bincount(shown, minlength=SLOTS + 1)
    assert counts[0] == 0 and (counts[1:] > 0).all() and counts[1] > counts[2] > counts[3]


def test_defects_of_objects_stay_on_them_unless_their_type_reaches_beyond():
    kinds = [kind for kind, row in DEFECTS.items() if not row.beyond and not row.texture_only]
    products, photos = torch.full((len(kinds),), 21), torch.arange(len(kinds))
    bad = shoot("ring", products, photos, kinds)
    steps = (torch.arange(224) + 0.5) / 112 - 1
    x, y = pose(steps[None, None], steps[None, :, None], Dice(products), Dice(photos), True)
    inside = OBJECTS["ring"](x, y, Dice(products)).inside
    share = (bad.masks.any(1) & (inside > 0)).sum() / bad.masks.any(1).sum()
    assert share > 0.99


def test_any_size():
    shots = shoot("mesh", [1, 2], [1, 2], ["good", "hole"], size=112)
    large = shoot("mesh", [1, 2], [1, 2], ["good", "hole"], size=224)
    assert shots.images.shape == (2, 3, 112, 112) and shots.masks.shape == (2, SLOTS, 112, 112)
    smaller = torch.nn.functional.avg_pool2d(large.images.float(), 2)
    assert (smaller - shots.images.float()).abs().mean() < 25, "the same picture at half the size"
    empty = shoot("mesh", torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), [])
    assert empty.images.shape == (0, 3, 224, 224)


# words


def test_ground_truth_tells_what_the_masks_show(gallery):
    for family, (bad, _) in gallery.items():
        for row, sample in enumerate(ground_truth(family, "thing", bad)):
            masks = [mask.numpy() for mask in bad.masks[row] if mask.any()]
            assert sample["product"] == "thing" and sample["family"] == family and sample["size"] == [224, 224]
            assert len(sample["defects"]) == len(masks)
            for told, mask in zip(sample["defects"], masks, strict=True):
                y, x = np.nonzero(mask)
                assert told["type"] == TYPES[bad.types[row]]
                assert told["box"] == [x.min(), y.min(), x.max() + 1, y.max() + 1]
                assert told["area"] == pytest.approx(mask.mean(), abs=1e-5)
                middle = (x.mean() + 0.5) / 224, (y.mean() + 0.5) / 224
                if min(abs(v - cut) for v in middle for cut in (1 / 3, 2 / 3)) > 1e-4:
                    assert told["place"] == place_of(*middle)
                assert 0.06 < told["contrast"] <= 1 and told["severity"] in SEVERITIES


def test_contrast_is_the_mean_change_inside_the_mask(gallery):
    """Up to the sensor's noise, which is the same in both pictures, and to clipping and rounding."""
    for bad, good in gallery.values():
        change = (bad.images.float() - good.images.float()).abs().amax(1) / 255
        for row, slot in bad.masks.flatten(2).any(2).nonzero().tolist():
            assert change[row][bad.masks[row, slot]].mean() == pytest.approx(bad.contrast[row, slot].item(), abs=0.03)


def test_the_cuts_of_places_belong_to_the_cell_before():
    assert place_of(1 / 3, 2 / 3) == "left" and place_of(1 / 3 + 1e-6, 2 / 3 + 1e-6) == "bottom"
    assert place_of(0, 0) == "top left" and place_of(1, 1) == "bottom right" and place_of(0.5, 0.5) == "center"


# one product, and the data in the repository


def test_draw_product_gives_what_is_asked_for():
    kinds = ["good", "good", "blowhole", "discolouration", "good", "pitting"]
    samples = draw_product("cast_metal", 3, kinds, "casting")
    assert [(s.known["defects"] or [{"type": "good"}])[0]["type"] for s in samples] == kinds
    assert [s.mask.any() for s in samples] == [kind != "good" for kind in kinds]
    assert all(s.image.shape == (224, 224, 3) and s.mask.shape == (224, 224) for s in samples)
    assert samples[0].known["product"] == "casting"
    assert contrast_of(*np.nonzero(samples[2].mask)[::-1], samples[2].mask, samples[2].image.astype(np.float32)) > 0.05
    again = draw_product("cast_metal", 3, kinds[:3])
    assert all((a.image == b.image).all() for a, b in zip(samples, again, strict=False)), "fewer, but the same"


@pytest.mark.parametrize(
    ("family", "kind", "expected"),
    [("car", "good", "no family 'car'; the mini world has brushed_metal"),
     ("nut", "fold", "no fold on a nut; choose from good, crack"),
     ("wood", "rust", "no rust on a wood")],
)  # fmt: skip
def test_draw_product_says_what_there_is(family, kind, expected):
    with pytest.raises(DataError, match=expected):
        draw_product(family, 0, [kind])


def test_committed_data_is_what_the_script_makes():
    texts = {entry["image_name"]: entry for entry in json.loads((make_mini_data.FOLDER / "TADD_text.json").read_text())}
    for family in ("weave", "gear"):
        for name, sample in make_mini_data.pictures(family):
            stored = np.asarray(Image.open(make_mini_data.FOLDER / name)).astype(int)
            assert abs(stored - sample.image).mean() < 6, f"{name} is not what {make_mini_data.__name__} draws"
            assert texts[name] == record(name, sample, make_mini_data.KINDS)


def test_committed_data_is_complete_and_small():
    folder = make_mini_data.FOLDER
    index = index_folder(folder)
    assert not index.problems and len(index.rows) == 60
    assert {row.defect_type.replace("_", " ") for row in index.rows} == {"good", *TYPES}
    assert {row.product for row in index.rows} & set(HELD_OUT_FAMILIES)
    for row in index.rows:
        assert (row.width, row.height) == (224, 224)
        assert not row.mask or read_mask(folder / row.mask).any()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2_000_000
    records = read_records(folder / "TADD_text.json", folder)
    assert {record.image.relative_to(folder).as_posix() for record in records} == {row.image for row in index.rows}


def test_a_world_is_a_data_set_in_mvtec_layout(tmp_path):
    records = write_world(tmp_path, products=18, seed=3)
    index = index_folder(tmp_path)
    assert not index.problems and len(index.rows) == len(records) == 18 * 8
    assert {record["image_name"] for record in records} == {row.image for row in index.rows}
    assert len({(row.subset, row.product) for row in index.rows}) == 18  # two nuts are not taken for one
    counts = Counter((row.split, row.defect_type == "good") for row in index.rows)
    assert counts["train", True] == 18 * 3 and counts["test", False] + counts["test", True] == 18 * 5
    assert 0.35 < counts["test", False] / len(index.rows) <= 0.5  # what is too faint to be seen leaves a good picture
    assert not {row.defect_type.replace("_", " ") for row in index.rows} & set(HELD_OUT_TYPES)
    families = [family for family in FAMILIES if family not in HELD_OUT_FAMILIES][:18]
    names = {row.subset: row.product.replace("_", " ") for row in index.rows}
    for number, family in enumerate(families):
        assert names[f"{number:04}"] in names_of({"product": family.replace("_", " "), "family": family})
    said = {record["image_name"]: record["conversation"] for record in records}
    for row in index.rows:
        answers = [turn["value"] for turn in said[row.image][1::2]]
        wrong = "Yes, there is an anomaly" if not row.mask else "No, there is no anomaly"
        assert not any(answer.startswith(wrong) for answer in answers), row


def test_the_same_world_again_another_one_and_what_is_held_out(tmp_path):
    for name, options in (("a", {}), ("b", {}), ("c", {"seed": 1}), ("held", {"held_out": True})):
        write_world(tmp_path / name, products=4, **options)

    def files(name):
        return {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}

    assert files("a") == files("b") != files("c")
    names = {row.product.replace("_", " ") for row in index_folder(tmp_path / "held").rows}
    known = [names_of({"product": family, "family": family}) for family in HELD_OUT_FAMILIES]
    assert len(names) == 4 and all(names & set(of_family) for of_family in known)
    with pytest.raises(DataError, match="no family lether; the mini world has"):
        write_world(tmp_path / "d", 1, families=["lether"])
