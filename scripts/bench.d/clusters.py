"""The servers that are measured: clusters of metcd and of etcd, and what they are held against, Redis and a bare HTTP server."""

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
TICKS = os.sysconf("SC_CLK_TCK")


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def get(url, timeout=2, data=None):
    request = urllib.request.Request(url, data=data)
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return answer.read()


def opened(sock, request, word):
    """A stream whose first message, with this word in it, was read."""
    sock.sendall(request)
    head = b""
    while word not in head:
        piece = sock.recv(4096)
        if not piece or b" 200 " not in (head + piece)[:20]:
            raise SystemExit("a watch was refused: " + (head + piece).decode(errors="replace"))
        head += piece
    return sock


class Cluster:
    """Processes of one server program; subclasses say how to start, ask and load them."""

    name = "?"

    def __init__(self, nodes, directory, options):
        self.nodes, self.directory, self.options = nodes, directory, options
        self.client_ports = free_ports(nodes)
        self.peer_ports = free_ports(nodes)
        self.processes = []

    def __enter__(self):
        os.makedirs(self.directory)
        for index in range(self.nodes):
            self.start(index)
        deadline = time.time() + 30
        while time.time() < deadline:
            try:
                self.leader_index = self.find_leader()
                return self
            except Exception:  # not up yet; the deadline below speaks
                time.sleep(0.1)
        raise SystemExit(f"{self.name} did not come up in 30 s; its logs are in {self.directory}")

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def run(self, index, command):
        log = open(os.path.join(self.directory, f"node{index}.log"), "ab")
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.directory)
        if index < len(self.processes):
            self.processes[index] = process
        else:
            self.processes.append(process)

    def kill(self, index, how=signal.SIGKILL):
        self.processes[index].send_signal(how)
        self.processes[index].wait()

    def url(self, index):
        return f"http://127.0.0.1:{self.client_ports[index]}"

    def leader(self):
        return self.url(self.leader_index)

    def follower(self):
        return self.url((self.leader_index + 1) % self.nodes)

    def peak_rss(self, index):
        """The most bytes that a member's process had resident."""
        with open(f"/proc/{self.processes[index].pid}/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))

    def usage(self):
        """(CPU seconds, resident bytes of the largest process)"""
        cpu, rss = 0.0, 0
        for process in (process for process in self.processes if process.poll() is None):
            with open(f"/proc/{process.pid}/stat") as stat:
                fields = stat.read().rsplit(")", 1)[1].split()
            cpu += (int(fields[11]) + int(fields[12])) / TICKS
            rss = max(rss, int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))
        return cpu, rss


class Metcd(Cluster):
    name = "metcd"

    def start(self, index):
        members = [f"--member={i + 1}=http://127.0.0.1:{port}" for i, port in enumerate(self.peer_ports)]
        self.run(index, [
            self.options.bin, "serve", "--id", str(index + 1), "--data-dir", os.path.join(self.directory, f"data{index}"),
            "--listen-client", f"127.0.0.1:{self.client_ports[index]}", "--listen-peer", f"127.0.0.1:{self.peer_ports[index]}",
            "--wal", self.options.wal, "--store", self.options.store,
            "--set", "limits.max_connections=12000", *members,
        ])

    def find_leader(self, ask=0):
        return json.loads(get(self.url(ask) + "/leader"))["id"] - 1

    def put_request(self, key, value=b"v" * 256):
        """Method, path and body that put a value."""
        return "PUT", "/" + key, value

    watches_in_base64 = False

    def open_watch(self, connect):
        """A watch of all keys that begin with k."""
        return opened(connect(self.leader()), b"GET /v1/watch?prefix=k HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n", b"event: open")

    def applied(self, index):
        """Applied index of a member."""
        return json.loads(get(self.url(index) + "/status"))["applied_index"]

    def syncs(self):
        alive = [index for index, process in enumerate(self.processes) if process.poll() is None]
        return sum(json.loads(get(self.url(index) + "/status"))["wal"]["syncs"] for index in alive)

    put = ("metcd_put.lua", "")
    put_large = ("metcd_put_large.lua", "")
    read = ("metcd_get.lua", "")
    read_serializable = ("metcd_get.lua", "?consistency=serializable")
    mixed = ("metcd_mixed.lua", "")

    fill = ("metcd_fill.lua", "")

    def prepare_reads(self):
        """The key that is read is there."""
        put = urllib.request.Request(self.leader() + "/k000000000000001", data=b"v" * 256, method="PUT")
        urllib.request.urlopen(put, timeout=10).close()

    def is_readable(self):
        get(self.url(0) + "/f000000000000100", timeout=1)
        return True


