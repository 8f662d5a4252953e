"""The metrics that Prometheus reads at /metrics. If vLLM has the same metric, its name is used with the prefix mft_."""

from collections.abc import Iterable

import torch
from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from mft.serving.batch.generation import Generation
from mft.serving.batch.scheduler import Scheduler
from mft.serving.tasks import Tasks
from mft_kernels import __version__

CONTENT_TYPE = CONTENT_TYPE_LATEST
_MODEL = ("model_name",)
_KEY = (
    "key",
)  # the name of the API key, "" (which Prometheus drops) without; only counters have it, as they are small
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
_ABORTED = 499  # the status if the client has left


class Metrics:
    """The metrics of one server, in a registry of its own. Requests, tokens and latencies count when a request ends."""

    def __init__(self, tasks: Tasks, scheduler: Scheduler) -> None:
        self._tasks = tasks
        self._registry = registry = CollectorRegistry()
        self._of_models: list[MetricWrapperBase] = []
        self._success = self._counter(
            "mft_request_success",
            "Requests that ended, by reason: stop, length, or abort if the client has left.",
            "finished_reason",
        )
        self._prompt = self._counter("mft_prompt_tokens", "Tokens of prompts that were read.")
        self._generation = self._counter("mft_generation_tokens", "Tokens that were generated.")
        self._first = self._seconds("mft_time_to_first_token_seconds", "Time from a request to its first token.")
        self._each = self._seconds(
            "mft_request_time_per_output_token_seconds",
            "Mean time per output token of a request, after the first token.",
        )
        self._queue = self._seconds(
            "mft_request_queue_time_seconds", "Time that a request waits for a place in the batch."
        )
        self._whole = self._seconds("mft_e2e_request_latency_seconds", "Time from a request to the end of its answer.")
        self._refused = Counter(
            "mft_request_refused", "Requests that were refused, by HTTP status.", (*_KEY, "status"), registry=registry
        )
        rows_help = "Rows per step of generation; each row gets one token per step."
        self.count_rows = Histogram("mft_batch_rows", rows_help, buckets=_ROWS, registry=registry).observe
        Info("mft_build", "The version of mft_kernels that runs.", registry=registry).info({"version": __version__})
        ProcessCollector(registry=registry)
        registry.register(_Now(tasks, scheduler))

    def count_answer(self, model: str, it: Generation, status: int, ending: str, seconds: float) -> None:
        """Count a generation that has ended. Arguments are as for Journal.record_answer."""
        if status not in (200, _ABORTED):
            self.count_refusal(status, it.key)
        if model != self._tasks.base and model not in self._tasks.bank.tasks:
            return  # its task has been unloaded meanwhile, and its counts are deleted
        if status in (200, _ABORTED):
            self._success.labels(model, it.key, ending if status == 200 else "abort").inc()
        self._generation.labels(model, it.key).inc(it.tokens)
        if it.joined:
            self._queue.labels(model).observe(it.joined - it.began)
        if it.first:
            self._prompt.labels(model, it.key).inc(len(it.prompt))
            self._first.labels(model).observe(it.first - it.began)
        if it.tokens > 1:
            self._each.labels(model).observe((seconds - (it.first - it.began)) / (it.tokens - 1))
        if status == 200:
            self._whole.labels(model).observe(seconds)

    def count_refusal(self, status: int, key: str) -> None:
        self._refused.labels(key, str(status)).inc()

    def forget(self, model: str) -> None:
        """Delete the counts of an unloaded task, so that tasks that come and go take no memory."""
        for metric in self._of_models:
            metric.remove_by_labels({"model_name": model})

    def page(self) -> bytes:
        return generate_latest(self._registry)

    def _counter(self, name: str, says: str, *labels: str) -> Counter:
        made = Counter(name, says, (*_MODEL, *_KEY, *labels), registry=self._registry)
        self._of_models.append(made)
        return made

    def _seconds(self, name: str, says: str) -> Histogram:
        made = Histogram(name, says, _MODEL, buckets=_SECONDS, registry=self._registry)
        self._of_models.append(made)
        return made


class _Now(Collector):
    """The gauges, which are computed when the metrics are read."""

    def __init__(self, tasks: Tasks, scheduler: Scheduler) -> None:
        self._tasks, self._scheduler = tasks, scheduler
        model = tasks.bank.model
        self._base = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))

    def collect(self) -> Iterable[GaugeMetricFamily]:
        running, waiting = self._scheduler.counts
        masks = self._tasks.bank.nbytes()
        yield GaugeMetricFamily("mft_num_requests_running", "Requests in the batch.", running)
        yield GaugeMetricFamily("mft_num_requests_waiting", "Requests in the queue.", waiting)
        yield GaugeMetricFamily(
            "mft_masks_loaded", "Tasks that requests can name, in addition to the base.", len(masks)
        )
        yield GaugeMetricFamily("mft_base_bytes", "Size of the base's weights.", self._base)
        by_task = GaugeMetricFamily("mft_mask_bytes", "Size of a task's masks.", labels=_MODEL)
        for task, size in masks.items():
            by_task.add_metric([task], size)
        yield by_task
        yield GaugeMetricFamily(
            "mft_kv_cache_bytes", "Size of the keys and values of the batch.", self._scheduler.cache_bytes
        )
        if torch.cuda.is_available():
            yield GaugeMetricFamily(
                "mft_gpu_memory_bytes", "GPU memory that torch has allocated.", torch.cuda.memory_allocated()
            )
