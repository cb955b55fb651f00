"""What others watch: metrics for Prometheus and OpenTelemetry, a dashboard, and alerts."""
