"""induce.py --serve: an OpenAI-compatible server, in which each request has a personality of its own, and a page with sliders.

    python induce.py --serve --characters DIR               or, where the package is installed: python -m personality.serve
    curl localhost:8000/v1/chat/completions -H 'content-type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Who are you?"}], "personality": {"traits": {"extraversion": 0.8}}}'
"""

import asyncio
import base64
import hashlib
import hmac
import importlib
import ipaddress
import logging
import os
import re
import signal
import socket
import threading
import time
from types import SimpleNamespace

from .api import ChatBody, CompletionBody, PersonalityBody, Refusal, of_request, parsed
from .answering import Server, as_model
from .inflight import EngineStopped
from .store import TEXTS
from .terminal import (EDIT_RULES, Flags, UserError, edit_arguments, loading_arguments, positive, refuse, say, script,
                       serve_arguments)

IDLE = 75  # seconds that a connection without requests stays open: longer than clients wait before they use it again
MOST_BYTES, PATIENCE = 1 << 20, 30  # of a body; seconds that it may take to come, and that SIGTERM waits for what runs
KEY = "PERSONALITY_API_KEY"  # where the key may stand


def page() -> tuple[bytes, str]:
    """The page, and the policy that lets its own script and style run, and nothing else."""
    text = (TEXTS / "serve.html").read_text(encoding="utf-8")
    inside = {kind: re.search(rf"<{kind}>(.*?)</{kind}>", text, re.S)[1].encode() for kind in ("script", "style")}
    hashes = {kind: base64.b64encode(hashlib.sha256(part).digest()).decode() for kind, part in inside.items()}
    return text.encode(), (f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
                           "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def allowed(headers, args, open_to_all: bool) -> None:
    """Raise where a request may not come in: without the key, or, where there is none, under a name that isn't this machine's
    (a page elsewhere whose name points here)."""
    given = headers.get("authorization", "").encode("latin-1")
    if args.api_key and not open_to_all and not hmac.compare_digest(given, f"Bearer {args.api_key}".encode()):
        raise Refusal(401, "expected the header Authorization: Bearer KEY", "authentication_error")
    if not args.api_key and not own_address(re.sub(r":\d+$", "", headers.get("host", "").lower()).strip("[]")):
        raise Refusal(403, "Host: expected localhost", "permission_error")


def own_address(host: str) -> bool:
    """Whether this is a name of this machine for itself."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def read_body(request) -> bytes:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "Content-Type: expected application/json")
    data = bytearray()

    async def read():
        async for part in request.stream():
            data.extend(part)
            if len(data) > MOST_BYTES:
                raise Refusal(413, f"expected a body of at most {MOST_BYTES >> 20} MiB")

    try:
        await asyncio.wait_for(read(), PATIENCE)
    except asyncio.TimeoutError:
        raise Refusal(408, f"expected the body within {PATIENCE} seconds") from None
    return bytes(data)


def as_reply(error: Refusal):
    from fastapi.responses import JSONResponse

    return JSONResponse(error.body, error.status, {"Retry-After": "1"} if error.status == 429 else None)


class Door:
    """ASGI middleware: who may come in, and what they got."""

    def __init__(self, app, server: Server):
        self.app, self.server, self.args = app, server, server.args

    async def __call__(self, scope, receive, send):
        from starlette.datastructures import Headers
        from starlette.requests import ClientDisconnect

        begun = []

        async def counted(message):
            if message["type"] == "http.response.start":
                begun.append(True)
                codes, code = self.server.codes, message["status"]
                codes[code] = codes.get(code, 0) + 1
            await send(message)

        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            open_to_all = scope["path"] in ("/", "/health")
            allowed(Headers(scope=scope), self.args, open_to_all)
            await self.app(scope, receive, counted)
        except Refusal as error:
            await as_reply(error)(scope, receive, counted)
        except ClientDisconnect:
            pass
        except asyncio.CancelledError:
            if not self.server.engine.stopping:  # else it is the server's end, which waits no longer
                raise
        except EngineStopped as error:
            if not begun:
                await as_reply(Refusal(503, str(error), "server_error"))(scope, receive, counted)
        except Exception as error:
            logging.getLogger("uvicorn.error").exception("a request failed")
            if not begun:
                why = Refusal(500, f"{type(error).__name__}: see the server's log", "server_error")
                await as_reply(why)(scope, receive, counted)


def application(server: Server):
    """The routes, as an ASGI application."""
    from fastapi import FastAPI, Request as Incoming
    from fastapi.responses import JSONResponse, PlainTextResponse, Response

    app, (html, policy) = FastAPI(openapi_url=None), page()
    app.add_middleware(Door, server=server)
    answer_errors(app)
    add_writing(app, server)

    @app.post("/v1/personality")
    async def made_of(request: Incoming):
        _, found = await server.person(parsed(PersonalityBody, await read_body(request)))
        return JSONResponse(found)

    @app.get("/v1/personality")
    async def inventory():
        return JSONResponse(server.inventory())

    @app.get("/v1/models")
    async def models():
        return JSONResponse(server.models())

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        of_request(SimpleNamespace(model=name, personality=None), server.name, server.people.characters)  # or a refusal
        return JSONResponse(as_model(name) if name else server.models())

    @app.get("/health")
    async def health():
        return PlainTextResponse("ok\n", 200 if server.engine.running() else 503)

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(server.metrics(), media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def index():
        return Response(html, media_type="text/html; charset=utf-8", headers={
            "Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"})

    return app


def answer_errors(app) -> None:
    """Every error in OpenAI's form."""
    from starlette.exceptions import HTTPException

    @app.exception_handler(Refusal)
    async def refused(request, error):
        return as_reply(error)

    @app.exception_handler(HTTPException)
    async def unknown(request, error):
        return as_reply(Refusal(error.status_code, str(error.detail)))


def add_writing(app, server: Server) -> None:
    """The routes whose replies are written by the model."""
    from fastapi import Request as Incoming
    from fastapi.responses import JSONResponse, StreamingResponse

    async def complete(kind, request):
        async def gone():
            while (await request.receive())["type"] != "http.disconnect":
                pass

        found = await server.complete(kind, await read_body(request), gone)
        if isinstance(found, dict):
            return JSONResponse(found)
        return StreamingResponse(found, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @app.post("/v1/chat/completions")
    async def chat(request: Incoming):
        return await complete(ChatBody, request)

    @app.post("/v1/completions")
    async def completions(request: Incoming):
        return await complete(CompletionBody, request)


# -------------------------------------------------------------------------------------------------------------------- run


def listening(args) -> socket.socket:
    """A socket on --host and --port; without a key only this machine's own addresses."""
    if not (own_address(args.host) or args.api_key):
        raise UserError(f"--host {args.host}: without a key the server listens on this machine's own addresses only (127.0.0.1): "
                        f"--api-key KEY, or the environment variable {KEY}")
    try:
        family, *_, address = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {args.host} --port {args.port}: {getattr(error, 'strerror', None) or error}") from None


def ended_by_engine(web, engine):
    """Have Ctrl-C and SIGTERM wait PATIENCE seconds, a second Ctrl-C no longer, for what is being written; then the engine stops,
    and who still waits is told so, before uvicorn cuts connections."""
    begin, waiting = web.handle_exit, []

    def handle_exit(number, frame):
        if not waiting:
            waiting.append(threading.Timer(PATIENCE, engine.stop))
            waiting[0].daemon = True
            waiting[0].start()
            if engine.requests:
                say(f"waiting up to {PATIENCE} seconds for what is being written; Ctrl-C again ends it")
        elif number == signal.SIGINT and len(waiting) < 2:
            waiting.append(threading.Thread(target=end, daemon=True))
            return waiting[1].start()
        begin(number, frame)

    def end():
        engine.stop()
        time.sleep(1)  # for what is told to clients
        web.force_exit = True  # whoever else is connected

    web.handle_exit = handle_exit
    return web


def serve(args) -> None:
    """Until Ctrl-C or SIGTERM, which wait PATIENCE seconds for what is being written."""
    try:
        _, uvicorn = map(importlib.import_module, ("fastapi", "uvicorn"))
    except ImportError as error:
        raise UserError("--serve needs fastapi and uvicorn: pip install -e '.[serve]'") from error
    args.api_key = args.api_key or os.environ.get(KEY) or None
    if not (args.api_key or "").isascii():
        raise UserError(f"--api-key, {KEY}: expected letters, digits and signs of ASCII, since that is what headers can hold")
    with listening(args) as listener:
        server = Server(args)
        try:
            host, port = listener.getsockname()[:2]
            say(f"{server.name}: http://{f'[{host}]' if ':' in host else host}:{port}/ has the page, /v1 is for OpenAI's clients; "
                f"traits: {', '.join(server.people.traits) or 'none'}; Ctrl-C ends it")
            web = ended_by_engine(uvicorn.Server(uvicorn.Config(
                application(server), log_level="warning", access_log=False, server_header=False, lifespan="off",
                timeout_graceful_shutdown=PATIENCE + 5, timeout_keep_alive=IDLE)), server.engine)
            server.engine.ended = lambda: setattr(web, "should_exit", True)  # a supervisor starts it anew
            if not server.engine.running():  # it stopped before it could say so
                web.should_exit = True
            web.run(sockets=[listener])
            if not server.engine.running():
                raise UserError(f"the engine has stopped: {server.engine.manager.background_thread_status.fatal_error}")
        finally:
            server.engine.stop()


def arguments():
    flags = Flags(__doc__)
    flags.prog = "python -m personality.serve"
    edit_arguments(flags)
    serve_arguments(flags)
    loading_arguments(flags)
    flags.add_argument("--max-new-tokens", type=positive, metavar="N",
                       help="length of an answer where the client asks for none (default: 512)")
    flags.set_defaults(batch_size=1)  # of the scripts: --rows is the server's
    args = flags.parse_args()
    refuse(args, EDIT_RULES)
    return args


main = serve

if __name__ == "__main__":
    script(arguments, "personality.serve")
