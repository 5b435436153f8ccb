"""Chromium by its DevTools protocol over a pipe: no driver, and no package but the browser."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
EXPLORER_READY = "document.documentElement && 'ready' in document.documentElement.dataset"
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--disable-extensions", "--disable-background-networking", "--remote-debugging-pipe"),
)
_TIMEOUT_S = 60


def find_chromium() -> str | None:
    """Return the path of the browser: $MOEZOO_CHROMIUM, or the first of NAMES on the PATH; None if there is none."""
    return os.environ.get("MOEZOO_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """A running browser with one page. Its messages are JSON and a zero byte, by file descriptors 3 and 4."""

    def __init__(self, process: subprocess.Popen[bytes], write: int, read: int) -> None:
        self._process, self._write, self._read = process, write, read
        self._rest, self._number, self._session = b"", 0, None
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result. Raises RuntimeError: it failed, or took a minute."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        number = self._number
        while True:
            received = self._receive()
            if received.get("id") != number:
                self._note(received)
            elif "error" in received:
                raise RuntimeError(f"{method}: {received['error']['message']}")
            else:
                return received["result"]

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression, awaited. Raises RuntimeError: it threw."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description") or details["text"])
        return result["result"].get("value")

    def open(
        self, address: str, width: int = 1280, height: int = 800, dark: bool = False, *, ready: str = EXPLORER_READY
    ) -> None:
        """Open an address in a window of a size, and wait until a JavaScript expression is true of the page."""
        self.problems.clear()
        self.requests.clear()
        self.size(width, height)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": _scheme(dark)}])
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)
        self.wait(ready)

    def size(self, width: int, height: int) -> None:
        """Set the size of the window."""
        mobile = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true. Raises TimeoutError, with the page's problems."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not self.run(condition):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{condition} is not true; problems: {self.problems}")
            time.sleep(0.01)

    def press(self, *keys: str) -> None:
        """Press keys one after the other, by the name that the event has: `j`, `ArrowDown`, `Enter`."""
        for key in keys:
            text = {"text": "\r" if key == "Enter" else key} if len(key) == 1 or key == "Enter" else {}
            code = {"Tab": 9, "Enter": 13, "Escape": 27}.get(key, 0)
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def click(self, selector: str) -> None:
        """Click the middle of the first element of a selector, as a mouse does."""
        x, y = self.run(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const b = e.getClientRects()[0];"
            f"return [b.x + b.width / 2, b.y + b.height / 2]; }})(document.querySelector({json.dumps(selector)}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def text(self, selector: str) -> str:
        """Return the text of the first element of a selector, as it is rendered."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def picture(self) -> bytes:
        """Return a PNG of the window."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        """End the browser."""
        self._session = None
        with contextlib.suppress(RuntimeError, OSError):
            self.call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], _TIMEOUT_S)[0]:
                raise RuntimeError("Chromium does not answer")
            part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError("Chromium has ended")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        """Keep what the page's console or log complains about, and every request."""
        parameters = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(str(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                self.problems.append(str(parameters["args"]))
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.problems.append(str(parameters["entry"]))
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])


@contextlib.contextmanager
def chromium(program: str, profile: Path) -> Iterator[Chromium]:
    """Start the browser with an empty profile, and end it after the block."""
    own_read, their_write = os.pipe()
    their_read, own_write = os.pipe()
    # A shell gives the pipes the numbers that Chromium wants.
    command = f'exec "$0" "$@" 3<&{their_read} 4>&{their_write}'
    arguments = [program, *_FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        ["bash", "-c", command, *arguments],
        pass_fds=(their_read, their_write),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_read)
    os.close(their_write)
    browser = Chromium(process, own_write, own_read)
    try:
        yield browser
    finally:
        browser.close()


def _scheme(dark: bool) -> str:
    return "dark" if dark else "light"
