"""A page for an index on this machine: a search field, and what is found as snippets that play from the original files.

`serve(Index.open("videos"))` runs it until it is interrupted; `app` is the same for another ASGI server. A video is addressed
by a hash of its name, never by a path, and only what the index has is given out, while it is the file that was indexed.
"""

import functools
import hashlib
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from evaat_fast.data.decode import VideoError
from evaat_fast.search import page
from evaat_fast.search.index import Index
from evaat_fast.search.moments import Moment, clock, printable
from evaat_fast.search.query import Like
from evaat_fast.search.store import BadIndex, File

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

PORT = 8765
MOST = 200  # moments of a request
LOCAL = ("127.0.0.1", "localhost", "::1")
EVERY = 2.0  # seconds between looks for what another process has committed
_POSTERS = 512  # that are kept, some 20 KB each
_PAGES = {"": ("index.html", "text/html"), "app.js": ("app.js", "text/javascript"), "app.css": ("app.css", "text/css")}
# Browsers go by these: QuickTime's container plays as mp4 where its codec does.
_TYPES = {".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/mp4", ".webm": "video/webm", ".mkv": "video/x-matroska"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "media-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

__all__ = ["PORT", "app", "serve"]


class _Served:
    """An index and the addresses of its videos, which change together when another process adds to it."""

    def __init__(self, index: Index):
        self.index = index
        self._lock = threading.Lock()
        self._looked = time.monotonic()
        self._posters: OrderedDict[tuple[str, float], bytes] = OrderedDict()
        self._decoding = threading.Semaphore(2)  # of posters at once: the search field must stay quick
        self._take()

    def _take(self) -> None:
        self.by_key = {_key(file.name): file for file in self.index.files}

    def fresh(self) -> None:
        """Looks for what was committed, now and then."""
        with self._lock:
            if time.monotonic() - self._looked < EVERY:
                return
            self._looked = time.monotonic()
            try:
                self.index.reload()
            except BadIndex:  # in the middle of a commit; the next look finds it whole
                return
            self._take()

    def file(self, key: str) -> tuple[File, str] | None:
        """A video and its path, if it is in the index and still the file that was indexed."""
        file = self.by_key.get(key)
        if file is None:
            return None
        path = self.index.path(file.name)
        try:
            found = os.stat(path)
        except (OSError, ValueError):
            return None
        same = stat.S_ISREG(found.st_mode) and (found.st_size, found.st_mtime_ns) == (file.size, file.mtime)
        return (file, path) if same else None

    def poster(self, key: str, path: str, at: float) -> bytes:
        with self._lock:
            if (kept := self._posters.get((key, at))) is not None:
                self._posters.move_to_end((key, at))
                return kept
        with self._decoding:
            picture = page.poster(path, at)
        with self._lock:
            self._posters[key, at] = picture
            while len(self._posters) > _POSTERS:
                self._posters.popitem(last=False)
        return picture

    def folders(self) -> list[str]:
        """Those that videos lie in, and those above them below the index's own."""
        found: set[str] = set()
        for file in self.index.files:
            folder = os.path.dirname(file.name)
            while folder and folder not in found and folder != os.sep:
                found.add(folder)
                folder = os.path.dirname(folder)
        return sorted(found)


@functools.lru_cache(maxsize=1 << 16)
def _key(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:24]


def app(index: Index, hosts: Sequence[str] = LOCAL) -> "Starlette":
    """The pages of an index as an ASGI application.

    Args:
        index: to search. hosts: names under which a browser may address it, so that no other site reaches it through a name of
            its own; "*" is any.

    Raises:
        ImportError: starlette is missing.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.routing import Route

    served = _Served(index)
    routes = [Route(f"/{name}", functools.partial(_static, name)) for name in _PAGES]
    routes += [
        Route(path, functools.partial(function, served))
        for path, function in (
            ("/api/index", _about),
            ("/api/search", _search),
            ("/video/{key}", _video),
            ("/poster/{key}", _poster),
        )
    ]
    allowed = [f"[{host}]" if ":" in host else host for host in hosts]
    return Starlette(
        routes=routes,
        middleware=[Middleware(_Headers), Middleware(TrustedHostMiddleware, allowed_hosts=allowed, www_redirect=False)],
    )


class _Headers:
    """Puts what keeps a browser from doing more than it must on every answer."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message):
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                more = ((k.lower().encode(), v.encode()) for k, v in _HEADERS.items())
                message["headers"] = [*message["headers"], *(pair for pair in more if pair[0] not in given)]
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)


def _static(name: str, request: "Request") -> "Response":
    from starlette.responses import Response

    file, kind = _PAGES[name]
    content = resources.files("evaat_fast.search").joinpath("web", file).read_bytes()
    return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})