class Etcd(Cluster):
    name = "etcd"

    def start(self, index):
        peers = ",".join(f"n{i}=http://127.0.0.1:{port}" for i, port in enumerate(self.peer_ports))
        client, peer = self.url(index), f"http://127.0.0.1:{self.peer_ports[index]}"
        self.run(index, [
            "etcd", "--name", f"n{index}", "--data-dir", os.path.join(self.directory, f"data{index}"), "--listen-client-urls", client,
            "--advertise-client-urls", client, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", peers,
            "--initial-cluster-state", "new", "--logger", "zap", "--log-level", "error", "--quota-backend-bytes", str(8 << 30),
        ])

    watches_in_base64 = True

    def open_watch(self, connect):
        """A watch of all keys that begin with k."""
        body = json.dumps({"create_request": {"key": base64.b64encode(b"k").decode(), "range_end": base64.b64encode(b"l").decode()}}).encode()
        head = f"POST /v3/watch HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        return opened(connect(self.leader()), head + body, b'"created":true')

    def put_request(self, key, value=b"v" * 256):
        """Method, path and body that put a value."""
        body = {"key": base64.b64encode(key.encode()).decode(), "value": base64.b64encode(value).decode()}
        return "POST", "/v3/kv/put", json.dumps(body).encode()

    def find_leader(self, ask=None):
        for index in range(self.nodes) if ask is None else [ask]:
            status = json.loads(get(self.url(index) + "/v3/maintenance/status", data=b"{}"))
            if status.get("leader", "0") == "0":
                raise RuntimeError("no leader yet")
            if status["leader"] == status["header"]["member_id"]:
                return index
            if ask is not None:
                return self.index_of(ask, status["leader"])
        raise RuntimeError("no leader yet")

    def applied(self, index):
        """Applied index of a member."""
        return int(json.loads(get(self.url(index) + "/v3/maintenance/status", data=b"{}"))["raftAppliedIndex"])

    def index_of(self, ask, member):
        """The place of a member, which etcd knows by name."""
        members = json.loads(get(self.url(ask) + "/v3/cluster/member/list", data=b"{}"))["members"]
        return next(int(known["name"][1:]) for known in members if known["ID"] == member)

    put = ("etcd_put.lua", "")
    put_large = ("etcd_put_large.lua", "")
    read = ("etcd_get.lua", "")
    read_serializable = ("etcd_get.lua", "serializable")
    mixed = ("etcd_mixed.lua", "")

    fill = ("etcd_fill.lua", "")

    def is_readable(self):
        body = json.dumps({"key": base64.b64encode(b"f000000000000100").decode()}).encode()
        return "kvs" in json.loads(get(self.url(0) + "/v3/kv/range", timeout=1, data=body))

    def prepare_reads(self):
        body = {"key": base64.b64encode(b"k000000000000001").decode(), "value": base64.b64encode(b"v" * 256).decode()}
        get(self.leader() + "/v3/kv/put", data=json.dumps(body).encode())
        # After writes, etcd 3.4 copies its read buffer on every get until a commit without key writes: two leases make that commit.
        for _ in range(2):
            get(self.leader() + "/v3/lease/grant", data=b'{"TTL":600}')
            time.sleep(0.3)


class Single(Cluster):
    """One process, which leads by being alone."""

    def find_leader(self, ask=0):
        with socket.create_connection(("127.0.0.1", self.client_ports[ask]), timeout=1):
            return 0


class Redis(Single):
    """Redis with an append-only file that is synced before every answer. Driven by redis-benchmark, as it speaks no HTTP."""

    name = "redis"

    def start(self, index):
        self.run(index, [
            "redis-server", "--port", str(self.client_ports[index]), "--bind", "127.0.0.1", "--dir", self.directory, "--save", "",
            "--appendonly", "yes", "--appendfsync", "always", "--daemonize", "no",
        ])

    def put_load(self, connections, seconds):
        count = 20000
        while True:
            begun = time.time()
            out = subprocess.run(
                ["redis-benchmark", "-p", str(self.client_ports[0]), "-t", "set", "-c", str(connections), "-d", "256", "-r", "100000",
                 "-n", str(count)], capture_output=True, text=True, check=True).stdout
            took = time.time() - begun
            if took > seconds * 0.7:
                break
            count = int(count * seconds / took)
        rate = float(re.search(r"throughput summary: ([0-9.]+)", out).group(1))
        _, _, p50, _, p99, _ = map(float, re.search(r"latency summary.*?\n.*?\n\s*([0-9. ]+)", out, re.S).group(1).split())
        return {"rate": rate, "p50_ms": p50, "p99_ms": p99, "errors": 0}


class Ceiling(Single):
    """A bare axum server (examples/ceiling.rs): what HTTP alone allows here."""

    name = "axum"

    def start(self, index):
        binary = os.path.join(os.path.dirname(self.options.bin), "examples", "ceiling")
        if not os.path.exists(binary):
            raise SystemExit(f"{binary} is not built: cargo build --release --example ceiling")
        self.run(index, [binary, f"127.0.0.1:{self.client_ports[index]}"])

    put = ("metcd_put.lua", "")
    read = read_serializable = ("metcd_get.lua", "")

    def prepare_reads(self):
        """It answers every GET."""
