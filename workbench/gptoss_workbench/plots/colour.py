"""Colour tables made here, not copied: equal steps in the data are equal steps to the eye.

The curves are drawn in Oklab (B. Ottosson, "A perceptual color space for image processing", 2020), where
straight distance is close to perceived difference, and then resampled so that neighbouring entries are
equally far apart. Lightness rises all the way through the sequential table, so it also reads in grey and
with any colour-vision deficiency.
"""

from __future__ import annotations

from functools import cache

import numpy as np

Theme = str  # "light" or "dark"

_LMS_FROM_LAB = np.array([
    [1.0, 0.3963377774, 0.2158037573],
    [1.0, -0.1055613458, -0.0638541728],
    [1.0, -0.0894841775, -1.2914855480],
])
_RGB_FROM_LMS = np.array([
    [4.0767416621, -3.3077115913, 0.2309699292],
    [-1.2684380046, 2.6097574011, -0.3413193965],
    [-0.0041960863, -0.7034186147, 1.7076147010],
])
_FINE = 2048


def oklab_to_srgb(lab: np.ndarray) -> np.ndarray:
    """Oklab (..., 3) to gamma-encoded sRGB (..., 3); values outside 0..1 are colours no screen shows."""
    linear = (lab @ _LMS_FROM_LAB.T) ** 3 @ _RGB_FROM_LMS.T
    small = np.clip(linear, 0.0031308, None)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * small ** (1 / 2.4) - 0.055)


def srgb_to_oklab(rgb: np.ndarray) -> np.ndarray:
    """Gamma-encoded sRGB (..., 3) in 0..1 to Oklab (..., 3)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lms = np.cbrt(linear @ np.linalg.inv(_RGB_FROM_LMS).T)
    return lms @ np.linalg.inv(_LMS_FROM_LAB).T


def _polar(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """Oklab from lightness, chroma and hue (degrees); chroma is cut where the screen's gamut ends."""
    angle = np.deg2rad(hue)
    direction = np.stack([np.zeros_like(angle), np.cos(angle), np.sin(angle)], axis=-1)
    grey = np.stack([lightness, np.zeros_like(angle), np.zeros_like(angle)], axis=-1)
    low, high = np.zeros_like(chroma), chroma.copy()
    for _ in range(24):
        middle = (low + high) / 2
        rgb = oklab_to_srgb(grey + middle[:, None] * direction)
        inside = ((rgb >= 0) & (rgb <= 1)).all(axis=-1)
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return grey + low[:, None] * direction


def _even(lab: np.ndarray, count: int) -> np.ndarray:
    """The same curve with ``count`` points at equal perceptual distance, as sRGB bytes (count, 3)."""
    steps = np.linalg.norm(np.diff(lab, axis=0), axis=-1)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    wanted = np.linspace(0.0, along[-1], count)
    points = np.stack([np.interp(wanted, along, lab[:, i]) for i in range(3)], axis=-1)
    return np.clip(np.round(oklab_to_srgb(points) * 255), 0, 255).astype(np.uint8)


@cache
def sequential() -> np.ndarray:
    """The table for quantities from little to much: uint8 (256, 3), night blue over teal and green to near white."""
    t = np.linspace(0.0, 1.0, _FINE)
    chroma = 0.13 * np.minimum(1.0, np.minimum(0.45 + 3.0 * t, 0.14 + 2.6 * (1.0 - t)))
    return _even(_polar(0.25 + 0.73 * t, chroma, 285.0 - 175.0 * t), 256)


@cache
def diverging(theme: Theme = "light") -> np.ndarray:
    """The table for quantities with a zero: uint8 (255, 3), blue below, page-like at zero, orange above."""
    middle, end = (0.97, 0.50) if theme == "light" else (0.26, 0.80)
    t = np.linspace(0.0, 1.0, _FINE)

    def arm(hue: float) -> np.ndarray:
        return _polar(middle + (end - middle) * t, 0.15 * t, np.full_like(t, hue))

    below, above = _even(arm(252.0), 128), _even(arm(48.0), 128)
    return np.concatenate([below[::-1], above[1:]])


def table(theme: Theme = "light", signed: bool = False) -> np.ndarray:
    """The table as a page of that theme uses it: small values recede into the page, large ones stand out."""
    if signed:
        return diverging(theme)
    return sequential()[::-1] if theme == "light" else sequential()


def plotly_scale(theme: Theme = "light", signed: bool = False, stops: int = 33) -> list[list]:
    """The table as a plotly colour scale: [[0.0, "rgb(r,g,b)"], ..., [1.0, "rgb(r,g,b)"]]."""
    colours = table(theme, signed)
    at = np.linspace(0.0, 1.0, stops)
    rows = colours[np.round(at * (len(colours) - 1)).astype(int)]
    return [[float(a), "rgb({},{},{})".format(*map(int, row))] for a, row in zip(at, rows, strict=True)]


def ink(rgb: tuple[int, int, int] | np.ndarray) -> str:
    """Black or white, whichever is the more readable on that background (WCAG contrast)."""
    share = np.asarray(rgb, dtype=float) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ np.array([0.2126, 0.7152, 0.0722]))
    return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"
