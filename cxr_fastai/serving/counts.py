"""What an operator watches: counters and timings in Prometheus' text format. No name, no pixel, no address."""
from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

PREDICT = '/v1/predict'
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Counts:
    """The figures of one service, in a registry of their own."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter('cxr_requests', 'Requests for predictions, by status', ['status'], registry=registry)
        self.films = Counter('cxr_films', 'Films, by status and code', ['status', 'code'], registry=registry)
        self.seconds = Histogram('cxr_request_seconds', 'Seconds from the whole request to its answer',
                                 buckets=SECONDS, registry=registry)
        self.batch = Histogram('cxr_batch_films', 'Films computed together', buckets=BATCHES, registry=registry)
        self.waiting = Gauge('cxr_requests_waiting', 'Requests that are being answered', registry=registry)
        self.ready = Gauge('cxr_ready', '1 once the canary films agree', registry=registry)

    def answered(self, path: str, status: int) -> None:
        """Count a request for predictions by its status; others are not counted."""
        if path == PREDICT: self.requests.labels(status or 'gone').inc()

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self.registry)
