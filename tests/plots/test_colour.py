"""The colour tables: even to the eye, rising in lightness, readable with any colour vision."""

from __future__ import annotations

import numpy as np
import pytest

from gptoss_workbench.plots import colour


def lightness(table: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB bytes, from the standard's formulas; a second source for what Oklab promises."""
    share = table / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    y = linear @ np.array([0.2126729, 0.7151522, 0.0721750])
    return np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)


def test_oklab_knows_the_published_colours():
    # B. Ottosson's table: XYZ white is Lab (1, 0, 0); and there and back is the identity
    assert np.allclose(colour.srgb_to_oklab(np.ones(3)), [1, 0, 0], atol=1e-4)
    assert np.allclose(colour.srgb_to_oklab(np.zeros(3)), 0, atol=1e-6)
    rgb = np.random.default_rng(0).random((100, 3))
    assert np.allclose(colour.oklab_to_srgb(colour.srgb_to_oklab(rgb)), rgb, atol=1e-6)


def test_sequential_table_rises_and_is_even():
    table = colour.sequential()
    assert table.shape == (256, 3) and table.dtype == np.uint8
    rise = lightness(table)
    assert rise[0] < 20 and rise[-1] > 95
    assert (np.diff(rise) > -0.35).all()  # bytes round; over any few entries it rises
    assert (rise[8:] - rise[:-8] > 0).all()
    lab = colour.srgb_to_oklab(table / 255)
    steps = np.linalg.norm(lab[8:] - lab[:-8], axis=1)
    assert steps.max() / steps.min() < 1.6


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_small_values_recede_into_the_page(theme):
    page = 100.0 if theme == "light" else 8.0
    away = np.abs(lightness(colour.table(theme)) - page)
    assert away[0] < 12 and away[-1] > 75


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_diverging_table_has_its_zero_in_the_middle_and_equal_arms(theme):
    table = colour.table(theme, signed=True)
    assert len(table) == 255
    middle = table[127].astype(int)
    assert np.ptp(middle) <= 2  # grey
    light = lightness(table)
    assert abs((light[0] - light[127]) - (light[-1] - light[127])) < 8
    assert table[0, 2] > table[0, 0] and table[-1, 0] > table[-1, 2]  # blue below, orange above


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_on_any_entry_has_contrast(theme, signed):
    for rgb in colour.table(theme, signed):
        share = rgb / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
        text = 0.0 if colour.ink(rgb) == "#000000" else 1.0
        high, low = max(luminance, text), min(luminance, text)
        assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG AA


def test_plotly_scale_spans_the_table():
    scale = colour.plotly_scale("dark")
    assert scale[0][0] == 0.0 and scale[-1][0] == 1.0
    assert scale[0][1] == "rgb({},{},{})".format(*colour.sequential()[0])
    assert [at for at, _ in scale] == sorted(at for at, _ in scale)
