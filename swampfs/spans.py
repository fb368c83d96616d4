"""Spans of OpenTelemetry around what takes time: requests to the datastore, polls, pushes, hydrations.

Only where its SDK is installed (``swampfs[otel]``) and asked for by its own variables; else a span is nothing at all.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from swampfs import __version__

log = logging.getLogger(__name__)

_WANTED = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_FLUSH_MS = 2000
_SEND_S = 2.0  # a mount that ends waits for it
_OFF: AbstractContextManager[Any] = nullcontext()
_tracers: list[Any] = []  # none, or the one of this process


def span(name: str, **attributes: str | int) -> AbstractContextManager[Any]:
    """Around a piece of work; a failure of it is the span's."""
    if not _tracers:
        return _OFF
    told = {f"swampfs.{key}": value for key, value in attributes.items()}
    return _tracers[0].start_as_current_span(name, attributes=told)  # type: ignore[no-any-return]


def begin(env: Mapping[str, str]) -> Callable[[], None]:
    """Send spans where ``OTEL_EXPORTER_OTLP_ENDPOINT`` says, if it does. Returns what ends it."""
    is_off = env.get("OTEL_SDK_DISABLED", "").lower() == "true" or env.get("OTEL_TRACES_EXPORTER", "").lower() == "none"
    if is_off or not any(env.get(name) for name in _WANTED):
        return _nothing
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.info("no spans: %s — `pip install 'swampfs[otel]'`", error)
        return _nothing
    about = {"service.name": env.get("OTEL_SERVICE_NAME") or "swampfs", "service.version": __version__}
    provider = TracerProvider(resource=Resource.create({**about, "process.pid": os.getpid()}), shutdown_on_exit=False)
    exporter: Any = _Exporter(OTLPSpanExporter(timeout=_SEND_S))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracers[:] = [provider.get_tracer("swampfs", __version__)]

    def end() -> None:
        _tracers.clear()
        provider.force_flush(_FLUSH_MS)
        exporter.shutdown()  # first: what is left is dropped, instead of being tried until its time is over
        provider.shutdown()

    return end


class _Exporter:
    """Says once that spans cannot be sent, and once that they can again; the SDK's own says it every few seconds."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._fails = False
        self.force_flush = inner.force_flush
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)

    def export(self, spans: Any) -> Any:
        result = self._inner.export(spans)
        fails = result.name != "SUCCESS"
        if fails != self._fails:
            self._fails = fails
            log.info("spans cannot be sent, and are dropped" if fails else "spans are sent again")
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()


def _nothing() -> None:
    return
