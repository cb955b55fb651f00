"""The page of the quotas in a real browser: what it shows, where it is red, what it remembers, and how it is used."""

import base64
import contextlib
import json
import os
import re
from pathlib import Path

import chromium
import pytest
from asgi_client import Model
from http_server import serving

from modelquota import ResourceQuotaConfig, ResourceQuotaManager
from modelquota.asgi import QuotaMiddleware
from modelquota.cluster.status import STATES, ClusterStatus, Share
from modelquota.errors import StoreError
from modelquota.reading.unmetered import unmetered_of

pytestmark = pytest.mark.skipif(chromium.PATH is None, reason="no chromium is installed; apt-get install chromium")

TOKEN = "a-token-of-the-operator"
HOSTILE = "<img src=x onerror=alert(1)>"
TEXT = "document.body.innerText"
unlimited = ResourceQuotaConfig.unlimited

# The page's clock can be put forward, and its next reading asked for at once.
SKIP = """(() => {
    const now = performance.now.bind(performance);
    let skipped = 0;
    performance.now = () => now() + skipped;
    window.skip = async seconds => { skipped += 1000 * seconds; await refresh(); };
})()"""


@pytest.fixture(scope="module")
def chrome():
    with chromium.browser() as browser:
        browser.command("Page.addScriptToEvaluateOnNewDocument", source=SKIP)
        yield browser


@pytest.fixture
def page(chrome):
    """Opens the page of a manager or of an application, and returns the browser."""
    chrome.complaints.clear()
    with contextlib.ExitStack() as stack:

        def show(shown, *, width=1280, theme="light", count=None):
            app = QuotaMiddleware(Model(), shown, page="/quota") if isinstance(shown, ResourceQuotaManager) else shown
            address = stack.enter_context(serving(app))
            chrome.show(f"{address}/quota", width=width, height=1000, theme=theme)
            chrome.until('document.getElementById("at")?.textContent.startsWith("as of")')
            if count is not None:
                assert chrome.evaluate('document.querySelectorAll("article").length') == count
            return chrome

        yield show
        assert chrome.complaints == []
        chrome.command("Page.navigate", url="about:blank")


def texts(browser, selector):
    """The texts of all elements that are shown or, in a long list, would be as soon as they are scrolled to."""
    return browser.evaluate(f"""[...document.querySelectorAll({json.dumps(selector)})].filter(e => e.checkVisibility())
        .map(e => e.textContent.replace(/\\s+/g, " ").trim())""")


def search(browser, text):
    browser.evaluate(f"""(() => {{
        byId("find").value = {json.dumps(text)};
        byId("find").dispatchEvent(new Event("input"));
    }})()""")


def limits(browser):
    """Of each limit on the page: its label, its state, and what it says."""
    found = browser.evaluate("""[...document.querySelectorAll(".limit")].map(e => [
        e.querySelector(".label").innerText, e.className.replace("limit", "").trim(),
        e.innerText.replaceAll("\\n", " ")])""")
    return {label: (state, text) for label, state, text in found}


def contrast(one, other):
    """The ratio of WCAG 2."""

    def luminance(color):
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# Of every element with text of its own, and of every bar, the color and the ground.
COLORS = """(() => {
    const ground = e => { for (; e; e = e.parentElement) {
        const color = getComputedStyle(e).backgroundColor;
        if (!/, 0\\)$/.test(color)) return color;
    } return "rgb(255, 255, 255)"; };
    const shown = e => e.checkVisibility() && e.getClientRects().length;
    const all = [...document.body.querySelectorAll(":not(script, style, option)")];
    const texts = all.filter(e => shown(e) && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
    const bars = [...document.querySelectorAll(".part:not(.burst) > .fill")].filter(e => shown(e) && e.offsetWidth);
    return {texts: texts.map(e => [getComputedStyle(e).color, ground(e), e.textContent.slice(0, 30)]),
            bars: bars.map(e => [getComputedStyle(e).backgroundColor, ground(e.parentElement),
                e.closest(".limit, .tightest, #legend span").className])};
})()"""


