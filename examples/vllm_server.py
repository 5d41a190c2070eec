"""vLLM's own OpenAI-compatible server with a λ that is set while it runs: for comparing λ by hand.

    PA_FAST_ADMIN_TOKEN=… python -m examples.vllm_server BASE INSTRUCT [options of `vllm serve`]

    curl -H "Authorization: Bearer $PA_FAST_ADMIN_TOKEN" -d '{"lambda": 0.6}' \\
         http://127.0.0.1:8000/admin/lambda

Everything but λ is vLLM's. `LambdaControl` is middleware that vLLM puts in front of its routes
(`--middleware`). A switch lets the requests in flight finish, and holds new ones back until it is
done, so that every answer is of one λ: it says which in the header `pa-fast-lambda`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import math
import os
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pa_fast import errors
from pa_fast.base import Lambda
from pa_fast.checkpoint.provenance import as_hex, combine
from pa_fast.errors import EngineError, PaFastError, UsageError

TOKEN = "PA_FAST_ADMIN_TOKEN"
EXTENSION = "pa_fast.engines.vllm.worker.Extension"
ADMIN = "/admin/lambda"
MOST_BYTES = 4096
"""Of the body of a request to set λ."""

DRAIN_S = 60.0
"""How long a switch waits for requests in flight, unless its request says `timeout_s`."""

Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class StillRunning(EngineError):
    """Requests in flight did not end in time."""


class Drained:
    """Requests that run at one λ, and switches that run alone."""

    def __init__(self) -> None:
        self._open, self._idle, self._alone = asyncio.Event(), asyncio.Event(), asyncio.Lock()
        self._open.set()
        self._idle.set()
        self._running = 0

    @contextlib.asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Run a request, once no switch runs."""
        while not self._open.is_set():
            await self._open.wait()
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    @contextlib.asynccontextmanager
    async def switch(self, timeout_s: float) -> AsyncIterator[None]:
        """Run a switch: hold new requests back, and wait for those that run.

        Raises:
            StillRunning: they ran for longer than `timeout_s`.
        """
        async with self._alone:
            self._open.clear()
            try:
                await within(timeout_s, self._idle.wait())
                yield
            finally:
                self._open.set()


async def within(timeout_s: float, end: Awaitable[Any]) -> None:
    """Wait for the `end` of requests in flight; raises StillRunning."""
    try:
        await asyncio.wait_for(end, timeout_s)
    except asyncio.TimeoutError:
        raise StillRunning(f"requests were still running after {timeout_s:g} s") from None


@dataclass(frozen=True)
class Held:
    """What all workers say that they hold.

    Attributes:
        lam: None where no λ is set, or where workers hold different ones.
        checksum: of the live weights of all workers, that which a sweep on as many records.
    """

    lam: Lambda | None = None
    checksum: str | None = None

    def json(self) -> dict[str, Any]:
        return {"lambda": self.lam, "checksum": self.checksum}

    def __str__(self) -> str:
        return "no λ is set" if self.lam is None else f"λ is {self.lam.key}"


