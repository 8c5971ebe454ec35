"""The seal op in Triton: fits, codes, outlier tokens and eigenvectors."""

__all__ = ["codes", "eigenvectors", "exact_tokens", "fit", "outliers", "seal"]
