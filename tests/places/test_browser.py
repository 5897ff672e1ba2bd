"""JupyterLab as a learner meets it: each notebook opened in a headless browser, Run All, every slider moved.

    pip install selenium && pytest -m browser                 little more than the notebooks' own minutes
    pytest -m browser -k 05                                   one notebook

Plain pytest leaves these tests out. They need selenium, Chromium (or Chrome) and its chromedriver, and say so where one
is missing. They work in a copy of the repository, in a folder whose name has a space and an accent, with settings of
JupyterLab of their own. With DDPM_SCREENSHOTS=FOLDER, pictures of every output go there, to be looked at.
"""

import contextlib
import json
import os
import pathlib
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
from series import PATHS, ROOT, code_cells
from test_pages_static import mathematics

SLIDERS = {"01": 1, "05": 1, "09": 1, "10": 2}  # how many a notebook must have at least
RUN_SECONDS = 40 * 60  # for all cells of one notebook, on a busy machine
ANSWER_SECONDS = 60  # for a click, or for a slider's picture
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))

pytestmark = pytest.mark.browser


def program(*names):
    return next(filter(None, map(shutil.which, names)), None)


def git(folder, *arguments):
    return subprocess.run(
        ["git", *arguments],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        encoding="utf-8",
    ).stdout


def wait_for(what, condition, seconds=ANSWER_SECONDS):
    """The first true value of condition(), which is asked again and again; an AssertionError that says what otherwise."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.2)


def copy_of_the_repository(folder):
    """What git knows or would add, committed in a repository of its own, so that git status shows what a run changes."""
    for name in git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split(
        "\0"
    ):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(
        folder,
        "-c",
        "user.name=test",
        "-c",
        "user.email=test@example.org",
        "-c",
        "commit.gpgsign=false",
        "commit",
        "-qm",
        "as it is",
    )


class Lab:
    """A running JupyterLab: its folder, and what its server answers."""

    def __init__(self, folder, address, token):
        self.folder, self.address, self.token = folder, address, token

    def ask(self, path, method="GET"):
        request = urllib.request.Request(
            self.address + path, method=method, headers={"Authorization": f"token {self.token}"}
        )
        with LOCAL.open(request, timeout=ANSWER_SECONDS) as answer:
            return json.loads(answer.read() or "null")

    def idle(self):
        """Whether there is a kernel, and none is busy. While one starts, the list may be answered by a 500."""
        try:
            kernels = self.ask("api/kernels")
        except urllib.error.HTTPError as error:
            if error.code != 500:
                raise
            return False
        return kernels and all(kernel["execution_state"] == "idle" for kernel in kernels)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    pytest.importorskip("selenium", reason="selenium is not installed (pip install selenium)")
    if not program("chromedriver") or not program(
        "chromium", "chromium-browser", "google-chrome", "chrome"
    ):
        pytest.skip("no Chromium or Chrome with its chromedriver on the PATH")
    place = tmp_path_factory.mktemp("lab")
    folder = place / "première leçon"
    folder.mkdir()
    copy_of_the_repository(folder)
    settings = place / "settings"  # of JupyterLab
    for (
        plugin,
        values,
    ) in {  # no cell is left out of the page, no question about news covers it, saved when asked to
        "notebook-extension/tracker": {"windowingMode": "none"},
        "docmanager-extension/plugin": {"autosave": False},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }.items():
        file = settings / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), encoding="utf-8")
    token = secrets.token_hex(16)
    own = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    environment = {
        **os.environ,
        **{name: str(place / value) for name, value in own.items()},
        "JUPYTER_TOKEN": token,
        "DDPM_DATA": os.environ.get("DDPM_DATA", str(ROOT / "data")),
    }
    environment.pop("DDPM_MAINTAINER", None)  # a learner's run
    with open(place / "server.log", "wb") as log:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--allow-root",
                "--ServerApp.ip=127.0.0.1",
                "--ServerApp.port=0",
                "--ServerApp.open_browser=False",
                f"--ServerApp.root_dir={folder}",
            ],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:

        def address():
            assert server.poll() is None, (place / "server.log").read_text(errors="replace")
            for file in (place / "runtime").glob("jpserver-*.json"):
                with contextlib.suppress(json.JSONDecodeError):  # still being written
                    return json.loads(file.read_text(encoding="utf-8"))["url"]

        running = Lab(folder, wait_for("JupyterLab starts", address), token)
        yield running
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture
def browser(lab, tmp_path):
    """A browser of its own for each notebook; afterwards its kernel is shut down and the copy put in order."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium", "chromium-browser", "google-chrome", "chrome")
    for flag in [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--window-size=1400,1000",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]:
        options.add_argument(flag)
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(program("chromedriver"))
    )
    driver.set_script_timeout(ANSWER_SECONDS)
    yield driver
    driver.quit()
    for session in lab.ask("api/sessions"):
        lab.ask(f"api/sessions/{session['id']}", "DELETE")
    git(lab.folder, "checkout", "-q", "--", ".")  # as it was, for the next notebook
    git(lab.folder, "clean", "-fdq")


def choose(browser, menu, command):
    """Opens a menu of JupyterLab's bar and clicks the item of this command."""
    from selenium.common.exceptions import StaleElementReferenceException

    def click(selector, text=None):
        def found():
            try:
                for element in browser.find_elements("css selector", selector):
                    if element.is_displayed() and (text is None or element.text == text):
                        element.click()
                        return True
            except StaleElementReferenceException:  # the menu was just redrawn
                return False

        wait_for(f"{menu}, {command}: {selector}", found)

    click(".lm-MenuBar-item", menu)
    click(f'.lm-Menu-item[data-command="{command}"]:not(.lm-mod-disabled)')