class LambdaControl:
    """ASGI middleware around vLLM's application, which sets and shows λ.

    Args:
        app: the application; its `state.engine_client` is vLLM's engine, with pa_fast's workers.

    Raises:
        UsageError: `PA_FAST_ADMIN_TOKEN` is not set.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]):
        self._app = app
        self._token = os.environ.get(TOKEN, "").encode()
        if not self._token:
            raise UsageError(f"{TOKEN} is not set, and whoever sets λ must show it")
        self._drained, self._held = Drained(), Held()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", "").rstrip("/"))
        if scope["type"] == "lifespan":
            await self._app(scope, receive, self._started(scope["app"].state.engine_client, send))
        elif scope["type"] == "websocket":  # a session would go on over switches
            await send({"type": "websocket.close", "code": 1003})
        elif path == ADMIN:
            await self._administer(scope, receive, send)
        elif path == "/v1/models":
            await self._app(scope, receive, self._with_lambda(send))
        elif scope["method"] == "POST":
            await self._compute(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _started(self, engine: Any, send: Send) -> Send:
        """`send` of the application's start, which succeeds once all workers hold λ = 1."""

        async def started(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                try:
                    await self._switch(engine, Lambda(1), DRAIN_S)
                except Exception as error:
                    message = {"type": "lifespan.startup.failed", "message": str(error)}
            await send(message)

        return started

    async def _compute(self, scope: Message, receive: Receive, send: Send) -> None:
        """Let the application answer, at one λ."""
        async with self._drained.request():
            if self._held.lam is None:
                await answer(send, 503, f"no λ is set, as the last switch failed: POST to {ADMIN}")
                return
            header = (b"pa-fast-lambda", self._held.lam.key.encode())

            async def marked(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message = {**message, "headers": [*message.get("headers", ()), header]}
                await send(message)

            await self._app(scope, receive, marked)

    def _with_lambda(self, send: Send) -> Send:
        """`send` of a list of models, which adds `lambda` and `checksum` to each of them."""
        start: Message = {}
        body = b""

        async def shown(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            body += message.get("body", b"")
            if message.get("more_body"):
                return
            if start["status"] == 200 and body:
                listed = json.loads(body)
                listed["data"] = [{**model, **self._held.json()} for model in listed["data"]]
                body = json.dumps(listed).encode()
            kept = [
                pair for pair in start.get("headers", ()) if pair[0].lower() != b"content-length"
            ]
            length = (b"content-length", str(len(body)).encode())
            await send({**start, "headers": [*kept, length]})
            await send({"type": "http.response.body", "body": body})

        return shown

    async def _administer(self, scope: Message, receive: Receive, send: Send) -> None:
        """Show λ, or set it."""
        shown = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(shown, b"Bearer " + self._token):
            await answer(
                send, 401, f"expected the bearer token of {TOKEN}", ("www-authenticate", "Bearer")
            )
        elif scope["method"] == "GET":
            await answer(send, 200, self._held.json())
        elif scope["method"] != "POST":
            await answer(send, 405, f"{scope['method']} {ADMIN}", ("allow", "GET, POST"))
        else:
            await self._set(scope, receive, send)

    async def _set(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request to set λ."""
        engine = scope["app"].state.engine_client
        try:
            lam, timeout_s = asked(await whole(receive))
            await call(engine, "check_lambda", lam.key)
            await self._switch(engine, lam, timeout_s)
        except UsageError as error:
            await answer(send, 400, str(error))
        except StillRunning as error:
            await answer(send, 503, f"{self._held} still: {error}", ("retry-after", "1"))
        except Exception as error:  # what fails in a worker may arrive as any type
            await answer(send, 500, f"the switch failed, and {self._held} now: {error}")
        else:
            await answer(send, 200, self._held.json())

    async def _switch(self, engine: Any, lam: Lambda, timeout_s: float) -> None:
        """Set λ in all workers, with no request in flight and no state of the old weights left.

        Raises:
            StillRunning: requests ran for longer than `timeout_s`; λ is what it was.
            EngineError: not all workers hold the new λ, or something of the old weights is left.
                What they hold is served, if it is one λ.
        """
        async with self._drained.switch(timeout_s):
            try:
                # what no HTTP request waits for any more, such as background responses
                await within(timeout_s, engine.pause_generation(mode="wait", clear_cache=False))
                self._held = Held()
                try:
                    await call(engine, "set_lambda", lam.key)
                except Exception:
                    with contextlib.suppress(Exception):
                        self._held = await settled(engine)
                    raise
                self._held = await settled(engine)
            finally:
                await engine.resume_generation()
            if self._held.lam != lam:
                raise EngineError("workers hold another λ than the one that was set")


async def call(engine: Any, method: str, *arguments: Any) -> list[Any]:
    """Call `method` of every worker's live weights, and return the results by rank.

    Raises:
        PaFastError: a worker raised it.
        Exception: of vLLM; a worker has no live weights, or died.
    """
    answers = await engine.collective_rpc("pa_call", args=(method, *arguments))
    for found in answers:
        if "error" in found:
            kind, message, hint = found["error"]
            raise getattr(errors, kind, EngineError)(message, hint)
    return [found["value"] for found in answers]


async def settled(engine: Any) -> Held:
    """Drop what vLLM keeps of the old weights, and return the λ on which all workers agree, if they
    do, and their checksum.

    Raises:
        EngineError: not all of it was dropped, or its models no longer consist of the live weights.
        Exception: of vLLM.
    """
    await call(engine, "inventory")
    await engine.reset_encoder_cache()
    if not await engine.reset_prefix_cache():
        raise EngineError("vLLM did not reset its prefix cache, which holds states of the old λ")
    keys = await call(engine, "lam")
    if len(set(keys)) != 1 or keys[0] is None:
        return Held()
    sums = [int(one, 16) for one in await call(engine, "checksum")]
    ranks = {f"rank {rank} of {len(sums)}": one for rank, one in enumerate(sums)}
    return Held(Lambda(keys[0]), as_hex(sums[0] if len(sums) == 1 else combine(ranks)))


def asked(body: bytes) -> tuple[Lambda, float]:
    """Return λ and `timeout_s` of the JSON text `body`.

    Raises:
        UsageError: it is something else.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or not {"lambda"} <= fields.keys() <= {"lambda", "timeout_s"}:
        raise UsageError(
            f"found {body[:80]!r}", 'expected {"lambda": 0.6}, and timeout_s beside it if wanted'
        )
    lam, timeout_s = fields["lambda"], fields.get("timeout_s", DRAIN_S)
    if isinstance(lam, bool) or not isinstance(lam, (int, float, str)):
        raise UsageError(f"λ is {lam!r}", 'expected a number, or text such as "1/3"')
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)):
        raise UsageError(f"timeout_s is {timeout_s!r}", "expected a number of seconds")
    if not 0 < timeout_s < math.inf:
        raise UsageError(f"timeout_s is {timeout_s}", "expected a number of seconds above 0")
    return Lambda(lam), timeout_s


async def whole(receive: Receive) -> bytes:
    """Return the body of a request, of which a bounded number of bytes is read."""
    body, more = b"", True
    while more and len(body) <= MOST_BYTES:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if len(body) > MOST_BYTES:
        raise UsageError(f"the request has more than {MOST_BYTES} bytes")
    return body


async def answer(
    send: Send, status: int, content: str | Mapping[str, Any], *headers: tuple[str, str]
) -> None:
    """Answer in JSON; with an error as OpenAI's API has them where `content` is its text."""
    if isinstance(content, str):
        content = {"error": {"message": content, "type": "pa_fast", "code": status}}
    body = json.dumps(content).encode()
    first = {"content-type": "application/json", "content-length": str(len(body)), **dict(headers)}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.encode(), value.encode()) for name, value in first.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})


