"""A whole cluster as real processes: Redis, S3, the head of Ray and its nodes, the service on them.

The service is what `deployments/cluster.yaml` says, with this machine's addresses and without GPUs:
every node claims one, so Ray puts one replica and one router on each.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import psutil
from botocore.config import Config
from chaos.cage import Wiring
from ports import free_port
from redis_server import RedisProcess
from s3_server import REGION, SECRET

TESTS = Path(__file__).parents[1]
SETTINGS = TESTS.parent / "deployments" / "cluster.yaml"
BUCKET = "chaos"
REPLICA = "ray::ServeReplica:echo-ray:GeneratorReplica"
ROUTER = "ray::ServeReplica:echo-ray:Router"
CONTROLLER = "ray::ServeController"
GCS = "gcs_server"
LISTENING = "0A"
OBJECT_STORE_BYTES = 80 * 2**20
START_LIMIT_S = 150.0
# As a production cluster would have it: a node is dead after three seconds without a word.
RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "OMP_NUM_THREADS": "1",
}


@dataclass
class Node:
    """One raylet with all that it starts."""

    number: int
    ip: str
    process: subprocess.Popen[bytes]


@dataclass
class Cluster:
    """The processes of a run. Everything here blocks; call it from a thread."""

    folder: Path
    wiring: Wiring
    engine: str
    nodes: list[Node] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)
    """Nodes that were killed and are not started again yet."""

    def start(self, nodes: int) -> None:
        """Start all of it and deploy the service. Raises `RuntimeError` with the log at fault."""
        self.wiring.lay(nodes)
        bind = " ".join({"127.0.0.1", self.wiring.stores, self.wiring.head})
        open_ = {"bind": bind, "protected_mode": "no"}
        self.redis = RedisProcess(self.folder / "redis", maxmemory_policy="noeviction", **open_)
        self.redis.start()
        self._ray_redis = RedisProcess(self.folder / "gcs", **open_).start()
        self._start_s3()
        self._gcs_port = free_port()
        self._env = self._environment()
        self._start_head()
        self._await_s3()
        for number in range(nodes):
            self.nodes.append(self._start_node(number))
        self._deploy(nodes)

    # Who is there

    def workers(self, title: str, node: Node | None = None) -> list[psutil.Process]:
        """Live processes with that title, of one node or of all, the head included."""
        found = []
        for process in self._family(node):
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                words = process.cmdline() or [""]
                if words[0].startswith(title) or process.name() == title:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return sorted(found, key=lambda p: p.pid)

    def node_of(self, pid: int) -> Node | None:
        """The node that a process belongs to."""
        return next((n for n in self.nodes if any(p.pid == pid for p in self._family(n))), None)

    def doors(self) -> Iterator[tuple[str, int]]:
        """Where processes of routers listen: their HTTP doors, and some ports of Ray."""
        for node in self.nodes:
            for router in self.workers(ROUTER, node):
                yield from ((node.ip, port) for port in open_ports(router.pid))

    def reap(self) -> None:
        """Bury orphans that died; their parents are gone."""
        own = {n.process.pid for n in self.nodes}
        for child in psutil.Process().children():
            try:
                if child.pid not in own and child.status() == psutil.STATUS_ZOMBIE:
                    os.waitpid(child.pid, os.WNOHANG)
            except (psutil.NoSuchProcess, ChildProcessError):
                continue

    def _family(self, node: Node | None) -> list[psutil.Process]:
        root = psutil.Process() if node is None else None
        if node is not None and node.number not in self.gone:
            try:
                root = psutil.Process(node.process.pid)
            except psutil.NoSuchProcess:
                root = None
        return [] if root is None else root.children(recursive=True)

    # What can happen to it

    def kill_node(self, node: Node) -> None:
        """kill -9 of the raylet and of every process that it started, all at once."""
        family = [psutil.Process(node.process.pid), *self._family(node)]
        self.gone.add(node.number)
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        node.process.wait()

    def given_up(self) -> list[Node]:
        """Nodes that ended by themselves: Ray had declared them dead while they were cut off."""
        return [
            node
            for node in self.nodes
            if node.number not in self.gone and node.process.poll() is not None
        ]

    def restart_node(self, node: Node) -> None:
        node.process = self._start_node(node.number).process
        self.gone.discard(node.number)

    def kill_gcs(self) -> tuple[list[str], dict[str, str]]:
        """kill -9 of Ray's own state server; returns what it takes to start it again."""
        server = self.workers(GCS)[0]
        words, env = server.cmdline(), server.environ()
        server.kill()
        return words, env

    def start_gcs(self, words: list[str], env: dict[str, str]) -> None:
        with (self.folder / "gcs_again.log").open("ab") as log:
            subprocess.Popen(words, env=env, stdout=log, stderr=log)

    def pause_s3(self) -> None:
        self._s3.send_signal(signal.SIGSTOP)

    def resume_s3(self) -> None:
        self._s3.send_signal(signal.SIGCONT)

    # Starting

    def _environment(self) -> dict[str, str]:
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_"))}
        return {
            **mine,
            **RAY_SETTINGS,
            "PYTHONPATH": str(TESTS),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "AWS_ACCESS_KEY_ID": "root",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_CONFIG_FILE": str(self.folder / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.folder / "none"),
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def _start_s3(self) -> None:
        port = free_port()
        self._s3_url = f"http://{self.wiring.stores}:{port}"
        with (self.folder / "s3.log").open("wb") as log:
            self._s3 = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", str(port)],
                stdout=log,
                stderr=log,
            )

    def _await_s3(self) -> None:
        limit = time.monotonic() + START_LIMIT_S
        while not _answers(f"{self._s3_url}/moto-api/"):
            if self._s3.poll() is not None or time.monotonic() > limit:
                raise RuntimeError((self.folder / "s3.log").read_text()[-2000:])
            time.sleep(0.1)
        client = boto3.Session("root", SECRET, region_name=REGION).client(
            "s3", endpoint_url=self._s3_url, config=Config(s3={"addressing_style": "path"})
        )
        client.create_bucket(Bucket=BUCKET)
        client.close()

    def _start_head(self) -> None:
        redis = f"{self.wiring.head}:{self._ray_redis.port}"
        words = [
            "--head",
            f"--port={self._gcs_port}",
            f"--node-ip-address={self.wiring.head}",
            f"--temp-dir={self.folder / 'head'}",
            "--num-cpus=0",
            "--include-dashboard=false",
        ]
        log = self.folder / "head.log"
        with log.open("wb") as output:
            started = subprocess.run(
                self._ray(words),
                env={**self._env, "RAY_REDIS_ADDRESS": redis},
                stdout=output,
                stderr=output,
                timeout=START_LIMIT_S,
                check=False,
            )
        if started.returncode:
            raise RuntimeError(log.read_text()[-2000:])

    def _start_node(self, number: int) -> Node:
        ip = self.wiring.address(number)
        words = [
            f"--address={self.wiring.head}:{self._gcs_port}",
            f"--node-ip-address={ip}",
            # Nodes that start at the same moment would take each other's sockets in one folder.
            f"--temp-dir={self.folder / f'node{number}'}",
            "--num-cpus=4",
            "--num-gpus=1",
            "--block",
        ]
        with (self.folder / f"node{number}.log").open("ab") as log:
            process = subprocess.Popen(
                [*self.wiring.prefix(number), *self._ray(words)],
                env=self._env,
                stdout=log,
                stderr=log,
            )
        return Node(number, ip, process)

    def _ray(self, words: list[str]) -> list[str]:
        shared = [f"--object-store-memory={OBJECT_STORE_BYTES}", "--include-log-monitor=false"]
        return [sys.executable, "-m", "ray.scripts.scripts", "start", *words, *shared]

    def _deploy(self, nodes: int) -> None:
        plan = {
            "address": f"{self.wiring.head}:{self._gcs_port}",
            "node_ip": self.wiring.head,
            "config": str(SETTINGS),
            "engine": self.engine,
            "nodes": nodes,
            "settings": {
                "access.enabled": "false",
                "model.preset": "echo-tiny",
                "model.weights": "null",
                "model.device": "cpu",
                "session.retention_chunks": 64,
                "storage.redis.url": f"redis://{self.wiring.stores}:{self.redis.port}/0",
                "storage.redis.username": "null",
                "storage.redis.password_env": "null",
                "storage.s3.bucket": BUCKET,
                "storage.s3.endpoint": self._s3_url,
                "storage.s3.region": REGION,
                "storage.s3.path_style": "true",
                "http.port": 0,
            },
        }
        log = self.folder / "deploy.log"
        with log.open("wb") as output:
            done = subprocess.run(
                [sys.executable, "-m", "chaos.deploy", json.dumps(plan)],
                env=self._env,
                stdout=output,
                stderr=output,
                timeout=START_LIMIT_S,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(log.read_text()[-3000:])


def open_ports(pid: int) -> list[int]:
    """TCP ports on which a process listens at every address, in whatever namespace it lives.

    (psutil asks the namespace of the one who asks.)
    """
    try:
        held = {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
        rows = [r.split() for r in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    except OSError:
        return []
    return [
        int(local.removeprefix("00000000:"), 16)
        for local, state, inode in ((r[1], r[3], r[9]) for r in rows)
        if state == LISTENING and local.startswith("00000000:") and f"socket:[{inode}]" in held
    ]


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except OSError:
        return False
    return True
