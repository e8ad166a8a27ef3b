"""Families of Prometheus metrics, named with the prefix `stockpot_`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from stockpot.telemetry.tally import Histogram

Values = Iterable[tuple[tuple[str, ...], float]]
"""Label values, in the order of the family's labels, and the value. No two have the same label values:
Prometheus would refuse the whole scrape."""


def gauge(name: str, text: str, labels: Sequence[str], values: Values) -> Metric:
    """What is now."""
    family = GaugeMetricFamily(f"stockpot_{name}", text, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, value)
    return family


def counter(name: str, text: str, labels: Sequence[str], values: Values) -> Metric:
    """What happened since start; the samples' name ends with `_total`."""
    family = CounterMetricFamily(f"stockpot_{name}", text, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, value)
    return family


def histogram(
    name: str, text: str, labels: Sequence[str], values: Iterable[tuple[tuple[str, ...], Histogram]]
) -> Metric:
    """What was measured since start."""
    family = HistogramMetricFamily(f"stockpot_{name}", text, labels=labels)
    for label_values, tally in values:
        family.add_metric(label_values, tally.buckets(), tally.sum)
    return family
