"""Pages in a real browser: what is on the first screen, at three widths, in both colour schemes, by mouse and by keyboard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report.browser import browser, opened
from report.test_run_page import ATTACK, made_up_card, made_up_run, plots_of

from rlhf.report.run_page import write_report

SIZES = {"desk": (1280, 800), "tablet": (820, 1100), "phone": (390, 844)}


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    with browser() as own:
        yield own


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with all its parts, with prompts in Arabic and Chinese, and a long word."""
    run = made_up_run(tmp_path_factory.mktemp("run"))
    (run / "reward" / "card.json").write_text(json.dumps(made_up_card()), encoding="utf-8")
    rows = [json.loads(line) for line in (run / "ppo" / "comparison.jsonl").read_text().splitlines()]
    for row, text in zip(
        rows[3::3], ("اكتب جملة واحدة عن فيلم", "请写一句关于电影的评论", "w" * 300, *"abc"), strict=False
    ):
        row["prompt"], row["ppo_response"] = text, text * 3
    (run / "ppo" / "comparison.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return write_report(run)


def test_the_first_screen_fits_every_screen(chrome: Any, page_file: Path, tmp_path: Path) -> None:
    """Bug: a page wider than the screen, a verdict below the fold, an open data table, colours that cannot be read."""
    for name, (width, height) in SIZES.items():
        with opened(chrome, page_file, viewport={"width": width, "height": height}) as page:
            assert page.locator(".tile").count() == 4 and page.locator(".trio").count() == 3
            assert page.locator("#data-card").get_attribute("open") is None
            assert page.locator("#data-card dl").is_hidden()
            assert page.evaluate("document.documentElement.dataset.drawn") == "15"
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                where = f"{name}, {scheme}"
                assert page.evaluate("document.documentElement.scrollWidth") == width, where
                for part in ("h1", ".task", ".tile >> nth=3", ".trio >> nth=0", ".sides h2 >> nth=0"):
                    box = page.locator(part).first.bounding_box()
                    assert box and box["y"] >= 0 and box["y"] + box["height"] <= height, (where, part, box)
                    assert box["x"] >= 0 and box["x"] + box["width"] <= width, (where, part, box)
                assert contrast(page, "h1") > 7 and contrast(page, ".tile .from") > 4.5, where
                page.screenshot(path=tmp_path / f"{name}-{scheme}.png")
    assert len(list(tmp_path.glob("*.png"))) == 6


def contrast(page: Any, part: str) -> float:
    """The contrast of a text with the page behind it, as WCAG defines it; 4.5 is what it asks for."""
    colors = page.evaluate(
        "part => [getComputedStyle(document.querySelector(part)).color, getComputedStyle(document.body).backgroundColor]",
        part,
    )

    def luminance(color: str) -> float:
        parts = [int(number) / 255 for number in color[4:-1].split(",")]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(map(luminance, colors))
    return (high + 0.05) / (low + 0.05)


def test_plots_zoom_by_mouse_by_button_and_by_touch(chrome: Any, page_file: Path) -> None:
    """Bug: plots stay empty, lack the names of their axes, or cannot be zoomed without a mouse."""
    charts = plots_of(page_file.read_text(encoding="utf-8"))
    score = next(number for number, chart in enumerate(charts) if chart["title"] == "Reward score")
    axis = f"document.querySelector('[data-plot=\"{score}\"]').layout.xaxis"
    with opened(chrome, page_file, viewport={"width": 1280, "height": 800}) as page:
        assert page.locator(".js-line").count() >= 13 and page.locator(".plot .point").count() >= 18
        assert page.evaluate(f"{axis}.title.text") == "PPO updates"
        for number, chart in enumerate(charts):
            named = page.locator(f'[data-plot="{number}"] .xtitle').text_content()
            assert named and named == chart["axis"], chart["title"]
        plot = page.locator(f'[data-plot="{score}"]')
        plot.scroll_into_view_if_needed()
        box = plot.locator(".nsewdrag").first.bounding_box()
        page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + box["height"] - 20, steps=5)
        page.mouse.up()
        low, high = page.evaluate(f"{axis}.range")
        assert 1 < low < high < 24
        page.mouse.dblclick(box["x"] + box["width"] / 2, box["y"] + 50)
        page.wait_for_function(f"{axis}.range[1] > 23")
        plot.locator(".modebar-btn").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_function(f"{axis}.range[1] < 23")
    options = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with opened(chrome, page_file, **options) as page:
        plot = page.locator(f'[data-plot="{score}"]')
        plot.scroll_into_view_if_needed()
        plot.locator(".modebar-btn").first.tap()
        page.wait_for_function(f"{axis}.range[1] < 23")
        assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_search_contents_and_folds_work_by_keyboard(chrome: Any, page_file: Path) -> None:
    """Bug: an empty search shows an empty page; a link of the contents leads nowhere; a hint or table only a mouse can reach."""
    with opened(chrome, page_file, viewport={"width": 1280, "height": 800}) as page:
        assert page.title() == "ppo/demo@1"
        page.fill("#search", "w" * 300)
        assert page.locator(".sample:visible").count() == 1 and page.locator("#none").is_hidden()
        assert page.locator("#count").inner_text() == "1 of 20"
        page.fill("#search", "no such text")
        assert (
            page.locator("#none").is_visible()
            and "Nothing found for “no such text”" in page.locator("#none").inner_text()
        )
        page.click("#clear")
        assert page.locator(".sample:visible").count() == 20 and page.locator("#none").is_hidden()
        page.select_option("#sort", "-gain")
        gains = [float(card.get_attribute("data-gain")) for card in page.locator(".sample").all()]
        assert gains == sorted(gains, reverse=True)
        assert page.locator(".sample .prompt", has_text="اكتب").evaluate("e => getComputedStyle(e).direction") == "rtl"
        links = page.locator("nav a").evaluate_all("links => links.map(link => link.getAttribute('href').slice(1))")
        assert links == page.locator("main h2[id]").evaluate_all("heads => heads.map(head => head.id)")
        page.locator("nav a", has_text="Curves").focus()
        page.keyboard.press("Enter")
        page.wait_for_function("document.getElementById('curves').getBoundingClientRect().top < 200")
        page.locator(".hint summary").first.focus()
        page.keyboard.press("Enter")
        assert page.locator(".hint p").first.is_visible()
        boxes = page.locator(".scroll").evaluate_all("boxes => boxes.every(box => box.tabIndex === 0)")
        assert boxes and ATTACK not in page.content()


def test_paper_shows_everything_in_dark_ink(chrome: Any, page_file: Path) -> None:
    """Bug: a page printed from a dark screen is white on white, or lacks what was folded; the screen is not restored."""
    with opened(chrome, page_file, viewport={"width": 1280, "height": 800}, color_scheme="dark") as page:
        ink = "getComputedStyle(document.body).color"
        before = page.evaluate(ink)
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.evaluate(ink) == "rgb(29, 31, 36)" and page.locator("#data-card dl").is_visible()
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.evaluate(ink) == before and page.locator("#data-card dl").is_hidden()
