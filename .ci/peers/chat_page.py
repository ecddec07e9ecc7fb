"""The chat page of a running updraft-serve, used in a real browser as a person would.

    pip install playwright        # and a Chromium, such as Debian's package
    updraft-serve --model M --api-key token-abc123 --port 8000 &
    python .ci/peers/chat_page.py http://127.0.0.1:8000 [--browser /usr/bin/chromium]

Prints one line a scenario; ends with 1 if any failed. The page may ask no server but this one.
"""

import argparse
import sys
import traceback
from urllib.parse import urlsplit

from playwright.sync_api import expect, sync_playwright

parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("--key", default="token-abc123")
parser.add_argument("--browser", default="/usr/bin/chromium")
args = parser.parse_args()
scenarios = []


def scenario(function):
    scenarios.append(function)
    return function


def enter(page):
    """A page with the key in its place and the models listed."""
    page.goto(args.url)
    page.fill("#key", args.key)
    page.keyboard.press("Tab")
    expect(page.locator("#model option")).not_to_have_count(0)


def ask(page, text):
    page.fill("#text", text)
    page.keyboard.press("Enter")


def answered(page, count):
    """Waits for the end of the count-th answer and returns its text."""
    expect(page.locator("#send")).to_have_text("Send")
    expect(page.locator("#status")).to_contain_text("written in")
    expect(page.locator("article.assistant")).to_have_count(count)
    return page.locator("article.assistant").nth(count - 1).inner_text()


@scenario
def without_a_key_the_page_says_what_is_missing(page):
    page.goto(args.url)
    expect(page.locator("#status")).to_contain_text("API key")
    ask(page, "hello")
    expect(page.locator("article.error")).to_contain_text("API key")


@scenario
def an_answer_streams_in(page):
    enter(page)
    page.fill("#temperature", "0")
    ask(page, "How many r's are in the word 'strawberry'?")
    expect(page.locator("article.user")).to_have_text("How many r's are in the word 'strawberry'?")
    assert answered(page, 1)


@scenario
def a_conversation_goes_on_and_starts_anew(page):
    enter(page)
    page.fill("#temperature", "0")
    ask(page, "Hello")
    answered(page, 1)
    read = int(page.locator("#status").inner_text().split()[0])
    ask(page, "And again")
    answered(page, 2)
    assert int(page.locator("#status").inner_text().split()[0]) > read, "what was said before counts"
    page.click("#clear")
    expect(page.locator("article")).to_have_count(0)


@scenario
def markup_is_only_text(page):
    enter(page)
    page.on("dialog", lambda dialog: (_ for _ in ()).throw(AssertionError("a script ran")))
    ask(page, "<img src=x onerror=alert(1)><b>bold</b>")
    expect(page.locator("article.user")).to_have_text("<img src=x onerror=alert(1)><b>bold</b>")
    assert page.locator("article.user *").count() == 0
    answered(page, 1)


@scenario
def an_error_is_shown(page):
    enter(page)
    ask(page, "x " * 20_000)
    expect(page.locator("article.error")).to_contain_text("context")
    expect(page.locator("#send")).to_have_text("Send")


@scenario
def a_stopped_answer_ends(page):
    enter(page)
    # A slow server: the answer's first part, and then nothing until it is stopped.
    held = []
    page.route("**/v1/chat/completions", lambda route: held.append(route))
    page.fill("#text", "Hello")
    page.click("#send")
    expect(page.locator("#send")).to_have_text("Stop")
    page.click("#send")
    expect(page.locator("#send")).to_have_text("Send")
    expect(page.locator("article.error")).to_have_count(0)


failed = 0
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=args.browser, args=["--no-sandbox"])
    print(f"Chromium {browser.version}")
    for one in scenarios:
        context = browser.new_context()
        context.set_default_timeout(30_000)
        page = context.new_page()
        elsewhere, errors = [], []
        page.on("request", lambda request: elsewhere.append(request.url)
                if urlsplit(request.url).netloc != urlsplit(args.url).netloc else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        try:
            one(page)
            assert not elsewhere, f"asked elsewhere: {elsewhere}"
            assert not errors, errors
            print(f"ok      {one.__name__}")
        except Exception:
            failed += 1
            print(f"FAILED  {one.__name__}")
            traceback.print_exc()
        context.close()
    browser.close()
print(f"{len(scenarios) - failed} of {len(scenarios)} scenarios pass")
sys.exit(failed > 0)