@pytest.fixture
def all_states():
    """A manager with a limit in every state, and ids that are markup."""
    manager = ResourceQuotaManager()
    manager.set_quota(
        "chat-70b", max_tokens_per_hour=1000, max_requests_per_hour=None, max_ram_mb=100, on_violation="reject"
    )
    manager.set_quota("code-34b-instruct-with-a-name-that-is-longer-than-a-phone-is-wide-" + "x" * 60)
    manager.set_quota(HOSTILE, on_violation="warn", max_tokens_per_hour=5)
    manager.set_quota(unlimited(f"{HOSTILE}#{HOSTILE}", max_tokens_per_hour=5, shadow_limits=["tokens_per_hour"]))
    manager.set_quota(unlimited("busy", max_concurrent_requests=1, on_violation="queue"))
    manager.set_quota(unlimited("spent", max_requests_per_day=1, on_violation="reject"))
    unmetered_of(manager).count(f"/v1/{HOSTILE}", "a test")
    held = [manager.reserve("chat-70b", 800, 60), manager.reserve("busy", 1), manager.reserve("spent", 1)]
    assert not manager.check_quota("chat-70b", 300)
    assert manager.check_quota(HOSTILE, 300)
    yield manager, held
    for grant in held:
        grant.release()


@pytest.mark.parametrize(
    ("name", "width"), [("light", 1280), ("dark", 1280), ("phone-light", 400), ("phone-dark", 400)]
)
def test_it_can_be_read(page, all_states, name, width):
    """In both themes, on a desk and on a phone; pictures are kept if MODELQUOTA_SCREENSHOTS names a folder."""
    manager, _ = all_states
    browser = page(manager, width=width, theme=name.removeprefix("phone-"), count=5)
    assert browser.evaluate("document.scrollingElement.scrollWidth") <= width
    colors = browser.evaluate(COLORS)
    assert len(colors["texts"]) > 100
    assert [words for *pair, words in colors["texts"] if contrast(*pair) < 4.5] == []
    assert len(colors["bars"]) > 5
    assert [words for *pair, words in colors["bars"] if contrast(*pair) < 3] == []
    assert (contrast(browser.evaluate("getComputedStyle(document.body).backgroundColor"), "0 0 0") > 10) == (
        "light" in name
    )
    assert (
        browser.evaluate("""getComputedStyle(document.querySelector(".used")).fontVariantNumeric""") == "tabular-nums"
    )
    assert browser.evaluate("""getComputedStyle(document.querySelector(".used")).textAlign""") == "right"
    if folder := os.environ.get("MODELQUOTA_SCREENSHOTS"):
        picture = browser.command("Page.captureScreenshot", captureBeyondViewport=width < 600)["data"]
        Path(folder, f"{name}.png").write_bytes(base64.b64decode(picture))


class ClusterMember:
    """What a manager tells of its cluster, in a state of a test's choice."""

    def __init__(self, state, *, error=None, leads=True):
        self.told = ClusterStatus(
            state, leads, 52.7, 3 * leads, 12.2 * (state == "learning"), starved=1234 * leads, error=error
        )

    def status(self):
        return self.told

    def shares(self):
        if not self.told.leads:
            return []
        return [
            Share("chat-70b", "tokens_per_hour", 1000, 800, 800, 140, 60),
            Share("busy", "concurrent_requests", 1, 1, 1, 0, 0),
        ]

    def close(self):
        pass


