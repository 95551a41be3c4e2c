"""Opens a page in headless Chromium, through the DevTools protocol on a pipe, without other packages."""

from __future__ import annotations

import json
import os
import select
import subprocess
from base64 import b64decode
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
PROBLEMS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
PATIENCE = 120  # seconds; Chromium starts in one or two

CONTRAST = """
(() => {
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(part => {
      const share = +part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let one = element; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if (!/, 0\\)$/.test(color)) return color;
    }
    return "rgb(255, 255, 255)";
  };
  return [...document.querySelectorAll(SELECTOR)].slice(0, 600).map(one => {
    const pair = [light(getComputedStyle(one).color), light(behind(one))].sort((a, b) => b - a);
    return [(pair[0] + 0.05) / (pair[1] + 0.05), one.textContent.slice(0, 40)];
  }).sort((a, b) => a[0] - b[0])[0];
})()
"""


class Chromium:
    """One browser with one page.

    ``problems`` collects what the page logs: script errors, policy violations. ``requests`` collects the addresses that
    the page asks for, without ``data:``.
    """

    def __init__(self, browser: str, profile: Path) -> None:
        self.problems: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self._last = 0
        self._rest = b""
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        command = [browser, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        # Chromium reads commands from descriptor 3 and writes answers to descriptor 4.
        shell = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)

    def __enter__(self) -> Chromium:
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Page.setLifecycleEventsEnabled", enabled=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError, EOFError):
            self._ask("Browser.close")
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def open(self, page: Path, scheme: str, width: int = 1200) -> None:
        """Loads a file with this ``prefers-color-scheme`` and waits until it is drawn."""
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        loader = self.ask("Page.navigate", url=page.as_uri())["loaderId"]
        while not self._loaded(loader, self._receive()):
            pass

    @staticmethod
    def _loaded(loader: str, message: dict[str, Any]) -> bool:
        params = message.get("params", {})
        return (message.get("method"), params.get("name"), params.get("loaderId")) == (
            "Page.lifecycleEvent",
            "load",
            loader,
        )

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; an exception in it fails the test."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["result"].get("description")
        return answer["result"].get("value")

    def worst_contrast(self, selector: str) -> tuple[float, str]:
        """The smallest contrast of a text with the colour behind it, as WCAG 2 defines it, and the text."""
        ratio, text = self.value(CONTRAST.replace("SELECTOR", json.dumps(selector)))
        return ratio, text

    def screenshot(self) -> bytes:
        """The visible part of the page, as PNG."""
        return b64decode(self.ask("Page.captureScreenshot")["data"])

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command to the page and returns the answer."""
        return self._ask(method, self._session, **params)

    def _ask(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._last:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], PATIENCE)[0]:
                raise TimeoutError(f"Chromium sent nothing for {PATIENCE} s")
            chunk = os.read(self._read, 1 << 16)
            if not chunk:
                raise EOFError("Chromium ended")
            self._rest += chunk
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if message.get("method") in PROBLEMS:
            self.problems.append(message["params"])
        if message.get("method") == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            self.requests += [] if url.startswith("data:") else [url]
        return message
