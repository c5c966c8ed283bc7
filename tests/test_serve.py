"""The page of an index: what is found and played, what is never given out, and the page itself in headless Chromium."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import browser
import pytest
from test_search import built, index, place, videos  # noqa: F401, fixtures

from evaat_fast.cli import main

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")

from evaat_fast.search import server  # noqa: E402


@contextlib.contextmanager
def serving(index, *names):  # noqa: F811
    """The port of its pages."""
    running = uvicorn.Server(uvicorn.Config(server.app(index, *names), port=0, log_level="warning"))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        browser.Browser.until(lambda: running.started)
        yield running.servers[0].sockets[0].getsockname()[1]
    finally:
        running.should_exit = True
        thread.join()


def get(port, path, method="GET", **headers):
    """(status, headers, body) of an address as it is, which no library has tidied up."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()
    finally:
        connection.close()


def found(port, **given):
    status, _, body = get(port, "/api/search?" + urllib.parse.urlencode(given, doseq=True))
    return status, json.loads(body)


ODD = ['it\'s "one" & <b>two.mp4', "Ünï ÇØ 猫.mp4", "a\nb.mp4", "100% ?x=1#t=2.mp4"]


@pytest.fixture
def odd(place, videos, index):  # noqa: F811
    """The index with videos of odd names."""
    for name in ODD:
        shutil.copy(place / "one.mp4", videos / name)
    assert index.add(videos).videos == len(ODD)
    return index


def test_a_search_and_what_it_plays(odd):
    with serving(odd) as port:
        status, answer = found(port, q="push left - a hand", k=50)
        assert status == 200 and answer["query"] == "push left - a hand" and len(answer["moments"]) > 4
        same = odd.search("push left - a hand", k=50)
        assert [m["score"] for m in answer["moments"]] == pytest.approx(same.score.tolist(), abs=1e-4)
        by_name = {m["file"]: m for m in answer["moments"]}
        assert {"one.mp4", "Ünï ÇØ 猫.mp4", "a\\nb.mp4"} <= set(by_name)
        for moment, path in zip(answer["moments"], same.file, strict=True):
            with open(path, "rb") as file:
                content = file.read()
            status, headers, body = get(port, f"/video/{moment['key']}")
            assert status == 200 and body == content and headers["content-type"] == "video/mp4"
            status, headers, body = get(port, f"/video/{moment['key']}", Range="bytes=100-299")
            assert status == 206 and body == content[100:300] and headers["content-range"] == f"bytes 100-299/{len(content)}"
            status, headers, body = get(port, f"/poster/{moment['key']}?t={moment['peak']}")
            assert status == 200 and headers["content-type"] == "image/jpeg" and body[:2] == b"\xff\xd8"
        first = by_name["one.mp4"]
        status, more = found(port, like=f"{first['key']}@{first['peak']}", k=50)
        assert status == 200 and more["query"].startswith("like ")
        below = found(port, q="push", folder="below", k=50)[1]["moments"]
        assert {m["file"] for m in below} == {"below/three.mp4"}
        assert found(port, q="push", before="1999-01-01")[1]["moments"] == []
        about = json.loads(get(port, "/api/index")[2])
        assert about["videos"] == 3 + len(ODD) and about["folders"] == [{"name": "below", "value": "below"}]


def test_mistakes_are_said(index):  # noqa: F811
    with serving(index) as port:
        for given, said in (
            ({}, "query: expected text"),
            ({"q": "a + + b"}, "query: expected text"),
            ({"q": "a", "after": "yesterday"}, "after: expected a date"),
            ({"q": "a", "folder": "nowhere"}, "folder: expected one with videos"),
            ({"q": "a", "folder": "../.."}, "folder: expected one with videos"),
            ({"q": "a", "folder": "a\0b"}, ""),
            ({"q": "a", "k": "many"}, "k: expected how many"),
            ({"like": "nothing@1"}, "like: expected a moment"),
            ({"like": "/etc/passwd@1"}, "like: expected a moment"),
        ):
            status, answer = found(port, **given)
            assert status == 400 and said in answer["error"] and str(index.folder.parents[1]) not in answer["error"], given


