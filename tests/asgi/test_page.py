"""The page of the quotas: what it shows, which requests may see it, and how it looks in a real browser."""

import asyncio
import base64
import os
import re
from pathlib import Path

import chromium
import pytest
from asgi_client import Call, Model
from http_server import serving

from modelquota import ResourceQuotaManager
from modelquota.asgi import QuotaMiddleware, QuotaPage
from modelquota.asgi.page import MOST_SHOWN, page_state

JSON = [(b"accept", b"application/json")]
HOSTILE = "<img src=x onerror=alert(1)>"
needs_chromium = pytest.mark.skipif(chromium.PATH is None, reason="no chromium is installed; apt-get install chromium")


@pytest.fixture
def manager():
    manager = ResourceQuotaManager()
    manager.set_quota(
        "chat-70b", max_tokens_per_hour=1000, max_requests_per_hour=None, max_ram_mb=100, on_violation="reject"
    )
    manager.set_quota("code-34b-instruct-with-a-name-that-is-longer-than-a-phone-is-wide-" + "x" * 60)
    manager.set_quota(HOSTILE, on_violation="warn", max_tokens_per_hour=5)
    return manager


def get(app, path="/quota", headers=(), method="GET", **scope):
    return asyncio.run(Call(app, path, method=method, headers=headers, **scope).run())


def test_what_the_page_shows(manager):
    held = manager.reserve("chat-70b", 800, 60)
    assert not manager.check_quota("chat-70b", 300)
    assert manager.check_quota(HOSTILE, 300)
    state = page_state(manager)
    assert state["models_total"] == 3
    assert (state["admitted"], state["serving"], state["waiting"], state["refused"]) == (2, 1, 0, 1)
    chat, _, hostile = state["models"]
    assert (chat["id"], chat["action"], chat["serving"], chat["refused"]) == ("chat-70b", "reject", 1, 1)
    meters = {meter["label"]: (meter["used"], meter["limit"]) for meter in chat["meters"]}
    assert meters["Tokens per hour"] == (800, 1000)
    assert meters["RAM"] == (60, 100)
    assert meters["Token burst"] == (0, 10_000)
    assert "Requests per hour" not in meters
    assert (hostile["refused"], hostile["warned"]) == (0, 1)
    held.release()


