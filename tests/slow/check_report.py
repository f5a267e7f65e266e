# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`make check-report`: the page in headless Chromium (chromium and chromedriver on the PATH). Figures are drawn, tables
open by the keyboard, a token shows its layers when it is pointed at and when it has the focus, in light and in dark,
and nothing is asked of any network. `REPORT=index.html` checks a page of yours; the screenshots go beside it.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from gated_llama import measure
from gated_llama.inspection.page import draw
from modeling_gated import GatedLlamaForCausalLM
from tiny import gated_model, source_model, tiny_tokenizer, token_ids


pytestmark = pytest.mark.report
webdriver = pytest.importorskip("selenium.webdriver")
ActionChains, By, Keys = webdriver.ActionChains, webdriver.common.by.By, webdriver.common.keys.Keys

QUIET = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
QUIET += "--disable-component-update --disable-sync --window-size=1300,1000"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if "REPORT" in os.environ:
        return Path(os.environ["REPORT"]).resolve()
    folder = tmp_path_factory.mktemp("report")
    models = [source_model("llama"), gated_model(GatedLlamaForCausalLM)]
    sentence = {"sentence": "the grumpy cat sat on the mat, which was red", "query": "which"}
    measured = [measure(model, tiny_tokenizer(), token_ids(2, 90), **sentence) for model in models]
    return draw([json.loads(result.to_json()) for result in measured], folder)


@pytest.fixture(params=["light", "dark"])
def browser(request, page):
    options = webdriver.ChromeOptions()
    for option in QUIET.split():
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        features = [{"name": "prefers-color-scheme", "value": request.param}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        driver.get(page.as_uri())
        yield driver
        height = driver.execute_script("return document.documentElement.scrollHeight")
        size = {"width": 1300, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.save_screenshot(str(page.with_name(f"page-{request.param}.png")))
        print(f"\n{page.with_name(f'page-{request.param}.png')}")
    finally:
        driver.quit()


def test_the_page_works(browser, page):
    dark = "dark" in browser.execute_script(
        "return matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light'"
    )
    background = browser.execute_script(
        "const c = document.createElement('div'); c.style.background = 'Canvas'; document.body.append(c);"
        "const v = getComputedStyle(c).backgroundColor; c.remove(); return v"
    )
    assert background == ("rgb(18, 18, 18)" if dark else "rgb(255, 255, 255)")
    images = browser.find_elements(By.TAG_NAME, "img")
    assert len(images) == 16
    assert all(browser.execute_script("return arguments[0].naturalWidth", image) > 400 for image in images)

    summary = browser.find_element(By.TAG_NAME, "summary")
    table = summary.find_element(By.XPATH, "..//table")
    assert not table.is_displayed()
    summary.send_keys(Keys.ENTER)
    assert table.is_displayed() and len(table.find_elements(By.TAG_NAME, "tr")) > 3

    tokens = browser.find_elements(By.CLASS_NAME, "token")
    layers = [token.find_element(By.CLASS_NAME, "layers") for token in tokens[:2]]
    assert len(tokens) >= 60 and not layers[0].is_displayed()
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", tokens[0])
    ActionChains(browser).move_to_element(tokens[0]).perform()
    assert layers[0].is_displayed() and "layer 0: " in layers[0].text
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    browser.execute_script("arguments[0].focus()", tokens[0])
    tokens[0].send_keys(Keys.TAB)
    assert layers[1].is_displayed() and not layers[0].is_displayed()

    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked and all(url == page.as_uri() or url.startswith("data:") for url in asked), asked
    assert browser.get_log("browser") == []


def test_control_a_request_would_be_seen_and_stopped(tmp_path, page, browser):
    """The same page with a picture from elsewhere: the policy of the page itself refuses it, and the log shows it."""
    other = tmp_path / "index.html"
    other.write_text(page.read_text().replace("<main>", '<main><img alt="" src="http://127.0.0.1:9/x.png">', 1))
    browser.get(other.as_uri())
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))
