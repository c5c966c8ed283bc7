"""A page for an index on this machine: a search field, and what is found as snippets that play from the original files.

`serve(Index.open("videos"))` runs it until it is interrupted; `app` is the same for another ASGI server. A video is addressed
by a hash of its name, never by a path, and only what the index has is given out, while it is the file that was indexed: opened
once, compared by where it lies, size and time, and read from what was opened.
"""

import contextlib
import functools
import hashlib
import ipaddress
import os
import re
import stat
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib import resources
from typing import IO, TYPE_CHECKING, Any

from evaat_fast.data.below import is_text
from evaat_fast.data.decode import VideoError
from evaat_fast.search import PORT, page, scan
from evaat_fast.search.index import Index
from evaat_fast.search.moments import Moment, clock, printable
from evaat_fast.search.query import Like
from evaat_fast.search.store import BadIndex, File

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

MOST = 200  # moments of a request
LOCAL = ("127.0.0.1", "localhost", "::1")
EVERY = 2.0  # seconds between looks for what another process has committed
_DECODING = 2  # posters at once: the search field must stay quick
_HOST = re.compile(r"\[([0-9a-f:.]+)\](?::\d+)?|([^:\[\]@/\s]+)(?::\d+)?", re.IGNORECASE)
_POSTERS = 512  # that are kept, some 20 KB each
_PAGES = {"": ("index.html", "text/html"), "app.js": ("app.js", "text/javascript"), "app.css": ("app.css", "text/css")}
# Browsers go by these: QuickTime's container plays as mp4 where its codec does.
_TYPES = {".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/mp4", ".webm": "video/webm", ".mkv": "video/x-matroska"}
_FRESH = {"Cache-Control": "private, no-cache"}  # a video that changes keeps its address
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "media-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

__all__ = ["app", "is_local", "serve"]


class _Served:
    """An index and the addresses of its videos, which change together when another process adds to it."""

    def __init__(self, index: Index, approximate: bool):
        self.index, self.approximate = index, approximate
        self._lock = threading.Lock()
        self._looked = time.monotonic()
        self._posters: OrderedDict[tuple[Any, ...], bytes] = OrderedDict()
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
            except (BadIndex, OSError):  # in the middle of a commit, or gone; a later look may find it whole
                return
            self._take()

    def open(self, key: str) -> tuple[File, str, IO[bytes]] | None:
        """A video, its path and it opened, if it is in the index and still the file that was indexed."""
        file = self.by_key.get(key)
        if file is None:
            return None
        path = self.index.real_path(file.name)
        opened = None
        try:
            opened = open(path, "rb", buffering=0, opener=_at_once)
            found = os.fstat(opened.fileno())
            same = stat.S_ISREG(found.st_mode) and scan.stamp(found) == (file.size, file.mtime)
            # A folder above it may be a link by now that leads elsewhere.
            if same and os.path.realpath(path) == path and os.path.samestat(os.lstat(path), found):
                return file, path, opened
        except (OSError, ValueError):
            pass
        if opened is not None:
            opened.close()
        return None

    def kept(self, key: str, at: float) -> bytes | tuple[tuple[Any, ...], str] | None:
        """The picture of a video at a time, if it is known; else what `decode` takes, None where there is no such video."""
        if (found := self.open(key)) is None:
            return None
        file, path, opened = found
        opened.close()
        name = (key, file.size, file.mtime, at)
        with self._lock:
            if (picture := self._posters.get(name)) is not None:
                self._posters.move_to_end(name)
                return picture
        return name, path

    def decode(self, name: tuple[Any, ...], path: str) -> bytes:
        """The picture that `kept` does not have."""
        picture = page.poster(path, name[-1])
        with self._lock:
            self._posters[name] = picture
            while len(self._posters) > _POSTERS:
                self._posters.popitem(last=False)
        return picture

    @functools.cached_property
    def decoding(self) -> Any:
        """Holds back those who wait for a picture, without a thread; made within the loop of the server."""
        import anyio

        return anyio.CapacityLimiter(_DECODING)

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


def _at_once(path: str, flags: int) -> int:
    """Does not wait for the other end of a pipe that has taken a file's place."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def app(index: Index, hosts: Sequence[str] = LOCAL, numbers: bool = False, approximate: bool = False) -> "Starlette":
    """The pages of an index as an ASGI application.

    Args:
        index: to search. hosts: names under which a browser may address it, so that no other site reaches it through a name of
            its own; "*" is any. numbers: or by an IP address, whichever; no site has one for a name.
        approximate: as for `Index.search`.

    Raises:
        ImportError: starlette is missing. BadIndex: approximate without a graph.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.routing import Route

    if approximate:
        index.graph()  # a mistake is said now, not at the first search
    served = _Served(index, approximate)
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
    allowed = frozenset(host.lower() for host in hosts)
    made = Starlette(routes=routes, middleware=[Middleware(_Guard, hosts=allowed, numbers=numbers)])
    made.router.redirect_slashes = False
    return made