@pytest.mark.parametrize(("name", "width"), [("light", 1280), ("dark", 1280), ("light", 400), ("dark", 400)])
@pytest.mark.parametrize("state", STATES)
def test_a_cluster_can_be_read(page, all_states, monkeypatch, state, name, width):
    manager, _ = all_states
    error = StoreError("out_of_memory", "full") if state in ("degraded", "expired") else None
    monkeypatch.setattr(ResourceQuotaManager, "cluster", property(lambda self: ClusterMember(state, error=error)))
    browser = page(manager, width=width, theme=name, count=5)
    assert browser.evaluate("document.scrollingElement.scrollWidth") <= width
    counts = ["Cluster" + state, "Lease left52 s", "Hosts3", "Starved1,234"]
    counts += ["Grants in12 s"] * (state == "learning") + ["Storeout of memory"] * (error is not None)
    assert sorted(texts(browser, "#cluster div")) == sorted(counts)
    said = [words.partition(" · ")[0] for words in texts(browser, ".words") if words.startswith("share")]
    assert said == [
        "share of this host: 800, free: 140; 60 held by hosts that are gone",
        "share of this host: 1, free: 0",
    ]
    colors = browser.evaluate(COLORS)
    assert [words for *pair, words in colors["texts"] if contrast(*pair) < 4.5] == []
    color = 'getComputedStyle(document.querySelector("#cluster dd")).color'
    plain = 'getComputedStyle(document.querySelector("#totals dd")).color'
    assert (browser.evaluate(color) == browser.evaluate(plain)) == (state == "ok")
    folder = os.environ.get("MODELQUOTA_SCREENSHOTS")
    if folder:
        picture = browser.command("Page.captureScreenshot", captureBeyondViewport=True)
        Path(folder, f"cluster-{state}-{name}-{width}.png").write_bytes(base64.b64decode(picture["data"]))


def test_a_process_that_does_not_exchange_shows_state_and_lease_only(page, all_states, monkeypatch):
    manager, _ = all_states
    browser = page(manager, count=5)
    assert texts(browser, "#cluster div") == []
    monkeypatch.setattr(ResourceQuotaManager, "cluster", property(lambda self: ClusterMember("ok", leads=False)))
    browser.evaluate("skip(2)")
    assert texts(browser, "#cluster div") == ["Clusterok", "Lease left52 s"]
    assert "share" not in browser.evaluate(TEXT)


def test_ids_and_paths_are_text(page, all_states):
    manager, _ = all_states
    browser = page(manager, count=5)
    assert HOSTILE in texts(browser, "h3 button")
    assert f"#{HOSTILE}" in texts(browser, ".of-meter h4 .id")
    assert [f"/v1/{HOSTILE}"] == texts(browser, "#unmetered td:first-child")
    assert browser.evaluate('document.querySelectorAll("img").length') == 0


def test_it_follows_the_manager_and_says_when_it_cannot(chrome, all_states):
    manager, (held, *_) = all_states
    chrome.complaints.clear()
    with serving(QuotaMiddleware(Model(), manager, page="/quota")) as address:
        chrome.show(f"{address}/quota", width=1280, height=1000, theme="light")
        chrome.until('[...document.querySelectorAll(".used")].some(e => e.textContent === "800")')
        held.settle(950)
        manager.remove_quota(HOSTILE)
        manager.remove_quota(f"{HOSTILE}#{HOSTILE}")
        manager.set_quota("new")
        chrome.until('[...document.querySelectorAll("h3 button")].some(e => e.textContent === "new")')
        assert "950" in texts(chrome, ".used")
        assert HOSTILE not in texts(chrome, "h3 button")
        assert chrome.complaints == []
    chrome.until('document.getElementById("lost").textContent === "no answer from the server"')
    assert chrome.evaluate('document.getElementById("at").textContent').startswith("as of")


