"""An OpenTelemetry collector for tests: takes spans as OTLP over HTTP and keeps them."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

COLLECT_SECONDS = 15.0


class Collector:
    """Spans that were received, and the bodies they came in. It listens on the same port after each `start`."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.bodies: list[bytes] = []
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1/traces"

    def start(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), _handler(self.take))
        self._port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def stop(self) -> None:
        """Close the port; nothing is listening there afterwards."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self._server = None

    @contextmanager
    def down(self) -> Iterator[None]:
        """Nobody listens meanwhile."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def take(self, body: bytes) -> None:
        self.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def request(self, request_id: str) -> Span | None:
        """The span of the request with this id."""
        return next((span for span in self.spans if attributes(span).get("e3rl.request_id") == request_id), None)

    def children(self, parent: Span) -> list[Span]:
        """Spans below `parent`, in the order of their start."""
        below = [span for span in self.spans if span.parent_span_id == parent.span_id]
        return sorted(below, key=lambda span: span.start_time_unix_nano)

    def wait_for_request(self, request_id: str) -> Span:
        """Its span, which is sent after those of its attempts."""
        deadline = time.monotonic() + COLLECT_SECONDS
        while (span := self.request(request_id)) is None:
            assert time.monotonic() < deadline, f"no span of request {request_id} within {COLLECT_SECONDS:g} s"
            time.sleep(0.02)
        return span


def attributes(span: Span) -> dict[str, Any]:
    """A span's attributes as Python values."""
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes}


def _handler(take: Callable[[bytes], None]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            take(self.rfile.read(int(self.headers["content-length"])))
            body = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing to standard error."""

    return Handler


@contextmanager
def running_collector() -> Iterator[Collector]:
    """A collector on a free port."""
    collector = Collector()
    collector.start()
    try:
        yield collector
    finally:
        collector.stop()
