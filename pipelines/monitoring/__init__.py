"""Metrics for Prometheus: what run folders, prepared datasets and the registry tell, read again and again."""
