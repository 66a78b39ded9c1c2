"""A real Prometheus with the repository's own rules, in a hurry: every window is seconds."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import yaml
from ports import free_port

FOLDER = Path(__file__).parents[2] / "infra" / "prometheus"
SHORT = {"5m": "5s", "10m": "8s", "15m": "8s", "30m": "10s", "1h": "12s", "6h": "15s"}
"""What a window of the rules is here; what an alert waits for (`for`) is a second."""


class Prometheus:
    """One that runs; `url` is where it answers."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expr: str) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expr}, timeout=10)
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {r["metric"]["alertname"] for r in self.query('ALERTS{alertstate="firing"}')}

    def targets(self) -> dict[str, list[str]]:
        """Addresses that answer, by job."""
        found: dict[str, list[str]] = {}
        for sample in self.query("up == 1"):
            found.setdefault(sample["metric"]["job"], []).append(sample["metric"]["instance"])
        return found


def hurried(folder: Path, router: str) -> None:
    """The files of `infra/prometheus`, for the router at `router`, every second."""
    for name in ("rules.yaml", "alerts.yaml"):
        text = (FOLDER / name).read_text()
        text = re.sub(r"\[(\d+[mh])\]", lambda m: f"[{SHORT[m[1]]}]", text)
        (folder / name).write_text(re.sub(r"for: \d+m", "for: 1s", text))
    text = (FOLDER / "prometheus.yml").read_text()
    text = text.replace("127.0.0.1:8000", router).replace("5s", "1s")
    assert yaml.safe_load(text)["global"]["scrape_interval"] == "1s"
    (folder / "prometheus.yml").write_text(text)


@contextmanager
def running_prometheus(folder: Path, router: str) -> Iterator[Prometheus]:
    """Start one that scrapes the service behind `router`; ended with the block."""
    folder.mkdir()
    hurried(folder, router)
    address, program = f"127.0.0.1:{free_port()}", shutil.which("prometheus")
    assert program is not None
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _await_ready(f"http://{address}/-/ready")
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(20)


def _await_ready(url: str) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with suppress(httpx.HTTPError):
            if httpx.get(url).status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"{url} was never ready")
