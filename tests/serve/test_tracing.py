"""A span per chunk at a real collector's door, and no harm where there is none."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from ports import free_port
from replicas import Replicas, watch

from echo_ray.config import EchoConfig, TelemetrySection, from_mapping
from echo_ray.errors import ConfigError
from echo_ray.serve.app import build
from echo_ray.serve.tracing import check_tracing, open_tracer


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """An HTTP server that keeps what it is sent."""
    bodies: list[bytes] = []

    class Door(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            packed = self.headers.get("Content-Encoding") == "gzip"
            bodies.append(gzip.decompress(body) if packed else body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Door)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", bodies
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def streamed(endpoint: str) -> int:
    """Six chunks of a session whose replica then leaves; the epoch they were made under."""
    with Replicas() as bench:
        bench.config = replace(bench.config, telemetry=TelemetrySection(otlp_endpoint=endpoint))
        replica = bench.start("r1")
        bench.session()
        epoch = bench.claim(replica)
        heads = asyncio.run(watch(replica, epoch, 0, 6))
        assert [head["chunk_index"] for head in heads] == list(range(6))
        replica.close()
        return epoch


def test_every_chunk_is_a_span_with_its_stages() -> None:
    with collector() as (endpoint, bodies):
        epoch = streamed(endpoint)
    spans = []
    for body in bodies:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            who = {a.key: a.value.string_value for a in resource.resource.attributes}
            assert (who["service.name"], who["service.instance.id"]) == ("echo-ray", "r1")
            spans += [span for scope in resource.scope_spans for span in scope.spans]
    assert {span.name for span in spans} == {"chunk"}
    told = [{a.key.removeprefix("echo_ray."): a.value for a in s.attributes} for s in spans]
    assert [a["chunk"].int_value for a in told][:6] == list(range(6))
    assert {(a["session"].string_value, a["epoch"].int_value) for a in told} == {("s1", epoch)}
    assert {"stage.denoise_s", "stage.decode_s", "late_s", "drift_score"} <= set(told[0])
    assert all(span.end_time_unix_nano >= span.start_time_unix_nano > 0 for span in spans)


@pytest.mark.filterwarnings("ignore")
def test_a_collector_that_does_not_answer_costs_the_stream_nothing() -> None:
    streamed(f"http://127.0.0.1:{free_port()}/v1/traces")


def test_nothing_is_imported_while_tracing_is_off() -> None:
    code = (
        "import sys, echo_ray.serve.tracing\n"
        "from echo_ray.config import TelemetrySection\n"
        "assert echo_ray.serve.tracing.open_tracer(TelemetrySection(), 'r1', None) is None\n"
        "assert not [m for m in sys.modules if m.startswith('opentelemetry')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)


def test_a_missing_package_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, name, None)
    section = TelemetrySection(otlp_endpoint="http://127.0.0.1:4318/v1/traces")
    with pytest.raises(ConfigError, match=r"telemetry.otlp_endpoint.*echo-ray\[tracing\]"):
        build({"telemetry": {"otlp_endpoint": section.otlp_endpoint}})
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        open_tracer(section, "r1", None)  # type: ignore[arg-type]
    check_tracing(TelemetrySection())


@pytest.mark.parametrize(
    "given", ["localhost:4318", "grpc://collector:4317", "http://me:secret@collector/", "", 4318]
)
def test_what_is_no_address_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"telemetry\.otlp_endpoint"):
        from_mapping(EchoConfig, {"telemetry": {"otlp_endpoint": given}})
