"""The web page in a real browser, against a small server that speaks the protocol."""

import asyncio
import contextlib
import json
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from browser import CHROMIUM, Browser
from replicas import eventually
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import FileResponse, JSONResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocketDisconnect

import echo_ray
from echo_ray.engine.frames import encode, mime
from echo_ray.serve.web_headers import WebHeaders
from echo_ray.session.chunk import Chunk, DriftReading, frames_digest
from echo_ray.session.engine_port import StreamShape

PLAYER = Path(echo_ray.__file__).parent / "player"
SHAPE = StreamShape(
    model="fake", fps=16, width=64, height=64, frames_per_chunk=12, first_chunk_frames=9,
    point_every=8,
)  # fmt: skip

needs_browser = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]


def paint(index):
    """A bar that moves by one pixel a frame, on a ground that brightens with the chunk."""
    count = SHAPE.frames_in(index)
    start = round(SHAPE.start_s(index) * SHAPE.fps)
    data = np.full((count, 64, 64, 3), (30, 60, 60 + index * 5 % 160), dtype=np.uint8)
    for n in range(count):
        at = (start + n) % 56
        data[n, 16:48, at : at + 8] = (230, 120, 40)
    raw = data.tobytes()
    return Chunk(index, raw, count, 64, 64, frames_digest(raw), DriftReading(0.1), "")