def _about(served: _Served, request: "Request") -> "Response":
    from starlette.responses import JSONResponse

    served.fresh()
    index = served.index
    times = [file.mtime for file in index.files]
    days = [time.strftime("%Y-%m-%d", time.localtime(pick(times) / 1e9)) for pick in (min, max)] if times else []
    return JSONResponse(
        {
            "clips": len(index),
            "videos": len(index.files),
            "unreadable": len(index.unreadable),
            "folders": [{"name": printable(x), "value": x} for x in served.folders() if _is_text(x)],
            "days": days,
            "name": printable(os.path.basename(index.base)),
        }
    )


def _search(served: _Served, request: "Request") -> "Response":
    from starlette.responses import JSONResponse

    served.fresh()
    given = request.query_params
    try:
        likes = [_like(served, text) for text in given.getlist("like")]
        k = min(MOST, max(1, int(given.get("k") or 24)))
        folder = given.get("folder")
        began = time.perf_counter()
        found = served.index.search(
            (given.get("q") or "").strip() or None,
            like=likes,
            k=k,
            folder=None if not folder else served.index.path(folder),
            after=given.get("after") or None,
            before=given.get("before") or None,
        )
    except (ValueError, VideoError, OSError, RuntimeError) as error:
        return JSONResponse({"error": str(error).splitlines()[0] if str(error) else type(error).__name__}, 400)
    took = time.perf_counter() - began
    keys = {served.index.path(file.name): key for key, file in served.by_key.items()}
    moments = [_shown(moment, keys.get(moment.file, ""), served.index.base) for moment in found]
    return JSONResponse({"query": printable(found.query), "moments": moments, "seconds": round(took, 3)})


def _shown(moment: Moment, key: str, base: str) -> dict[str, Any]:
    name = os.path.relpath(moment.file, base) if moment.file.startswith(base + os.sep) else moment.file
    return {
        "key": key,
        "file": printable(name),
        "score": round(moment.score, 4),
        "start": round(moment.start, 3),
        "stop": round(moment.stop, 3),
        "peak": round(moment.peak, 3),
        "time": f"{clock(moment.start)} – {clock(moment.stop)}",
        "date": moment.date.strftime("%Y-%m-%d %H:%M"),
    }


def _like(served: _Served, text: str) -> Like:
    """KEY@SECONDS of a video in the index."""
    key, at, seconds = text.partition("@")
    file = served.by_key.get(key)
    try:
        time = float(seconds)
    except ValueError:
        time = -1.0
    if not at or file is None or not 0 <= time < float("inf"):
        raise ValueError("like: expected a moment that was found")
    return Like(served.index.path(file.name), time)


def _video(served: _Served, request: "Request") -> "Response":
    from starlette.responses import FileResponse

    found = served.file(request.path_params["key"])
    if found is None:
        return _missing()
    kind = _TYPES.get(os.path.splitext(found[1])[1].lower(), "application/octet-stream")
    return FileResponse(found[1], media_type=kind, headers={"Cache-Control": "private, max-age=3600"})


def _poster(served: _Served, request: "Request") -> "Response":
    from starlette.responses import Response

    key = request.path_params["key"]
    found = served.file(key)
    try:
        at = round(float(request.query_params.get("t", "0")), 3)
        if found is None or not 0 <= at < 1e7:
            return _missing()
        picture = served.poster(key, found[1], at)
    except (ValueError, VideoError, OSError):
        return _missing()
    return Response(picture, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})


def _missing() -> "Response":
    from starlette.responses import PlainTextResponse

    return PlainTextResponse("not in the index, or changed since it was indexed", 404)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8, which an address cannot carry
        return False
    return True


def serve(index: Index, host: str = "127.0.0.1", port: int = PORT, *, started: Callable[[str], object] | None = None) -> None:
    """Serves the pages of an index until it is interrupted.

    Args:
        index: to search; its model is loaded meanwhile. host: the address to listen at; others than this machine's own let
            everyone in the network see the videos. port: 0 takes a free one. started: called with the page's address as soon as
            it can be opened.

    Raises:
        ImportError: starlette or uvicorn is missing. OSError: the port is taken.
    """
    import socket

    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    with listening:
        if os.name == "posix":  # a port that was left just now may be taken again
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)
        hosts = LOCAL if host in LOCAL else ("*",)
        config = uvicorn.Config(app(index, hosts), log_level="warning", access_log=False, timeout_graceful_shutdown=2)
        threading.Thread(target=_load, args=(index,), daemon=True).start()
        if started is not None:  # who comes now waits in the queue of the socket
            started(_address(host, listening.getsockname()[1]))
        uvicorn.Server(config).run(sockets=[listening])


def _load(index):
    try:
        index.embedder  # noqa: B018, loads the model while the page is looked at
    except (ValueError, OSError, RuntimeError):
        pass  # the first search says it


def _address(host, port):
    name = f"[{host}]" if ":" in host else {"0.0.0.0": "127.0.0.1"}.get(host, host)
    return f"http://{name}:{port}/"