def test_red_only_where_requests_are_refused_now(page):
    manager = ResourceQuotaManager()
    manager.set_quota(
        unlimited(
            "m", max_tokens_per_hour=1000, max_requests_per_minute=1000, max_tokens_per_day=10**6, on_violation="reject"
        )
    )
    assert manager.check_quota("m", 990)
    browser = page(manager, count=1)
    assert [state for state, _ in limits(browser).values()] == ["", "", ""], "use that is merely high"
    assert not manager.check_quota("m", 30)
    browser.evaluate("skip(2)")
    found = limits(browser)
    assert {label: state for label, (state, _) in found.items() if state} == {"Tokens per hour": "refuses"}
    assert "refused requests just now, 10 left" in found["Tokens per hour"][1]
    assert texts(browser, "article .now") == ["1 refused in 10 s"]
    assert browser.evaluate("document.title") == "1 refusing · modelquota"
    browser.evaluate("skip(11)")
    assert [state for state, _ in limits(browser).values()] == ["", "", ""]
    assert texts(browser, "article .now") == []
    assert manager.check_quota("m", 10)
    browser.evaluate("skip(2)")
    assert limits(browser)["Tokens per hour"][0] == "refuses"
    assert "nothing left, refuses requests" in limits(browser)["Tokens per hour"][1]
    manager.enforcement_enabled = False
    browser.evaluate("skip(2)")
    assert [state for state, _ in limits(browser).values()] == ["quiet"] * 3
    assert browser.evaluate('document.getElementById("off").checkVisibility()')


def test_full_is_not_red_while_requests_wait(page):
    manager = ResourceQuotaManager()
    manager.set_quota(unlimited("m", max_concurrent_requests=1, on_violation="queue"))
    with manager.reserve("m", 1):
        browser = page(manager, count=1)
        ((state, text),) = limits(browser).values()
        assert (state, "nothing left, requests wait" in text) == ("waits", True)


def test_a_rate_and_its_burst_are_one_bar_in_plain_words(page):
    manager = ResourceQuotaManager()
    manager.set_quota(unlimited("m", max_requests_per_second=0.001, burst_requests=3))
    manager.set_quota(unlimited("strict", max_tokens_per_second=0.5, burst_tokens=0))
    for _ in range(2):
        assert manager.check_quota("m", 0)
    browser = page(manager, count=2)
    found = limits(browser)
    state, text = found["Requests per second"]
    assert state == ""
    assert re.fullmatch(
        r"Requests per second 2 of 4 0\.001 a second \+ burst of 3, 1 of it used; [012] in this second", text
    )
    assert found["Tokens per second"][1] == "Tokens per second 0 of 1 0.5 a second"
    bars = browser.evaluate("""[...document.querySelectorAll(".limit .track")].map(track => [...track.children]
        .filter(part => !part.hidden).map(part => [part.style.flexGrow, part.firstChild.style.width]))""")
    assert bars == [[["1", "100%"], ["3", "33.3333%"]], [["1", "0%"]]]
    assert browser.evaluate("""[...document.querySelectorAll("[role=meter]")].map(e => e.ariaValueNow)""") == [
        "50",
        "0",
    ]


def test_the_last_ten_minutes_are_drawn(page):
    manager = ResourceQuotaManager()
    manager.set_quota(unlimited("m", max_tokens_per_hour=1000, on_violation="reject"))
    browser = page(manager, count=1)

    def path(name):
        return browser.evaluate(f'document.querySelector(".limit .spark .{name}").getAttribute("d")')

    def drawn():
        points, words = path("line"), browser.evaluate('document.querySelector(".limit .spark title").textContent')
        return points.count("M"), points.count("h"), words

    assert drawn()[0] == 1
    for _ in range(10):
        assert manager.check_quota("m", 50)
        browser.evaluate("skip(5)")
    parts, slots, words = drawn()
    assert (parts, slots >= 11, words) == (1, True, "Last ten minutes: up to 50 %")
    assert not manager.check_quota("m", 600)
    browser.evaluate("skip(5)")
    assert drawn()[2].startswith("Last ten minutes: up to 50 %, refused requests in ")
    assert path("refused").startswith("M")
    browser.evaluate("skip(120)")
    assert drawn()[0] == 2, "nothing is drawn where nothing was read"
    browser.evaluate("skip(700)")
    assert drawn() == (1, 1, "Last ten minutes: up to 50 %")


