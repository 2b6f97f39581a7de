"""A Chromium without a window, spoken to over a pair of pipes by the DevTools protocol: no package is needed."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, final

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"),
    *("--disable-background-networking", "--disable-component-update", "--no-first-run", "about:blank"),
)


def find_browser() -> str:
    """Return the browser's path; skip the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    return found


@final
class Browser:
    """One tab; console messages that are errors or warnings, exceptions and requests are kept."""

    def __init__(self, profile: Path) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
        command = f'exec "$0" "$@" 3<&{high[0]} 4>&{high[1]}'
        words = [find_browser(), f"--user-data-dir={profile}", *FLAGS]
        self._process = subprocess.Popen(
            ["bash", "-c", command, *words], pass_fds=high, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self._from, self._to = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb")
        self._held, self._number, self._session = b"", 0, None
        self.said: list[str] = []
        self.requested: list[str] = []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Ask for something, and take note of events until the answer is there."""
        self._number += 1
        session = {} if self._session is None else {"sessionId": self._session}
        self._to.write(json.dumps({"id": self._number, "method": method, "params": arguments} | session).encode())
        self._to.write(b"\0")
        self._to.flush()
        while (message := self._next()).get("id") != self._number:
            self._note(message)
        assert "error" not in message, message["error"]
        return message["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            part = os.read(self._from.fileno(), 2**20)
            assert part, "the browser has ended"
            self._held += part
        content, _, self._held = self._held.partition(b"\0")
        return json.loads(content)

    def _note(self, event: dict[str, Any]) -> None:
        told = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.said.append(json.dumps(told["exceptionDetails"]))
            case "Runtime.consoleAPICalled":
                self.said.append(json.dumps(told["args"]))
            case "Log.entryAdded":
                self.said.append(told["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requested.append(told["request"]["url"])
            case "Page.javascriptDialogOpening":
                self.said.append(f"dialog: {told['message']}")
            case "Page.loadEventFired":
                self._is_loaded = True

    def open(self, page: Path, *, width: int = 1200, height: int = 900, phone: bool = False) -> None:
        """Open a file, and wait until it has been loaded and its charts drawn."""
        self.said, self.requested, self._is_loaded = [], [], False
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Page.navigate", url=page.absolute().as_uri())
        while not self._is_loaded:
            self._note(self._next())
        self.value("new Promise(done => requestAnimationFrame(() => setTimeout(() => done(1))))")

    def value(self, expression: str) -> Any:
        """Return what an expression, or the promise that it is, comes to on the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def picture(self, path: Path) -> None:
        """Write a picture of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip={**size, "scale": 1})
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        """Print the page."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"])

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        self._from.close()
        self._to.close()