class FakeService:
    """One session, generated at a realtime pace, whose faults the test commands."""

    def __init__(self):
        self.session = None
        self.prompts = {}
        self.events = {}
        self.asked = []
        self.sockets = set()
        self.shown = []
        self.owner, self.epoch = "replica-a", 1
        self.state = "live"
        self.served = 0
        self.twist = lambda index: index
        self.error = None
        self.clip = None
        self.ignored = {}
        self.listed = []
        self.forbidden = False

    def application(self):
        return Starlette(
            middleware=[Middleware(WebHeaders)],
            routes=[
                Route("/", lambda _: FileResponse(PLAYER / "index.html")),
                Route("/v1/sessions", self.create, methods=["POST"]),
                Route("/v1/sessions", self.list_all),
                Route("/v1/sessions/{id}", self.get),
                Route("/v1/sessions/{id}", self.delete, methods=["DELETE"]),
                Route("/v1/sessions/{id}/events", self.event, methods=["POST"]),
                Route("/v1/sessions/{id}/{verb:str}", self.turn, methods=["POST"]),
                Route("/v1/admin/replicas", self.replicas),
                WebSocketRoute("/v1/sessions/{id}/stream", self.stream),
                Mount("/player", StaticFiles(directory=PLAYER)),
            ],
        )

    def row(self):
        return {
            "id": "s1", "state": self.state, "prompt": self.prompts.get(0), "seed": 7, "fps": 16,
            "width": 64, "height": 64, "frames_per_chunk": 12, "next_chunk": self.served,
        }  # fmt: skip

    async def create(self, request):
        if request.headers["content-type"].startswith("multipart/form-data"):
            form = await request.form()
            body, self.clip = json.loads(form["session"]), await form["clip"].read()
            await form.close()
        else:
            body = await request.json()
        if not body["prompt"].strip():
            error = {"message": "prompt is empty", "code": "prompt_invalid"}
            return JSONResponse({"error": error}, 400)
        self.session, self.prompts[0] = "s1", body["prompt"]
        return JSONResponse(self.row(), 201)

    async def list_all(self, request):
        self.listed.append("sessions")
        return JSONResponse({"sessions": [self.row()] if self.session else []})

    async def get(self, request):
        self.shown.append(request.headers.get("authorization"))
        if request.path_params["id"] != self.session:
            error = {"message": "session is unknown", "code": "session_not_found"}
            return JSONResponse({"error": error}, 404)
        return JSONResponse(self.row())

    async def delete(self, request):
        self.state = "closed"
        for ws in tuple(self.sockets):
            await ws.send_json({"type": "session.done"})
        return JSONResponse({}, 204)

    async def event(self, request):
        body = await request.json()
        self.prompts[self.served + 1] = body["event"]["prompt"]
        self.events[self.served + 1] = body["event_id"]
        answer = {"event_id": body["event_id"], "effective_chunk": self.served + 1}
        return JSONResponse(answer, 202)

    async def turn(self, request):
        self.asked.append((request.path_params["verb"],))
        self.state = {"pause": "paused", "resume": "live"}[request.path_params["verb"]]
        return JSONResponse(self.row())

    async def replicas(self, request):
        self.listed.append("replicas")
        if self.forbidden:
            error = {"message": "this needs a token with the role admin", "code": "forbidden"}
            return JSONResponse({"error": error}, 403)
        rows = [
            {"id": f"replica-{n}", "node_id": "node-1", "pid": 10, "address": "127.0.0.2:1",
             "state": "ready", "sessions": ["s1"] if self.owner == f"replica-{n}" else [],
             "chunk_seconds": 0.21, "free_slots": 3} for n in "ab"
        ]  # fmt: skip
        return JSONResponse({"replicas": rows})

    async def stream(self, ws):
        await ws.accept()
        if self.error:
            await ws.send_json({"type": "error", **self.error})
            await ws.close(1008)
            return
        self.sockets.add(ws)
        self.shown.append(ws.query_params.get("token"))
        fmt, index = ws.query_params["format"], int(ws.query_params["from"])
        self.asked.append(("stream", index, fmt))
        start = {"fps": 16, "width": 64, "height": 64, "mime": mime(fmt)}
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            await ws.send_json({"type": "video.start", "format": fmt, **start})
            await ws.send_json({"type": "some.future.message"})
            while ws in self.sockets:
                await self.send_chunk(ws, fmt, self.twist(index))
                index += 1
                self.served = max(self.served, index)
                await asyncio.sleep(0.5)
            await ws.close(1012)

    async def send_chunk(self, ws, fmt, index):
        chunk = paint(index)
        start = round(SHAPE.start_s(index) * SHAPE.fps)
        segment = encode(chunk, fmt, fps=16, start_frame=start)
        since = max(c for c in self.prompts if c <= index)
        event = [self.events[index]] if index in self.events else []
        metadata = {
            "type": "video.chunk_metadata", "chunk_index": index, "num_frames": chunk.num_frames,
            "pts_ms": SHAPE.start_s(index) * 1000, "byte_length": len(segment),
            "digest": chunk.digest, "epoch": self.epoch, "prompt": self.prompts[since],
            **self.ignored.get(self.prompts[since], {}),
            "started_event_ids": event, "active_event_ids": [], "completed_event_ids": [],
            "discontinuity": False, "drift": {"score": 0.12, "flags": ["frozen"] * (index == 3)},
            "owner": self.owner, "chunk_seconds": 0.2,
        }  # fmt: skip
        await ws.send_json(metadata)
        await ws.send_bytes(segment)

    def cut(self):
        """Drop every viewer; another owner goes on."""
        self.owner, self.epoch = "replica-b", self.epoch + 1
        self.sockets.clear()


@pytest.fixture
def service():
    fake = FakeService()
    with socket.create_server(("127.0.0.1", 0)) as door:
        config = uvicorn.Config(
            fake.application(), log_level="critical", lifespan="off", ws="websockets-sansio"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]})
        thread.start()
        fake.url = f"http://127.0.0.1:{door.getsockname()[1]}/"
        yield fake
        fake.sockets.clear()
        server.should_exit = server.force_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    page = Browser(tmp_path_factory.mktemp("chromium"))
    yield page
    page.close()


@pytest.fixture
def browser(chromium):
    chromium.open("about:blank")
    chromium.complaints.clear()
    return chromium


def start(browser, service, fmt="fmp4"):
    browser.open(service.url)
    browser.run(f"document.getElementById('format').value = '{fmt}'")
    browser.fill("prompt", "an orange bar")
    browser.click("#start-form button")


def chunk_at_least(number):
    return f"Number(document.getElementById('chunk').textContent) >= {number}"


