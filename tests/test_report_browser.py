"""The HTML report in a real browser: keyboard, screen reader, phone, dark mode, paper."""

import os
import shutil
from pathlib import Path

import pytest

from lego.cli import run_command
from lego.run_folder import RunFolder
from tests.runs import finished_run

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
SessionNotCreatedException = pytest.importorskip(
    "selenium.common.exceptions"
).SessionNotCreatedException
By = pytest.importorskip("selenium.webdriver.common.by").By

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
DRIVER = shutil.which("chromedriver") or ""
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs chromium and chromedriver on the PATH"
)
BENCHMARKS = Path(__file__).parents[1] / "benchmarks" / "results" / "decode.json"
THEMES = ("light", "dark")
# WCAG 2.2: 4.5:1 for text, by the computed colours of text and of what lies behind it
LOW_CONTRAST = """
const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const parse = text => text.match(/[\\d.]+/g).map(Number);
const luminance = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
const behind = e => {
  for (; e; e = e.parentElement) {
    const found = parse(getComputedStyle(e).backgroundColor);
    if (found.length < 4 || found[3] > 0) return found;
  }
  return [255, 255, 255];
};
const low = [];
let seen = 0;
for (const e of document.querySelectorAll('body *')) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  if (!own || e.closest('script, defs') || !e.getClientRects().length) continue;
  const style = getComputedStyle(e);
  const ink = parse(e.closest('svg') ? style.fill : style.color);
  const [a, b] = [luminance(ink), luminance(behind(e))].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  seen += 1;
  if (ratio < 4.5) low.push(`${e.tagName}.${e.className.baseVal ?? e.className} ${ratio}`);
}
return [seen, low];
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report.html"
    folder = str(finished_run()[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEGO_CACHE", str(finished_run()[2]))
        args = ["report", folder, folder, "--benchmarks", str(BENCHMARKS), "--out", str(out)]
        assert run_command(args) == 0
    return out


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # chromium refuses to start as root with it
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    except SessionNotCreatedException as error:
        # such as in a container that forbids what a browser needs
        pytest.skip(f"{BROWSER} does not start here: {error.msg}")
    yield driver
    driver.quit()


def show(browser, report, *, theme="light", width=1200, media=""):
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(report.as_uri())


def open_all(browser):
    browser.execute_script("for (const e of document.querySelectorAll('details')) e.open = true;")


def focused(browser):
    return browser.switch_to.active_element


def described(browser):
    """(role, name, description) of what is focused, as assistive technology is given them."""
    document = browser.execute_cdp_cmd("DOM.getDocument", {})["root"]["nodeId"]
    query = {"nodeId": document, "selector": ":focus"}
    node = browser.execute_cdp_cmd("DOM.querySelector", query)["nodeId"]
    found = browser.execute_cdp_cmd(
        "Accessibility.getPartialAXTree", {"nodeId": node, "fetchRelatives": False}
    )["nodes"][0]
    return tuple(found.get(key, {}).get("value", "") for key in ("role", "name", "description"))


def test_quiet_and_alone(browser, report):
    """Nothing on the console, nothing fetched."""
    show(browser, report)
    open_all(browser)
    browser.find_element(By.CSS_SELECTOR, ".token").click()
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.title == "LEGO report: run, run"


def test_as_many_tokens_as_were_generated(browser, report):
    show(browser, report)
    config = RunFolder(finished_run()[0]).config()
    wanted = config.model.max_seq_len - config.timing.prompt_tokens
    for i in (1, 2):
        tokens = browser.find_elements(By.CSS_SELECTOR, f"#run{i}-map > [role=option]")
        assert len(tokens) == wanted
        rows = browser.find_elements(By.CSS_SELECTOR, f"#run{i}-exits tbody tr, tbody tr")
        assert len(rows) > wanted


def test_keyboard(browser, report):
    """One tab stop for the tokens of a run; arrows move, and each token says its confidence."""
    show(browser, report)
    body = browser.find_element(By.TAG_NAME, "body")
    reached = []
    while len(reached) < 200:
        (focused(browser) if reached else body).send_keys(Keys.TAB)
        reached.append(focused(browser))
        if reached[-1].get_attribute("role") == "option":
            break
    assert reached[0].get_attribute("textContent") == "Skip to the content"
    assert reached[-1].get_attribute("role") == "option" and len(reached) < 30
    tokens = browser.find_elements(By.CSS_SELECTOR, "#run1-map > [role=option]")
    panel = browser.find_element(By.ID, "run1-map-panel")

    def at(place):
        token = focused(browser)
        assert token == tokens[place]
        title = token.get_attribute("title")
        role, name, description = described(browser)
        assert role == "option" and name and description == title and ", confidence 0." in title
        assert panel.text.endswith(title) and token.get_attribute("aria-selected") == "true"
        selected = browser.find_elements(By.CSS_SELECTOR, "#run1-map > [aria-selected=true]")
        stops = browser.find_elements(By.CSS_SELECTOR, "#run1-map > [tabindex='0']")
        assert selected == stops == [token]

    at(0)
    for key, place in (
        (Keys.ARROW_LEFT, 0),
        (Keys.ARROW_RIGHT, 1),
        (Keys.ARROW_DOWN, 2),
        (Keys.ARROW_UP, 1),
        (Keys.END, len(tokens) - 1),
        (Keys.ARROW_RIGHT, len(tokens) - 1),
        (Keys.HOME, 0),
    ):
        focused(browser).send_keys(key)
        at(place)
    focused(browser).send_keys(Keys.TAB)
    assert focused(browser).tag_name == "summary"
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.execute_script(outline) != "none"


def test_pointer_and_finger(browser, report):
    show(browser, report, width=360)
    tokens = browser.find_elements(By.CSS_SELECTOR, "#run2-map > [role=option]")
    panel = browser.find_element(By.ID, "run2-map-panel")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", tokens[5])
    tokens[5].click()
    assert panel.text.endswith(tokens[5].get_attribute("title"))
    webdriver.ActionChains(browser).move_to_element(tokens[7]).perform()
    assert panel.text.endswith(tokens[7].get_attribute("title"))


def test_everything_has_a_name(browser, report):
    """Images, links, regions, tables and options, as the accessibility tree has them."""
    show(browser, report)
    open_all(browser)
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    counts = {}
    for node in nodes:
        role = node.get("role", {}).get("value")
        if node.get("ignored") or role not in {
            "image", "img", "link", "region", "table", "option", "listbox", "article", "navigation"
        }:  # fmt: skip
            continue
        assert node.get("name", {}).get("value"), node
        counts[role] = counts.get(role, 0) + 1
    pictures = counts.get("image", 0) + counts.get("img", 0)
    assert pictures >= 8 and counts["article"] == counts["listbox"] == 2 and counts["table"] > 20


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", [320, 360, 768])
def test_no_sideways_scrolling(browser, report, theme, width):
    """Wide tables scroll in a box of their own, which the keyboard reaches."""
    show(browser, report, theme=theme, width=width)
    open_all(browser)
    widths = "const e = document.documentElement; return [e.scrollWidth, e.clientWidth, innerWidth]"
    scroll, client, inner = browser.execute_script(widths)
    assert scroll == client <= inner == width  # without and with a scroll bar
    boxes = """return [...document.querySelectorAll('.scroll')].map(
        e => [e.scrollWidth > e.clientWidth || e.scrollHeight > e.clientHeight, e.tabIndex])"""
    # sizes are observed after a frame
    frames = "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
    browser.execute_async_script(frames)
    found = browser.execute_script(boxes)
    assert {(scrolls, stop) for scrolls, stop in found} == {(True, 0), (False, -1)}


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("media", ["screen", "print"])
def test_contrast(browser, report, theme, media):
    show(browser, report, theme=theme, media=media)
    open_all(browser)
    seen, low = browser.execute_script(LOW_CONTRAST)
    assert seen > 200 and low == []


def test_dark_mode_and_paper(browser, report):
    """Paper is white whatever the screen was."""
    colours = {}
    ask = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    for media in ("screen", "print"):
        for theme in THEMES:
            show(browser, report, theme=theme, media=media)
            colours[media, theme] = browser.execute_script(ask)
    assert colours["screen", "light"] != colours["screen", "dark"]
    assert colours["print", "light"] == colours["print", "dark"]
    assert colours["print", "dark"] == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
    assert not browser.find_element(By.TAG_NAME, "nav").is_displayed()


def test_exits_differ_without_colour(browser, report):
    show(browser, report)
    style = """const s = getComputedStyle(document.querySelector(arguments[0]));
        return [s.fontWeight, s.borderBottomStyle]"""
    shallow, deep = (browser.execute_script(style, f".legend .{n}") for n in ("shallow", "deep"))
    assert all(one != two for one, two in zip(shallow, deep, strict=True))
