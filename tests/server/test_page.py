"""The chat page in a real browser, held to axe-core's rules."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from serving import running

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium here: apt install chromium chromium-driver"
)
AXE = "4.14.1"
SHOTS = os.environ.get("MOBILELLM_SHOTS")  # a folder for screenshots


@cache
def axe_core() -> str:
    """axe-core from the npm registry, fetched once into the build cache."""
    home = Path(os.environ.get("MOBILELLM_BUILD_CACHE") or "~/.cache/mobilellm-cpp-build")
    packed = home.expanduser() / f"axe-core-{AXE}.tgz"
    if not packed.exists():
        npm = shutil.which("npm") or str(Path(sys.executable).with_name("npm"))
        with tempfile.TemporaryDirectory(dir=packed.parent) as folder:
            command = [npm, "pack", "--silent", f"axe-core@{AXE}"]
            if subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL).returncode:
                pytest.skip("npm cannot fetch axe-core")
            os.replace(Path(folder) / packed.name, packed)
    with tarfile.open(packed) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


@contextmanager
def browser(*arguments):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for each in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(each)
    options.add_argument("--window-size=1100,760")
    for each in arguments:
        options.add_argument(each)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def chromium():
    with browser() as driver:
        yield driver


class Page:
    def __init__(self, driver, url):
        from selenium.webdriver.support.ui import WebDriverWait

        self.driver = driver
        self._wait = WebDriverWait(driver, 20, poll_frequency=0.02)
        driver.get(url)
        driver.execute_script("localStorage.clear(); sessionStorage.clear()")
        driver.get_log("browser")  # what earlier pages said
        driver.get(url)

    def one(self, css):
        return self.driver.find_element("css selector", css)

    def texts(self, css):
        """In one go: the page may draw itself anew at any moment."""
        read = "return [...document.querySelectorAll(arguments[0])].map((each) => each.innerText)"
        return self.driver.execute_script(read, css)

    def until(self, condition):
        return self._wait.until(lambda _: condition())

    def status(self, text):
        self.until(lambda: self.one("#status").text == text)

    def ask(self, text):
        self.one("#question").send_keys(text)

    def shot(self, name):
        if SHOTS:
            self.driver.save_screenshot(str(Path(SHOTS) / f"{name}.png"))

    def check_rules(self):
        self.driver.execute_script(axe_core())
        done = self.driver.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
        assert len(done["passes"]) > 15
        assert [
            (each["id"], each["nodes"][0]["html"], each["nodes"][0]["failureSummary"])
            for each in done["violations"]
        ] == []

    def check_log(self):
        """The browser complained of nothing: no missing file, nothing that the policy forbids."""
        assert [each for each in self.driver.get_log("browser")] == []


def test_a_conversation(chromium, server, llm):
    from selenium.webdriver.common.keys import Keys

    hello = [{"role": "user", "content": "Hello! Who are you?"}]
    page = Page(chromium, server.url)
    page.until(lambda: page.one("#model").text == "demo")
    page.check_rules()
    page.one("#open-settings").click()
    page.check_rules()
    page.one("#temperature").send_keys("0")
    page.one("dialog button[value=close]").click()
    page.ask("Hello! Who are you?")
    page.ask(Keys.ENTER)
    page.status("The answer is there.")
    said = str(llm.chat(hello, temperature=0))
    assert page.texts("article p") == ["Hello! Who are you?", said]
    page.check_rules()
    page.shot("page-light")
    page.ask("And")
    page.ask(Keys.SHIFT + Keys.ENTER)
    page.ask("your name?" + Keys.ENTER)
    page.until(lambda: len(page.texts("article")) == 4)
    page.status("The answer is there.")
    assert page.texts("article p")[2] == "And\nyour name?"
    page.one("article:last-child .tools button:last-child").click()  # Regenerate
    page.status("The answer is there.")
    assert len(page.texts("article")) == 4
    page.one("#theme").click()
    page.check_rules()
    page.shot("page-dark")
    chromium.refresh()  # all of it is kept
    page.until(lambda: len(page.texts("article")) == 4)
    assert page.texts("#conversations li button:first-child") == ["Hello! Who are you?"]
    assert chromium.execute_script("return document.documentElement.dataset.theme") == "dark"
    page.one("#new").click()
    assert page.texts("article") == []
    page.one("#conversations li button:first-child").click()
    page.until(lambda: len(page.texts("article")) == 4)
    page.one("#conversations li button:last-child").click()
    assert page.texts("#conversations li") == page.texts("article") == []
    page.check_log()


def test_stop(chromium, llm, monkeypatch):
    from selenium.webdriver.common.keys import Keys

    from mobilellm_cpp.server import scheduler as module

    monkeypatch.setattr(module, "BURST", 0)  # a token a round
    with running(llm) as server:
        scheduler = server.service.scheduler
        going = scheduler._round

        scheduler._round = lambda work: (going(work), time.sleep(0.3))
        page = Page(chromium, server.url)
        page.ask("Hello! Who are you?" + Keys.ENTER)
        page.until(lambda: page.texts("article.assistant p") not in ([], [""]))
        assert not page.one("#send").is_enabled()
        page.one("#question").send_keys(Keys.ESCAPE)
        page.status("Stopped.")
        assert server.idle(2) and page.one("#send").is_enabled()
        page.check_log()

        scheduler._round = lambda work: time.sleep(0.05)
        page = Page(chromium, server.url)
        page.ask("Hello! Who are you?" + Keys.ENTER)
        page.until(lambda: page.one("#stop").is_displayed())
        page.one("#question").send_keys(Keys.ESCAPE)
        page.status("Stopped.")
        page.check_rules()
        scheduler._round = going
        page.one(".tools button").click()  # Ask again
        page.status("The answer is there.")
        assert page.texts("article h2") == ["You", "Model"]


def test_a_key(chromium, llm):
    with running(llm, key="sesam") as server:
        page = Page(chromium, server.url)
        page.until(lambda: page.one("#settings").is_displayed())
        page.one("#key").send_keys("sesam")
        page.one("dialog button[value=close]").click()
        page.until(lambda: page.one("#model").text == "demo")


def test_markup_in_a_text_stays_text(chromium, server):
    from selenium.webdriver.common.keys import Keys

    page = Page(chromium, server.url)
    text = "<img src=x onerror=alert(1)> <b>bold</b>"
    page.ask(text + Keys.ENTER)
    page.status("The answer is there.")
    assert page.texts("article.user p") == [text]
    assert page.driver.find_elements("css selector", "article img, article b") == []
    page.check_log()
