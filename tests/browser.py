"""A headless Chromium that tests drive through its DevTools socket."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--autoplay-policy=no-user-gesture-required",
    "--remote-debugging-port=0",
)


class Browser:
    """One browser with one page; collects what the page complains about."""

    def __init__(self, profile: Path, *, width: int = 1200, height: int = 1000) -> None:
        self.complaints: list[str] = []
        self._ids = itertools.count(1)
        size = f"--window-size={width},{height}"
        command = [str(CHROMIUM), *FLAGS, size, f"--user-data-dir={profile}", "about:blank"]
        self._held = contextlib.ExitStack()
        with contextlib.ExitStack() as starting:
            self._process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            starting.callback(self._end)
            address = self._page_address(profile)
            self._socket = starting.enter_context(connect(address, max_size=2**26))
            for domain in ("Page", "Runtime", "Log"):
                self.command(f"{domain}.enable")
            self._held = starting.pop_all()

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("id") != number:
                self._note(message)
                continue
            if "error" in message:
                raise RuntimeError(f"{method}: {message['error']}")
            result: dict[str, Any] = message["result"]
            return result

    def open(self, url: str) -> None:
        self.command("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; promises are awaited."""
        answer = self.command(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, condition: str, *, limit_s: float = 20.0) -> Any:
        """Poll until the expression is true; fails with the page's text."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            value = self.run(condition)
            if value:
                return value
            time.sleep(0.05)
        text = self.run("document.body.innerText")
        raise AssertionError(f"not in {limit_s} s: {condition}\n{self.complaints}\n{text}")

    def text(self, element_id: str) -> str:
        return str(self.run(f"document.getElementById('{element_id}').textContent"))

    def fill(self, element_id: str, text: str) -> None:
        self.run(f"document.getElementById('{element_id}').value = {json.dumps(text)}")

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def screenshot(self, file: Path) -> None:
        answer = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        self._held.close()

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        if message.get("method") == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.complaints.append(str(params["args"]))
        if message.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def _page_address(self, profile: Path) -> str:
        port_file = profile / "DevToolsActivePort"
        end = time.monotonic() + 30
        while time.monotonic() < end and self._process.poll() is None:
            if port_file.exists() and (lines := port_file.read_text().split()):
                with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list") as answer:
                    pages = [t for t in json.load(answer) if t["type"] == "page"]
                if pages:
                    return str(pages[0]["webSocketDebuggerUrl"])
            time.sleep(0.05)
        raise RuntimeError(f"{CHROMIUM} did not open its DevTools port; has it ended?")
