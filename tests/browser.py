"""Headless Chromium over its debugging pipe: opens a page at a size and a colour scheme, and asks it questions."""

import base64
import json
import os
import pathlib
import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page. ``problems`` collects what the page or the browser complained about since it was opened."""

    def __init__(self, profile: pathlib.Path):
        commands_end, self._commands = os.pipe()
        self._answers, answers_end = os.pipe()
        switches = (
            f"--headless=new --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir={profile} "
            "--no-first-run --disable-background-networking --disable-component-update"
        )
        script = f'exec "$0" "$@" 3<&{commands_end} 4>&{answers_end}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, CHROMIUM, *switches.split()],
            pass_fds=(commands_end, answers_end),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands_end)
        os.close(answers_end)
        self._buffer, self._count, self._session = b"", 0, None
        self.problems = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def _read(self):
        while b"\0" not in self._buffer:
            part = os.read(self._answers, 1 << 16)
            assert part, "the browser has gone"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(message)
        if message.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.problems.append(message["params"])
        return message

    def call(self, method, **params):
        """The result of a command of the DevTools protocol."""
        self._count += 1
        command = {"id": self._count, "method": method, "params": params}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while (message := self._read()).get("id") != self._count:
            pass
        assert "error" not in message, message
        return message["result"]

    def open(self, path, width, height=900, scheme="light"):
        """Loads a file at a window's size; ``scheme``: light or dark."""
        self.problems.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=pathlib.Path(path).resolve().as_uri())
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression):
        """The value of JavaScript, as JSON gives it."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path):
        """Writes the whole page as PNG."""
        image = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        pathlib.Path(path).write_bytes(base64.b64decode(image))

    def close(self):
        self._process.terminate()
        self._process.wait(300)
        os.close(self._commands)
        os.close(self._answers)
