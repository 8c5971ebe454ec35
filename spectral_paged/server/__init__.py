"""An OpenAI-compatible HTTP server over an LLM: `pip install 'spectral-paged[server]'`."""
