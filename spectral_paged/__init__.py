"""Paged KV-cache block manager whose pages are spectral."""
