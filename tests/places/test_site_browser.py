"""The notebooks' web pages as a reader meets them: in a headless browser, narrow and wide, light and dark.

    pip install selenium && pytest -m browser tests/places/test_site_browser.py        some minutes

Nothing is run: the sliders have drawn pictures here. Formulas are looked at where MathJax can be had, from
`outputs/site/node_modules` (notebooks/teaching.md tells how it gets there) or from the network. With
DDPM_SCREENSHOTS=FOLDER, pictures of the pages go there, to be looked at.
"""

import base64
import io
import os
import pathlib
import shutil

import make_site
import pytest
from PIL import Image
from series import PATHS
from test_browser import program, wait_for

NAMES = ["index", *(path.stem for path in PATHS)]
VIEWS = [(375, "light"), (375, "dark"), (1200, "light"), (1200, "dark")]
pytestmark = pytest.mark.browser


def drawn_frames(path):
    """Three grey squares in place of each slider's pictures."""
    frames = []
    for grey in (0, 128, 255):
        file = io.BytesIO()
        Image.new("L", (640, 200), grey).save(file, "PNG")
        frames.append((f"{grey}", grey == 128, base64.b64encode(file.getvalue()).decode()))
    cells = make_site.nbformat.read(path, as_version=4).cells
    return {i: {"t": frames} for i, cell in enumerate(cells) if "interact(" in cell.source}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    installed = make_site.SITE / "node_modules"
    if installed.is_dir():
        shutil.copytree(installed, folder / "node_modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_site, "frames_of", drawn_frames)
        make_site.make_site(folder=folder)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start() opens a browser; start(scripts=False) one that runs no scripts of a page."""
    pytest.importorskip("selenium", reason="selenium is not installed (pip install selenium)")
    binary = program("chromium", "chromium-browser", "google-chrome", "chrome")
    if not program("chromedriver") or not binary:
        pytest.skip("no Chromium or Chrome with its chromedriver on the PATH")
    from selenium import webdriver

    drivers = []

    def open_one(scripts=True):
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        for flag in [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
        ]:
            options.add_argument(flag)
        options.page_load_strategy = "eager"  # MathJax may be out of reach
        service = webdriver.ChromeService(program("chromedriver"))
        drivers.append(webdriver.Chrome(options=options, service=service))
        if not scripts:
            drivers[-1].execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
        return drivers[-1]

    yield open_one
    for driver in drivers:
        driver.quit()


@pytest.fixture(scope="module")
def browser(start):
    return start()


def look_at(browser, site, name, width=1200, scheme="light"):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get((site / f"{name}.html").as_uri())


def typeset(browser):
    """Waits for MathJax; False where it could not be had."""
    return browser.execute_async_script("""
        const done = arguments[0];
        const look = () => {
            if (window.MathJax?.startup?.promise) MathJax.startup.promise.then(() => done(true));
            else if (document.readyState == 'complete') done(false);
            else setTimeout(look, 100); };
        look();""")


def luminance(colour):
    """WCAG 2's relative luminance of "rgb(…)"."""
    values = [int(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def faint(browser):
    """Texts whose contrast against what is behind them is below 4.5, as "contrast: text"."""
    texts = browser.execute_script("""
        const behind = element => {
            for (; element; element = element.parentElement) {
                const colour = getComputedStyle(element).backgroundColor;
                if (colour != 'rgba(0, 0, 0, 0)') return colour; }
            return 'rgb(255, 255, 255)'; };
        const found = {};
        for (const element of document.querySelectorAll('body *')) {
            if (element.closest('svg, mjx-container, script')) continue;
            const text = Array.from(element.childNodes).filter(node => node.nodeType == 3)
                .map(node => node.data.trim()).join(' ').trim();
            if (text) found[getComputedStyle(element).color + '|' + behind(element)] = text.slice(0, 40); }
        return found;""")
    assert len(texts) > 1
    complaints = []
    for colours, text in texts.items():
        dark, light = sorted(map(luminance, colours.split("|")))
        if (light + 0.05) / (dark + 0.05) < 4.5:
            complaints.append(f"{(light + 0.05) / (dark + 0.05):.2f}: {text}")
    return complaints


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
@pytest.mark.parametrize("name", NAMES)
def test_a_page_fits_and_can_be_read(browser, site, name, width, scheme):
    look_at(browser, site, name, width, scheme)
    has_mathjax = typeset(browser)
    if os.environ.get("DDPM_SCREENSHOTS"):
        folder = pathlib.Path(os.environ["DDPM_SCREENSHOTS"]) / "site"
        folder.mkdir(parents=True, exist_ok=True)
        for y in range(0, browser.execute_script("return document.body.scrollHeight"), 2000):
            clip = {"x": 0, "y": y, "width": width, "height": 2000, "scale": 1}
            shot = {"captureBeyondViewport": True, "clip": clip}
            picture = browser.execute_cdp_cmd("Page.captureScreenshot", shot)["data"]
            file = folder / f"{name}_{width}_{scheme}_{y // 2000:02}.png"
            file.write_bytes(base64.b64decode(picture))
    if has_mathjax:  # without it formulas stay as they are typed
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert not faint(browser)
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(paper) < 0.1) == (scheme == "dark")


@pytest.mark.parametrize("name", NAMES[1:])
def test_formulas_are_rendered(browser, site, name):
    look_at(browser, site, name)
    if not typeset(browser):
        pytest.skip("MathJax can't be had: npm install --prefix outputs/site mathjax@3")
    assert len(browser.find_elements("css selector", "mjx-container")) > 20
    wrong = "mjx-merror, [data-mjx-error]"
    assert not browser.find_elements("css selector", wrong)
    left = browser.execute_script("""
        const copy = document.querySelector('main').cloneNode(true);
        copy.querySelectorAll('pre, code, mjx-container').forEach(element => element.remove());
        return copy.textContent.match(/\\$[^$]*\\$/g)""")
    assert not left


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_sliders_move_and_folded_parts_unfold(browser, site, path):
    from selenium.webdriver import Keys

    look_at(browser, site, path.stem, 375)
    sliders = browser.find_elements("css selector", ".slider")
    assert len(sliders) == len(drawn_frames(path))
    for slider in sliders:
        handle = slider.find_element("css selector", "input")

        def seen():
            pictures = slider.find_elements("css selector", "img")
            return [p.get_attribute("alt") for p in pictures if p.is_displayed()]

        assert seen() == ["t = 128"] == [slider.find_element("css selector", "output").text]
        for key, text in ((Keys.ARROW_RIGHT, "t = 255"), (Keys.HOME, "t = 0")):
            handle.send_keys(key)
            wait_for(f"the slider shows {text}", lambda: seen() == [text], 5)
            assert slider.find_element("css selector", "output").text == text
            assert handle.get_attribute("aria-valuetext") == text
    for details in browser.find_elements("css selector", "details"):
        inside = details.find_element("css selector", "summary + *")
        assert not inside.is_displayed()
        details.find_element("css selector", "summary").click()
        assert inside.is_displayed()


def test_without_scripts_a_still_is_shown_and_no_slider(start, site):
    browser = start(scripts=False)
    for path in PATHS:
        if drawn_frames(path):
            browser.get((site / f"{path.stem}.html").as_uri())
            sliders = browser.find_elements("css selector", ".slider")
            assert sliders and not any(slider.is_displayed() for slider in sliders)
            still = browser.find_element("css selector", ".slider ~ img")  # the next one below
            assert still.is_displayed() and still.get_attribute("alt")
