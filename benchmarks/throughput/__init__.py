"""`spectral-paged bench throughput`: offline batch generation, timed end to end."""
