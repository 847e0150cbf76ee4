"""The page of `search.py --serve`: a field to type into, a place to drop a picture on, and what was found.

It is for the one who started it: the server listens on 127.0.0.1, answers only to that name and to localhost (a page
from elsewhere could otherwise have its own name point here), and the page loads nothing from anywhere else. It shows
the images of the index, by pair number and drawn anew as JPEG, and no other file.
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

from flask import Flask, Response, abort, g, render_template, request
from PIL import Image
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.serving import BaseWSGIServer, make_server

from images.files import UnreadableImage, load_thumbnail
from pipeline.errors import UserError
from pipeline.pairs import SPLITS
from reporting.retrieval_index import Index, answer_image, answer_pair, answer_text
from training.encoder import RunEncoder

HOST = "127.0.0.1"
UPLOAD_BYTES, UPLOAD_PIXELS = 32 * 2**20, 64_000_000
SMALL, LARGE = 320, 1600
"""Pixels of the longer side of an image among the results, and on its own."""
MOST = 384
"""Results on a page."""


def make_app(encoder: RunEncoder, index: Index, first: int = 24, first_split: str = "all") -> Flask:
    """The page over a run's encoder and the index of its dataset, which at first shows so many results of a split."""
    app = Flask(__name__, template_folder=str(Path(__file__).parent), static_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=UPLOAD_BYTES, TRUSTED_HOSTS=[HOST, "localhost"])
    decoding = threading.Lock()  # one image at a time: a large one takes hundreds of megabytes

    @functools.lru_cache(maxsize=2000)
    def jpeg(pair: int, longest: int) -> bytes:
        path = index.describe(pair)["path"]
        with decoding:
            return to_jpeg(load_thumbnail(path, longest, encoder.settings.dataset.max_pixels))

    def page(status: int = 200, **shown: Any) -> tuple[str, int]:
        given = {"answer": None, "error": None, "picture": None, "text": "", "split": first_split, "top": first}
        about = {"run": encoder.run.name, "images": len(index.images.pairs), "texts": len(index.texts.pairs)}
        return render_template(
            "search_page.html", nonce=g.nonce, splits=("all", *SPLITS), most=MOST, **about, **(given | shown)
        ), status

    @app.before_request
    def draw_nonce() -> None:
        g.nonce = secrets.token_urlsafe(16)

    @app.after_request
    def restrict(response: Response) -> Response:
        own = f"'nonce-{g.nonce}'" if "nonce" in g else "'none'"
        response.headers["Content-Security-Policy"] = (
            f"default-src 'none'; img-src 'self' data:; style-src {own}; script-src {own}; form-action 'self'; "
            "base-uri 'none'; frame-ancestors 'none'"
        )
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    def wanted() -> tuple[str, int]:
        split = request.values.get("split", first_split)
        top = request.values.get("top", first, type=int)
        return split if split in SPLITS else "all", min(max(top, 1), MOST)

    @app.get("/")
    def search() -> tuple[str, int]:
        split, top = wanted()
        text, pair = request.args.get("text", "").strip(), request.args.get("pair", type=int)
        among = None if split == "all" else split
        asked: dict[str, Any] = {"text": text, "split": split, "top": top}
        if pair is not None:
            try:
                return page(answer=answer_pair(index, pair, top, among), **asked)
            except KeyError:
                return page(404, error=f"The index has no image of pair {pair}.", **asked)
        if not text:
            return page(**asked)
        try:
            return page(answer=answer_text(encoder, index, text, top, among), **asked)
        except UserError as error:
            message = str(error)
            return page(400, error=f"{message[0].upper()}{message[1:]}.", **asked)

    @app.post("/")
    def search_by_picture() -> tuple[str, int]:
        split, top = wanted()
        upload = request.files.get("picture")
        asked: dict[str, Any] = {"split": split, "top": top}
        if upload is None or not upload.filename:
            return page(400, error="Choose a picture, or drop one here.", **asked)
        with tempfile.TemporaryDirectory() as folder, decoding:
            path = Path(folder) / "picture"
            upload.save(path)
            try:
                among = None if split == "all" else split
                answer = answer_image(encoder, index, path, top, among, max_pixels=UPLOAD_PIXELS)
                picture = "data:image/jpeg;base64," + base64.b64encode(
                    to_jpeg(load_thumbnail(path, SMALL, UPLOAD_PIXELS))
                ).decode("ascii")
            except (UserError, UnreadableImage) as error:
                return page(400, error=f"{str(error).replace(str(path), upload.filename)}.", **asked)
        answer["query"]["image"] = upload.filename
        return page(answer=answer, picture=picture, **asked)

    @app.get("/image/<int:pair>")
    @app.get("/image/<int:pair>/<any(large):size>")
    def image(pair: int, size: str = "") -> Response:
        if not index.holds_image(pair):
            abort(404)
        try:
            content = jpeg(pair, LARGE if size else SMALL)
        except UnreadableImage:
            abort(404)
        response = Response(content, mimetype="image/jpeg")
        response.add_etag()
        response.cache_control.no_cache = True  # ask whether it is still the same: another run may use this port
        return response.make_conditional(request)

    @app.errorhandler(RequestEntityTooLarge)
    def too_large(_: RequestEntityTooLarge) -> tuple[str, int]:
        return page(413, error=f"The picture is larger than {UPLOAD_BYTES // 2**20} MB.")

    @app.errorhandler(HTTPException)
    def failed(error: HTTPException) -> tuple[str, int, dict[str, str]]:
        return f"{error.code} {error.name}\n", error.code or 500, {"Content-Type": "text/plain; charset=utf-8"}

    return app


def to_jpeg(image: Image.Image) -> bytes:
    """The bytes of an RGB image as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def local_server(app: Flask, port: int) -> BaseWSGIServer:
    """A server of the page to this computer; port 0 takes a free one. Raises UserError where the port is in use."""
    try:
        listening = socket.create_server((HOST, port))
    except OSError as error:
        raise UserError(f"cannot listen on port {port}: {error.strerror}; choose another with --port") from None
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line for every image
    with listening:  # the server has a handle of its own
        return make_server(HOST, listening.getsockname()[1], app, threaded=True, fd=listening.fileno())


def serve(app: Flask, port: int) -> None:
    """Serve the page until Ctrl-C; errors as for `local_server`."""
    server = local_server(app, port)
    print(f"serving http://{HOST}:{server.port}/ to this computer until Ctrl-C", flush=True)
    server.serve_forever()