# --- start


def check_reach(host: str | None, environment: Mapping[str, str]) -> None:
    """Refuse to let others than this machine set λ without a token that they were given.

    Raises:
        UsageError: `host` is no loopback address and there is no token, or vLLM's development
            routes, which set weights without one, are on.
    """
    if environment.get("VLLM_SERVER_DEV_MODE", "0") not in ("", "0"):
        raise UsageError(
            "VLLM_SERVER_DEV_MODE is on: its routes change weights without a token", "unset it"
        )
    if not environment.get(TOKEN) and not is_loopback(host):
        raise UsageError(
            f"the server would listen on {host or 'all addresses'}, beyond this machine, and"
            f" {TOKEN} is not set",
            "set it to a long random text; for texts, vLLM has --api-key and --ssl-certfile",
        )


def is_loopback(host: str | None) -> bool:
    """Whether `host` is an address of this machine that no other reaches."""
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return host == "localhost"


def options(pair: Mapping[str, Any], more: Sequence[str]) -> list[str]:
    """Return vLLM's options: on loopback unless told, and with pa_fast's workers whatever is told.

    Args:
        pair: the arguments of `WorkerWeights.bind`, by which each worker binds it.
        more: options of `vllm serve`.
    """
    return [
        *("--model", pair["instruct"], "--host", "127.0.0.1", *more),
        *("--load-format", "pa_fast", "--worker-extension-cls", EXTENSION),
        *("--additional-config", json.dumps({"pa_fast": pair})),
        *("--middleware", "examples.vllm_server.LambdaControl"),
    ]


def main(base: str, instruct: str, *more: str) -> None:
    """Serve until interrupted.

    Raises:
        UsageError: see `check_reach`.
        CheckpointError, PairError: the folders cannot be read or do not pair.
    """
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm_server"))
    args = parser.parse_args(options(sides(base, instruct), more))
    validate_parsed_serve_args(args)
    check_reach("127.0.0.1" if args.uds else args.host, os.environ)
    if not os.environ.get(TOKEN):
        os.environ[TOKEN] = secrets.token_urlsafe(32)
        print(f"{TOKEN}={os.environ[TOKEN]}", file=sys.stderr, flush=True)
    uvloop.run(run_server(args))


def sides(base: str, instruct: str) -> dict[str, Any]:
    """Return what workers bind by, of two folders or hub ids that pair."""
    from pa_fast.engines.served.arguments import PairArguments

    return PairArguments.of(base, instruct).for_workers()


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1].startswith("-"):
        sys.exit(str(__doc__))
    try:
        main(*sys.argv[1:])
    except PaFastError as error:
        sys.exit(f"error: {error}")
