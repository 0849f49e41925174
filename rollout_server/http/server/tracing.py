"""OpenTelemetry spans: one a request, and below it one an attempt at a segment."""

import logging
import threading

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from rollout_server.http.openai.segments import JudgedSegment

log = logging.getLogger("e3rl.server")
CLOSE_SECONDS = 3.0


class Tracing:
    """Spans to one exporter; made only where tracing is asked for."""

    def __init__(self, exporter: SpanExporter) -> None:
        resource = Resource.create({"service.name": "e3rl"})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("e3rl")

    def request(self, name: str, headers: dict[str, str], started: int) -> Span:
        """A request's span, below the caller's if `headers` hold a W3C `traceparent`. Times: ns since the epoch."""
        context = TraceContextTextMapPropagator().extract(headers)
        return self._tracer.start_span(name, context=context, kind=SpanKind.SERVER, start_time=started)

    def attempt(self, request: Span, choice: int, segment: JudgedSegment, started: int, ended: int) -> None:
        """The span of an attempt, which is over."""
        span = self._tracer.start_span("attempt", context=trace.set_span_in_context(request), start_time=started)
        span.set_attributes(
            {
                "e3rl.choice": choice,
                "e3rl.segment": segment.index,
                "e3rl.attempt": segment.attempt,
                "e3rl.tokens": segment.end - segment.start,
                "e3rl.uncertainty": segment.judgement.uncertainty,
                "e3rl.verdict": "erased" if segment.erased else "accepted",
            }
        )
        if segment.judgement.threshold is not None:
            span.set_attribute("e3rl.threshold", segment.judgement.threshold)
        span.end(end_time=ended)

    def close(self) -> None:
        """Send what is left. A collector that does not take it in time does not keep the server from ending."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)
        if closing.is_alive():
            log.warning("the collector did not take the last traces within %g s", CLOSE_SECONDS)


def otlp_tracing(endpoint: str) -> Tracing:
    """Tracing to an OpenTelemetry collector over HTTP."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return Tracing(OTLPSpanExporter(endpoint=endpoint))