def test_nothing_else_is_given_out(index, videos, tmp_path):  # noqa: F811
    """Neither files outside nor the index itself, nor what has taken the place of a video; and no other site may ask."""
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    with serving(index) as port:
        key = found(port, q="push", folder="below")[1]["moments"][0]["key"]
        outside = [f"/{x}/../../../../../../../..{secret}" for x in ("video", "poster", "api", f"video/{key}", "")]
        outside += [
            f"/video/{urllib.parse.quote(str(secret), safe='')}",
            f"/video/{secret}",
            f"//{secret}",
            "/video/..%2f..%2fsecret.txt",
        ]
        outside += [
            f"/video/{key}/../../app.css/../x",
            "/video/index.json",
            "/.evaat-index/index.json",
            "/video/%00",
            "/web/app.js",
        ]
        outside += [f"/poster/{key}?t={t}" for t in ("nan", "inf", "-1", "1e99", "x", "")]
        for path in outside:
            status, _, body = get(port, path)
            assert status in (400, 404) and b"secret" not in body, path
        for method in ("POST", "PUT", "DELETE"):
            assert get(port, f"/video/{key}", method)[0] == 405
        assert get(port, "/", Host="evil.example")[0] == 400 and get(port, f"/video/{key}", Host="evil.example:80")[0] == 400
        assert get(port, "/", Host=f"localhost:{port}")[0] == get(port, "/", Host=f"127.0.0.1:{port}")[0] == 200
        _, headers, page = get(port, "/")
        assert "default-src 'none'" in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff"
        assert b"http" not in page.lower().replace(b"http-equiv", b"")  # nothing from elsewhere
        three = videos / "below" / "three.mp4"
        three.unlink()
        three.symlink_to(secret)
        assert get(port, f"/video/{key}")[0] == get(port, f"/poster/{key}?t=1")[0] == 404


def test_links_lead_where_they_led(index, place, videos, tmp_path):  # noqa: F811
    """A folder that was a link when it was indexed plays; what leads elsewhere since does not, though of the same size and
    time."""
    outside, secret = tmp_path / "outside", tmp_path / "secret"
    for folder in (outside, secret):
        folder.mkdir()
        shutil.copy(place / "two.mp4", folder / "film.mp4")
    (videos / "linked").symlink_to(outside)
    (videos / "single.mp4").symlink_to(outside / "film.mp4")
    index.add(videos)
    state = os.stat(outside / "film.mp4")
    (secret / "film.mp4").write_bytes(b"S" * state.st_size)
    shutil.copytree(videos / "below", tmp_path / "copy")
    for path, like in ((secret / "film.mp4", outside / "film.mp4"), (tmp_path / "copy/three.mp4", videos / "below/three.mp4")):
        os.utime(path, ns=(like.stat().st_mtime_ns,) * 2)
    keys = {name: server._key(name) for name in ("linked/film.mp4", "single.mp4", "below/three.mp4")}
    with serving(index) as port:

        def given(name):
            return [get(port, address)[0] for address in (f"/video/{keys[name]}", f"/poster/{keys[name]}?t=1")]

        assert all(given(name) == [200, 200] for name in keys)
        (videos / "linked").unlink()
        (videos / "linked").symlink_to(secret)
        (videos / "single.mp4").unlink()
        (videos / "single.mp4").symlink_to(secret / "film.mp4")
        (videos / "below").rename(tmp_path / "was")
        (videos / "below").symlink_to(tmp_path / "copy")
        content = (place / "two.mp4").read_bytes()  # the one that was indexed
        assert [get(port, f"/video/{keys[name]}")[2] == content for name in ("linked/film.mp4", "single.mp4")] == [True, True]
        assert given("below/three.mp4") == [404, 404]
        outside.rename(tmp_path / "gone")
        outside.symlink_to(secret)
        assert given("linked/film.mp4") == given("single.mp4") == [404, 404]


def test_what_was_compared_is_read(index, videos, monkeypatch):  # noqa: F811
    """A file that is replaced between the look and the reading; and by a pipe, which nobody waits for."""
    from starlette.responses import FileResponse

    path, answers = videos / "one.mp4", FileResponse.__call__
    content, stamp = path.read_bytes(), path.stat().st_mtime_ns

    async def replaced(self, *scope):
        path.unlink()
        path.write_bytes(b"S" * len(content))
        await answers(self, *scope)

    key = server._key("one.mp4")
    with serving(index) as port:
        monkeypatch.setattr(FileResponse, "__call__", replaced)
        for more in ({}, {"Range": "bytes=5-"}):
            path.write_bytes(content)
            os.utime(path, ns=(stamp, stamp))
            assert get(port, f"/video/{key}", **more)[2] == content[5 if more else 0 :]
        path.unlink()
        os.mkfifo(path)
        assert get(port, f"/video/{key}")[0] == 404


