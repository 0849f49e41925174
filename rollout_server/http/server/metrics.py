"""What the server counts, as Prometheus metrics with the prefix `e3rl_`, and vLLM's own beside them."""

from collections.abc import Callable, Sequence

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class ServerMetrics:
    """One set per server, in a registry of its own, so that several servers can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        with_route = ["route", "status"]
        self.requests = Counter("e3rl_requests", "Requests that were answered.", with_route, registry=self.registry)
        self.request_seconds = Histogram(
            "e3rl_request_seconds",
            "From a request's first byte to its answer's last.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first_token_seconds = Histogram(
            "e3rl_first_token_seconds",
            "From a request's first byte to its first sampled token, of requests that are followed token by token.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.disconnects = self._counter("e3rl_disconnects", "Clients that left before their answer was complete.")
        self.prompt_tokens = self._counter("e3rl_prompt_tokens", "Tokens of prompts.")
        self.committed_tokens = self._counter("e3rl_committed_tokens", "Generated tokens that were kept.")
        self.erased_tokens = self._counter("e3rl_erased_tokens", "Generated tokens that were erased.")
        self.erasures = self._counter("e3rl_erasures", "Segments that were erased.")
        self.restorations = self._counter(
            "e3rl_restorations", "Erased segments that were accepted after all, because their erasures were spent."
        )
        self.reused_prefix_tokens = self._counter(
            "e3rl_reused_prefix_tokens", "Tokens that the prefix cache gave back after an erasure."
        )
        self.resubmissions = self._counter(
            "e3rl_resubmissions", "Groups that were given to another replica because theirs died."
        )
        self.non_finite = self._counter(
            "e3rl_non_finite_logits", "Requests that failed because the weights gave logits that are not finite."
        )
        self.syncs = Counter("e3rl_weight_syncs", "Weight syncs.", ["result"], registry=self.registry)

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when metrics are."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def watch_each(self, name: str, text: str, reads: Sequence[Callable[[], float]]) -> None:
        """As `watch`, of each replica."""
        gauge = Gauge(name, text, ["replica"], registry=self.registry)
        for number, read in enumerate(reads):
            gauge.labels(number).set_function(read)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, registry=self.registry)

    def render(self, accept: str, with_engine: bool) -> tuple[bytes, str]:
        """Text and content type. `with_engine`: add what vLLM counts in this process."""
        encode, content_type = choose_encoder(accept)
        text = encode(self.registry)
        if with_engine:
            names = [name for name in REGISTRY._names_to_collectors if name.startswith("vllm:")]
            engine = encode(REGISTRY.restricted_registry(names))
            text = text.removesuffix(b"# EOF\n") + engine
        return text, content_type
