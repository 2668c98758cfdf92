"""
Pictures of real handwritten digits on real photographs: a pure function of (seed, split, index, size).

The digits are the 1,797 samples of 8x8 pixels in scikit-learn (``sklearn.datasets.load_digits``), the
photographs those that come inside the scikit-learn and scikit-image packages, so nothing is downloaded.

Train and val share neither: of each class the last quarter of the samples belongs to val (the samples are
stored in order of collection, so neighbours, which look alike, mostly stay together), and of each
photograph the right 30% of the columns. A picture's random state depends on (seed, kind, split, index)
alone, so the number of pictures does not change any of them.

Boxes are (x0, y0, x1, y1) in pixels with x1, y1 exclusive: Detectron2's XYXY_ABS.
"""

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

from kd_det.quickstart.register import DIGIT_CLASSES, SPLITS

__all__ = ["Picture", "Sources", "extreme_points", "load_sources", "render_crop", "render_digit", "render_scene"]

VAL_DIGITS = 0.25  # of each class, the last ones
VAL_COLUMNS = 0.3  # of each photograph, the right ones
MAX_OBJECTS = 6
SCENE_SIDES = (0.11, 0.4)  # height of a digit over the side of the picture
CROP_SIDES = (0.5, 0.85)
MIN_VISIBLE = 0.7  # of each digit's pixels: the rest may lie outside the picture or under later digits
MAX_IOU = 0.3  # between boxes: beyond this, crossed strokes make digits unreadable
MIN_CONTRAST = 60.0  # Euclidean, RGB in 0..255, between a digit and the mean of what it is pasted on
LIGHT_CONTRAST = 90.0  # of brightness in 0..255, by which light digits exceed what they are pasted on ...
LIGHTEST = 200.0  # ... up to this brightness, so that a colour can be found on a light digit, too
DIMMED = 0.4  # brightness of the photographs behind light digits
BRIGHTNESS = (0.114, 0.587, 0.299)  # of B, G, R
MAX_NOISE = 8.0  # standard deviation, in 0..255
CELL = 16  # pixels that one of the 8x8 cells becomes before the warp


@dataclass(frozen=True)
class Sources:
    """
    What one split may draw from. ``digits[c]``: (rows in load_digits(), images (n, 8, 8) in 0..1).
    ``photos``: (name, first column, region (h, w, 3) uint8 BGR) each.
    """

    digits: tuple
    photos: tuple


@dataclass(frozen=True)
class Picture:
    """The lists hold one entry per digit; later ones lie on top of earlier ones."""

    image: np.ndarray  # (H, W, 3) uint8, BGR
    labels: list
    visible: list  # bool (H, W): the digit's pixels that are inside the picture and not under another digit
    boxes: np.ndarray  # (n, 4) int, the tight boxes of ``visible``
    truncated: list  # bool: the box is smaller than the whole digit's
    digit_ids: list  # rows in load_digits()
    photo: tuple  # (name, x0, y0, side): what part of which photograph is behind


