"""`examples/vllm_server.py` around a fake of vLLM's application and engine: who may set λ, and that
every answer is of one λ, whatever fails."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from examples.vllm_server import (
    ADMIN,
    EXTENSION,
    TOKEN,
    LambdaControl,
    asked,
    check_reach,
    is_loopback,
    options,
)
from pa_fast.base import Lambda
from pa_fast.checkpoint.provenance import as_hex, combine
from pa_fast.errors import EngineError, PaFastError, UsageError, WeightsError

SECRET = "a long random text"


class FakeEngine:
    """The members of vLLM's engine client that a switch uses, and the λ that each worker holds.

    Attributes:
        log: what was called, in order.
        faults: method → what it does in addition; an error of pa_fast is answered by the worker,
            any other one comes from vLLM.
        running: requests that compute now.
    """

    def __init__(self, workers: int = 1):
        self.keys: list[str | None] = [None] * workers
        self.log: list[str] = []
        self.faults: dict[str, Any] = {}
        self.running = 0
        self.paused = False

    @property
    def lam(self) -> float:
        """Of the first worker, which writes the fake's answers."""
        return float(Lambda(self.keys[0]))

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        assert method == "pa_call"
        await self._called(args[0])
        if args[0] == "set_lambda":
            assert self.paused and self.running == 0, "a request was in flight"
            self.keys = [args[1]] * len(self.keys)
        try:
            self.faults.get(args[0], bool)()
        except PaFastError as error:
            return [{"error": [type(error).__name__, error.message, error.hint]}] * len(self.keys)
        if args[0] == "checksum":
            return [{"value": checksum(key, rank)} for rank, key in enumerate(self.keys)]
        return [{"value": key if args[0] == "lam" else None} for key in self.keys]

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        assert mode == "wait"
        await self._called("pause")
        if "pause" in self.faults:
            await asyncio.sleep(60)
        self.paused = True

    async def resume_generation(self) -> None:
        await self._called("resume")
        self.paused = False

    async def reset_prefix_cache(self) -> bool:
        await self._called("reset_prefix_cache")
        return "reset_prefix_cache" not in self.faults

    async def reset_encoder_cache(self) -> None:
        await self._called("reset_encoder_cache")

    async def _called(self, name: str) -> None:
        self.log.append(name)
        await asyncio.sleep(0)


def checksum(key: str | None, rank: int = 0) -> str:
    return as_hex(int(1000 * Lambda(key)) + rank)


