"""A stand-in for an OpenTelemetry collector: receives spans over OTLP/HTTP and keeps them."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

WAIT_SECONDS = 30.0


class SpanReceiver:
    """Attributes of the spans that a server exports."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, bytes, dict[str, Any]]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver._keep(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"

    def __enter__(self) -> SpanReceiver:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _keep(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    attributes = {pair.key: _value(pair.value) for pair in span.attributes}
                    self._spans.append((span.name, span.trace_id, attributes))

    def request(self, trace_id: str) -> dict[str, Any]:
        """Attributes of the request span of a trace, once it has arrived.

        Args:
            trace_id: as in the request's header ``traceparent``.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            for name, trace, attributes in list(self._spans):
                if name == "llm_request" and trace.hex() == trace_id:
                    return attributes
            time.sleep(0.1)
        raise TimeoutError(f"no span of trace {trace_id}; there are {[name for name, *_ in self._spans]}")


def _value(value: Any) -> Any:
    """A span attribute's value as Python's."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind)
