"""The template that opens as an app: its three inputs are there, and a run shows the video."""

import pytest
from comfyui_server import RUN_TIMEOUT


@pytest.fixture
def fresh(browser, server, page_class):
    """A page of its own: App Mode would stay for the other tests."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(120_000)
    yield page_class(context.new_page(), server)
    context.close()


def test_it_opens_as_an_app_and_runs(fresh):
    fresh.open()
    fresh.template("tiny_app")
    page = fresh.page
    page.wait_for_timeout(2000)
    skip = page.get_by_role("button", name="Skip")  # the page's own tour of apps, once
    if skip.count():
        skip.first.click()
    for name in ("text", "reference_frames", "length"):
        page.get_by_text(name, exact=True).first.wait_for()
    page.get_by_role("button", name="Run").last.click()
    page.locator("video").first.wait_for(timeout=1000 * RUN_TIMEOUT)
    fresh.picture("app after the run")
