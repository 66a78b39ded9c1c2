"""`echo-ray drain`, the end of a pod: against a real replica, and against answers of every kind."""

from __future__ import annotations

import httpx
import pytest
from fakes import FakeEngine
from ports import free_port
from replicas import Replicas

from echo_ray import cli
from echo_ray.commands.drain import drain
from echo_ray.config import EchoConfig, from_mapping
from echo_ray.errors import UnavailableError


@pytest.fixture
def replicas():
    some = Replicas()
    yield some
    for generator in some._running:
        generator.close(1.0)


def asked(*answers: object) -> tuple[int, list[int]]:
    """What the command makes of a replica's answers, and what it asked for; a second each."""
    clock, within = [0.0], []
    queue = list(answers)

    def replica(request: httpx.Request) -> httpx.Response:
        within.append(int(request.url.params["within_ms"]))
        clock[0] += 1.0
        answer = queue.pop(0) if len(queue) > 1 else queue[0]
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else httpx.Response(202, json=answer)

    client = httpx.Client(base_url="http://r:8001", transport=httpx.MockTransport(replica))
    return drain(client, 5.0, lambda: clock[0], lambda _: None), within


def test_a_replica_on_a_fixed_port_is_drained(replicas, capsys):
    port = free_port()
    replicas.config = from_mapping(EchoConfig, {"http": {"replica_port": port}})
    generator = replicas.start("a")
    assert generator.address == f"127.0.0.1:{port}"
    assert cli.main(["drain", "127.0.0.1", "--port", str(port), "--within", "40"]) == 0
    assert generator.host.record().state == "drained"
    assert capsys.readouterr().err == ""


def test_with_access_on_it_shows_the_secret_of_the_routers(replicas, tmp_path, capsys):
    port, secret = free_port(), tmp_path / "replica-secret"
    secret.write_text("s" * 40 + "\n")
    files = {f"{kind}_secret_file": str(secret) for kind in ("viewer", "replica")}
    access = {"enabled": True, "tokens_file": str(tmp_path / "tokens"), **files}
    given = {"http": {"replica_port": port}, "access": access}
    replicas.config = from_mapping(EchoConfig, given)
    generator = replicas.start("a")
    words = ["drain", "127.0.0.1", "--port", str(port), "--within", "40"]
    assert cli.main(words) == 1
    assert "refused to drain: Client error '401" in capsys.readouterr().err
    assert generator.host.record().state == "ready"
    assert cli.main([*words, "--secret-file", str(secret)]) == 0
    assert generator.host.record().state == "drained"


def test_a_fixed_port_takes_one_replica_and_is_free_after_it(replicas):
    port = free_port()
    replicas.config = from_mapping(EchoConfig, {"http": {"replica_port": port}})
    first = replicas.start("a")
    with pytest.raises(UnavailableError, match=r"http\.replica_port: .* one replica a node"):
        replicas.start("b", FakeEngine())
    first.close(1.0)
    assert replicas.start("c").address == f"127.0.0.1:{port}"


def test_it_waits_for_the_end_of_the_drain():
    draining, drained = {"state": "draining"}, {"state": "drained"}
    assert asked(draining, draining, drained) == (0, [5000, 4000, 3000])


def test_a_busy_replica_is_asked_again():
    assert asked(httpx.ReadTimeout("busy"), {"state": "drained"})[0] == 0


def test_where_no_replica_listens_there_is_nothing_to_do(capsys):
    assert asked(httpx.ConnectError("refused"))[0] == 0
    port = str(free_port())
    assert cli.main(["drain", "127.0.0.1", "--port", port, "--within", "40"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"state": "draining"}, "the replica at http://r:8001 is draining after 5 s"),
        (httpx.ReadTimeout("busy"), "is silent after 5 s"),
        (httpx.Response(401), "refused to drain: Client error '401"),
        (httpx.Response(200, text="hello"), "refused to drain"),
        ({"status": "ok"}, "refused to drain: 'state'"),
    ],
)
def test_what_went_wrong_is_said(capsys, answer, says):
    status, within = asked(answer)
    assert status == 1
    assert says in capsys.readouterr().err
    assert within == [max(0, 5000 - 1000 * n) for n in range(len(within))]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--port", "0", "--within", "5"], "--port 0 is not allowed: 1 to 65535"),
        (["--port", "70000", "--within", "5"], "--port 70000 is not allowed"),
        (["--port", "1", "--within", "0"], "--within 0.0 is not allowed: more than 0"),
        (["--port", "1", "--within", "4000"], "at most 3600"),
        (
            ["--port", "1", "--within", "1", "--secret-file", "/none"],
            "access.replica_secret_file",
        ),
    ],
)
def test_it_refuses(capsys, words, says):
    assert cli.main(["drain", "127.0.0.1", *words]) == 2
    assert says in capsys.readouterr().err
