"""An HTTP server that speaks OpenAI's API.

It knows the LLM, OpenAI's forms and the metrics; fastapi and uvicorn are imported when it starts.
"""

__all__ = [
    "app",
    "command",
    "http_server",
    "settings",
]
