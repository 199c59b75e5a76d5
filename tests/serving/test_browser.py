"""The pages in headless Chromium: it opens them, types, watches tokens appear, and replays them."""

import re
import shutil
from pathlib import Path

import pytest
from servers import ROOT, Turnstile, running, wait_until

from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.sampling import Generation, WinoSampler
from dllm_var.sampling.recording import replay_of
from dllm_var.view import page as page_of

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHECKPOINT = ROOT / "checkpoints" / "cmudict"
PHONE = dict(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
WINO = WinoSampler(threshold=0.6, shadow_threshold=0.9, block_length=8, max_new_tokens=48)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chromium():
    api.expect.set_options(timeout=60_000)
    with api.sync_playwright() as playwright:
        found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome", "chrome")]
        own = playwright.chromium.executable_path
        path = next(filter(None, found), own if Path(own).exists() else None)
        if path is None:
            pytest.skip("there is no Chromium: apt-get install chromium, or playwright install chromium")
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium):
    """Opens tabs; whatever a page complains of, and every dialog, fails the test."""
    complaints, contexts = [], []

    def open_tab(url, **options):
        contexts.append(chromium.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)  # milliseconds; a machine may be busy
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.goto(url)
        page.complaints = complaints
        return page

    yield open_tab
    for context in contexts:
        context.close()
    assert not complaints


def cells(page, pane=0):
    """Returns the tokens of a pane in their order, None for masks; the terminator is left out."""
    found = page.locator(".pane").nth(pane).locator(".cell:not(.end)")
    texts = found.evaluate_all("all => all.map(one => one.matches('.mask') ? null : one.firstChild.textContent)")
    return [text if text is None else text.strip() for text in texts]


def states(sampler, words, prompt):
    """Returns what the cells are after each step, and the answer."""
    model, tokenizer, _ = words
    [answer] = sampler.generate(model, [prompt], tokenizer=tokenizer, record=True)
    shown, found = {}, []
    for step in answer.steps:
        shown |= {place: token for place, token, _ in step.changes}
        tokens = [shown.get(place) for place in range(step.length)]
        found.append([token if token is None else tokenizer.decode([token]).strip() for token in tokens])
    return found, answer


def wide_as_the_screen(page):
    return page.evaluate("document.documentElement.scrollWidth <= screen.width")  # innerWidth grows with what is wide


def test_an_answer_appears_forward_by_forward_and_is_replayed(tab, words):
    model, tokenizer, _ = load_checkpoint(CHECKPOINT)
    turnstile = Turnstile(model)
    (expected, answer), (others, other) = states(words[2], words, "keyboard"), states(WINO, words, "keyboard")
    with running(model, tokenizer, words[2], others={"wino": WINO}) as server:
        page = tab(server.url)
        page.keyboard.type("keyboard")  # the page opens with its field in focus
        page.select_option("#other", "wino")
        page.focus("#prompt")
        page.keyboard.press("Control+Enter")
        for number, state in enumerate(expected, start=1):
            turnstile.let()
            wait_until(lambda state=state: cells(page) == state)
            assert page.locator(".pane").nth(0).locator(".facts b").first.inner_text().split()[0] == str(number)
        turnstile.open_up()
        page.locator("#go", has_text="Generate").wait_for()
        assert cells(page) == expected[-1] and cells(page, 1) == others[-1]
        for pane, one in enumerate((answer, other)):
            facts = page.locator(".facts").nth(pane).inner_text()
            assert f"{one.nfe} forwards for {one.new_tokens} tokens" in facts
            assert re.search(r"\d\.\d{3} s; ended by the model", facts)
        replay(page, expected, others)


def replay(page, *panes):
    """Checks the slider, the keys and the button against the states that the panes have after each step."""
    last = max(map(len, panes))

    def shows(step):
        states = [[[None] * len(found[0]), *found] for found in panes]
        return all(cells(page, pane) == found[min(step, len(found) - 1)] for pane, found in enumerate(states))

    assert page.locator("#where").inner_text() == f"step {last} of {last}" and shows(last)
    page.locator("#slider").fill("1")
    assert shows(1)
    page.locator("#play").focus()
    for key, step in [("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", last), ("Home", 0)]:
        page.keyboard.press(key)
        assert shows(step), key
    page.locator("#slider").focus()
    page.keyboard.press("Space")
    api.expect(page.locator("#play")).to_have_attribute("aria-label", "pause")
    api.expect(page.locator("#where")).to_have_text(f"step {last} of {last}")
    assert shows(last)
    page.keyboard.press("Home")
    page.locator("#play").click()
    page.locator("#play").click()  # pauses
    stays = page.locator("#where").inner_text()
    page.wait_for_timeout(700)
    assert page.locator("#where").inner_text() == stays