def test_ranges_are_bounded(index, videos):  # noqa: F811
    """However many are asked for, no more comes than the file has, and what makes no sense is refused."""
    content = (videos / "one.mp4").read_bytes()
    address, n = f"/video/{server._key('one.mp4')}", len(content)
    with serving(index) as port:
        for asked, status, length in (
            ("bytes=-1", 206, 1),
            (f"bytes=-{'9' * 30}", 206, n),
            ("bytes=" + ",".join(["0-"] * 90), 206, n),
            ("bytes=" + ",".join(["0-"] * 9000), 200, n),
            ("bytes=5-2", 400, None),
            (f"bytes={n}-", 416, 0),
            ("bytes=" + "9" * 5000 + "-", 400, None),
        ):
            answer = get(port, address, Range=asked)
            assert answer[0] == status and length in (None, len(answer[2])), asked[:30]
        spread = get(port, address, Range="bytes=" + ",".join(f"{i}-{i}" for i in range(0, 190, 2)))
        assert spread[0] == 206 and len(spread[2]) < 100 * 200
        assert get(port, address, "HEAD", Range="bytes=1-3")[1]["content-length"] == "3"


def test_names_of_the_server(index):  # noqa: F811
    """A site that has its own name lead here is refused, also where every address is answered."""
    with serving(index, ["localhost", "::1"]) as port:
        for name, status in (
            ("LOCALHOST", 200),
            ("[::1]", 200),
            (f"[::1]:{port}", 200),
            ("192.168.1.5", 400),
            ("localhost.evil.example", 400),
            ("evil@localhost", 400),
            ("localhost:80:80", 400),
            ("[::1", 400),
            ("", 400),
        ):
            assert get(port, "/", Host=name)[0] == status, name
    with serving(index, ["box.local"], True) as port:
        for name, status in (("192.168.1.5:80", 200), ("[fe80::1]", 200), ("box.local", 200), ("evil.example", 400)):
            assert get(port, "/", Host=name)[0] == status, name
    assert server.is_local("127.0.0.2") and server.is_local("::1") and not server.is_local("0.0.0.0")
    assert server._address("::", 80) == "http://[::1]:80/" and server._address("", 80) == "http://127.0.0.1:80/"


def test_a_search_does_not_wait_for_pictures(index, monkeypatch):  # noqa: F811
    """More of them than the server has threads."""
    began, go = threading.Semaphore(0), threading.Event()

    def waits(path, time):
        began.release()
        assert go.wait(20)
        return b"picture %g" % time

    monkeypatch.setattr(server.page, "poster", waits)
    key = server._key("one.mp4")
    with serving(index) as port, ThreadPoolExecutor(50) as pool:
        asked = [pool.submit(get, port, f"/poster/{key}?t={n}") for n in range(50)]
        try:
            assert began.acquire(timeout=20)
            time.sleep(0.3)
            assert found(port, q="push")[0] == get(port, f"/video/{key}")[0] == 200 and not any(a.done() for a in asked)
        finally:
            go.set()
        assert [a.result()[2] for a in asked] == [b"picture %d" % n for n in range(50)]


def test_the_picture_of_a_changed_video(index, place, videos, monkeypatch):  # noqa: F811
    monkeypatch.setattr(server, "EVERY", 0.0)
    monkeypatch.setattr(server.page, "poster", lambda path, time: open(path, "rb").read())
    with serving(index) as port:
        for name in ("one.mp4", "two.mp4"):
            shutil.copy(place / name, videos / "one.mp4")
            type(index).open(videos, device="cpu").add(videos)
            assert found(port, q="push")[0] == 200
            _, headers, body = get(port, f"/poster/{server._key('one.mp4')}?t=1")
            assert body == (place / name).read_bytes() and "no-cache" in headers["cache-control"]


def test_an_index_that_is_damaged_meanwhile(index, videos, monkeypatch):  # noqa: F811
    """What was there before is searched."""
    monkeypatch.setattr(server, "EVERY", 0.0)
    manifest = index.folder / "index.json"
    text = manifest.read_text()
    with serving(index) as port:
        for bad in ("", "[" * 100_000, '{"format": 1}', text.replace('"rows": ', '"rows": -'), text.replace("vectors-", "/x")):
            manifest.write_text(bad)
            assert found(port, q="push")[0] == get(port, "/api/index")[0] == 200, bad[:20]
        manifest.unlink()
        manifest.mkdir()
        assert found(port, q="push")[0] == 200
        shutil.rmtree(index.folder)
        assert found(port, q="push")[0] == 200


