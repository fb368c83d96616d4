"""What a mount writes for those who collect it: a log of JSON lines, spans of OpenTelemetry."""

from __future__ import annotations

import http.server
import json
import os
import signal
import threading

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.datastores import load_shards
from tests.harness import wait_for

FILES = [("files/one", b"one")]


def about(span):
    return {a.key: a.value.string_value or a.value.int_value for a in span.attributes}


class Collector:
    """Takes spans over OTLP, as a collector would."""

    def __init__(self):
        spans = self.spans = []
        services = self.services = set()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                request = ExportTraceServiceRequest.FromString(body)
                for resource in request.resource_spans:
                    services.update(
                        a.value.string_value for a in resource.resource.attributes if a.key == "service.name"
                    )
                    spans.extend(span for scope in resource.scope_spans for span in scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *words):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def named(self, name):
        return [span for span in self.spans if span.name == name]

    def close(self):
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


@pytest.fixture
def collector():
    collector = Collector()
    yield collector
    collector.close()


def test_spans_of_requests_are_inside_those_of_what_they_are_for(bucket, fleet, collector):
    load_shards(bucket, FILES)
    env = {**bucket.env, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    machine = fleet.machine("a", env, options=("--push-delay", "100ms", "--timeout", "3s"))
    machine.mount(bucket.url)
    assert (machine.path / "files/one").read_bytes() == b"one"
    (machine.path / "files/new").write_bytes(b"new")
    machine.flush()
    bucket.delete("files/one")
    load_shards(bucket, [("files/one", b"other"), ("files/new", b"new")])
    bucket.delete("files/one")
    wait_for(lambda: (machine.path / "files/one").stat().st_size == 5, "the other machine's is seen")
    with pytest.raises(OSError):
        (machine.path / "files/one").read_bytes()
    machine.umount()
    assert collector.services == {"swampfs"}
    (hydrated, failed) = collector.named("hydrate")
    assert about(hydrated) == {"swampfs.path": "files/one"}
    downloads = [span for span in collector.named("download") if span.parent_span_id == hydrated.span_id]
    assert [about(span)["swampfs.key"] for span in downloads] == [f"{bucket.prefix}/files/one"]
    assert hydrated.start_time_unix_nano <= downloads[0].start_time_unix_nano
    assert failed.status.code == 2, "an error"
    pushes = {span.span_id for span in collector.named("push")}
    assert [span for span in collector.named("put") if span.parent_span_id in pushes]
    assert collector.named("pull")


def test_a_mount_without_a_collector_is_a_mount(bucket, fleet, collector):
    """It is gone when the spans are to be sent: nobody waits for it for long."""
    load_shards(bucket, FILES)
    collector.close()
    machine = fleet.machine("a", {**bucket.env, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url})
    machine.mount(bucket.url)
    assert (machine.path / "files/one").read_bytes() == b"one"
    machine.umount()  # which is an error if the process is not gone after a while
    assert machine.log().count("spans cannot be sent") == 1


def test_a_log_of_json_lines_is_one_object_per_line(bucket, fleet):
    load_shards(bucket, FILES)
    machine = fleet.machine("a", bucket.env, options=("--log-format", "json"))
    machine.mount(bucket.url)
    pid = machine.pid()
    os.kill(pid, signal.SIGUSR1)
    log = machine.state_dir / "swampfs.log"
    wait_for(lambda: "state: " in log.read_text(), "it says how it stands")
    machine.umount()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert all({"time", "level", "logger", "message", "pid"} <= line.keys() for line in lines)
    (told,) = [line for line in lines if line["message"].startswith("state: ")]
    assert (told["level"], told["logger"], told["pid"]) == ("info", "swampfs.mount", pid)