def page(browser):
    """What the opened notebook shows: the prompts of its code cells, errors and warnings, and what mathematics failed."""
    return browser.execute_script("""
        const notebook = document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden)');
        const texts = selector => Array.from(notebook.querySelectorAll(selector), element => element.textContent.trim());
        return {prompts: texts('.jp-CodeCell .jp-InputArea-prompt'),
                errors: texts('[data-mime-type="application/vnd.jupyter.error"], ' +
                              '[data-mime-type="application/vnd.jupyter.stderr"]'),  // a traceback comes as the latter
                mathematics: texts('.jp-MarkdownOutput mjx-container').length,
                wrong: texts('mjx-merror, .MathJax_Error, merror'),
                rendered: texts('.jp-MarkdownCell.jp-mod-rendered').length,
                markdown: texts('.jp-MarkdownCell').length}""")


def open_notebook(browser, lab, path):
    browser.get(
        f"{lab.address}lab/tree/notebooks/{urllib.parse.quote(path.name)}?reset&token={lab.token}"
    )
    wait_for(
        "the notebook opens",
        lambda: browser.find_elements(
            "css selector", ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell"
        ),
    )
    wait_for("its kernel starts", lab.idle)


def run_all(browser, lab):
    """Clears what was saved, runs all cells, and hands back how the page looks at the end."""
    choose(browser, "Edit", "editmenu:clear-all")
    wait_for("the outputs are cleared", lambda: set(page(browser)["prompts"]) == {"[ ]:"})
    choose(browser, "Run", "runmenu:run-all")

    def ended():
        now = page(browser)
        assert not now["errors"], "\n".join(now["errors"])
        return now if not {"[ ]:", "[*]:"} & set(now["prompts"]) and lab.idle() else None

    return wait_for("all cells ran", ended, RUN_SECONDS)


def move_sliders(browser):
    """Moves every slider with the keyboard and with the mouse; the picture under it must follow. Hands back how many."""
    from selenium.webdriver import ActionChains, Keys

    count = len(browser.find_elements("css selector", ".widget-slider"))
    for i in range(count):
        slider = browser.find_elements("css selector", ".widget-slider")[i]
        browser.execute_script("arguments[0].scrollIntoView({block: 'start'})", slider)
        label = slider.find_element("css selector", ".widget-label")
        assert label.is_displayed() and label.text.strip(), "a slider without a label"
        handle = slider.find_element("css selector", "[role=slider]")

        def state():  # in one script, because the picture is replaced at any moment
            return browser.execute_script(
                """
                const images = arguments[0].closest('.widget-interact').querySelectorAll('img');
                return [Array.from(images, image => image.src), arguments[1].getAttribute('aria-valuetext')]""",
                slider,
                handle,
            )

        def moves(how, action):
            pictures, value = wait_for(
                "a picture under the slider", lambda: state() if state()[0] else None
            )
            action.perform()
            wait_for(
                f"slider {label.text} moves with the {how}, from {value}",
                lambda: state()[1] != value,
            )
            wait_for(
                f"the picture follows slider {label.text}",
                lambda: state()[0] and state()[0] != pictures,
            )

        browser.execute_script("arguments[0].focus()", handle)
        moves("keyboard", ActionChains(browser).send_keys(Keys.ARROW_RIGHT))
        moves("keyboard, back", ActionChains(browser).send_keys(Keys.ARROW_LEFT))
        moves("mouse", ActionChains(browser).drag_and_drop_by_offset(handle, 60, 0))
        moves("mouse, back", ActionChains(browser).drag_and_drop_by_offset(handle, -90, 0))
    return count


def save(browser, path):
    """Saves the opened notebook, and hands back what is in the file."""
    before = path.read_bytes()
    choose(browser, "File", "docmanager:save")

    def saved():
        if path.read_bytes() != before and not path.with_name(f".~{path.name}").exists():
            with contextlib.suppress(json.JSONDecodeError):  # still being written
                return json.loads(path.read_text(encoding="utf-8"))

    return wait_for("the notebook is saved", saved)


def take_pictures(browser, path):
    folder = pathlib.Path(os.environ["DDPM_SCREENSHOTS"]) / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    browser.set_window_size(1400, 1700)
    for i, cell in enumerate(
        browser.find_elements("css selector", ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell")
    ):
        browser.execute_script("arguments[0].scrollIntoView({block: 'start'})", cell)
        cell.screenshot(str(folder / f"{i:02}.png"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_learner_runs_the_notebook(path, lab, browser):
    open_notebook(browser, lab, path)
    end = run_all(browser, lab)
    shown = [
        n
        for n, cell in enumerate(code_cells(path), 1)
        if not cell["metadata"].get("jupyter", {}).get("source_hidden")
    ]
    assert end["prompts"] == [f"[{n}]:" for n in shown]  # a collapsed cell has no prompt
    assert end["rendered"] == end["markdown"] > 0
    texts = [
        "".join(cell["source"])
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "markdown"
    ]
    assert end["mathematics"] == sum(len(mathematics(text)) for text in texts) and not end["wrong"]
    assert move_sliders(browser) >= SLIDERS.get(path.stem[:2], 0)
    assert not page(browser)["errors"], page(browser)["errors"]
    if os.environ.get("DDPM_SCREENSHOTS"):
        take_pictures(browser, path)
    saved = save(browser, lab.folder / "notebooks" / path.name)
    assert "widgets" not in saved["metadata"], "GitHub would not show it"
    changed = git(lab.folder, "-c", "core.quotepath=off", "status", "--porcelain").splitlines()
    assert changed == [f" M notebooks/{path.name}"], "the run changed more than the opened notebook"