class _Guard:
    """Answers only those who call the server by its own name, and puts what keeps a browser from doing more than it must on
    every answer."""

    def __init__(self, app: Any, hosts: frozenset[str], numbers: bool):
        self.app, self.hosts, self.numbers = app, hosts, numbers

    def _allows(self, scope: Any) -> bool:
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        found = _HOST.fullmatch(given[0].strip()) if len(given) == 1 else None
        if found is None:
            return False
        name = (found[1] or found[2]).lower()
        return name in self.hosts or "*" in self.hosts or (self.numbers and _number(name) is not None)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import PlainTextResponse

        async def with_headers(message):
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                more = ((k.lower().encode(), v.encode()) for k, v in _HEADERS.items())
                message["headers"] = [*message["headers"], *(pair for pair in more if pair[0] not in given)]
            await send(message)

        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif self._allows(scope):
            await self.app(scope, receive, with_headers)
        else:
            said = "not a name of this server; open it by its address in numbers\n"
            await PlainTextResponse(said, 400)(scope, receive, with_headers)


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
            "folders": [{"name": printable(x), "value": x} for x in served.folders() if is_text(x)],
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
        many = given.get("k") or "24"
        if not (many.isascii() and many.isdecimal()):
            raise ValueError("k: expected how many moments")
        folder = given.get("folder")
        if folder and not any(
            file.name.startswith(f"{folder}/") for file in served.index.files
        ):  # and where it lies is not said
            raise ValueError(f"folder: expected one with videos of the index below it, got {folder[:200]!r}")
        began = time.perf_counter()
        found = served.index.search(
            (given.get("q") or "").strip() or None,
            like=likes,
            k=min(MOST, max(1, int(many[:9]))),
            folder=None if not folder else served.index.path(folder),
            after=given.get("after") or None,
            before=given.get("before") or None,
            approximate=served.approximate,
        )
    except (ValueError, VideoError, OSError, RuntimeError) as error:
        return JSONResponse({"error": str(error).splitlines()[0] if str(error) else type(error).__name__}, 400)
    took = time.perf_counter() - began
    moments = [_shown(moment, served.index.base) for moment in found]
    return JSONResponse({"query": printable(found.query), "moments": moments, "seconds": round(took, 3)})


def _shown(moment: Moment, base: str) -> dict[str, Any]:
    name = scan.name_of(moment.file, base)
    return {
        "key": _key(name),
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

    found = served.open(request.path_params["key"])
    if found is None:
        return _missing()
    file, path, opened = found
    kind = _TYPES.get(os.path.splitext(file.name)[1].lower(), "application/octet-stream")
    # What was compared is what is read: the path may lead elsewhere by now.
    again = f"/dev/fd/{opened.fileno()}" if os.path.isdir("/dev/fd") else path
    answer = FileResponse(again, media_type=kind, headers=_FRESH, stat_result=os.fstat(opened.fileno()))
    weakref.finalize(answer, opened.close)
    return answer


async def _poster(served: _Served, request: "Request") -> "Response":
    from anyio.to_thread import run_sync
    from starlette.responses import Response

    try:
        at = round(float(request.query_params.get("t", "0")), 3)
        if not 0 <= at < 1e7:
            return _missing()
        picture = await run_sync(served.kept, request.path_params["key"], at)
        if isinstance(picture, tuple):
            picture = await run_sync(served.decode, *picture, limiter=served.decoding)
    except (ValueError, VideoError, OSError):
        return _missing()
    return _missing() if picture is None else Response(picture, media_type="image/jpeg", headers=_FRESH)


def _missing() -> "Response":
    from starlette.responses import PlainTextResponse

    return PlainTextResponse("not in the index, or changed since it was indexed", 404)


def serve(
    index: Index,
    host: str = "127.0.0.1",
    port: int = PORT,
    *,
    approximate: bool = False,
    started: Callable[[str], object] | None = None,
) -> None:
    """Serves the pages of an index until it is interrupted.

    Args:
        index: to search; its model is loaded meanwhile. host: the address to listen at; others than this machine's own let
            everyone in the network see the videos. port: 0 takes a free one. approximate: as for `Index.search`.
            started: called with the page's address as soon as it can be opened.

    Raises:
        ImportError: starlette or uvicorn is missing. OSError: the port is taken. BadIndex: approximate without a graph.
    """
    import socket

    import uvicorn

    class Server(uvicorn.Server):
        """Hangs up when it ends: a film that plays would hold it, and end in a traceback."""

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for connection in list(self.server_state.connections):
                if connection.transport is not None:
                    connection.transport.abort()
            await super().shutdown(sockets)

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    with listening:
        if os.name == "posix":  # a port that was left just now may be taken again
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)
        names, numbers = (LOCAL, False) if host in LOCAL else (_names(host), not is_local(host))
        pages = app(index, names, numbers, approximate)
        config = uvicorn.Config(pages, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
        threading.Thread(target=_load, args=(index,), daemon=True).start()
        if started is not None:  # who comes now waits in the queue of the socket
            started(_address(host, listening.getsockname()[1]))
        Server(config).run(sockets=[listening])


def is_local(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    address = _number(host)
    return host in LOCAL or (address is not None and address.is_loopback)


def _number(host: str) -> Any:
    """The IP address that a text is, or None."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _names(host: str) -> tuple[str, ...]:
    """By which others may call this machine."""
    import socket

    own = {host, socket.gethostname(), f"{socket.gethostname()}.local"}
    with contextlib.suppress(OSError):
        own.add(socket.getfqdn())
    return (*LOCAL, *sorted(own - {""}))


def _load(index):
    try:
        index.embedder  # noqa: B018, loads the model while the page is looked at
    except (ValueError, OSError, RuntimeError):
        pass  # the first search says it


def _address(host, port):
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/"
