"""`python -m tasks.serve`: Prefect's server, whose pages may talk to nobody else. `magellano up` starts it.

Both of Prefect's UIs carry addresses of others (Amplitude, Sanity, GitHub) that no setting turns off; the browser is
told to refuse them. A worker of another machine reaches the server only where PREFECT_SERVER_API_HOST says so.
"""

import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Any, Send], Awaitable[None]]


def policy(ui_api_url: str) -> bytes:
    """The Content-Security-Policy of a server whose pages ask `ui_api_url`."""
    there = urlsplit(ui_api_url)
    ws = "wss" if there.scheme == "https" else "ws"
    own = f"'self' {there.scheme}://{there.netloc} {ws}://{there.netloc}"
    rules = {
        "default-src": "'self'",
        "connect-src": f"{own} data: blob:",
        "img-src": "'self' data: blob:",  # artifacts carry their pictures as data:
        "style-src": "'self' 'unsafe-inline'",
        "script-src": "'self' 'unsafe-inline' 'unsafe-eval' blob:",  # without eval the run's graph stays blank
        "worker-src": "'self' blob:",
        "font-src": "'self' data:",
        "form-action": "'self'",
        "base-uri": "'self'",
        "object-src": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items()).encode()


class Guarded:
    """An ASGI application whose answers carry the policy."""

    def __init__(self, app: App, headers: list[tuple[bytes, bytes]]) -> None:
        self._app, self._headers = app, headers

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self._headers]
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)


def main() -> None:
    """Serve until SIGTERM."""
    import uvicorn
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    settings = get_current_settings().server
    asked = settings.ui.api_url or f"http://{settings.api.host}:{settings.api.port}/api"
    headers = [
        (b"content-security-policy", policy(asked)),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
    ]
    uvicorn.run(
        Guarded(create_app(final=True), headers),
        host=settings.api.host, port=settings.api.port, log_level="warning", lifespan="on",
        timeout_graceful_shutdown=5, server_header=False,
    )  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("PREFECT__SERVER_FINAL", "1")
    main()