class Served:
    """A fake of vLLM's application under `LambdaControl`, and what a client does with it.

    A completion says the λ of the first worker as it begins and as it ends; between them it waits
    for `release`, or as many turns of the event loop as its body says.
    """

    def __init__(self, workers: int = 1):
        self.engine = FakeEngine(workers)
        self.release = asyncio.Event()
        self.control = LambdaControl(self.app)
        self.scope = {"app": SimpleNamespace(state=SimpleNamespace(engine_client=self.engine))}

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        engine, headers = self.engine, [(b"content-type", b"application/json")]
        if scope["type"] == "lifespan":
            assert (await receive())["type"] == "lifespan.startup"
            await send({"type": "lifespan.startup.complete"})
        elif scope["path"] == "/v1/models":
            body = json.dumps({"object": "list", "data": [{"id": "m"}, {"id": "n"}]}).encode()
            length = (b"content-length", str(len(body)).encode())
            await send(
                {"type": "http.response.start", "status": 200, "headers": [*headers, length]}
            )
            await send({"type": "http.response.body", "body": body[:7], "more_body": True})
            await send({"type": "http.response.body", "body": body[7:]})
        elif scope["path"] == "/health":
            await send({"type": "http.response.start", "status": 200})
            await send({"type": "http.response.body"})
        else:
            turns = (await receive())["body"]
            engine.running += 1
            try:
                assert not engine.paused
                first = engine.lam
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                if turns:
                    for _ in range(int(turns)):
                        await asyncio.sleep(0)
                else:
                    await self.release.wait()
                body = json.dumps([first, engine.lam]).encode()
                await send({"type": "http.response.body", "body": body})
            finally:
                engine.running -= 1

    async def start(self) -> list[Any]:
        return await self._through({"type": "lifespan"}, {"type": "lifespan.startup"})

    async def ask(
        self, method: str, path: str, body: Any = b"", token: str | None = None, root: str = ""
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and body of the answer, which is whole."""
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        shown = [] if token is None else [(b"authorization", f"Bearer {token}".encode())]
        found = await self._through(
            {
                "type": "http",
                "method": method,
                "path": root + path,
                "root_path": root,
                "headers": shown,
            },
            {"type": "http.request", "body": sent},
        )
        headers = {name.decode(): value.decode() for name, value in found[0].get("headers", ())}
        text = b"".join(message.get("body", b"") for message in found[1:])
        if "content-length" in headers:
            assert int(headers["content-length"]) == len(text)
        return found[0]["status"], headers, json.loads(text) if text else None

    async def set(self, lam: Any, **more: Any) -> tuple[int, dict[str, str], Any]:
        return await self.ask("POST", ADMIN, {"lambda": lam, **more}, SECRET)

    async def complete(self, turns: int = 1) -> tuple[int, dict[str, str], Any]:
        return await self.ask("POST", "/v1/completions", b"%d" % turns)

    async def models(self) -> list[Any]:
        status, _, listed = await self.ask("GET", "/v1/models")
        assert status == 200 and [model["id"] for model in listed["data"]] == ["m", "n"]
        (one,) = {json.dumps([m["lambda"], m["checksum"]]) for m in listed["data"]}
        found: list[Any] = json.loads(one)
        return found

    async def _through(self, scope: dict[str, Any], message: Any) -> list[Any]:
        found: list[Any] = []

        async def receive() -> Any:
            return message

        async def send(said: Any) -> None:
            found.append(said)

        await self.control({**self.scope, **scope}, receive, send)
        return found


Scenario = Callable[[Served], Awaitable[None]]


def served(workers: int = 1) -> Callable[[Scenario], Callable[[], None]]:
    """Run a test in an event loop, with a server that has started."""

    def decorate(test: Scenario) -> Callable[[], None]:
        async def run() -> None:
            server = Served(workers)
            assert await server.start() == [{"type": "lifespan.startup.complete"}]
            server.engine.log.clear()
            await asyncio.wait_for(test(server), 60)

        def ran() -> None:
            asyncio.run(run())

        return ran

    return decorate


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, SECRET)


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@served()
async def test_a_switch_is_shown_by_models_and_by_every_answer(server: Served) -> None:
    assert await server.models() == [1.0, checksum("1")]
    assert await server.complete() == (
        200,
        {"content-type": "application/json", "pa-fast-lambda": "1"},
        [1.0, 1.0],
    )
    status, _, said = await server.set(0.6)
    assert (status, said) == (200, {"lambda": 0.6, "checksum": checksum("0.6")})
    assert await server.models() == [0.6, checksum("0.6")]
    _, headers, lams = await server.complete()
    assert headers["pa-fast-lambda"] == "0.6" and lams == [0.6, 0.6]
    assert (await server.ask("GET", ADMIN, token=SECRET))[2] == said
    assert (await server.set("1/3"))[2]["lambda"] == 1 / 3
    assert (await server.ask("GET", "/health"))[:2] == (200, {})


@served()
async def test_a_switch_pauses_sets_forgets_and_looks_in_this_order(server: Served) -> None:
    await server.set(0.6)
    assert server.engine.log == [
        "check_lambda",
        "pause",
        "set_lambda",
        "inventory",
        "reset_encoder_cache",
        "reset_prefix_cache",
        "lam",
        "checksum",
        "resume",
    ]


@served(workers=2)
async def test_of_several_workers_the_checksum_is_that_of_a_sweep_on_as_many(
    server: Served,
) -> None:
    ranks = {f"rank {r} of 2": int(checksum("0.5", r), 16) for r in range(2)}
    assert (await server.set(0.5))[2]["checksum"] == as_hex(combine(ranks))


@served()
async def test_only_who_shows_the_token_sees_or_sets_the_switch(server: Served) -> None:
    for method in ("GET", "POST", "PUT"):
        for shown in (None, "", SECRET[:-1], SECRET + "x", "a wrong one", "λ"):
            status, headers, said = await server.ask(method, ADMIN, {"lambda": 0.6}, shown)
            assert status == 401 and headers["www-authenticate"] == "Bearer"
            assert SECRET not in str(said)
    assert server.engine.log == [] and await server.models() == [1.0, checksum("1")]
    assert (await server.ask("PUT", ADMIN, {"lambda": 0.6}, SECRET))[0] == 405


@served()
async def test_a_prefix_of_a_proxy_is_no_way_around_the_token(server: Served) -> None:
    assert (await server.ask("POST", ADMIN, {"lambda": 0.6}, None, "/api"))[0] == 401
    assert (await server.ask("POST", ADMIN, {"lambda": 0.6}, SECRET, "/api"))[0] == 200


def test_without_a_token_there_is_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "")
    with pytest.raises(UsageError, match=f"{TOKEN} is not set"):
        Served()


@served()
async def test_requests_in_flight_end_at_their_lambda_and_new_ones_wait(server: Served) -> None:
    old = [asyncio.create_task(server.ask("POST", "/v1/completions")) for _ in range(3)]
    await turns()
    switch = asyncio.create_task(server.set(0.6))
    await turns()
    new = asyncio.create_task(server.complete())
    await turns()
    assert server.engine.running == 3 and server.engine.log == ["check_lambda"] and not new.done()
    assert await server.models() == [1.0, checksum("1")], "looking waits for nobody"
    server.release.set()
    for request in old:
        _, headers, lams = await request
        assert headers["pa-fast-lambda"] == "1" and lams == [1.0, 1.0]
    assert (await switch)[0] == 200
    _, headers, lams = await new
    assert headers["pa-fast-lambda"] == "0.6" and lams == [0.6, 0.6]


@served()
async def test_a_switch_that_would_wait_too_long_changes_nothing(server: Served) -> None:
    long = asyncio.create_task(server.ask("POST", "/v1/completions"))
    await turns()
    switch = asyncio.create_task(server.set(0.6, timeout_s=0.05))
    await turns()
    new = asyncio.create_task(server.complete())
    status, headers, said = await switch
    assert status == 503 and headers["retry-after"] == "1"
    assert "λ is 1 still: requests were still running after 0.05 s" in said["error"]["message"]
    assert (await new)[2] == [1.0, 1.0] and server.engine.log == ["check_lambda"]
    server.release.set()
    assert (await long)[2] == [1.0, 1.0]
    assert (await server.set(0.6))[0] == 200


@served()
async def test_what_only_the_engine_knows_of_is_waited_for_too(server: Served) -> None:
    server.engine.faults["pause"] = True
    status, _, said = await server.set(0.6, timeout_s=0.05)
    assert status == 503 and "λ is 1 still" in said["error"]["message"]
    assert server.engine.log == ["check_lambda", "pause", "resume"]
    assert (await server.complete())[2] == [1.0, 1.0]


@served()
async def test_a_client_that_goes_away_is_not_waited_for(server: Served) -> None:
    gone = asyncio.create_task(server.ask("POST", "/v1/completions"))
    await turns()
    gone.cancel()
    assert (await server.set(0.6, timeout_s=5))[0] == 200


@served()
async def test_a_request_that_waits_for_the_switch_may_go_away(server: Served) -> None:
    old = asyncio.create_task(server.ask("POST", "/v1/completions"))
    await turns()
    switch = asyncio.create_task(server.set(0.6))
    await turns()
    gone = asyncio.create_task(server.complete())
    await turns()
    gone.cancel()
    server.release.set()
    assert (await old)[2] == [1.0, 1.0] and (await switch)[0] == 200
    assert (await server.complete())[2] == [0.6, 0.6]


def failing(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@served(workers=2)
async def test_a_lambda_that_workers_refuse_holds_nobody_up(server: Served) -> None:
    long = asyncio.create_task(server.ask("POST", "/v1/completions"))
    await turns()
    server.engine.faults["check_lambda"] = failing(UsageError("λ = 7 is past its reach", "use 1"))
    status, _, said = await server.set(7)
    assert status == 400 and said["error"]["message"] == "λ = 7 is past its reach\n\nhint: use 1"
    assert server.engine.log == ["check_lambda"]
    server.release.set()
    assert (await long)[2] == [1.0, 1.0]


@pytest.mark.parametrize(
    "fault", ["half", "silent", "none", "died", "moved", "cache", "kept", "twice"]
)
def test_what_is_not_one_lambda_is_not_served_until_a_switch_succeeds(fault: str) -> None:
    @served(workers=2)
    async def run(server: Served) -> None:
        engine = server.engine

        def leave(*keys: str | None) -> Callable[[], None]:
            def left() -> None:
                engine.keys = list(keys)
                raise WeightsError("the switch did not finish")

            return left

        name, what = {
            "half": ("set_lambda", leave("0.6", "1")),
            "silent": ("set_lambda", lambda: setattr(engine, "keys", ["0.6", "1"])),
            "twice": ("set_lambda", leave("0.6", "0.6")),
            "none": ("set_lambda", leave(None, None)),
            # what a worker in another process raises arrives as an exception without a type
            "died": ("lam", failing(Exception("the engine is dead"))),
            "moved": ("inventory", failing(EngineError("a parameter was moved"))),
            "cache": ("reset_prefix_cache", None),
            "kept": ("set_lambda", leave("1", "1")),
        }[fault]
        engine.faults[name] = what
        if fault == "twice":  # the first error is the one that says why
            engine.faults["inventory"] = failing(EngineError("a parameter was moved"))
        status, _, said = await server.set(0.6)
        assert status == 500 and "the switch failed" in said["error"]["message"]
        if name == "set_lambda" and fault != "silent":
            assert "the switch did not finish" in said["error"]["message"]
        if fault == "kept":  # all hold the old one, so that is one λ
            assert "λ is 1 now" in said["error"]["message"]
            assert (await server.complete())[1]["pa-fast-lambda"] == "1"
            assert "reset_prefix_cache" in engine.log
        else:
            assert "no λ is set now" in said["error"]["message"]
            assert await server.models() == [None, None]
            status, headers, said = await server.complete()
            assert status == 503 and "pa-fast-lambda" not in headers
            assert "no λ is set" in said["error"]["message"]
        assert not engine.paused
        engine.faults.clear()
        assert (await server.set(0.6))[0] == 200
        assert (await server.complete())[2] == [0.6, 0.6]

    run()


@served()
async def test_switches_run_one_after_another(server: Served) -> None:
    lams = [k / 8 for k in range(8)]
    found = await asyncio.gather(*(server.set(lam) for lam in lams))
    assert [(status, said["lambda"]) for status, _, said in found] == [(200, lam) for lam in lams]
    assert server.engine.log.count("resume") == 8


@pytest.mark.parametrize("seed", range(20))
def test_every_answer_is_of_the_lambda_that_it_says(seed: int) -> None:
    """Requests of any length, and switches, begun in any order."""

    @served()
    async def run(server: Served) -> None:
        draw = random.Random(seed)
        requests, switches = [], []
        for _ in range(60):
            await turns(draw.randrange(6))
            if draw.random() < 0.2:
                switches.append(asyncio.create_task(server.set(draw.randrange(11) / 10)))
            else:
                requests.append(asyncio.create_task(server.complete(draw.randrange(1, 30))))
        for status, headers, lams in await asyncio.gather(*requests):
            assert status == 200 and {float(headers["pa-fast-lambda"])} == set(lams)
        assert {status for status, *_ in await asyncio.gather(*switches)} == {200}

    run()


BODIES = {
    "nothing": b"",
    "no JSON": b"{lambda}",
    "a list": b"[0.6]",
    "no λ": b'{"timeout_s": 3}',
    "another field": b'{"lambda": 0.6, "lamda": 0.7}',
    "true": b'{"lambda": true}',
    "null": b'{"lambda": null}',
    "NaN": b'{"lambda": NaN}',
    "too large": b'{"lambda": 1e300}',
    "words": b'{"lambda": "half"}',
    "nested": b"[" * 4000,
    "too long": b'{"lambda": 0.6' + b" " * 5000 + b"}",
    "no time": b'{"lambda": 0.6, "timeout_s": 0}',
    "for ever": b'{"lambda": 0.6, "timeout_s": Infinity}',
    "time as text": b'{"lambda": 0.6, "timeout_s": "3"}',
    "no UTF-8": b'{"lambda": "\xff"}',
}


@pytest.mark.parametrize("body", BODIES)
def test_what_is_no_lambda_is_refused_before_anything_waits(body: str) -> None:
    @served()
    async def run(server: Served) -> None:
        status, _, said = await server.ask("POST", ADMIN, BODIES[body], SECRET)
        assert status == 400 and said["error"]["code"] == 400 and server.engine.log == []

    run()


def test_lambda_and_time_are_read() -> None:
    assert asked(b'{"lambda": "1/3", "timeout_s": 2}') == (1 / 3, 2)
    assert asked(b'{"lambda": -1}') == (-1.0, 60.0)


@pytest.mark.parametrize(
    "error", [Exception("no attribute 'pa_call'"), EngineError("the pair is not bound")], ids=type
)
def test_it_does_not_start_without_live_weights(error: Exception) -> None:
    async def run() -> list[Any]:
        server = Served()
        server.engine.faults["set_lambda"] = failing(error)
        return await server.start()

    assert asyncio.run(run()) == [{"type": "lifespan.startup.failed", "message": str(error)}]


def test_websockets_are_closed() -> None:
    async def run() -> list[Any]:
        return await Served()._through({"type": "websocket", "path": "/v1/realtime"}, {})

    assert asyncio.run(run()) == [{"type": "websocket.close", "code": 1003}]


# --- start


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        (None, False),
        ("10.0.0.3", False),
        ("localhost.example.org", False),
    ],
)
def test_beyond_loopback_a_token_must_be_given(host: str | None, loopback: bool) -> None:
    assert is_loopback(host) == loopback
    check_reach(host, {TOKEN: SECRET})
    for environment in ({}, {TOKEN: ""}):
        if loopback:
            check_reach(host, environment)
        else:
            with pytest.raises(UsageError, match="beyond this machine") as refused:
                check_reach(host, environment)
            assert (host or "all addresses") in str(refused.value)


def test_routes_that_set_weights_without_a_token_are_refused() -> None:
    for value in ("1", "true"):
        with pytest.raises(UsageError, match="VLLM_SERVER_DEV_MODE"):
            check_reach("127.0.0.1", {TOKEN: SECRET, "VLLM_SERVER_DEV_MODE": value})
    check_reach("127.0.0.1", {"VLLM_SERVER_DEV_MODE": "0"})


def test_own_options_may_move_the_server_but_not_its_workers() -> None:
    pair = {"base": "B", "instruct": "I", "store": ["dense", {}]}
    given = options(pair, ["--host", "::", "--load-format", "auto", "--middleware", "mine.M"])
    last = dict(zip(given[::2], given[1::2]))
    assert last["--host"] == "::" and last["--model"] == "I"
    assert last["--load-format"] == "pa_fast" and last["--worker-extension-cls"] == EXTENSION
    assert json.loads(last["--additional-config"]) == {"pa_fast": pair}
    assert given.count("--middleware") == 2
    assert options(pair, [])[2:4] == ["--host", "127.0.0.1"]