def test_meters_and_money(page):
    manager = ResourceQuotaManager()
    manager.set_quota(unlimited("acme", max_requests_per_day=100))
    manager.set_quota(
        unlimited(
            "acme#usd", unit="usd", token_weights=(3, 0.3, 15), max_tokens_per_month=500_000_000, max_tokens_per_day=1
        )
    )
    manager.set_quota(unlimited("bare#output", max_tokens_per_minute=100))
    manager.set_quota(unlimited("free"))
    manager.charge_many(manager.codes(["acme#usd"]), [27_489_712])
    browser = page(manager, count=3)
    assert texts(browser, ".of-meter h4 .id") == ["#usd", "#output"]
    found = limits(browser)
    assert found["Dollars per month"][1] == "Dollars per month $412.34 of $500.00"
    assert found["Dollars per day"][1].startswith("Dollars per day $412.34 of $0.000001")
    assert texts(browser, ".none") == ["No quota of its own, only meters.", "No limit is set."]


def many(count):
    manager = ResourceQuotaManager()
    for number in range(count):
        prefix = ("tenant/", "user:", "llama-")[number % 3]
        manager.set_quota(unlimited(f"{prefix}{number}", max_tokens_per_day=100, on_violation="reject"))
    manager.set_quota(unlimited("alone", max_tokens_per_day=100, on_violation="reject"))
    assert manager.check_quota("tenant/3", 100)
    assert manager.check_quota("user:4", 90)
    return manager


def test_up_to_thirty_ids_are_not_grouped(page):
    browser = page(many(29), count=30)
    assert browser.evaluate('document.getElementById("tools").hidden')
    assert texts(browser, ".group > h2") == []


def test_above_thirty_ids_there_are_groups_search_filters_and_an_order(page):
    browser = page(many(60), count=61)
    assert texts(browser, ".group > h2") == [
        "llama- 20 ids",
        "tenant/ 20 ids 1 refusing now",
        "user: 20 ids",
        "Other ids 1 id",
    ]
    assert texts(browser, "#filters button") == ["All 61", "Refusing now 1", "Waiting 0"]
    names = texts(browser, "h3 button")
    assert names[:2] == ["llama-2", "llama-5"], "numbers are in their order"
    browser.evaluate("""document.querySelector("#filters [data-filter=refusing]").click()""")
    assert texts(browser, "h3 button") == ["tenant/3"]
    browser.evaluate("""document.querySelector("#filters [data-filter=all]").click()""")
    browser.evaluate('document.getElementById("find").focus()')
    browser.command("Input.insertText", text="USER:4")
    assert texts(browser, "h3 button") == ["user:4", "user:40", "user:43", "user:46", "user:49"]
    browser.evaluate("skip(2)")
    assert browser.evaluate("document.activeElement.id") == "find", "a reading does not take the focus away"
    browser.command("Input.insertText", text="x")
    assert "No id contains “USER:4x”." in browser.evaluate(TEXT)
    search(browser, "")
    browser.evaluate(
        """(() => { const sort = byId("sort"); sort.value = "use"; sort.dispatchEvent(new Event("change")); })()"""
    )
    assert [names[0] for names in (texts(browser, f".group:nth-child({n}) h3") for n in (2, 3))] == [
        "tenant/3",
        "user:4",
    ]
    browser.evaluate("""document.querySelector(".group > h2 > button").click()""")
    assert len(texts(browser, "h3")) == 41
    assert browser.evaluate("""document.querySelector(".group > h2 > button").ariaExpanded""") == "false"


