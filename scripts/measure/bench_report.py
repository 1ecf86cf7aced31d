"""How quick the page of `mxdsurgery report` is in a real browser (Chromium): until it opens, and until a search is answered.

    python scripts/measure/bench_report.py smollm2-healed/report.html --search king [--shows 20:17 --picture report.png]

Needs chromium, chromedriver and selenium (pip install 'mxdsurgery[test]').
"""

import shutil
import sys
import time
from pathlib import Path

import click
from selenium import webdriver

from mxdsurgery.terminal.console import size

_MOST_SECONDS = 300
_BEGUN = """
const box = document.getElementById('search');
box.value = arguments[0];
document.getElementById('scope').value = 'fires';
box.dispatchEvent(new Event('input'));
"""
_ANSWERED = "return state.scores !== null && !/reading/.test(document.getElementById('status').textContent)"


def until(browser: webdriver.Chrome, script: str) -> float:
    """Seconds until a script returns something."""
    start = time.perf_counter()
    while not browser.execute_script(script):
        if time.perf_counter() - start > _MOST_SECONDS:
            sys.exit(f"never: {script}")
        time.sleep(0.01)
    return time.perf_counter() - start


@click.command(help=__doc__)
@click.argument("page", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--search", "sought", required=True, help="What is typed into the box.")
@click.option("--shows", metavar="LAYER:EXPERT", help="The expert that is shown in the picture.")
@click.option("--picture", type=click.Path(path_type=Path), help="A .png to write.")
def main(page: Path, sought: str, shows: str | None, picture: Path | None) -> None:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,900"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        start = time.perf_counter()
        browser.get(page.resolve().as_uri())
        until(browser, "return document.querySelector('#detail h2, [role=alert]')")
        opened = time.perf_counter() - start
        shown = browser.execute_script("return document.getElementById('status').textContent")
        browser.execute_script(_BEGUN, sought)
        answered = until(browser, _ANSWERED)
        print(f"page      {size(page.stat().st_size)}, opened in {opened:.1f} s: {shown}")
        print(f"search    {sought!r} in the layer shown: {answered:.1f} s")
        if shows is not None and picture is not None:
            layer, expert = shows.split(":")
            browser.get("about:blank")
            browser.get(f"{page.resolve().as_uri()}#layer={layer}&expert={expert}")
            until(browser, "return document.querySelector('#detail h2')")
            time.sleep(1)  # pictures and fonts
            browser.save_screenshot(str(picture))
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
