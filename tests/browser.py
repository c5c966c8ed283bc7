"""Headless Chromium through chromedriver, by the WebDriver protocol itself: a page is opened, typed into and looked at."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
missing = None if CHROMIUM and DRIVER else "needs Chromium and chromedriver (Debian: chromium chromium-driver)"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync "
    "--disable-component-update --disable-dev-shm-usage --autoplay-policy=no-user-gesture-required"
)
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "ArrowDown": "\ue015", "ArrowRight": "\ue014"}


class Browser:
    """A window. profile: an empty folder."""

    def __init__(self, profile, size=(1200, 900), dark=False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._at = f"http://127.0.0.1:{port}"
        flags = [*FLAGS.split(), f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
        flags += ["--force-dark-mode"] if dark else []
        options = {"binary": CHROMIUM, "args": flags}
        asked = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.until(lambda: self._ask("GET", "/status")["ready"])
        session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": asked}})
        self._at += f"/session/{session['sessionId']}"

    def _ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._at + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, address):
        self._ask("POST", "/url", {"url": address})

    def run(self, script, *arguments):
        """The value of `return ...` in the page."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def type(self, text, *keys):
        """To what has the focus, then keys by name."""
        strokes = [*text, *(KEYS.get(key, key) for key in keys)]
        actions = [{"type": kind, "value": key} for key in strokes for kind in ("keyDown", "keyUp")]
        self._ask("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def back(self):
        self._ask("POST", "/back", {})

    def console(self):
        """What the console was told since the last look."""
        return self._ask("POST", "/se/log", {"type": "browser"})

    def screenshot(self):
        """PNG, base64."""
        return self._ask("GET", "/screenshot")

    @staticmethod
    def until(true, seconds=20):
        """Waits for what `true` returns to be true, and returns it."""
        end = time.monotonic() + seconds
        while True:
            try:
                if value := true():
                    return value
                error = None
            except (RuntimeError, OSError) as problem:
                error = problem
            if time.monotonic() > end:
                raise TimeoutError(f"not within {seconds} s{f': {error}' if error else ''}")
            time.sleep(0.05)

    def close(self):
        try:
            self._ask("DELETE", "")
        finally:
            self._driver.kill()
            self._driver.wait()