def test_it_ends_while_a_video_plays(index, videos):  # noqa: F811
    with open(videos / "one.mp4", "ab") as file:  # longer than a connection holds
        file.write(struct.pack(">I4s", 50_000_000, b"free"))
        file.truncate(file.tell() + 50_000_000 - 8)
    index.add(videos)
    command = [sys.executable, "-m", "evaat_fast", "serve", "--index", str(videos), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            running.stdout.readline()
            port = int(running.stdout.readline().split()[0].rstrip("/").rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port)) as playing:
                playing.sendall(f"GET /video/{server._key('one.mp4')} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                assert playing.recv(100).startswith(b"HTTP/1.1 200")
                began = time.monotonic()
                running.send_signal(signal.SIGINT)
                said = running.communicate(timeout=30)[1]
                assert time.monotonic() - began < 2 and said == ""
        finally:
            running.kill()


def test_what_another_process_adds_is_found(index, place, videos, monkeypatch):  # noqa: F811
    monkeypatch.setattr(server, "EVERY", 0.0)
    with serving(index) as port:
        assert json.loads(get(port, "/api/index")[2])["videos"] == 3
        shutil.copy(place / "two.mp4", videos / "new.mp4")
        other = type(index).open(videos, device="cpu")
        other.add(videos)
        assert json.loads(get(port, "/api/index")[2])["videos"] == 4
        assert "new.mp4" in {m["file"] for m in found(port, q="push", k=50)[1]["moments"]}


def test_the_command(index, videos, capsys, monkeypatch):  # noqa: F811
    """It says its address and what is wrong; another's port is no traceback."""
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    with monkeypatch.context() as patched:
        patched.setattr(uvicorn.Server, "run", lambda self, sockets: None)
        assert main(["serve", "--index", str(videos), "--port", "0", "--open"]) in (None, 0)
    assert opened[0].startswith("http://127.0.0.1:") and opened[0] in capsys.readouterr().out
    with serving(index) as port:
        assert main(["serve", "--index", str(videos), "--port", str(port)]) == 2
        assert f"port {port}" in capsys.readouterr().err
    os.makedirs(videos / "below" / "empty")
    assert main(["serve", "--index", str(videos / "below" / "empty")]) == 2
    assert "there is no index" in capsys.readouterr().err


@pytest.mark.skipif(browser.missing is not None, reason=str(browser.missing))
@pytest.mark.parametrize("size,dark", [((1200, 900), False), ((390, 800), True)], ids=["desk", "phone"])
def test_the_page(odd, tmp_path, size, dark):
    """Type, see, play, more like this, go back; no error in the console."""
    with serving(odd) as port, contextlib.closing(browser.Browser(tmp_path / "profile", size, dark)) as window:
        window.open(f"http://127.0.0.1:{port}/")
        window.until(lambda: "clips of 7 videos" in window.run("return document.getElementById('status').textContent"))
        window.type("push <b>left</b>", "Enter")
        cards = "return document.querySelectorAll('#moments > li').length"
        count = window.until(lambda: window.run(cards))
        assert count == len(odd.search("push <b>left</b>", k=24)) and "q=push+%3Cb%3Eleft" in window.run(
            "return location.search"
        )
        names = window.run("return [...document.querySelectorAll('.name')].map((x) => x.textContent)")
        assert 'it\'s "one" & <b>two.mp4' in names and not window.run("return document.querySelectorAll('li b').length")
        loaded = "return [...document.images].filter((x) => x.complete && x.naturalWidth > 0).length"
        window.run("for (const x of document.images) x.loading = 'eager'")
        window.until(lambda: window.run(loaded) == count)
        assert window.run("return document.documentElement.scrollWidth <= innerWidth"), "wider than the window"
        for row in {0, names.index('it\'s "one" & <b>two.mp4')}:
            window.run("document.querySelectorAll('#moments > li')[arguments[0]].focus()", row)
            window.type("", "Enter")
            playing = "const v = document.querySelector('video'); return v && v.currentTime > v.closest('li').moment.start"
            window.until(lambda playing=playing: window.run(playing))
            start, stop = window.run("const m = document.querySelector('video').closest('li').moment; return [m.start, m.stop]")
            assert start <= window.run("return document.querySelector('video').currentTime") <= stop + 0.3
        window.type("", "m")
        window.until(lambda: "like=" in window.run("return location.search"))
        window.until(lambda: window.run(cards) and not window.run("return document.getElementById('like').hidden"))
        window.back()
        window.until(lambda: window.run("return document.getElementById('query').value") == "push <b>left</b>")
        window.until(lambda: window.run(cards) == count)
        window.run("document.getElementById('query').value = 'a + + b'; document.getElementById('form').requestSubmit()")
        window.until(lambda: "query: expected text" in window.run("return document.getElementById('status').textContent"))
        problems = [x for x in window.console() if x["level"] in ("SEVERE", "WARNING") and "400" not in x["message"]]
        assert not problems, problems
        ink, paper = window.run("const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]")
        assert dark == (sum(map(int, paper[4:-1].split(","))) < sum(map(int, ink[4:-1].split(","))))