class TestInBrowser:
    pytestmark = needs_browser

    def test_a_viewer_token_in_the_address_is_used_and_forgotten(self, service, browser):
        service.session, service.prompts[0] = "s1", "an orange bar"
        browser.open(f"{service.url}?session=s1#token=echo-view.a.b")
        browser.wait_for(chunk_at_least(1))
        assert service.shown[:2] == ["Bearer echo-view.a.b", "echo-view.a.b"]
        assert browser.run("location.href") == f"{service.url}?session=s1"
        for what in ("start-form", "switch-form", "lists"):
            assert browser.run(f"document.getElementById('{what}').hidden")
        assert browser.run("document.getElementById('pause').disabled")
        assert service.listed == []
        browser.run("sessionStorage.clear()")
        assert browser.complaints == []

    def test_a_list_that_is_forbidden_is_asked_for_once(self, service, browser):
        service.forbidden = True
        browser.open(service.url)
        assert eventually(lambda: service.listed.count("sessions") >= 3, timeout_s=20)
        assert service.listed.count("replicas") == 1

    def test_a_chosen_clip_is_sent_with_the_prompt(self, service, browser):
        browser.open(service.url)
        browser.run(
            "{ const chosen = new DataTransfer();"
            "  chosen.items.add(new File([new Uint8Array([0, 1, 255])], 'a.mp4'));"
            "  document.getElementById('clip').files = chosen.files; }"
        )
        browser.fill("prompt", "an orange bar")
        browser.click("#start-form button")
        browser.wait_for(chunk_at_least(1))
        assert service.clip == b"\x00\x01\xff"
        assert service.prompts[0] == "an orange bar"
        assert browser.complaints == []

    @pytest.mark.parametrize("fmt", ["fmp4", "jpeg"])
    def test_watch_switch_and_survive_a_cut(self, service, browser, fmt):
        start(browser, service, fmt)
        browser.wait_for(chunk_at_least(2))
        assert browser.text("effect") == "an orange bar"
        assert browser.text("owner") == "replica-a"
        if fmt == "fmp4":
            before = browser.run("document.getElementById('video').currentTime")
            browser.wait_for(f"document.getElementById('video').currentTime > {before} + 0.5")
        browser.fill("switch", "a blue bar")
        browser.click("#switch-form button")
        browser.wait_for("document.getElementById('effect').textContent === 'a blue bar'")
        assert browser.text("switch-note").startswith("In effect since chunk ")
        browser.wait_for("Number(document.getElementById('fps').textContent) > 10")
        service.cut()
        browser.wait_for("document.getElementById('reconnects').textContent === '1'")
        browser.wait_for("document.getElementById('owner').textContent === 'replica-b'")
        assert browser.text("handovers") == "1"
        assert browser.text("gap").endswith(" s")
        streams = [a for a in service.asked if a[0] == "stream"]
        assert [s[2] for s in streams] == [fmt, fmt]
        assert streams[0][1] == 0
        received = int(browser.text("received"))
        assert 3 < streams[1][1] <= received
        browser.wait_for(chunk_at_least(received + 1))
        assert browser.run("document.getElementById('alert').hidden")
        assert browser.complaints == []

    def test_words_that_were_not_understood_stand_under_their_prompt(self, service, browser):
        service.ignored["an orange bar"] = {"ignored_words": ["lovely", "<b>sunset</b>"]}
        service.ignored["a blue bar"] = {"ignored_words": []}
        shown = "getComputedStyle(document.getElementById('ignored')).display !== 'none'"
        start(browser, service, "jpeg")
        browser.wait_for(chunk_at_least(1))
        assert browser.text("ignored") == "not understood: lovely, <b>sunset</b>"
        assert browser.run(shown)
        for prompt in ("a blue bar", "a bar of an older owner"):
            browser.fill("switch", prompt)
            browser.click("#switch-form button")
            browser.wait_for(f"document.getElementById('effect').textContent === '{prompt}'")
            assert browser.text("ignored") == ""
            assert not browser.run(shown)
        assert browser.complaints == []

    def test_picture_is_what_was_sent(self, service, browser):
        start(browser, service, "jpeg")
        browser.wait_for(chunk_at_least(1))
        colour = browser.run(
            "Array.from(document.getElementById('canvas').getContext('2d')"
            ".getImageData(2, 60, 1, 1).data)"
        )
        assert colour[:2] == pytest.approx([30, 60], abs=6)
        assert 60 <= colour[2] <= 90

    def test_pause_resume_close(self, service, browser):
        start(browser, service)
        browser.wait_for(chunk_at_least(1))
        browser.click("#pause")
        browser.wait_for("document.getElementById('link').textContent === 'paused'")
        browser.wait_for("document.getElementById('video').paused")
        browser.click("#resume")
        browser.wait_for(chunk_at_least(3))
        assert ("pause",) in service.asked
        assert ("resume",) in service.asked
        streams = [a[1] for a in service.asked if a[0] == "stream"]
        assert streams[0] == 0
        assert streams[1] > 0
        browser.click("#close")
        browser.wait_for("document.getElementById('link').textContent === 'session closed'")
        assert browser.run("document.getElementById('pause').disabled")
        assert browser.complaints == []

    def test_joining_by_address_and_changing_the_picture(self, service, browser):
        service.session, service.prompts[0], service.served = "s1", "old", 40
        browser.open(f"{service.url}?session=s1")
        browser.wait_for(chunk_at_least(41))
        assert browser.run("document.getElementById('video').currentTime") > 29
        browser.run(
            "const f = document.getElementById('format');"
            "f.value = 'jpeg'; f.dispatchEvent(new Event('change'))"
        )
        browser.wait_for("!document.getElementById('canvas').hidden")
        browser.wait_for(chunk_at_least(43))
        assert browser.run("document.getElementById('video').hidden")
        assert browser.complaints == []

    @pytest.mark.parametrize(("wrong", "says"), [(-1, "repeated"), (1, "skipped to")])
    def test_a_server_that_repeats_or_skips_is_told_on(self, service, browser, wrong, says):
        service.twist = lambda index: index + wrong if index == 3 else index
        start(browser, service)
        browser.wait_for(f"document.getElementById('alert').textContent.includes('{says}')")
        assert f"chunk {3 + wrong}; chunk 3 was due" in browser.text("alert")
        assert int(browser.text("received")) == 2
        service.twist = lambda index: index
        browser.wait_for(chunk_at_least(4))

    def test_refusals_are_shown(self, service, browser):
        browser.open(f"{service.url}?session=nobody")
        browser.wait_for("!document.getElementById('alert').hidden")
        assert browser.text("alert") == "session is unknown (session_not_found)"
        browser.fill("prompt", " ")
        browser.click("#start-form button")
        browser.wait_for("document.getElementById('alert').textContent.includes('empty')")
        service.error = {"code": "session_closed", "message": "it is over", "retryable": False}
        browser.fill("prompt", "a")
        browser.click("#start-form button")
        browser.wait_for("document.getElementById('alert').textContent.startsWith('it is over')")
        assert browser.text("link") == "stream ended"


def test_the_page_needs_nothing_from_elsewhere():
    for file in sorted(PLAYER.iterdir()):
        text = file.read_text(encoding="utf-8")
        addresses = [w for w in text.split() if "://" in w and "www.w3.org/2000/svg" not in w]
        assert addresses == [], f"{file.name} names another place"
        assert len(text.splitlines()) <= 400


def test_every_control_has_a_label():
    page = (PLAYER / "index.html").read_text(encoding="utf-8")
    for name in ("prompt", "seed", "clip", "switch", "format"):
        assert f'<label for="{name}">' in page
    script = (PLAYER / "player.js").read_text(encoding="utf-8")
    named = {w.split('"')[1] for w in script.split("element(")[1:] if w.startswith('"')}
    assert named
    for name in named:
        assert json.dumps(name).replace('"', "") in page
        assert f'id="{name}"' in page
