"""Latency, statistics, environment, quality and reports."""