def test_a_key_an_error_and_an_answer_that_is_stopped(tab):
    model, tokenizer, _ = load_checkpoint(CHECKPOINT)
    turnstile = Turnstile(model)
    with running(model, tokenizer, WINO, key="secret") as server:
        page = tab(server.url, **PHONE)
        page.fill("#prompt", "keyboard")
        page.tap("#go")
        api.expect(page.locator("#problem")).to_have_text("the API key is missing or wrong")
        page.fill("#key", "secret")
        page.fill("#limit", "5000")
        page.tap("#go")
        api.expect(page.locator("#problem")).to_contain_text("this server takes 256 together")
        assert [text for text in page.complaints if "status of 40" not in text] == []
        page.complaints.clear()
        page.fill("#limit", "")
        page.tap("#go")
        turnstile.let()
        page.locator(".cell").first.wait_for()
        assert not page.locator("#problem").is_visible() and wide_as_the_screen(page)
        page.tap("#go")  # it says Stop
        turnstile.open_up()
        wait_until(lambda: not server.in_flight())
        page.locator("#go", has_text="Generate").wait_for()
        assert page.locator(".cell.mask").count() and not page.locator("#problem").is_visible()


def test_a_file_shows_hostile_text_as_text_in_light_and_dark_and_on_a_phone(tab, words, tmp_path):
    expected, answer = states(words[2], words, "keyboard")
    step = {"forward": 1, "length": 1, "starts": [], "changes": [[0, HOSTILE, 0.5]]}
    hostile = {**replay_of(answer, HOSTILE, HOSTILE), "length": 1, "given": [], "steps": [step]}
    file = tmp_path / "page.html"
    file.write_text(page_of([hostile, replay_of(answer, "keyboard")], title=HOSTILE), encoding="utf-8")
    page = tab(file.as_uri())
    assert page.locator(".asked").inner_text() == page.title() == HOSTILE and cells(page) == [HOSTILE]
    assert wide_as_the_screen(page)
    page.keyboard.press("ArrowDown")
    assert page.locator(".asked").inner_text() == "keyboard"
    replay(page, expected)

    def is_dark():
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) < 200

    assert not is_dark()
    page.keyboard.press("d")
    assert is_dark()
    page.click("#theme")
    assert not is_dark()
    page.emulate_media(color_scheme="dark")
    assert not is_dark(), "the choice stays"
    page.reload()
    assert is_dark(), "without a choice, as the system has it"
    assert wide_as_the_screen(tab(file.as_uri(), **PHONE))


def test_hebrew_goes_from_right_to_left(tab, tmp_path):
    changes = [[place, text, 0.5] for place, text in enumerate(["\u05d0\u05d1", "\u05d2\u05d3", "x"])]
    step = {"forward": 1, "length": 3, "starts": [0], "changes": changes}
    answer = Generation([5, 6, 7], "eos", 1, 0.1, prompt_length=1)
    file = tmp_path / "page.html"
    file.write_text(page_of([{**replay_of(answer, "\u05d0"), "given": [], "steps": [step]}]), encoding="utf-8")
    page = tab(file.as_uri())
    places = page.locator(".cell").evaluate_all("all => all.map(one => one.getBoundingClientRect().x)")
    assert len(places) == 4 and places == sorted(places, reverse=True)
    assert page.locator(".asked").evaluate("one => getComputedStyle(one).direction") == "rtl"


def test_ten_thousand_tokens_are_replayed_without_waiting(tab, tmp_path):
    steps = []
    for start in range(0, 10_000, 50):
        changes = [[start + place, "word", 0.9] for place in range(50)]
        steps.append({"forward": len(steps) + 1, "length": start + 50, "starts": [start], "changes": changes})
    answer = Generation([5] * 10_000, "length", len(steps), 1.0, prompt_length=1)
    file = tmp_path / "page.html"
    file.write_text(page_of([{**replay_of(answer), "given": [], "steps": steps}]), encoding="utf-8")
    page = tab(file.as_uri())
    assert page.locator(".cell").count() == 10_000 and wide_as_the_screen(page)
    page.keyboard.press("Home")
    page.locator("#slider").fill("2")
    assert cells(page) == ["word"] * 100
    page.keyboard.press("End")
    assert page.evaluate("getComputedStyle(document.querySelector('.block')).contentVisibility") == "auto"


def test_a_frame_in_a_notebook_is_as_high_as_its_page(tab, words, tmp_path):
    model, tokenizer, sampler = words
    [answer] = sampler.generate(model, ["keyboard"], tokenizer=tokenizer)
    file = tmp_path / "notebook.html"
    file.write_text(f"<!doctype html><body>{answer._repr_html_()}", encoding="utf-8")
    page = tab(file.as_uri())
    frame = page.frame_locator("iframe")
    api.expect(frame.locator(".cell:not(.end)")).to_have_count(answer.new_tokens)
    height = frame.locator("body").evaluate("body => body.scrollHeight")
    assert height <= page.locator("iframe").evaluate("one => one.clientHeight") < height + 20
