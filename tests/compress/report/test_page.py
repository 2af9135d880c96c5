"""The pages in headless Chromium: what a keyboard chooses is shown, and nothing is wider than a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.report import build_report, compare_runs
from tests.helpers.browser import CHROMIUM, browser
from tests.helpers.kept_run import FILES, keep_run
from tests.helpers.report_pages import full_report, write_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: the page is not tried")

SHOWN = """[...document.querySelectorAll('.shot')].filter((shot) => shot.getBoundingClientRect().height > 50)
  .map((shot) => shot.querySelector('.reason').textContent.split(':')[0])"""
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def run(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    keep_run(folder)
    artifacts = [{**full_report()["artifacts"][0], "file": file, "latency_doubts": ["not stable"]} for file in FILES]
    report = {**full_report(), "classes": ["class 0", "class 1"], "artifacts": artifacts, "pictures": [], **changes}
    long = f"a_long_name_{len(changes)}" * 9
    (folder / "recipe.yaml").write_text(f"name: run\nteacher: {{checkpoint: {long}}}\n")
    return write_run(folder, report)


def test_pictures_are_filtered_by_keyboard_and_phones_need_no_sideways_scrolling(tmp_path: Path) -> None:
    one, two = run(tmp_path / "one"), run(tmp_path / "two", name="a_name_without_a_break_" * 4)
    pages = [build_report(one, 6), tmp_path / "compare.html"]
    compare_runs([one, two], pages[1])
    with browser() as page:
        page.open(pages[0].as_uri())
        assert len(page.run(SHOWN)) == 6
        page.run("document.querySelector('#why-all').focus()")
        for words in ("Among the worst", "Among the best", "Teacher and student differ"):
            page.press("ArrowRight")
            found = page.run(SHOWN)
            assert found and set(found) == {words}, words
        for path in pages:
            page.open(path.as_uri(), 390, 844, phone=True)
            assert page.run(WIDER) == 0, path.name
        assert page.complaints == [] and not [url for url in page.requested if url.startswith("http")]
