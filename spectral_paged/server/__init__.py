"""An HTTP server with OpenAI's API.

The package imports the LLM, OpenAI's formats and the metrics. fastapi and uvicorn are imported when
the server starts.
"""

__all__ = [
    "app",
    "async_llm",
    "command",
    "http_server",
    "llm_engine",
    "settings",
]
