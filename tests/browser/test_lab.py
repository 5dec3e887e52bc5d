"""The ground the browser tests stand on: the lab opens, cells run, the extension loads."""

from __future__ import annotations


def test_the_lab_runs_cells_and_says_nothing_on_its_own(lab_page):
    lab_page.notebook(["print('a' * 3)", "1 / 0"])
    lab_page.run_all()
    first, second = lab_page.outputs()[:2]
    assert first.strip() == "aaa"
    assert "ZeroDivisionError" in second
    assert lab_page.execute("x = 6 * 7") == "ok"
    assert lab_page.value("{'x': x}") == {"x": 42}
    assert lab_page.execute("1 / 0") == "error"
    assert lab_page.page.locator(".Toastify__toast").count() == 0
    lab_page.theme("dark")
    lab_page.theme("light")
    assert lab_page.screenshot("lab").stat().st_size > 10_000
    assert lab_page.errors == []