def test_two_thousand_ids_are_shown_at_once(page):
    browser = page(many(1_999))
    assert len(texts(browser, "h3")) == 25 * 3 + 1, "a group shows its first ones"
    assert texts(browser, ".more:not([hidden])") == [
        "Show 100 more of 641",
        "Show 100 more of 642",
        "Show 100 more of 641",
    ]
    browser.evaluate("""document.querySelector(".more").click()""")
    assert len(texts(browser, "h3")) == 25 * 3 + 1 + 100
    assert browser.evaluate("document.activeElement.textContent") == "llama-77"
    browser.evaluate("skip(2)")
    assert float(browser.evaluate('document.querySelector("main").dataset.ms')) < 1_000
    search(browser, "llama-1998")
    assert texts(browser, "h3") == []
    search(browser, "llama-1994")
    assert texts(browser, "h3") == ["llama-1994"]


def test_of_more_ids_than_are_sent_the_server_finds_the_others(page, monkeypatch):
    monkeypatch.setattr("modelquota.asgi.page.state.MOST_SHOWN", 50)
    browser = page(many(90))
    assert "50 of 91 models" in browser.evaluate(TEXT)
    assert "llama-2" not in texts(browser, "h3")
    search(browser, "llama-2")
    browser.until(
        """[...document.querySelectorAll("h3")].map(e => e.innerText).join()
            === "llama-2,llama-20,llama-23,llama-26,llama-29" """
    )
    assert browser.evaluate("""models.has("tenant/3")"""), "what is not found is remembered"
    search(browser, "")
    browser.until(f'{TEXT}.includes("50 of 91 models")')


