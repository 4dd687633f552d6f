"""Refuse requests that another web site's page sends to this server through the browser of the person at work."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fmdistill.serve import is_loopback

HEADERS = {
    # Only this server's own files and pictures; so nothing is loaded from elsewhere, and no page may frame this one.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Guard:
    """Answers 403 if the request's origin is another site, or its Host a name that was pointed at this machine."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app, self.only_loopback = app, is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if (problem := self._problem(Headers(scope=scope))) is not None:
            await JSONResponse({"error": problem}, status_code=403)(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, with_headers)

    def _problem(self, headers: Headers) -> str | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.only_loopback and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return f"host {host}: this page is open to this machine only; start it with host=ADDRESS for others"
        if origin is not None and urlsplit(origin).netloc != host:
            return f"origin {origin}: another site may not use this page"
        return None
