"""Where web functions are: by path, by the name of a host, in classes; servers of their own; who is let in."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator

import httpx
import pytest

import mesh as mesh_api
from mesh import client
from mesh.exception import ConflictError, InvalidError
from tests.support import Mesh, gateway, until

SHOP = """
import os, subprocess, sys
import mesh

app = mesh.App("shop")

@app.cls()
@mesh.concurrent(max_inputs=4)
class Model:
    @mesh.enter()
    def load(self):
        self.greeting = "hello"

    @mesh.asgi_app(label="talk", custom_domains=["talk.example.com"])
    def page(self):
        greeting = self.greeting

        async def application(scope, receive, send):
            assert scope["type"] in ("http", "lifespan")
            if scope["type"] == "http":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                body = f"{greeting} {scope['root_path']} {scope['path']} {os.getpid()}"
                await send({"type": "http.response.body", "body": body.encode()})
        return application

    @mesh.fastapi_endpoint(requires_proxy_auth=True)
    def ask(self, name: str):
        return f"{self.greeting} {name}"

    @mesh.method()
    def pid(self):
        return os.getpid()

@app.function(OPTIONS)
@mesh.web_server(0, startup_timeout=20)
def own():
    subprocess.Popen([sys.executable, os.path.join(os.environ["SERVERS"], "server.py"), os.environ["PORT"]])

@app.function(startup_timeout=30)
@mesh.web_server(1, startup_timeout=0.2)
def silent():
    pass
"""

SERVER = """
import asyncio, hashlib, os, sys
import uvicorn

async def application(scope, receive, send):
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept", "subprotocol": scope["subprotocols"][0]})
        while (event := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": event["text"][::-1]})
        return
    if scope["path"] == "/end":
        os._exit(0)
    digest, more = hashlib.sha256(), True
    while more:
        event = await receive()
        digest.update(event["body"])
        more = event.get("more_body", False)
    headers = dict(scope["headers"])
    prefix, pid = headers[b"x-forwarded-prefix"].decode(), str(os.getpid())
    told = [scope["method"], scope["path"], prefix, digest.hexdigest(), pid]
    await send({"type": "http.response.start", "status": 202, "headers": [(b"x-own", b"yes")]})
    for part in told:
        await send({"type": "http.response.body", "body": part.encode() + b" ", "more_body": True})
    await send({"type": "http.response.body", "body": b""})

uvicorn.run(application, port=int(sys.argv[1]), lifespan="off")
"""


@pytest.fixture(scope="module")
def _shop(_shared: Mesh) -> Iterator[str]:
    client.use_settings(_shared.settings)
    _shared.write(SERVER, "server", folder="servers")
    env = f"env={{'SERVERS': {str(_shared.directory / 'servers')!r}}}"
    with gateway(_shared) as address:
        _shared.deploy(SHOP.replace("OPTIONS", env))
        yield address


@pytest.fixture
def shop(mesh: Mesh, _shop: str) -> str:
    """The address of a gateway to it."""
    return _shop


def test_methods_of_a_class_answer_in_the_containers_of_its_other_methods(mesh: Mesh, shop: str) -> None:
    Model = mesh_api.Cls.from_name("shop", "Model")  # noqa: N806
    assert Model().page.get_web_url() == f"{shop}/shop/Model.page"
    said = httpx.get(f"{shop}/shop/Model.page/a", timeout=30).text.split()
    assert said == ["hello", "/shop/Model.page", "/shop/Model.page/a", str(Model().pid.remote())]
    with pytest.raises(InvalidError, match="is a web function: it answers HTTP requests"):
        Model().page.remote()
    assert httpx.get(f"{shop}/shop/Model", timeout=30).status_code == 404
    assert httpx.get(f"{shop}/shop/Model.pid", timeout=30).status_code == 404


@pytest.mark.parametrize("host", ["talk.localhost", "TALK.example.org:8700", "talk.example.com", "shop-own.localhost"])
def test_a_host_leads_to_its_function(shop: str, host: str) -> None:
    answer = httpx.get(f"{shop}/a/b", headers={"host": host}, timeout=30)
    assert answer.text.split()[1] == "/a/b"


def test_who_shows_no_token_is_not_let_in(mesh: Mesh, shop: str) -> None:
    token = json.loads(mesh.cli("proxy-token", "create", "--json").stdout)
    ask: Callable[..., httpx.Response] = lambda **headers: httpx.get(  # noqa: E731
        f"{shop}/shop/Model.ask", params={"name": "you"}, timeout=30, headers=headers
    )
    assert ask().status_code == 401
    assert ask(**{"mesh-key": token["key"], "mesh-secret": "ms-guessed"}).status_code == 401
    let_in = until(lambda: (a := ask(**{"mesh-key": token["key"], "mesh-secret": token["secret"]})).is_success and a)
    assert let_in.json() == "hello you"
    assert token["key"] in mesh.cli("proxy-token", "list").stdout
    mesh.cli("proxy-token", "delete", token["key"])
    assert mesh.cli("proxy-token", "delete", token["key"], check=False).returncode == 3


def test_a_label_has_one_owner(mesh: Mesh, shop: str) -> None:
    other = """
    import mesh
    app = mesh.App("rival")

    @app.function()
    @mesh.asgi_app(label="LABEL")
    def f(): ...

    @app.function()
    @mesh.asgi_app(label="mine")
    def g(): ...
    """
    with pytest.raises(ConflictError, match=r"'talk' leads to function 'Model\.page' of app 'shop' already"):
        mesh.deploy(other.replace("LABEL", "talk"))
    with pytest.raises(ConflictError, match="'shop-own' leads to function 'own' of app 'shop' already"):
        mesh.deploy(other.replace("LABEL", "shop-own"))
    with pytest.raises(InvalidError, match="'f' and 'g' both ask for the host 'mine'"):
        mesh.deploy(other.replace("LABEL", "mine"))
    mesh.deploy(other.replace("LABEL", "free"))
    mesh.cli("app", "stop", "rival", "--yes")
    mesh.deploy(other.replace("rival", "heir").replace("LABEL", "free"))


def test_a_server_of_ones_own_is_passed_everything(shop: str) -> None:
    from websockets.sync.client import connect
    from websockets.typing import Subprotocol

    body = os.urandom(300_000)
    answer = httpx.post(f"{shop}/shop/own/a", content=iter([body[:1000], body[1000:]]), timeout=30)
    assert (answer.status_code, answer.headers["x-own"]) == (202, "yes")
    assert answer.text.split()[:4] == ["POST", "/a", "/shop/own", hashlib.sha256(body).hexdigest()]
    protocol = Subprotocol("reversed")
    with connect(f"{shop.replace('http', 'ws')}/shop/own/ws", subprotocols=[protocol]) as connection:
        assert connection.subprotocol == "reversed"
        connection.send("x" * 300_000 + "y")
        assert connection.recv() == "y" + "x" * 300_000


def test_a_server_that_ends_is_started_again(shop: str) -> None:
    before = httpx.get(f"{shop}/shop/own/", timeout=30).text.split()[-1]
    assert httpx.get(f"{shop}/shop/own/end", timeout=30).status_code in (500, 502)
    after = until(lambda: (a := httpx.get(f"{shop}/shop/own/", timeout=30)).is_success and a.text.split()[-1])
    assert after != before


def test_a_server_that_does_not_listen_has_not_started(shop: str) -> None:
    answer = httpx.get(f"{shop}/shop/silent/", timeout=30)
    assert answer.status_code == 503
    assert "no server listens on port 1 after 0.2 s" in answer.text
