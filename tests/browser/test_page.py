"""The report page in headless Chromium, driven by its own DevTools protocol through selenium."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pa_fast.report import write
from pa_fast.sweep import sweep
from tests.report import runs
from tests.sweep.fakes import FakeEngine, Scorer

pytestmark = pytest.mark.browser
webdriver = pytest.importorskip("selenium.webdriver")
SHOTS = Path(os.environ.get("PA_FAST_SCREENSHOTS", "screenshots"))
QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--hide-scrollbars",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (*QUIET, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield made
    made.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    one = runs.sized(runs.made(folder / "sweep"))
    flat = runs.sized(runs.made(folder / "flat", shape="flat", n=300), layers=4)
    write(runs.loaded(one))
    shutil.copytree(one, folder / "two")
    write(runs.loaded(folder / "two", flat))
    many = sweep(FakeEngine(), "0:1:1/9999", [Scorer("icl")], folder / "many", figure=False)
    large = sweep(
        FakeEngine(), "0:1:0.05", [runs.Tasks("icl", n=50_000)], folder / "large", figure=False
    )
    for result in (many, large):
        write([result])
    names = ("sweep", "two", "flat", "many", "large")
    return {name: folder / name / "report.html" for name in names}


def opened(browser: Any, page: Path, width: int = 1280, scheme: str = "light") -> float:
    """Open a page; return the seconds until it was drawn."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    start = time.perf_counter()
    browser.get(page.as_uri())
    drawn = (
        "return [...document.querySelectorAll('figure')].every(f => f.querySelector('.vega-embed'))"
    )
    while not browser.execute_script(drawn):
        assert time.perf_counter() - start < 60, "the charts were not drawn"
        time.sleep(0.02)
    return time.perf_counter() - start


def requests(browser: Any) -> list[str]:
    events = [json.loads(one["message"])["message"] for one in browser.get_log("performance")]
    sent = [
        e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in sent if not url.startswith(("file:", "data:", "blob:"))]


@pytest.mark.parametrize("name", ["sweep", "two", "flat", "many"])
def test_no_console_error_and_no_request(browser: Any, pages: dict[str, Path], name: str) -> None:
    opened(browser, pages[name])
    assert not [one for one in browser.get_log("browser") if one["level"] in ("SEVERE", "WARNING")]
    assert requests(browser) == []
    assert browser.switch_to.active_element is not None and "alert" not in browser.title


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("name", ["sweep", "two", "flat", "many"])
def test_it_fits_and_is_seen(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    opened(browser, pages[name], width, scheme)
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(overflow) <= 0
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    label = (
        "const t = document.querySelector('figure svg text');"
        "return [getComputedStyle(t).fill, getComputedStyle(document.body).color]"
    )
    fill, ink = browser.execute_script(label)
    assert fill == ink, "labels of charts have another colour than the text"
    height = browser.execute_script("return document.documentElement.scrollHeight")
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    time.sleep(0.3)
    SHOTS.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(SHOTS / f"{name}-{width}-{scheme}.png"))


def test_tables_sort_by_numbers_and_by_text(browser: Any, pages: dict[str, Path]) -> None:
    opened(browser, pages["sweep"])
    column = """
      const [title, press] = arguments;
      const tables = [...document.querySelectorAll('table')];
      const table = tables.find(t => t.tHead.textContent.includes('wins'));
      const heads = [...table.tHead.rows[0].cells];
      const at = heads.findIndex(h => h.textContent.trim() === title);
      if (press) heads[at].querySelector('button').click();
      return [[...table.tBodies[0].rows].map(r => r.cells[at].textContent), heads[at].ariaSort];
    """
    for title, key in (
        ("wins", lambda text: float(text.replace(",", ""))),
        ("difference", lambda text: float(text.replace("−", "-"))),
        ("task", str),
    ):
        before, _ = browser.execute_script(column, title, False)
        up, direction = browser.execute_script(column, title, True)
        assert up == sorted(before, key=key) and direction == "ascending"
        down, direction = browser.execute_script(column, title, True)
        assert [key(text) for text in down] == sorted(map(key, before), reverse=True)
        assert direction == "descending"


def test_it_is_reached_by_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.keys import Keys

    opened(browser, pages["sweep"])
    seen = set()
    body = browser.find_element("tag name", "body")
    for _ in range(40):
        body.send_keys(Keys.TAB) if not seen else browser.switch_to.active_element.send_keys(
            Keys.TAB
        )
        seen.add(browser.switch_to.active_element.tag_name)
    assert {"button", "div"} <= seen
    is_open = "return document.querySelector('details').open"
    before = browser.execute_script(is_open)
    browser.execute_script("document.querySelector('summary').focus()")
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.execute_script(is_open) is not before


def test_it_is_readable_without_scripts(browser: Any, pages: dict[str, Path]) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(pages["sweep"].as_uri())
        figures = browser.find_elements("css selector", "figure .drawn svg")
        assert len(figures) >= 4 and all(figure.is_displayed() for figure in figures)
        assert browser.find_element("tag name", "h1").text.startswith("λ = ")
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.parametrize("name", ["sweep", "two", "many", "large"])
def test_its_size_and_the_time_to_open_it(browser: Any, pages: dict[str, Path], name: str) -> None:
    size = pages[name].stat().st_size
    seconds = min(opened(browser, pages[name]) for _ in range(3))
    print(f"{name}: {size / 1e6:.2f} MB, {seconds:.2f} s")
    assert size <= 5_000_000 and seconds <= 2


def test_many_λ_are_thinned_and_the_page_says_so(browser: Any, pages: dict[str, Path]) -> None:
    opened(browser, pages["many"])
    text = browser.find_element("tag name", "body").text
    left = re.findall(r"([\d,]+) λ are left out, evenly", text)
    assert len(left) == 3, "beside both charts and the table"
    marks = (
        "return document.querySelector('figure svg').querySelectorAll('.mark-symbol path').length"
    )
    assert browser.execute_script(marks) == 10_000 - int(left[0].replace(",", "")) <= 101
