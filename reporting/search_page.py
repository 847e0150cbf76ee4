"""The page of `search.py --serve`: a field for words, a place to drop a picture, and the results.

Only the user who started the server can use it:

- The server listens on 127.0.0.1.
- It answers only requests for that address or localhost, so that a foreign name that points here gets nothing.
- The page loads nothing from other hosts.
- The server sends indexed images only, by pair number, encoded again as JPEG.
"""

import base64
import functools
import io
import logging
import secrets
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

from flask import Flask, abort, g, render_template, request
from flask.wrappers import Response
from PIL import Image
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.serving import BaseWSGIServer, make_server

from images.files import UnreadableImage, load_thumbnail
from pipeline.errors import UserError
from pipeline.pairs import SPLITS
from reporting.answers import answer_image, answer_pair, answer_text
from reporting.retrieval_index import Index
from training.encoder import RunEncoder
from training.runs import readable_name

HOST = "127.0.0.1"
UPLOAD_BYTES, UPLOAD_PIXELS = 32 * 2**20, 64_000_000
THUMBNAIL_SIDE, LARGE_SIDE = 320, 1600
"""Pixels of the longer side of an image, among the results and on its own."""
MAX_RESULTS = 384
"""Results on a page, at most."""

Page = tuple[str, int]
"""HTML and HTTP status."""


class SearchPage:
    """The page over a run's encoder and the index of its dataset."""

    def __init__(self, encoder: RunEncoder, index: Index, default_top: int, default_split: str) -> None:
        self.encoder, self.index = encoder, index
        self.default_top, self.default_split = default_top, default_split
        self.decoding = threading.Lock()  # one image at a time: a large one takes hundreds of megabytes
        self.jpeg = functools.lru_cache(maxsize=2000)(self._jpeg)

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
        with tempfile.TemporaryDirectory() as folder, self.decoding:
            path = Path(folder) / "picture"
            upload.save(path)
            try:
                among = None if split == "all" else split
                answer = answer_image(self.encoder, self.index, path, top, among, max_pixels=UPLOAD_PIXELS)
                thumbnail = to_jpeg(load_thumbnail(path, THUMBNAIL_SIDE, UPLOAD_PIXELS))
            except (UserError, UnreadableImage) as error:
                return self.render(400, error=f"{str(error).replace(str(path), upload.filename)}.", **asked)
        answer["query"]["image"] = upload.filename
        picture = "data:image/jpeg;base64," + base64.b64encode(thumbnail).decode("ascii")
        return self.render(answer=answer, picture=picture, **asked)

    def image(self, pair: int, size: str = "") -> Response:
        """An indexed image as JPEG, by its pair number."""
        if not self.index.holds_image(pair):
            abort(404)
        try:
            content = self.jpeg(pair, LARGE_SIDE if size else THUMBNAIL_SIDE)
        except UnreadableImage:
            abort(404)
        response = Response(content, mimetype="image/jpeg")
        response.add_etag()
        response.cache_control.no_cache = True  # browsers must ask again: another run may use this port
        response.make_conditional(request)
        return response

    def render(self, status: int = 200, **shown: Any) -> Page:
        """The page with what is `shown`, and the status."""
        given: dict[str, Any] = {"answer": None, "error": None, "picture": None, "text": ""}
        given |= {"split": self.default_split, "top": self.default_top}
        counts = {"images": len(self.index.images.pairs), "texts": len(self.index.texts.pairs)}
        run, splits = readable_name(self.encoder.run), ("all", *SPLITS)
        html = render_template(
            "search_page.html", nonce=g.nonce, splits=splits, most=MAX_RESULTS, run=run, **counts, **(given | shown)
        )
        return html, status

    def _options(self) -> tuple[str, int]:
        """Split and number of results of the request; the defaults where it has none that are valid."""
        split = request.values.get("split", self.default_split)
        top = request.values.get("top", self.default_top, type=int)
        return split if split in SPLITS else "all", min(max(top, 1), MAX_RESULTS)

    def _jpeg(self, pair: int, longest: int) -> bytes:
        path = self.index.describe(pair)["path"]
        with self.decoding:
            return to_jpeg(load_thumbnail(path, longest, self.encoder.settings.dataset.max_pixels))


def make_app(encoder: RunEncoder, index: Index, default_top: int = 24, default_split: str = "all") -> Flask:
    """The page as a Flask application. By default it shows `default_top` results of `default_split`."""
    page = SearchPage(encoder, index, default_top, default_split)
    app = Flask(__name__, template_folder=str(Path(__file__).parent), static_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=UPLOAD_BYTES, TRUSTED_HOSTS=[HOST, "localhost"])
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
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def to_jpeg(image: Image.Image) -> bytes:
    """An RGB image as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def local_server(app: Flask, port: int) -> BaseWSGIServer:
    """A server for this computer only. Port 0 takes a free one. Raises UserError where the port is in use."""
    try:
        listening = socket.create_server((HOST, port))
    except OSError as error:
        raise UserError(f"cannot listen on port {port}: {error.strerror}; choose another with --port") from None
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no log line for every image
    with listening:  # the server duplicates the socket
        return make_server(HOST, listening.getsockname()[1], app, threaded=True, fd=listening.fileno())


def serve(app: Flask, port: int) -> None:
    """Serve the page until Ctrl-C. Errors as for `local_server`."""
    server = local_server(app, port)
    print(f"serving http://{HOST}:{server.port}/ to this computer until Ctrl-C", flush=True)
    server.serve_forever()
