"""The pages in a real browser: no script error, every picture and curve there, narrow and wide."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import train
from engine.report import write, write_comparison
from tests.reports import PROTOCOL, measure
from tests.runs import run_folder, toy

WIDTHS = {"narrow": 390, "wide": 1400}
HEADINGS = (
    *(
        "Samples",
        "Quality",
        "Measured by engine.evaluate",
        "Neighbours in the training set",
        "Interpolation",
        "Reconstructions",
    ),
    *("Curves", "Settings", "Where it ran", "Commands"),
)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI has no chromium: apt-get install chromium")
        pytest.skip("no chromium on the PATH to look at the pages with")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A GAN and a VAE that were really trained, a moment each, and measured by made-up figures."""
    root, found = tmp_path_factory.mktemp("runs"), {}
    for name in ("dcgan_mnist", "vae_mnist"):
        flags = [*toy(name)[1], "--data.resolution", "32", "--steps", "90", "--compile", "off"]
        flags += ["--log-every", "0.008", "--sample-every", "0.2", "--checkpoint-every", "1"]
        flags += ["--metrics.every-kimg", "0", "--runs", str(root)]
        assert train.main([name, *flags]) == 0
        found[name] = run_folder(root, name)
        figures = {"fid": 30.0, "kid": 0.1, "precision": 0.5, "psnr": 20.0}
        measure(found[name], {400: figures}, generated=100)
        measure(found[name], {720: {**figures, "fid": 20.0}}, extractor=f"classifier of {name}")
        figures = {"figures": {"fid": 25.0, "kid": None}, "protocol": PROTOCOL}
        entry = figures | {"images": 720, "checkpoint": "ab" * 32}
        (found[name] / "evaluation.json").write_text(json.dumps([entry]))
        write(found[name])
    return found


class Look:
    """A page that is open in a browser, and everything that it complained of."""

    def __init__(self, browser, file: Path, width: int) -> None:
        size = {"width": width, "height": 900}
        self.page, self.errors = browser.new_page(viewport=size), []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.goto(file.resolve().as_uri())
        self.page.wait_for_function("document.querySelectorAll('figure svg path').length > 0")

    def headings(self) -> list[str]:
        return self.page.locator("h2").all_inner_texts()

    def check(self) -> None:
        """What holds for every page at every width."""
        assert not self.errors
        widths = self.page.evaluate(
            "Promise.all([...document.images].map(i => i.decode().catch(() => 0)))"
            ".then(() => [...document.images].map(i => i.naturalWidth))"
        )
        assert widths and min(widths) > 0
        paths = self.page.evaluate(
            "[...document.querySelectorAll('figure svg')].map(s =>"
            "  [...s.querySelectorAll('path')].filter(p => p.getTotalLength() > 0 ||"
            "    p.getAttribute('d')).length)"
        )
        assert paths and min(paths) > 0
        assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    def click_everything(self) -> None:
        """Every kind of control once, some twice; pages must not mind."""
        self.page.get_by_role("button", name="light / dark").click()
        for name in ("log", "▶ play"):
            for button in self.page.get_by_role("button", name=name, exact=True).all():
                button.click()
        for legend in self.page.locator(".legend").all():
            button = legend.locator("button").first
            button.click()
            assert button.get_attribute("aria-pressed") == "false"
            button.click()
        for button in self.page.get_by_role("button", name="log", exact=True).all():
            button.click()
        self.page.locator("figure svg").first.hover()
        assert "images" in self.page.locator(".tip:visible").inner_text()


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("name", ["dcgan_mnist", "vae_mnist"])
def test_the_page_of_a_run(browser, runs: dict[str, Path], name: str, width: int) -> None:
    look = Look(browser, runs[name] / "report.html", width)
    look.check()
    expected = [h for h in HEADINGS if h != "Reconstructions" or name == "vae_mnist"]
    assert [h for h in look.headings() if h in HEADINGS] == expected
    titles = look.page.locator("figure h3").all_inner_texts()
    assert {"FID", "KID", "Precision and recall", "PSNR", "Losses", "Learning rates"} <= {*titles}
    assert {"Throughput", "Memory", "Collapse and memorisation"} <= {*titles}
    assert "the metrics' protocol changed" in look.page.locator("main").inner_text()
    look.click_everything()
    look.check()
    look.page.close()


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_the_page_of_a_comparison(
    browser, runs: dict[str, Path], width: int, tmp_path: Path
) -> None:
    write_comparison([*runs.values()], tmp_path / "cmp.html")
    look = Look(browser, tmp_path / "cmp.html", width)
    look.check()
    evaluated = "Measured by engine.evaluate"
    assert look.headings() == ["Samples", evaluated, "Quality", "Curves", "Settings that differ"]
    text = look.page.locator("main").inner_text()
    assert "measured by different protocols" in text
    assert "Protocol 2" in text
    look.click_everything()
    look.check()
    look.page.close()


def test_a_page_of_nothing_yet(browser, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    write(tmp_path)
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "report.html").as_uri())
    assert "No sample has been drawn yet." in page.locator("main").inner_text()
    assert not errors
    page.close()