def test_who_waits_and_who_was_admitted_after_a_wait_is_not_refused(manager):
    manager.update_quota("chat-70b", max_concurrent_requests=1, on_violation="queue")

    async def main():
        held = manager.reserve("chat-70b", 1)
        waits = [asyncio.create_task(manager.acquire_async("chat-70b", 1)) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert [page_state(manager)["models"][0][key] for key in ("waiting", "refused", "waited")] == [2, 0, 0]
        held.release()
        (await waits[0]).release()
        (await waits[1]).release()

    asyncio.run(main())
    assert [page_state(manager)["models"][0][key] for key in ("waiting", "refused", "waited")] == [0, 0, 2]


def test_of_many_models_those_that_need_attention_are_shown():
    manager = ResourceQuotaManager()
    for number in range(MOST_SHOWN + 50):
        manager.set_quota(f"m{number}", max_requests_per_hour=0 if number == 7 else None, on_violation="reject")
    manager.check_quota("m7", 1)
    manager.check_quota("m9", 1)
    state = page_state(manager)
    assert len(state["models"]) == MOST_SHOWN
    assert state["models_total"] == MOST_SHOWN + 50
    assert {"m7", "m9"} <= {model["id"] for model in state["models"]}


def test_the_page_is_opt_in_and_passes_nothing_on(manager):
    response = get(QuotaMiddleware(Model(answer={"from": "the application"}), manager))
    assert response.json == {"from": "the application"}
    model = Model()
    response = get(QuotaMiddleware(model, manager, page="/quota"))
    assert response.status == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    assert model.calls == []
    assert get(QuotaMiddleware(model, manager, page="/quota"), headers=JSON).json == page_state(manager)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_the_page_is_read_only(manager, method):
    response = get(QuotaPage(manager), method=method)
    assert (response.status, response.headers["allow"]) == (405, "GET, HEAD")


def test_head_has_the_headers_only(manager):
    response = get(QuotaPage(manager), method="HEAD")
    assert response.body == b""
    assert int(response.headers["content-length"]) > 1000


@pytest.mark.parametrize("later", [False, True])
def test_the_page_can_be_protected(manager, later):
    right = b"Basic " + base64.b64encode(b"me:secret")

    def allow(scope):
        return dict(scope["headers"]).get(b"authorization") == right

    async def allow_later(scope):
        await asyncio.sleep(0)
        return allow(scope)

    app = QuotaMiddleware(Model(), manager, page="/quota", allow_page=allow_later if later else allow)
    for headers in ([], JSON, [(b"authorization", b"Basic xyz")]):
        response = get(app, headers=headers)
        assert response.status == 401
        assert response.headers["www-authenticate"].startswith("Basic realm=")
        assert b"chat-70b" not in response.body
    assert get(app, headers=[(b"authorization", right)]).status == 200


def test_the_page_is_one_file_without_outside_assets(manager):
    response = get(QuotaPage(manager))
    html = response.body.decode()
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://", html)
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "innerHTML" not in html


def contrast(one, other):
    """The ratio of WCAG 2."""

    def luminance(color):
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


COLORS = """[...document.querySelectorAll("h1, h2, dt, dd, .action, .words span, #state")].map(e =>
    [getComputedStyle(e).color, getComputedStyle(e.closest("article") || document.body).backgroundColor])"""


@needs_chromium
def test_the_page_in_a_real_browser(manager):
    """In both themes, on a desk and on a phone; pictures are kept if MODELQUOTA_SCREENSHOTS names a folder."""
    folder = os.environ.get("MODELQUOTA_SCREENSHOTS")
    held = manager.reserve("chat-70b", 800, 60)
    assert not manager.check_quota("chat-70b", 300)
    assert manager.check_quota(HOSTILE, 300)
    text = "document.body.innerText"
    with chromium.browser() as browser:
        with serving(QuotaMiddleware(Model(), manager, page="/quota")) as address:
            backgrounds = {}
            for name, width in (("light", 1200), ("dark", 1200), ("phone-light", 400), ("phone-dark", 400)):
                theme = name.removeprefix("phone-")
                browser.show(f"{address}/quota", width=width, height=1000, theme=theme)
                browser.until('document.querySelectorAll("article").length === 3')
                assert browser.evaluate("document.scrollingElement.scrollWidth") <= width
                shown = browser.evaluate(text)
                assert "800 of 1,000" in shown
                assert HOSTILE in shown
                assert browser.evaluate('document.querySelectorAll("img").length') == 0
                colors = browser.evaluate(COLORS)
                assert len(colors) > 20
                assert min(contrast(*pair) for pair in colors) >= 4.5
                backgrounds[name] = browser.evaluate("getComputedStyle(document.body).backgroundColor")
                if folder is not None:
                    picture = browser.command("Page.captureScreenshot", captureBeyondViewport=width < 600)["data"]
                    Path(folder, f"{name}.png").write_bytes(base64.b64decode(picture))
            assert backgrounds["light"] == backgrounds["phone-light"] != backgrounds["dark"]
            held.settle(950)
            held.release()
            manager.remove_quota(HOSTILE)
            manager.set_quota("new")
            browser.until(f'{text}.includes("950 of 1,000") && {text}.includes("new")')
            assert HOSTILE not in browser.evaluate(text)
            assert browser.evaluate('document.querySelectorAll(".full").length') == 1
            assert browser.complaints == []
        browser.until(f'{text}.includes("no answer from the server; as of")')


@pytest.mark.parametrize("accept", [[], JSON])
@pytest.mark.parametrize("sent", [0, 1])
def test_a_client_that_leaves_is_no_error(manager, accept, sent):
    """A server may report it by an OSError of `send`."""
    left = []

    async def send(message):
        if len(left) == sent:
            raise ConnectionResetError("the client has left")
        left.append(message)

    scope = {"type": "http", "method": "GET", "path": "/quota", "headers": accept}
    asyncio.run(QuotaPage(manager)(scope, None, send))
    assert len(left) == sent
