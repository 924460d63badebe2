"""Read receipts and scanned pages: `mesh serve examples/document_ocr.py`, and drop a few on the page it names.

The page sends each file to `web`, which spawns `read_document` and answers with the call's id; then it asks by that id
until the text is there. `read_document` takes a file apart into pages, and has `read_page` read all of them at once, on
whichever workers have room. Nothing is stored but the call's result, which the mesh keeps for a day.

Without a browser:

    curl --data-binary @examples/document_ocr_page/receipt.png "$URL/documents?name=receipt.png"
    curl "$URL/documents/fc-…"
"""

import io
from pathlib import Path

import mesh

PAGE = "document_ocr_page"  # the files of the page: a folder beside this file, and beside its containers
LARGEST_FILE = 10_000_000  # bytes
MOST_PAGES = 20
LONGEST_SIDE = 2400  # pixels: enough for a page of small print

image = (
    mesh.Image.debian_slim()
    .apt_install("tesseract-ocr")
    .pip_install("fastapi", "pillow", "pypdfium2", "pytesseract")
    .add_local_dir(Path(__file__).parent / PAGE, PAGE)
)
app = mesh.App("document-ocr", image=image)


class UnreadableFileError(Exception):
    """A file that has no text for us; says why in words for the person who sent it."""


# --- reading ---------------------------------------------------------------------------------------------------------


@app.function(timeout=120, result_ttl=24 * 3600)
def read_document(content: bytes) -> dict:
    """What stands on the pages of a file, and where: `{"pages": […], "pictures": […]}`."""
    pictures = pages_of(content)
    return {"pages": list(read_page.map(pictures)), "pictures": pictures}


@app.function(timeout=60, retries=1)
def read_page(picture: bytes) -> dict:
    """The text of one page, and its words in that order, each with its box in pixels: left, top, width, height."""
    import pytesseract
    from PIL import Image

    page = Image.open(io.BytesIO(picture))
    found = pytesseract.image_to_data(page, output_type=pytesseract.Output.DICT)
    columns = ("block_num", "par_num", "line_num", "text", "left", "top", "width", "height")
    words, paragraphs = [], {}
    for block, paragraph, line, word, *box in zip(*(found[name] for name in columns), strict=True):
        if word.strip():
            words.append({"text": word, "box": box})
            paragraphs.setdefault((block, paragraph), {}).setdefault(line, []).append(word)
    text = "\n\n".join("\n".join(map(" ".join, lines.values())) for lines in paragraphs.values())
    print(f"read {len(words)} words")
    return {"text": text, "words": words, "width": page.width, "height": page.height}


def pages_of(content: bytes) -> list[bytes]:
    """The pages of a file, each a JPEG, upright, and no larger than is useful."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    pictures = []
    try:
        for page in pdf_pages(content) if content.startswith(b"%PDF") else picture_pages(content):
            if len(pictures) == MOST_PAGES:
                raise UnreadableFileError(f"This file has more than {MOST_PAGES} pages. Send it in parts.")
            upright = ImageOps.exif_transpose(page).convert("RGBA")
            paper = Image.new("RGB", upright.size, "white")  # what is transparent is not black
            paper.paste(upright, mask=upright)
            paper.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            jpeg = io.BytesIO()
            paper.save(jpeg, "JPEG", quality=85)
            pictures.append(jpeg.getvalue())
    except UnidentifiedImageError:
        raise UnreadableFileError("This is not a picture or a PDF, or it is damaged.") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableFileError(f"This file cannot be opened: {error}.") from None
    return pictures


def picture_pages(content: bytes):
    """The pages of a picture: a TIFF may have several."""
    from PIL import Image, ImageSequence

    yield from ImageSequence.Iterator(Image.open(io.BytesIO(content)))


def pdf_pages(content: bytes):
    """The pages of a PDF as pictures, 200 dots an inch."""
    import pypdfium2

    try:
        for page in pypdfium2.PdfDocument(content):
            yield page.render(scale=200 / 72).to_pil()
    except pypdfium2.PdfiumError:
        raise UnreadableFileError("This PDF cannot be opened: it is damaged, or has a password.") from None


# --- the page --------------------------------------------------------------------------------------------------------


def explained(error: Exception) -> tuple[int, str]:
    """The status of an answer, and words for the person who waits for it."""
    match error:
        case UnreadableFileError():
            return 422, str(error)
        case mesh.exception.OutputExpiredError() | mesh.exception.NotFoundError():
            return 404, "The text of this file is no longer kept. Send it again."
        case mesh.exception.RequestSizeError():
            return 413, "This file, or what it becomes as pictures, is larger than the mesh carries."
        case mesh.exception.FunctionTimeoutError():
            return 500, "Reading it took too long. A smaller picture may work."
    return 500, f"Reading it failed on the worker: {error}"


class Documents:
    """What was read, by the id of its call. The last few are at hand: a page asks for each of its pictures."""

    def __init__(self):
        self._recent: dict[str, dict] = {}

    async def get(self, call_id: str, patience: float) -> dict:
        if call_id not in self._recent:
            self._recent[call_id] = await mesh.FunctionCall.from_id(call_id).get.aio(timeout=patience)
            if len(self._recent) > 8:
                del self._recent[next(iter(self._recent))]
        return self._recent[call_id]


@app.function()
@mesh.asgi_app()
def web():
    from fastapi import FastAPI, HTTPException, Request, Response
    from fastapi.responses import JSONResponse
    from fastapi.staticfiles import StaticFiles

    site = FastAPI(title="Document OCR")
    documents = Documents()

    @site.post("/documents", status_code=202)
    async def submit(request: Request, name: str = ""):
        """Begin to read the file that is the request's body."""
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > LARGEST_FILE:
                raise HTTPException(413, f"This file is larger than {LARGEST_FILE // 1_000_000} MB.")
        if not content:
            raise HTTPException(422, "This file is empty.")
        try:
            call = await read_document.spawn.aio(bytes(content))
        except mesh.exception.Error as error:
            raise HTTPException(*explained(error)) from None
        print(f"{name or 'a file'} is {call.object_id}")
        return {"call_id": call.object_id}

    @site.get("/documents/{call_id}")
    async def look(call_id: str):
        """What is on the pages, or 202 and how far it is."""
        try:
            return {"pages": (await documents.get(call_id, patience=1))["pages"]}
        except TimeoutError:
            status = await mesh.FunctionCall.from_id(call_id).status.aio()
            return JSONResponse({"state": status.state, "waiting_for": status.waiting_for}, status_code=202)
        except Exception as error:  # noqa: BLE001 - whatever it was, somebody waits to be told
            raise HTTPException(*explained(error)) from None

    @site.get("/documents/{call_id}/pages/{number}")
    async def picture(call_id: str, number: int):
        """The picture of a page, to which the boxes belong."""
        pictures = (await documents.get(call_id, patience=0))["pictures"]
        return Response(pictures[number], media_type="image/jpeg")

    site.mount("/", StaticFiles(directory=PAGE, html=True))
    return site
