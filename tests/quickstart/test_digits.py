import numpy as np
import pytest

from kd_det.quickstart import digits
from kd_det.quickstart.digits import load_sources, render_crop, render_digit, render_scene


def tight_box(mask):
    """By definition: the smallest and largest pixel, the end exclusive."""
    pixels = [(x, y) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    xs, ys = [x for x, _ in pixels], [y for _, y in pixels]
    return [min(xs), min(ys), max(xs) + 1, max(ys) + 1]


def test_render_digit_of_full_ink_is_the_rectangle():
    # 8 rows of full ink, 32 pixels high: the edge (half ink) is where the cells end.
    full = np.ones((8, 8), np.float32)
    coverage = render_digit(full, 32)
    assert coverage.shape == (32, 32)
    assert coverage.min() >= 0 and coverage.max() == 1
    assert coverage.sum() == pytest.approx(32 * 32, rel=0.05)
    assert render_digit(full, 32, aspect=0.5).shape == (32, 16)
    assert render_digit(full, 32, aspect=0.5, angle=90).shape == (16, 32)
    # A square turned by 45 degrees is sqrt(2) as wide: 45.25, less the corners that interpolation rounds.
    h, w = render_digit(full, 32, angle=45).shape
    assert 40 <= h <= 46 and 40 <= w <= 46


def test_render_digit_is_cut_tightly_and_keeps_its_place():
    sample = np.zeros((8, 8), np.float32)
    sample[2:6, 3:5] = 1
    coverage = render_digit(sample, 64)  # 8 pixels to the cell: 4 x 2 cells
    h, w = coverage.shape
    assert 32 <= h <= 34 and 16 <= w <= 18  # bicubic interpolation overshoots beside a thin stroke
    for border in (coverage[0], coverage[-1], coverage[:, 0], coverage[:, -1]):
        assert border.max() >= 0.5


def test_boxes_are_tight_around_the_visible_pixels():
    several = 0
    for index in range(20):
        picture = render_scene("train", index, size=96, seed=3)
        assert picture.boxes.tolist() == [tight_box(mask) for mask in picture.visible]
        assert np.sum(picture.visible, axis=0).max() <= 1  # no pixel belongs to two digits
        several += len(picture.labels) > 1
    assert several > 5


def test_extreme_points_by_hand():
    mask = np.array([list(row) for row in ("..###.", "#.....", ".....#", "##.#..", "......")]) == "#"
    # As (x, y); of two pixels the second, never a place between them.
    assert digits.extreme_points(mask) == ((3, 0), (1, 3), (0, 3), (5, 2))


def test_boxes_are_tight_in_the_image_itself(monkeypatch):
    # On a grey photograph without noise, a digit's pixels are at least half as far from grey as its colour.
    grey = np.full((160, 160, 3), 128, np.uint8)
    sources = load_sources("train")
    flat = digits.Sources(sources.digits, (("grey", 0, grey),))
    monkeypatch.setattr(digits, "load_sources", lambda split: flat)
    monkeypatch.setattr(digits, "MAX_NOISE", 0)
    for index in range(20):
        picture = render_crop("train", index, size=96, seed=0)
        background = np.median(picture.image.reshape(-1, 3), axis=0)
        distance = np.linalg.norm(picture.image - background, axis=2)
        assert picture.boxes.tolist() == [tight_box(distance >= 0.5 * distance.max())]


def test_every_digit_stays_visible(monkeypatch):
    drawn = []
    draw = digits._draw_digit
    monkeypatch.setattr(digits, "_draw_digit", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    truncated = []
    for index in range(40):
        drawn.clear()
        picture = render_scene("val", index, size=96, seed=0)
        areas = {digit_id: int((coverage >= 0.5).sum()) for digit_id, coverage in drawn}
        for digit_id, mask, cut in zip(picture.digit_ids, picture.visible, picture.truncated):
            if [d for d, _ in drawn].count(digit_id) == 1:
                assert mask.sum() >= digits.MIN_VISIBLE * areas[digit_id]
                assert cut or mask.sum() <= areas[digit_id]
        truncated += picture.truncated
    assert 0 < sum(truncated) < len(truncated) / 2


def test_any_ten_pictures_in_a_row_hold_every_class():
    for render in (render_scene, render_crop):
        labels = {render("val", index, size=64, seed=5).labels[0] for index in range(7, 17)}
        assert labels == set(range(10))


def test_labels_are_the_digits_own():
    from sklearn.datasets import load_digits

    target = load_digits().target
    for index in range(10):
        picture = render_scene("train", index, size=96, seed=0)
        assert picture.labels == target[picture.digit_ids].tolist()


def test_train_and_val_share_no_digit_and_no_region():
    train, val = load_sources("train"), load_sources("val")
    ids = {
        name: np.concatenate([indices for indices, _ in split.digits])
        for name, split in (("train", train), ("val", val))
    }
    assert sorted([*ids["train"], *ids["val"]]) == list(range(1797))  # each once: disjoint, none lost
    assert len(ids["val"]) / 1797 == pytest.approx(0.25, abs=0.01)
    assert [name for name, _, _ in train.photos] == [name for name, _, _ in val.photos]
    for (_, start, region), (_, val_start, val_region) in zip(train.photos, val.photos):
        assert start == 0 and region.shape[1] == val_start and val_region.shape[1] >= 0.29 * val_start


@pytest.mark.parametrize("render", [render_scene, render_crop])
def test_a_picture_depends_on_seed_split_and_index(render):
    image = render("train", 4, size=64, seed=1).image
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert np.array_equal(render("train", 4, size=64, seed=1).image, image)
    for split, index, seed in (("val", 4, 1), ("train", 5, 1), ("train", 4, 2)):
        assert not np.array_equal(render(split, index, size=64, seed=seed).image, image)


def test_digits_stand_out_from_the_photograph():
    # The colour is drawn at least MIN_CONTRAST away from the mean of what lies below, so a digit can be seen.
    rng = np.random.default_rng(0)
    image = np.full((8, 8, 3), 90.0)
    mask = np.zeros((8, 8), bool)
    mask[2:5, 2:5] = True
    for _ in range(50):
        out = digits._blend(rng, image, mask.astype(np.float32), mask, light=False)
        assert np.array_equal(out[~mask], image[~mask])
        assert np.linalg.norm(out[3, 3] - 90) >= 0.75 * digits.MIN_CONTRAST


def test_light_digits_are_lighter_than_what_they_lie_on():
    weights = np.array(digits.BRIGHTNESS)
    for index in range(10):
        picture = render_scene("val", index, size=96, seed=0, light=True)
        brightness = picture.image.astype(float) @ weights
        under = np.ones(brightness.shape, bool)
        for x0, y0, x1, y1 in picture.boxes.astype(int):
            under[y0:y1, x0:x1] = False
        assert brightness[under].max() < 255 * digits.DIMMED + 5 * digits.MAX_NOISE
        for x0, y0, x1, y1 in picture.boxes.astype(int):
            assert np.percentile(brightness[y0:y1, x0:x1], 90) > brightness[under].mean() + digits.LIGHT_CONTRAST / 2
