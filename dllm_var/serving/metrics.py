"""Figures of the server, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dllm_var.sampling.base import Generation

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1_000)
TOKENS = (0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics:
    """Counts of one server; a registry of its own keeps servers of one process apart."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "dllm_var_requests", "Requests by path and status", ["path", "status"], registry=registry
        )
        self.disconnected = Counter("dllm_var_disconnected", "Clients that went away early", registry=registry)
        self.queue_length = Gauge("dllm_var_queue_length", "Answers that wait for a row", registry=registry)
        self.rows = Gauge("dllm_var_rows", "Answers being decoded", registry=registry)
        self.prompt_tokens = Counter("dllm_var_prompt_tokens", "Tokens of prompts read", registry=registry)
        self.tokens = Counter("dllm_var_tokens", "Tokens of finished answers", registry=registry)
        self.forwards = Counter(
            "dllm_var_forwards", "Forward passes that finished answers took part in", registry=registry
        )
        self.steps = Counter("dllm_var_steps", "Decoding steps of whole batches", registry=registry)
        self.tokens_per_forward = Histogram(
            "dllm_var_tokens_per_forward", "Tokens per forward of an answer", buckets=TOKENS, registry=registry
        )
        self.latency = Histogram(
            "dllm_var_latency_seconds",
            "Seconds from a request to the end of its answers",
            buckets=SECONDS,
            registry=registry,
        )
        self.first_text = Histogram(
            "dllm_var_first_text_seconds",
            "Seconds from a request to the first text of its stream",
            buckets=SECONDS,
            registry=registry,
        )

    def count(self, answer: Generation) -> None:
        self.prompt_tokens.inc(answer.prompt_length)
        self.tokens.inc(answer.new_tokens)
        self.forwards.inc(answer.nfe)
        self.tokens_per_forward.observe(answer.new_tokens / max(answer.nfe, 1))

    def text(self) -> bytes:
        """Returns the figures in Prometheus's text format."""
        return generate_latest(self.registry)