def press(browser, key, code):
    for kind in ("keyDown", "keyUp"):
        text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
        browser.command("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)


def test_by_keyboard(page):
    browser = page(many(40))
    reached = []
    for _ in range(9):
        press(browser, "Tab", 9)
        reached.append(browser.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert reached[:3] == ["pause", "find", "All 41"]
    assert reached[5:8] == ["sort", "llama- 13 ids", "llama-2"]
    browser.evaluate("""document.querySelector("h3 button").focus()""")
    assert browser.evaluate("""getComputedStyle(document.activeElement).outlineStyle""") == "solid"
    opened = 'document.querySelector("article .body").checkVisibility()'
    assert not browser.evaluate(opened)
    press(browser, "Enter", 13)
    assert browser.evaluate(opened)
    browser.evaluate("skip(2)")
    assert browser.evaluate(opened), "it stays open"
    press(browser, "Enter", 13)
    assert not browser.evaluate(opened)


def test_a_row_of_the_list_opens_wherever_it_is_clicked(page):
    browser = page(many(40))
    shown = 'document.querySelector("article .body").checkVisibility()'
    for part in (".tightest", ".spark", "h3 button"):
        for opened in (True, False):
            browser.evaluate(f"""document.querySelector("article {part}").dispatchEvent(
                new MouseEvent("click", {{bubbles: true}}))""")
            assert browser.evaluate(shown) is opened


def test_everything_has_a_name_and_nothing_moves_if_that_is_asked_for(page, all_states):
    manager, _ = all_states
    browser = page(manager, count=5)
    nodes = browser.command("Accessibility.getFullAXTree")["nodes"]
    named = [
        node
        for node in nodes
        if node.get("role", {}).get("value") in ("button", "meter", "searchbox", "combobox", "img")
    ]
    assert len(named) > 20
    assert [node for node in named if not node.get("name", {}).get("value")] == []
    levels = browser.evaluate(
        """[...document.querySelectorAll("h1, h2, h3, h4")].filter(e => e.checkVisibility()).map(e => +e.tagName[1])"""
    )
    assert levels[0] == 1
    width = '.fill")).transitionDuration'
    assert browser.evaluate(f'getComputedStyle(document.querySelector(".limit {width}') == "0.4s"
    browser.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    assert browser.evaluate(f'getComputedStyle(document.querySelector(".limit {width}') == "0s"


def test_readings_do_not_multiply(page):
    browser = page(many(3))
    assert (
        browser.evaluate("""(async () => {
        const later = window.setTimeout, set = [];
        window.setTimeout = (...args) => { set.push(later(...args)); return set.at(-1); };
        await Promise.all([refresh(), refresh(), refresh()]);
        return set.length;
    })()""")
        == 1
    )


def test_it_can_be_paused(page):
    manager = ResourceQuotaManager()
    browser = page(manager)
    browser.evaluate('document.getElementById("pause").click()')
    manager.set_quota("new")
    assert (
        browser.evaluate(
            "timer_is_off = new Promise(done => setTimeout(() => done(document.body.innerText), 2500))"
        ).count("new")
        == 0
    )
    browser.evaluate('document.getElementById("pause").click()')
    browser.until('document.querySelectorAll("article").length === 1')


def test_a_quota_can_be_edited_if_there_is_an_admin_api(page):
    manager = ResourceQuotaManager()
    manager.set_quota(unlimited("a/b", max_tokens_per_day=100))
    manager.set_quota(unlimited("a/b#usd", unit="usd", max_tokens_per_month=5_000_000))
    browser = page(QuotaMiddleware(Model(), manager, page="/quota", admin="/quotas", admin_token=TOKEN), count=1)
    box, error = 'document.querySelector("[name=%s]")', 'document.getElementById("editor-error").textContent'

    def submit(expression=""):
        browser.evaluate(f"(() => {{ {expression}; document.getElementById('editor-form').requestSubmit(); }})()")

    token = 'document.querySelector("#editor-token input").value'
    browser.evaluate("""document.querySelector(".of-meter .edit").click()""")
    submit(f'{token} = "wrong"')
    browser.until(f'{error} === "The token is not accepted."')
    submit(f'{token} = "{TOKEN}"')
    browser.until(f"{box % 'max_tokens_per_month'} !== null")
    assert browser.evaluate(f"{box % 'max_tokens_per_month'}.value") == "5"
    submit(f"{box % 'max_tokens_per_month'}.value = '-1'")
    browser.until(f'{error}.includes("max_tokens_per_month=-1000000 is not accepted")')
    assert browser.evaluate("document.activeElement.name") == "max_tokens_per_month"
    submit(f"{box % 'max_tokens_per_month'}.value = '7.5'; {box % 'on_violation'}.value = 'reject'")
    browser.until('!document.getElementById("editor").open')
    quota = manager.get_quota("a/b#usd")
    assert (quota.max_tokens_per_month, quota.on_violation, quota.max_tokens_per_day) == (7_500_000, "reject", None)
    browser.until(f'{TEXT}.includes("$7.50")')
    browser.evaluate("""document.querySelector(".body > .edit").click()""")
    browser.until(f"{box % 'max_tokens_per_day'}?.value === '100'")
    submit(f"{box % 'max_tokens_per_day'}.value = ''")
    browser.until('!document.getElementById("editor").open')
    assert manager.get_quota("a/b").max_tokens_per_day is None
    browser.evaluate("""document.querySelector(".body > .edit").click()""")
    browser.until(f"{box % 'max_tokens_per_day'}?.value === ''")
    manager.update_quota("a/b", max_tokens_per_hour=9)
    submit(f"{box % 'max_tokens_per_day'}.value = '50'")
    browser.until(f'{error}.includes("changed in the meantime")')
    assert manager.get_quota("a/b").max_tokens_per_day is None
    assert TOKEN not in browser.evaluate(
        "document.documentElement.outerHTML + JSON.stringify([localStorage, sessionStorage])"
    )
    refused = [complaint["text"] for complaint in browser.complaints]
    assert [re.search("status of ([0-9]+)", text)[1] for text in refused] == ["401", "400", "412"]
    browser.complaints.clear()


def test_without_an_admin_api_nothing_can_be_edited(page):
    manager = ResourceQuotaManager()
    manager.set_quota("m")
    browser = page(manager, count=1)
    assert browser.evaluate("""[...document.querySelectorAll(".edit")].every(e => !e.checkVisibility())""")
