"""Web functions, driven over HTTP by an independent client, through a real gateway."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import mesh as mesh_api
from mesh import client, web
from mesh.exception import InvalidError
from mesh.server import NatsServer
from mesh.spec import FunctionSpec
from mesh.webspec import WebSpec
from tests.support import Mesh, gateway, new_mesh, until

SITE = '''
import asyncio, json, os, time
import mesh

app = mesh.App("site")

@app.function(OPTIONS)
@mesh.asgi_app()
def pages():
    running = [0, 0]
    lived = []

    async def application(scope, receive, send):
        if scope["type"] == "lifespan":
            while True:
                event = await receive()
                lived.append(event["type"])
                scope["state"]["color"] = "green"
                await send({"type": event["type"] + ".complete"})
                if event["type"] == "lifespan.shutdown":
                    print("the lifespan has ended", flush=True)
                    return
        if scope["type"] == "websocket":
            await echo(receive, send)
            return
        path = scope["path"][len(scope["root_path"]):]
        await answers[path.strip("/")](scope, receive, send)

    async def echo(receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        while (event := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": event["text"][::-1]})

    async def answer(send, body, status=200):
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": body.encode()})

    async def on_about(scope, receive, send):
        shown = {name: scope[name] for name in ("path", "root_path", "method", "scheme")}
        shown |= {"query": scope["query_string"].decode(), "state": scope["state"], "lived": lived, "pid": os.getpid()}
        await answer(send, json.dumps(shown), 201)

    async def on_together(scope, receive, send):
        running[0] += 1
        running[1] = max(running)
        while running[1] < 5:
            await asyncio.sleep(0.01)
        await answer(send, str(os.getpid()))

    async def on_size(scope, receive, send):
        import hashlib
        digest, more = hashlib.sha256(), True
        while more:
            event = await receive()
            digest.update(event["body"])
            more = event.get("more_body", False)
        await answer(send, digest.hexdigest())

    async def on_stream(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(int(scope["query_string"])):
            await send({"type": "http.response.body", "body": bytes([number % 256]) * 65536, "more_body": True})
            ledger("sent")
        await send({"type": "http.response.body", "body": b""})

    async def on_ticks(scope, receive, send):
        """Until the client has gone."""
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"tick", "more_body": True})
        ledger((await receive())["type"])

    async def on_deaf(scope, receive, send):
        """Reads no more of what is uploaded, and goes on answering."""
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b".", "more_body": True})
                await asyncio.sleep(0.02)
        except OSError:
            ledger("deaf")

    async def on_hold(scope, receive, send):
        ledger(f"hold {os.getpid()}")
        while not os.path.exists(os.environ["LEDGER"] + ".gate"):
            await asyncio.sleep(0.02)
        await answer(send, str(os.getpid()))

    async def on_slow(scope, receive, send):
        ledger("slow")
        await asyncio.sleep(60)

    async def on_half(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        await asyncio.sleep(0.8)
        await send({"type": "http.response.body", "body": b" and half"})

    async def on_die(scope, receive, send):
        os._exit(3)

    async def on_raise(scope, receive, send):
        raise ValueError("this was raised by the application")

    async def on_nothing(scope, receive, send):
        pass

    def ledger(line):
        with open(os.environ["LEDGER"], "a") as file:
            file.write(line + "\\n")

    answers = {name.removeprefix("on_"): value for name, value in locals().items() if name.startswith("on_")}
    return application

@app.function()
@mesh.fastapi_endpoint(method="POST")
def double(number: int):
    return {"doubled": 2 * number}

@app.function()
@mesh.concurrent(max_inputs=3)
@mesh.wsgi_app()
def old():
    def application(environ, start_response):
        body = environ["wsgi.input"].read()
        start_response("202 Accepted", [("Content-Type", "text/plain")])
        return [environ["SCRIPT_NAME"].encode(), b" ", environ["PATH_INFO"].encode(), b" %d" % len(body)]
    return application

@app.function(timeout=1)
@mesh.asgi_app()
def brief():
    async def application(scope, receive, send):
        if scope["type"] == "http":
            await asyncio.sleep(60)
    return application

@app.function()
def plain(): ...
'''


def site_source(mesh: Mesh) -> str:
    return SITE.replace("OPTIONS", f"env={{'LEDGER': {str(mesh.directory / 'ledger')!r}}}")


@pytest.fixture(scope="module")
def _site(server: NatsServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mesh, str]]:
    """A deployed site with a worker and a gateway, and the address of that."""
    with new_mesh(server, tmp_path_factory.mktemp("site")) as mesh:
        mesh.start_worker("--containers", "8")
        with gateway(mesh, "--max-body", "8M") as address:
            mesh.deploy(site_source(mesh), "site_1")
            yield mesh, address


@pytest.fixture
def site(_site: tuple[Mesh, str]) -> tuple[Mesh, str]:
    client.use_settings(_site[0].settings)  # a test between may have used others
    return _site


@pytest.fixture
def pages(site: tuple[Mesh, str]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{site[1]}/site/pages", timeout=30) as opened:
        yield opened


# --- what a request and its answer are -------------------------------------------------------------------------------


def test_an_application_sees_its_request_and_its_lifespan(pages: httpx.Client) -> None:
    answer = pages.get("/about?a=1&b=%20")
    assert (answer.status_code, answer.headers["content-type"]) == (201, "text/plain")
    about = answer.json()
    about.pop("pid")
    assert about == {
        "path": "/site/pages/about",
        "root_path": "/site/pages",
        "method": "GET",
        "scheme": "http",
        "query": "a=1&b=%20",
        "state": {"color": "green"},
        "lived": ["lifespan.startup"],
    }


def test_a_handle_knows_where_its_function_is(site: tuple[Mesh, str]) -> None:
    function = mesh_api.Function.from_name("site", "pages")
    assert function.get_web_url() == f"{site[1]}/site/pages"
    assert mesh_api.Function.from_name("site", "plain").get_web_url() is None
    for method in (function.remote, function.spawn, lambda: list(function.map([1]))):
        with pytest.raises(InvalidError, match="'pages' is a web function: it answers HTTP requests"):
            method()


def test_requests_are_logged(site: tuple[Mesh, str], pages: httpx.Client) -> None:
    pages.get("/about?logged=1")
    logs = list(site[0].directory.glob("gateway-*.log"))
    until(lambda: any('"GET /site/pages/about?logged=1 HTTP/1.1" 201' in log.read_text() for log in logs))


def test_requests_share_a_container(pages: httpx.Client) -> None:
    pids: list[str] = []
    threads = [threading.Thread(target=lambda: pids.append(pages.get("/together").text)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pids) == 5
    assert len(set(pids)) == 1


def test_an_endpoint_follows_the_rules_of_fastapi(site: tuple[Mesh, str]) -> None:
    address = f"{site[1]}/site/double"
    answer = httpx.post(address, params={"number": 21}, headers={"origin": "http://elsewhere"}, timeout=30)
    assert answer.json() == {"doubled": 42}
    assert answer.headers["access-control-allow-origin"] in ("*", "http://elsewhere")
    assert httpx.post(address, params={"number": "x"}).status_code == 422
    assert httpx.get(address).status_code == 405


def test_a_wsgi_application_is_served(site: tuple[Mesh, str]) -> None:
    answer = httpx.post(f"{site[1]}/site/old/a/b", content=b"x" * 300_000, timeout=30)
    assert (answer.status_code, answer.text) == (202, "/site/old /a/b 300000")


def test_a_page_without_its_slash_is_redirected_to_it(site: tuple[Mesh, str]) -> None:
    answer = httpx.get(f"{site[1]}/site/pages?a=1", headers={"accept": "text/html"})
    assert (answer.status_code, answer.headers["location"]) == (307, "/site/pages/?a=1")


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_body_of_any_size_comes_whole(pages: httpx.Client) -> None:
    body = os.urandom(5_000_000)
    assert pages.post("/size", content=body).text == hashlib.sha256(body).hexdigest()
    pieces = [body[at : at + 100_000] for at in range(0, len(body), 100_000)]
    assert pages.post("/size", content=iter(pieces)).text == hashlib.sha256(body).hexdigest()


def test_who_reads_slowly_slows_who_writes(site: tuple[Mesh, str], pages: httpx.Client) -> None:
    ledger = site[0].ledger()
    before = ledger.count("sent")
    with pages.stream("GET", "/stream?300") as answer:
        chunks = answer.iter_bytes(65536)
        first = next(chunks)
        time.sleep(1)
        ahead = ledger.count("sent") - before
        rest = b"".join(chunks)
    assert 0 < ahead < 250, "what lies in buffers is bounded"
    expected = b"".join(bytes([number % 256]) * 65536 for number in range(300))
    assert first + rest == expected


def test_an_application_hears_that_its_client_has_gone(site: tuple[Mesh, str], pages: httpx.Client) -> None:
    with pages.stream("GET", "/ticks") as answer:
        assert next(answer.iter_bytes()) == b"tick"
    until(lambda: site[0].ledger().count("http.disconnect"), what="the disconnect reached the application")


def test_an_application_that_does_not_read_hears_that_its_client_has_gone(site: tuple[Mesh, str]) -> None:
    host, port = site[1].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"POST /site/pages/deaf HTTP/1.1\r\nhost: x\r\ncontent-length: 8000000\r\n\r\n")
        client.settimeout(1)
        with contextlib.suppress(TimeoutError):  # nobody reads all of it
            client.sendall(b"x" * 8_000_000)
    until(lambda: site[0].ledger().count("deaf"), what="the disconnect reached the application")


def test_a_websocket_is_one(site: tuple[Mesh, str]) -> None:
    from websockets.sync.client import connect

    with connect(f"{site[1].replace('http', 'ws')}/site/pages/ws") as connection:
        for text in ("abc", "x" * 300_000 + "y"):
            connection.send(text)
            assert connection.recv() == text[::-1]


# --- what can go wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/site/nothing", 404),
        ("/nothing/pages", 404),
        ("/site/plain", 404),
        ("/", 404),
        ("/site/pages/raise", 500),
        ("/site/pages/nothing", 500),
        ("/site/pages/die", 502),
        ("/site/brief/", 504),
    ],
)
def test_what_went_wrong_has_a_status_of_its_own(site: tuple[Mesh, str], path: str, status: int) -> None:
    assert httpx.get(site[1] + path, timeout=30).status_code == status


def test_too_much_is_refused(pages: httpx.Client) -> None:
    assert pages.post("/size", content=b"x" * 9_000_000).status_code == 413
    with contextlib.suppress(httpx.WriteError):  # it does not read what it has refused
        assert pages.post("/size", content=iter([b"x" * 100_000] * 90)).status_code == 413


def test_what_an_application_raises_is_in_the_output(site: tuple[Mesh, str], pages: httpx.Client) -> None:
    pages.get("/raise")
    until(lambda: "ValueError: this was raised by the application" in site[0].workers[0].log)


def test_without_a_worker_there_is_no_service(server: NatsServer, tmp_path: Path) -> None:
    with new_mesh(server, tmp_path) as mesh, gateway(mesh) as address:
        mesh.deploy(site_source(mesh), "site_2")
        answer = httpx.get(f"{address}/site/pages/about", timeout=30)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.text.startswith("no worker runs this function now: no worker is running; start one with")


def test_an_answer_under_way_is_finished_while_its_worker_drains(server: NatsServer, tmp_path: Path) -> None:
    with new_mesh(server, tmp_path) as mesh, gateway(mesh) as address:
        first = mesh.start_worker()
        mesh.deploy(site_source(mesh), "site_3")
        with httpx.stream("GET", f"{address}/site/pages/half", timeout=30) as answer:
            chunks = answer.iter_bytes()
            assert next(chunks) == b"half"
            first.process.terminate()
            assert b"".join(chunks) == b" and half"
        assert first.process.wait(60) == 0
        assert "the lifespan has ended" in first.log


def test_a_killed_worker_loses_only_what_it_had(server: NatsServer, tmp_path: Path) -> None:
    with new_mesh(server, tmp_path) as mesh, gateway(mesh) as address:
        workers = [mesh.start_worker("--containers", "1") for _ in range(2)]
        mesh.deploy(site_source(mesh), "site_4")
        answers: list[httpx.Response] = []
        ask: Callable[[], None] = lambda: answers.append(httpx.get(f"{address}/site/pages/hold", timeout=60))  # noqa: E731
        asking = [threading.Thread(target=ask) for _ in range(16)]
        for thread in asking:
            thread.start()
        until(lambda: mesh.ledger().count("hold") == 16, what="all requests are under way")
        lost = sum(mesh.ledger().count(f"hold {pid}") for pid in workers[0].containers())
        workers[0].kill()
        until(lambda: len(answers) == lost, what="what it had has failed")
        assert [answer.status_code for answer in answers] == [502] * lost
        gone, silent = "the process at the other end has gone", "nothing was heard of the other end for too long"
        assert [a.text for a in answers if gone not in a.text and silent not in a.text] == []  # killed before it spoke
        mesh.ledger("ledger.gate").path.touch()
        for thread in asking:
            thread.join()
        assert [answer.status_code for answer in answers[lost:]] == [200] * (16 - lost)


# --- while it is written ---------------------------------------------------------------------------------------------


def test_serve_shows_changes_at_once_and_keeps_what_could_be_imported(site: tuple[Mesh, str]) -> None:
    mesh, address = site
    helper = mesh.write("WORD = 'one'\n", "said", folder="served")
    file = mesh.write(
        """
        import sys
        EARLY = "httpx" in sys.modules
        import httpx, mesh, said
        app = mesh.App("talk")

        @app.function()
        @mesh.asgi_app()
        def say():
            async def application(scope, receive, send):
                if scope["type"] == "http":
                    print("was asked")
                    await send({"type": "http.response.start", "status": 200, "headers": []})
                    await send({"type": "http.response.body", "body": f"{said.WORD} {EARLY}".encode()})
            return application
        """,
        "talk",
        folder="served",
    )
    log = mesh.directory / "serve.log"
    with log.open("wb") as output:
        serving = subprocess.Popen(
            [sys.executable, "-m", "mesh", "serve", str(file)], env=mesh.variables, stdout=output, stderr=output
        )
    try:
        found = until(lambda: re.search(r"http://\S+", log.read_text()))
        assert found[0] == f"{address}/talk-dev/say"
        told: Callable[[], list[str]] = lambda: httpx.get(found[0], timeout=30).text.split()  # noqa: E731
        says: Callable[[], str] = lambda: told()[0]  # noqa: E731
        assert told() == ["one", "False"]
        until(lambda: "was asked" in log.read_text())
        helper.write_text("WORD = 'two'\n")
        until(lambda: says() == "two", what="the change of an imported module is there")
        helper.write_text("WORD = \n")
        until(lambda: "the last good version goes on" in log.read_text())
        assert "SyntaxError" in log.read_text()
        assert says() == "two"
        helper.write_text("WORD = 'three'\n")
        until(lambda: says() == "three", what="it goes on after the error")

        words = itertools.count()

        def changed() -> bool:
            word = f"w{next(words)}"
            helper.write_text(f"WORD = '{word}'\n")
            until(lambda: says() == word)
            return told()[1] == "True"

        until(changed, what="what is installed was imported before the change")
        serving.send_signal(signal.SIGINT)
        assert serving.wait(30) == 0
        until(lambda: httpx.get(found[0]).status_code == 404, what="it is off the mesh")
    finally:
        serving.kill()
        serving.wait()


# --- what the decorators take ----------------------------------------------------------------------------------------


def raw() -> None: ...


def test_web_and_concurrent_stand_in_either_order() -> None:
    app = mesh_api.App()

    @app.function(serialized=True)
    @mesh_api.asgi_app()
    @mesh_api.concurrent(max_inputs=7)
    def above() -> None: ...

    @app.function(serialized=True)
    @mesh_api.concurrent(max_inputs=7)
    @mesh_api.asgi_app()
    def below() -> None: ...

    @app.function(serialized=True)
    @mesh_api.wsgi_app()
    def default() -> None: ...

    inputs = {name: f.spec.max_inputs for name, f in app.registered_functions.items()}
    assert inputs == {"above": 7, "below": 7, "default": web.MAX_INPUTS}
    assert app.registered_web_endpoints == ["above", "below", "default"]


async def _async() -> None: ...


def _parameters(x: int) -> None: ...


def _generator() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("decorator", "function", "text"),
    [
        (mesh_api.asgi_app(), _async, "is async"),
        (mesh_api.wsgi_app(), _async, "is async"),
        (mesh_api.asgi_app(), _parameters, "has parameters"),
        (mesh_api.fastapi_endpoint(), _generator, "is a generator"),
    ],
)
def test_what_cannot_be_a_web_function_is_refused(decorator: Any, function: Any, text: str) -> None:
    with pytest.raises(InvalidError, match=text):
        decorator(function)


def test_a_web_decorator_above_the_function_says_to_swap_them() -> None:
    app = mesh_api.App()
    function = app.function(serialized=True)(raw)
    with pytest.raises(InvalidError, match=r"must stand below @app.function"):
        mesh_api.asgi_app()(function)


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InvalidError, match="did you forget the parentheses"):
        mesh_api.asgi_app(raw)
    with pytest.raises(InvalidError, match="method must be one of"):
        mesh_api.fastapi_endpoint(method="FETCH")
    with pytest.raises(InvalidError, match="retries cannot be used on the web function"):
        FunctionSpec(name="f", web=WebSpec(kind="asgi"), retries=mesh_api.Retries(max_retries=1))
    with pytest.raises(InvalidError, match="label must be 1 to 63 small letters"):
        mesh_api.asgi_app(label="My_Page")
    with pytest.raises(InvalidError, match="custom_domains must be a list of names"):
        mesh_api.wsgi_app(custom_domains="jobs.example.com")
    with pytest.raises(InvalidError, match="web_server needs a port"):
        mesh_api.web_server(raw)  # type: ignore[arg-type]
    with pytest.raises(InvalidError, match="port must be a whole number from 0 to 65535"):
        mesh_api.web_server(70_000)

    @mesh_api.asgi_app()
    def once() -> None: ...

    with pytest.raises(InvalidError, match="two web decorators"):
        mesh_api.wsgi_app()(once)


def test_a_class_whose_parameters_are_needed_cannot_answer() -> None:
    app = mesh_api.App()

    class Model:
        size: str = mesh_api.parameter()

        @mesh_api.asgi_app()
        def page(self) -> None: ...

    with pytest.raises(InvalidError, match="has a web method, whose requests bring nothing to construct it with"):
        app.cls(serialized=True)(Model)


def test_labels_are_made_of_names_and_fit_into_a_host() -> None:
    web = WebSpec(kind="asgi", domains=("jobs.example.com",))
    assert web.hosts("My.Shop", "My.Shop", "Model.ask_me") == ["my-shop-model-ask-me", "jobs.example.com"]
    assert web.hosts("ap-1", "shop", "f") == ["shop-f-dev"]
    long = web.hosts("a" * 64, "", "f")[0]
    assert (len(long), long[:54]) == (63, "a" * 54)
    assert web.hosts("a" * 64, "", "g")[0] != long
