"""examples/document_ocr.py as a person has it: in a Chromium, with pictures that Tesseract reads.

What the page looks like is in .dev/screenshots afterwards.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from mesh import client
from mesh.server import NatsServer
from tests.support import ROOT, Mesh, gateway, new_mesh

if TYPE_CHECKING:
    from PIL.Image import Image
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

EXAMPLES = ROOT / "examples"
RECEIPT = EXAMPLES / "document_ocr_page" / "receipt.png"
SHOTS = ROOT / ".dev" / "screenshots"
LONGEST = 60_000  # milliseconds that reading may take on a busy machine


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def _deployed(server: NatsServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mesh, str]]:
    """The app on a mesh with a worker, and its address."""
    with new_mesh(server, tmp_path_factory.mktemp("ocr")) as mesh:
        mesh.start_worker("--containers", "6")
        with gateway(mesh) as address:
            mesh.cli("deploy", str(EXAMPLES / "document_ocr.py"))
            site = f"{address}/document-ocr/web/"
            assert httpx.get(site, timeout=240).status_code == 200  # the image is built meanwhile
            yield mesh, site


@pytest.fixture
def deployed(_deployed: tuple[Mesh, str]) -> tuple[Mesh, str]:
    client.use_settings(_deployed[0].settings)
    return _deployed


@pytest.fixture
def page(deployed: tuple[Mesh, str], chromium: Browser) -> Iterator[Page]:
    """The page, open; whatever its console says is a failure."""
    allowed = ["clipboard-read", "clipboard-write"]
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, permissions=allowed)
    opened = context.new_page()
    said: list[str] = []
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.goto(deployed[1])
    yield opened
    context.close()
    assert not said


# --- pictures --------------------------------------------------------------------------------------------------------


def sheet(*lines: str) -> Image:
    """A page of paper with large clear print."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("L", (1000, 140 + 80 * len(lines)), 255)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(44)
    for number, line in enumerate(lines):
        draw.text((70, 60 + 80 * number), line, font=font, fill=0)
    return picture


def file_of(name: str, content: bytes) -> dict[str, object]:
    return {"name": name, "mimeType": "application/octet-stream", "buffer": content}


def encoded(format: str, first: Image, *others: Image) -> bytes:
    """A file of one picture, or of several pages."""
    buffer = io.BytesIO()
    compression = {"compression": "tiff_deflate"} if format == "TIFF" else {}
    first.save(buffer, format, **({"save_all": True, "append_images": others} if others else {}), **compression)
    return buffer.getvalue()


# --- looking ---------------------------------------------------------------------------------------------------------


