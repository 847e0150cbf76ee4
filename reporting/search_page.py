"""The page of `search.py --serve`: a field for words, a place to drop a picture, and the results.

Before a search it shows drawn pairs and common words.

Only the user who started the server can use it:

- The server listens on 127.0.0.1.
- It answers only requests for that address or localhost, so that a foreign name that points here gets nothing.
- The page loads nothing from other hosts.
- The server sends indexed images only, by pair number, encoded again as JPEG.
- Pages of other sites can link to the page, and do nothing else: they send no pictures and show none of its images.
"""

import base64
import functools
import io
import logging
import os
import secrets
import socket
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flask import Flask, abort, g, render_template, request
from flask.wrappers import Response
from PIL import Image
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from images.files import UnreadableImage, load_thumbnail
from images.tar_members import file_of
from pipeline.errors import UserError
from pipeline.pairs import SPLITS
from reporting.answers import UnknownWords, answer_image, answer_pair, answer_text, common_words, draw_pairs
from reporting.retrieval_index import Index
from training.encoder import RunEncoder
from training.runs import describe_run

if TYPE_CHECKING:
    from waitress.server import BaseWSGIServer

HOST = "127.0.0.1"
UPLOAD_BYTES, UPLOAD_PIXELS = 32 * 2**20, 25_000_000
"""Limits of a picture. A dataset was checked once; a picture comes from anyone, and is decoded twice while its sender
waits. 24 megapixels are what most cameras take, and need 100 MB and about a second.
"""
MAX_PICTURES = 3
"""Uploaded pictures at a time: one is decoded, the others wait. THREADS is larger, so that words are still answered."""
THREADS, CONNECTIONS = 8, 300
TIMEOUT_S = 30
"""Seconds after which a connection that sends nothing is closed."""
THUMBNAIL_SIDE, LARGE_SIDE = 320, 1600
"""Pixels of the longer side of an image, among the results and on its own."""
MAX_RESULTS = 384
"""Results on a page, at most."""
DRAWN_PAIRS, COMMON_WORDS = 12, 10
"""What the page opens with."""

Page = tuple[str, int]
"""HTML and HTTP status."""


class SearchPage:
    """The page over a run's encoder and the index of its dataset."""

    def __init__(self, encoder: RunEncoder, index: Index, default_top: int, default_split: str) -> None:
        self.encoder, self.index = encoder, index
        self.run = describe_run(encoder.run)
        self.words = common_words(encoder.vocabulary, COMMON_WORDS)
        self.default_top, self.default_split = default_top, default_split
        self.decoding = threading.Lock()  # one image at a time: a large one takes hundreds of megabytes
        self.upload_pixels = min(UPLOAD_PIXELS, encoder.settings.dataset.max_pixels)
        self.pictures, self.decoding_picture = threading.BoundedSemaphore(MAX_PICTURES), threading.Lock()
        self.thumbnail = functools.lru_cache(maxsize=2000)(functools.partial(self._jpeg, longest=THUMBNAIL_SIDE))
        self.large = functools.lru_cache(maxsize=50)(functools.partial(self._jpeg, longest=LARGE_SIDE))

    def search(self) -> Page:
        """GET: search by words or by an indexed image."""
        split, top = self._options()
        text, pair = request.args.get("text", "").strip(), request.args.get("pair", type=int)
        among = None if split == "all" else split
        asked: dict[str, Any] = {"text": text, "split": split, "top": top}
        if pair is not None:
            try:
                return self.render(answer=answer_pair(self.index, pair, top, among), **asked)
            except KeyError:
                return self.render(404, error=f"The index has no image of pair {pair}.", **asked)
        if not text:
            return self.render(**asked)
        try:
            return self.render(answer=answer_text(self.encoder, self.index, text, top, among), **asked)
        except UnknownWords as error:
            return self.render(400, unknown=error, **asked)
        except UserError as error:
            message = str(error)
            return self.render(400, error=f"{message[0].upper()}{message[1:]}.", **asked)

    def search_by_picture(self) -> Page:
        """POST: search by an uploaded picture."""
        split, top = self._options()
        upload = request.files.get("picture")
        asked: dict[str, Any] = {"split": split, "top": top}
        if upload is None or not upload.filename:
            return self.render(400, error="Choose a picture, or drop one here.", **asked)
        if not self.pictures.acquire(blocking=False):
            return self.render(503, error="Other pictures are being read. Try again in a few seconds.", **asked)
        try:
            with tempfile.TemporaryDirectory() as folder, self.decoding_picture:
                path = Path(folder) / "picture"
                upload.save(path)
                among = None if split == "all" else split
                answer = answer_image(self.encoder, self.index, path, top, among, max_pixels=self.upload_pixels)
                thumbnail = to_jpeg(load_thumbnail(path, THUMBNAIL_SIDE, self.upload_pixels))
        except (UserError, UnreadableImage) as error:
            why = str(error).replace(str(path), upload.filename).replace("dataset.max_pixels", "this page's limit of")
            return self.render(400, error=f"{why}.", **asked)
        finally:
            self.pictures.release()
        answer["query"]["image"] = upload.filename
        picture = "data:image/jpeg;base64," + base64.b64encode(thumbnail).decode("ascii")
        return self.render(answer=answer, picture=picture, **asked)

    def image(self, pair: int, size: str = "") -> Response:
        """An indexed image as JPEG, by its pair number."""
        if not self.index.holds_image(pair):
            abort(404)
        try:
            changed = file_of(Path(self.index.describe(pair)["path"])).stat().st_mtime_ns
            content = self.large(pair, changed) if size else self.thumbnail(pair, changed)
        except (OSError, UnreadableImage):
            abort(404)
        response = Response(content, mimetype="image/jpeg")
        response.add_etag()
        response.cache_control.no_cache = True  # browsers must ask again: another run may use this port
        response.make_conditional(request)
        return response

    def render(self, status: int = 200, **shown: Any) -> Page:
        """The page with what is `shown`, and the status."""
        given: dict[str, Any] = {"answer": None, "error": None, "unknown": None, "picture": None, "text": ""}
        given |= {"split": self.default_split, "top": self.default_top, "drawn": [], "words": self.words} | shown
        if not given["answer"]:
            among = None if given["split"] == "all" else given["split"]
            given["drawn"] = draw_pairs(self.index, DRAWN_PAIRS, self.run["seed"], among)
        counts = {"images": len(self.index.images.pairs), "texts": len(self.index.texts.pairs)}
        given |= counts | {"run": self.run, "splits": ("all", *SPLITS), "most": MAX_RESULTS}
        given |= {"image_pair": self.index.image_pair, "file_name": os.path.basename}
        return render_template("search_page.html", nonce=g.nonce, **given), status

    def _options(self) -> tuple[str, int]:
        """Split and number of results of the request; the defaults where it has none that are valid."""
        split = request.values.get("split", self.default_split)
        top = request.values.get("top", self.default_top, type=int)
        return split if split in SPLITS else "all", min(max(top, 1), MAX_RESULTS)

    def _jpeg(self, pair: int, _changed: int, longest: int) -> bytes:
        path = self.index.describe(pair)["path"]
        with self.decoding:
            return to_jpeg(load_thumbnail(path, longest, self.encoder.settings.dataset.max_pixels))


