"""A headless Chromium, spoken to over a pipe: no port, no network, nothing but the standard library."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["WHY_NOT", "Page", "browser"]

_PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WHY_NOT = None if _PROGRAM else "there is no chromium here (Debian: apt-get install chromium)"
_WAIT_SECS = 60.0
_EXEC = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
"""The browser reads commands from descriptor 3 and answers on 4."""


class Browser:
    """One browser process."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._number, self._rest = commands, answers, 0, b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        os.write(self._commands, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            found = self._receive()
            if found.get("id") == self._number:
                assert "error" not in found, f"{method}: {found['error']}"
                return found["result"]
            self.events.append(found)

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + _WAIT_SECS
        while b"\0" not in self._rest:
            assert select.select([self._answers], [], [], max(0.0, end - time.monotonic()))[0], "the browser is silent"
            data = os.read(self._answers, 1 << 20)
            assert data, "the browser has ended"
            self._rest += data
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)


class Page:
    """One page of a given size."""

    def __init__(self, owner: Browser, width: int, height: int, *, dark: bool = False) -> None:
        target = owner.call("Target.createTarget", url="about:blank")["targetId"]
        self._owner = owner
        self._session = owner.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._owner.call(method, self._session, **params)

    def open(self, path: Path) -> float:
        """Open a page and wait until it has drawn itself; return the seconds that took."""
        began = time.monotonic()
        self.call("Page.navigate", url=path.as_uri())
        self.wait_for("document.documentElement?.dataset.ready")
        return time.monotonic() - began

    def wait_for(self, expression: str) -> Any:
        end = time.monotonic() + _WAIT_SECS
        while not (found := self.value(expression)):
            assert time.monotonic() < end, f"{expression} never came true; complaints: {self.complaints()}"
            time.sleep(0.02)
        return found

    def value(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def complaints(self) -> list[str]:
        """Return every error, warning and exception that was reported so far."""
        found: list[str] = []
        for event in self._of_mine():
            method, params = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"].get("exception", {}).get("description")))
            elif method == "Runtime.consoleAPICalled":
                found.append(str(params["args"]))
            elif method == "Log.entryAdded":
                found.append(params["entry"]["text"])
        return found

    def requests(self) -> list[str]:
        """Return every address that was asked for."""
        sent = [event for event in self._of_mine() if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def _of_mine(self) -> list[dict[str, Any]]:
        return [event for event in self._owner.events if event.get("sessionId") == self._session]

    def screenshot(self, path: Path) -> bytes:
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(data)
        return data


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Run a browser that keeps its things in *profile*."""
    assert _PROGRAM is not None
    (in_read, in_write), (out_read, out_write) = os.pipe(), os.pipe()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-extensions", "--disable-dev-shm-usage"]
    options += [
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={profile}",
        "about:blank",
    ]
    command = [sys.executable, "-c", _EXEC, str(in_read), str(out_write), _PROGRAM, *options]
    environment = {**os.environ, "HOME": str(profile), "XDG_RUNTIME_DIR": str(profile)}
    with subprocess.Popen(
        command,
        pass_fds=(in_read, out_write),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
    ) as process:
        os.close(in_read)
        os.close(out_write)
        owner = Browser(in_write, out_read)
        try:
            yield owner
        finally:
            with suppress(Exception):
                owner.call("Browser.close")
            os.close(in_write)
            os.close(out_read)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
