"""Metrics for Prometheus and OpenTelemetry, a Grafana dashboard, and alerts."""