@cache
def load_sources(split):
    """Read the digits and photographs that ``split`` ("train" or "val") may use."""
    # Here, not above: only those who make the data set need these packages.
    import skimage.data
    from sklearn.datasets import load_digits, load_sample_image

    bunch = load_digits()
    digits = []
    for label in range(len(DIGIT_CLASSES)):
        indices = np.flatnonzero(bunch.target == label)
        first_val = round(len(indices) * (1 - VAL_DIGITS))
        indices = indices[:first_val] if split == "train" else indices[first_val:]
        digits.append((indices, (bunch.images[indices] / 16).astype(np.float32)))

    photos = {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    for name in ("astronaut", "brick", "chelsea", "coffee", "grass", "gravel", "rocket"):
        photos[name] = getattr(skimage.data, name)()
    photos["motorcycle"] = skimage.data.stereo_motorcycle()[0]  # only the left view: both show the same scene
    regions = []
    for name, photo in sorted(photos.items()):
        first_val = round(photo.shape[1] * (1 - VAL_COLUMNS))
        x0, x1 = (0, first_val) if split == "train" else (first_val, photo.shape[1])
        code = cv2.COLOR_GRAY2BGR if photo.ndim == 2 else cv2.COLOR_RGB2BGR
        regions.append((name, x0, cv2.cvtColor(np.ascontiguousarray(photo[:, x0:x1]), code)))
    return Sources(tuple(digits), tuple(regions))


def render_digit(sample, side, *, angle=0.0, shear=0.0, aspect=1.0, threshold=0.5):
    """
    Draw one digit smoothly at any size.

    Args:
        sample: (8, 8) float32 in 0..1. side: height in pixels that its 8 rows become. angle: degrees.
        shear: x per y. aspect: width over height. threshold: ink above it is stroke; lower means thicker.

    Returns:
        (h, w) float32 in 0..1, the part of each pixel that ink covers, cut tightly: every border row and column holds
        one of the digit's pixels, those covered by half or more.
    """
    # Interpolate the grey values first and find the edge after the warp: it then is sharp at every size.
    field = cv2.resize(np.pad(sample, 1), None, fx=CELL, fy=CELL, interpolation=cv2.INTER_CUBIC)
    scale = side / (8 * CELL)
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array([[aspect, shear], [0, 1]]) * scale
    canvas = 2 * int(np.ceil(max(1, aspect) * side)) + 4
    # Centre upon centre. OpenCV's coordinates are of pixel centres: the middle of n pixels is (n - 1) / 2.
    offset = np.full(2, (canvas - 1) / 2) - matrix @ np.full(2, (len(field) - 1) / 2)
    warped = cv2.warpAffine(field, np.column_stack([matrix, offset]), (canvas, canvas))
    # A cell's ink goes from 0 to 1 over side / 8 pixels, so this slope makes the edge about one pixel wide.
    coverage = np.clip((warped - threshold) * max(side / 8, 2.0) + 0.5, 0, 1)
    x0, y0, x1, y1 = _tight_box(coverage >= 0.5)
    return coverage[y0:y1, x0:x1]


def render_scene(split, index, *, size, seed, light=False):
    """
    Draw :class:`Picture` ``index`` of a split: 1 to MAX_OBJECTS digits, ``size`` x ``size`` pixels. The first digit's
    class is index % 10, so any ten pictures in a row hold every class. With ``light``, digits are lighter than what
    they lie on, a dimmed photograph: much easier to learn from scratch than digits of either polarity.
    """
    rng = np.random.default_rng([seed, 0, SPLITS.index(split), index])
    others = rng.integers(len(DIGIT_CLASSES), size=rng.integers(MAX_OBJECTS))
    labels = [index % len(DIGIT_CLASSES), *(int(label) for label in others)]
    return _render(rng, load_sources(split), size, labels, SCENE_SIDES, light)


def render_crop(split, index, *, size, seed, light=False):
    """Draw one digit of class index % 10 that fills most of a :class:`Picture`, as :func:`render_scene` draws it."""
    rng = np.random.default_rng([seed, 1, SPLITS.index(split), index])
    return _render(rng, load_sources(split), size, [index % len(DIGIT_CLASSES)], CROP_SIDES, light)


def extreme_points(mask):
    """The (x, y) of DIGIT_KEYPOINTS: of the digit's pixels in an outermost row or column, the middle one."""
    x0, y0, x1, y1 = _tight_box(mask)
    lines = [np.flatnonzero(line) for line in (mask[y0], mask[y1 - 1], mask[:, x0], mask[:, x1 - 1])]
    top, bottom, left, right = (int(pixels[len(pixels) // 2]) for pixels in lines)
    return (top, y0), (bottom, y1 - 1), (x0, left), (x1 - 1, right)


def _render(rng, sources, size, labels, sides, light):
    image, photo = _background(rng, sources, size)
    if light:
        image = image * DIMMED
    placed, masks, areas, full_boxes, digit_ids = [], [], [], [], []
    for label in labels:
        for _ in range(20):  # a digit that finds no free place in 20 tries is left out
            digit_id, coverage = _draw_digit(rng, sources, label, sides, size)
            h, w = coverage.shape
            x0, y0 = (int(round(rng.uniform(-0.15 * n, size - 0.85 * n))) for n in (w, h))
            alpha = _paste(coverage, x0, y0, size)
            mask, area = alpha >= 0.5, int((coverage >= 0.5).sum())
            remaining = [old & ~mask for old in masks] + [mask]
            if _acceptable(remaining, [*areas, area]):
                break
        else:
            continue
        image = _blend(rng, image, alpha, mask, light)
        masks = remaining
        placed.append(label)
        areas.append(area)
        full_boxes.append((x0, y0, x0 + w, y0 + h))
        digit_ids.append(digit_id)
    # As a camera's noise: on digits and photograph alike.
    image = image + rng.normal(0, rng.uniform(0, MAX_NOISE), image.shape)
    boxes = np.array([_tight_box(mask) for mask in masks], dtype=np.int64).reshape(-1, 4)
    truncated = [tuple(box) != full for box, full in zip(boxes.tolist(), full_boxes)]
    image = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return Picture(image, placed, masks, boxes, truncated, digit_ids, photo)


def _background(rng, sources, size):
    name, first_column, region = sources.photos[rng.integers(len(sources.photos))]
    h, w = region.shape[:2]
    side = int(round(rng.uniform(0.4, 1.0) * min(h, w)))
    x0, y0 = int(rng.integers(w - side + 1)), int(rng.integers(h - side + 1))
    crop = region[y0 : y0 + side, x0 : x0 + side]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    interpolation = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    crop = cv2.resize(np.ascontiguousarray(crop), (size, size), interpolation=interpolation)
    return crop * rng.uniform(0.6, 1.1), (name, first_column + x0, y0, side)


def _draw_digit(rng, sources, label, sides, size):
    indices, samples = sources.digits[label]
    which = rng.integers(len(indices))
    coverage = render_digit(
        samples[which],
        size * np.exp(rng.uniform(*np.log(sides))),
        angle=rng.uniform(-25, 25),  # more would make a 6 a 9
        shear=rng.uniform(-0.25, 0.25),
        aspect=rng.uniform(0.75, 1.3),
        threshold=rng.uniform(0.4, 0.6),
    )
    return int(indices[which]), coverage


def _acceptable(visible, areas):
    """Whether every digit keeps enough visible pixels and the last box does not cover another too much."""
    if any(mask.sum() < MIN_VISIBLE * area for mask, area in zip(visible, areas)):
        return False
    *others, last = (_tight_box(mask) for mask in visible)
    return all(_iou(last, other) <= MAX_IOU for other in others)


def _blend(rng, image, alpha, mask, light):
    below = image[mask].mean(axis=0)
    least = min(below @ BRIGHTNESS + LIGHT_CONTRAST, LIGHTEST)
    while True:  # ends soon: most of the colour cube is far from any one colour
        colour = rng.uniform(0, 255, size=3)
        if colour @ BRIGHTNESS >= least if light else np.linalg.norm(colour - below) >= MIN_CONTRAST:
            break
    alpha = (alpha * rng.uniform(0.75, 1.0))[..., None]
    return image * (1 - alpha) + colour * alpha


def _paste(patch, x0, y0, size):
    """``patch`` at (x0, y0) of an empty (size, size) canvas; what falls outside is cut."""
    canvas = np.zeros((size, size), np.float32)
    h, w = patch.shape
    top, left, bottom, right = max(y0, 0), max(x0, 0), min(y0 + h, size), min(x0 + w, size)
    canvas[top:bottom, left:right] = patch[top - y0 : bottom - y0, left - x0 : right - x0]
    return canvas


def _tight_box(mask):
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def _iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)