def make_app(encoder: RunEncoder, index: Index, default_top: int = 24, default_split: str = "all") -> Flask:
    """The page as a Flask application. By default it shows `default_top` results of `default_split`."""
    page = SearchPage(encoder, index, default_top, default_split)
    app = Flask(__name__, template_folder=str(Path(__file__).parent), static_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=UPLOAD_BYTES, TRUSTED_HOSTS=[HOST, "localhost"])
    app.before_request(_refuse_other_sites)
    app.before_request(_draw_nonce)
    app.after_request(_restrict)
    app.get("/")(page.search)
    app.post("/")(page.search_by_picture)
    app.add_url_rule("/image/<int:pair>", view_func=page.image)
    app.add_url_rule("/image/<int:pair>/<any(large):size>", view_func=page.image)

    @app.errorhandler(RequestEntityTooLarge)
    def too_large(_: RequestEntityTooLarge) -> Page:
        return page.render(413, error=f"The picture is larger than {UPLOAD_BYTES // 2**20} MB.")

    @app.errorhandler(HTTPException)
    def failed(error: HTTPException) -> tuple[str, int, dict[str, str]]:
        return f"{error.code} {error.name}\n", error.code or 500, {"Content-Type": "text/plain; charset=utf-8"}

    return app


def _refuse_other_sites() -> None:
    """Other sites, and other ports of this computer, may link to the page. Browsers say where a request comes from."""
    is_link = request.method in ("GET", "HEAD") and request.headers.get("Sec-Fetch-Mode") == "navigate"
    is_page = is_link and request.headers.get("Sec-Fetch-Dest") == "document"
    if request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and not is_page:
        abort(403)


def _draw_nonce() -> None:
    """Only the page's own script and style, which have this request's nonce, are run and applied."""
    g.nonce = secrets.token_urlsafe(16)


def _restrict(response: Response) -> Response:
    own = f"'nonce-{g.nonce}'" if "nonce" in g else "'none'"
    response.headers["Content-Security-Policy"] = (
        f"default-src 'none'; img-src 'self' data:; style-src {own}; script-src {own}; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    )
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["X-Content-Type-Options"] = "nosniff"
    if response.status_code == 503:
        response.headers["Retry-After"] = "5"
    return response


def to_jpeg(image: Image.Image) -> bytes:
    """An RGB image as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def local_server(app: Flask, port: int) -> "BaseWSGIServer":
    """A server for this computer only. Port 0 takes a free one. Raises UserError where the port is in use."""
    from waitress import create_server

    try:
        listening = socket.create_server((HOST, port), backlog=CONNECTIONS)
    except OSError as error:
        raise UserError(f"cannot listen on port {port}: {error.strerror}; choose another with --port") from None
    logging.getLogger("waitress").setLevel(logging.ERROR)  # it warns whenever requests wait
    return create_server(
        app,
        sockets=[listening],
        threads=THREADS,
        connection_limit=CONNECTIONS,
        channel_timeout=TIMEOUT_S,
        cleanup_interval=TIMEOUT_S // 3,
        max_request_header_size=2**16,
        max_request_body_size=4 * UPLOAD_BYTES,  # up to here the page says what is wrong
        ident=None,  # no header that names the server
    )


def serve(app: Flask, port: int) -> None:
    """Serve the page until Ctrl-C. Errors as for `local_server`."""
    server = local_server(app, port)
    print(f"serving http://{HOST}:{server.effective_port}/ to this computer until Ctrl-C", flush=True)
    server.run()