def look(page: Page, name: str) -> None:
    """See that the page is fit to be seen, on a desk and on a telephone, by day and by night; keep pictures of it."""
    from axe_playwright_python.sync_playwright import Axe

    SHOTS.mkdir(parents=True, exist_ok=True)
    for width, scheme in itertools.product((1280, 390), ("light", "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        assert page.evaluate("document.documentElement.scrollWidth") == width, f"{name} overflows at {width} pixels"
        page.screenshot(path=SHOTS / f"document-ocr-{name}-{width}-{scheme}.png", full_page=True)
        found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa", "best-practice"]})
        assert found.violations_count == 0, found.generate_report()
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme="light", reduced_motion="no-preference")


def card(page: Page, name: str, state: str) -> str:
    """The text of a document's card, once it is in a state."""
    found = page.locator(f"article.{state}").filter(has_text=name)
    found.wait_for(timeout=LONGEST)
    return found.inner_text()


# --- what a person does ----------------------------------------------------------------------------------------------


def test_the_text_of_a_picture_is_shown_beside_it(page: Page) -> None:
    look(page, "empty")
    words = ["Invoice 20317", "Seven green apples", "Total 41.80 EUR"]
    page.set_input_files("#files", [file_of("invoice.png", encoded("PNG", sheet(*words)))])
    shown = card(page, "invoice.png", "done")
    assert all(line in shown for line in words), shown
    assert "1 page, 8 words" in shown
    assert page.locator("#news").inner_text() == "invoice.png: 1 page, 8 words", "screen readers are told"
    picture, boxes = page.locator(".sheet img"), page.locator(".sheet rect")
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 1000
    assert boxes.count() == 8
    frame, first = picture.bounding_box(), boxes.first.bounding_box()
    assert frame is not None
    assert first is not None
    scale = frame["width"] / 1000
    assert abs(first["x"] - frame["x"] - 70 * scale) < 8, "the first box is where the first word is"
    assert abs(first["y"] - frame["y"] - 68 * scale) < 16
    page.get_by_text("apples").hover()
    assert page.locator("rect.same").count() == 1
    page.mouse.move(0, 0)
    page.get_by_role("button", name="Copy text of page 1").click()
    page.get_by_text("Copied").first.wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "\n".join(words)


def test_pages_are_read_side_by_side_and_files_too(page: Page) -> None:
    pages = [sheet(f"This is page number {number}") for number in (1, 2, 3)]
    files = {"scan.tiff": encoded("TIFF", *pages), "scan.pdf": encoded("PDF", *pages)}
    page.set_input_files("#files", [file_of(name, content) for name, content in files.items()])
    for name in files:
        shown = card(page, name, "done")
        assert "3 pages, 15 words" in shown
        assert re.findall(r"This is page number (\d)", shown) == ["1", "2", "3"]
    files = {"receipt.png": RECEIPT.read_bytes(), "blank.png": encoded("PNG", sheet())}
    page.set_input_files("#files", [file_of(name, content) for name, content in files.items()])
    assert "TOTAL EUR 23.50" in card(page, "receipt.png", "done")
    assert "No text was found on this page." in card(page, "blank.png", "done")
    look(page, "done")
    page.get_by_role("button", name="Remove scan.tiff").click()
    assert page.locator("article").count() == 3


def test_a_photograph_is_read_too(page: Page) -> None:
    from PIL import Image, ImageChops

    paper = sheet("Seventeen pears", "and a plum").resize((4000, 1200))
    photograph = ImageChops.multiply(paper, Image.effect_noise(paper.size, 40).point(lambda value: value + 90))
    content = encoded("PNG", photograph)
    assert 2_000_000 < len(content) < 10_000_000, "as large as those of telephones are"
    page.set_input_files("#files", [file_of("photograph.png", content)])
    assert "Seventeen pears" in card(page, "photograph.png", "done")


def test_what_cannot_be_read_says_why(page: Page, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(10_000_001)
    wrong = {
        "notes.txt": (b"These are words, but no picture.", "This is not a picture or a PDF, or it is damaged."),
        "half.png": (RECEIPT.read_bytes()[:5000], "This file cannot be opened: "),
        "broken.pdf": (b"%PDF-1.7 and nothing more", "This PDF cannot be opened"),
        "nothing.png": (b"", "This file is empty."),
    }
    page.set_input_files("#files", [file_of(name, content) for name, (content, _) in wrong.items()])
    for name, (_, text) in wrong.items():
        assert text in card(page, name, "wrong")
    page.set_input_files("#files", [large])
    assert "This file is larger than 10 MB." in card(page, "large.png", "wrong")
    look(page, "error")


def test_that_reading_fails_is_said(deployed: tuple[Mesh, str], page: Page) -> None:
    mesh, site = deployed
    source = (EXAMPLES / "document_ocr.py").read_text()
    broken = source.replace(".add_local_dir(", '.env({"TESSDATA_PREFIX": "/nowhere"}).add_local_dir(')
    broken = broken.replace('App("document-ocr"', 'App("broken-ocr"').replace("Path(__file__).parent", repr(EXAMPLES))
    broken = broken.replace("PosixPath", "Path")
    mesh.cli("deploy", str(mesh.write(broken, "broken_ocr")))
    page.goto(site.replace("document-ocr", "broken-ocr"))
    page.set_input_files("#files", [RECEIPT])
    shown = card(page, "receipt.png", "wrong")
    assert "Reading it failed on the worker:" in shown
    assert "/nowhere/eng.traineddata" in shown, "what Tesseract said is there"
    assert page.get_by_role("button", name="Try again").is_visible()


def test_the_server_refuses_what_the_page_would_not_send(deployed: tuple[Mesh, str]) -> None:
    site = deployed[1]
    assert httpx.post(f"{site}documents", content=bytes(10_000_001), timeout=60).status_code == 413
    assert httpx.post(f"{site}documents", content=b"").json() == {"detail": "This file is empty."}
    assert httpx.get(f"{site}documents/fc-01M85KENBEDVG6VWEK24XNHWD3", timeout=60).status_code == 404


def test_a_file_waits_for_a_worker(deployed: tuple[Mesh, str], page: Page) -> None:
    mesh, _ = deployed
    mesh.workers[-1].stop()
    page.set_input_files("#files", [RECEIPT])
    page.get_by_text("No worker can take it just now. Trying again…").first.wait_for(timeout=LONGEST)
    look(page, "working")
    mesh.start_worker("--containers", "6")
    assert "THE CORNER BAKERY" in card(page, "receipt.png", "done")


def test_it_can_be_used_by_keyboard_alone(page: Page) -> None:
    def focused() -> str:
        """The name of what has the focus, which must be seen to have it."""
        assert page.evaluate("""() => {
            const seen = document.activeElement.id === "files" ? "label[for=files]" : ":focus";
            const { outlineStyle, outlineWidth } = getComputedStyle(document.querySelector(seen));
            return outlineStyle === "solid" && parseFloat(outlineWidth) >= 2;
        }"""), "focus is not visible"
        return str(page.evaluate("document.activeElement.id || document.activeElement.innerText"))

    page.on("filechooser", lambda chooser: None)  # from now on none opens for real
    page.keyboard.press("Tab")
    assert focused() == "files"
    page.screenshot(path=SHOTS / "document-ocr-focus.png")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    assert chooser.value.is_multiple()
    page.keyboard.press("Tab")
    assert focused() == "sample"
    page.keyboard.press("Enter")
    assert "Thank you, and good morning!" in card(page, "receipt.png", "done")
    page.keyboard.press("Tab")
    assert focused() == "Remove"
    page.keyboard.press("Tab")
    assert focused() == "Copy text"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    assert page.locator("article").count() == 0
    assert focused() == "files"
