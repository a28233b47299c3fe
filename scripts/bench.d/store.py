"""Scenarios of the revision store: a large list, watchers idle, many, and stopped, and leases. Each returns a dictionary of figures.

They use plain sockets: what a client library would cost is not the server's.
"""

import base64
import http.client
import json
import math
import os
import select
import socket
import statistics
import subprocess
import threading
import time
import urllib.parse

MSG_TRUNC = getattr(socket, "MSG_TRUNC", 0x20)
VALUE = b"v" * 256


def address(url):
    parts = urllib.parse.urlsplit(url)
    return parts.hostname, parts.port


def status_field(pid, field):
    """A memory figure of a process, in bytes."""
    with open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"{field} is not in /proc/{pid}/status")


def disk_of_store(cluster):
    """Bytes of the first member's store on disk."""
    directory = os.path.join(cluster.directory, "data0", "store")
    return sum(os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(directory) for name in names)


def forget_peak(pid):
    """The peak of resident memory counts from now on."""
    with open(f"/proc/{pid}/clear_refs", "w") as clear:
        clear.write("5")


def connect(url, receive_buffer=None):
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(30)
    sock.connect(address(url))
    return sock


def request(sock, path, accept):
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: {accept}\r\n\r\n".encode())


def open_watch(url, path, accept="text/event-stream", receive_buffer=None):
    """A watch whose `open` message was read."""
    sock = connect(url, receive_buffer)
    request(sock, path, accept)
    head = b""
    while b"open" not in head:
        piece = sock.recv(4096)
        if not piece or b" 200 " not in (head + piece)[:20]:
            raise SystemExit("a watch was refused: " + (head + piece).decode(errors="replace"))
        head += piece
    return sock


def percentile(values, percent):
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * percent / 100))] if values else float("nan")


def request_once(connection, method, path, body):
    """Seconds that it took."""
    begun = time.perf_counter()
    connection.request(method, path, body)
    answer = connection.getresponse()
    answer.read()
    if answer.status >= 300:
        raise SystemExit(f"{method} {path} was answered {answer.status}")
    return time.perf_counter() - begun


def put_once(connection, path, body):
    """Seconds that a PUT took."""
    return request_once(connection, "PUT", path, body)


# Connections that fill a store.
FILLING = 256


def fill(cluster, wrk, keys):
    """The keys f000000000000001 and on, so many and few more; returns how many there are, and the figures of the last seconds."""
    script, _ = cluster.fill
    written, seconds = 0, 5
    # The count is of what wrk's rate and time say, which is off by some: the last ones may not be there.
    while written < keys + FILLING:
        # wrk numbers its requests as it sends them, and its end cuts off what is under way: those are sent again.
        result = wrk([cluster.leader()], script, str(max(0, written - FILLING)), FILLING, seconds)
        more = int(result["rate"] * seconds) - min(written, FILLING)
        if more <= 0:
            raise SystemExit(f"{cluster.name} takes too few keys to be filled: {result}")
        written += more
        left = (keys + FILLING - written) / max(1.0, result["rate"])
        seconds = max(1, min(5, math.ceil(left)))
    return written, result


def list_million(cluster, wrk, seconds):
    """All keys of a store with a million of them, as one NDJSON stream."""
    pid = cluster.processes[0].pid
    fill(cluster, wrk, 1_000_000)
    time.sleep(5)
    before = status_field(pid, "VmRSS")
    forget_peak(pid)
    sock = connect(cluster.leader())
    begun = time.perf_counter()
    request(sock, "/v1/kv?prefix=", "application/x-ndjson")
    first, received, tail = None, 0, b""
    buffer = bytearray(1 << 20)
    while not tail.endswith(b"0\r\n\r\n"):
        count = sock.recv_into(buffer)
        if count == 0:
            raise SystemExit("the list broke off")
        first = first or time.perf_counter() - begun
        received += count
        tail = (tail + buffer[max(0, count - 80):count])[-80:]
    total = time.perf_counter() - begun
    peak = status_field(pid, "VmHWM")
    keys = json.loads(tail[tail.index(b'{"end"'):tail.index(b"\n", tail.index(b'{"end"'))])["count"]
    return {
        "keys": keys, "first_byte_ms": first * 1e3, "total_s": total, "mb": received / 1e6,
        "rss_before_mb": before / 1e6, "rss_peak_above_mb": (peak - before) / 1e6,
    }


def disk_after_compaction(cluster, wrk, seconds):
    """A million keys, written again, seven tenths deleted, history compacted: what the disk holds for each byte that is left a minute later."""
    leader, directory = cluster.leader(), os.path.join(cluster.directory, "data0")
    disk = lambda names: sum(
        os.path.getsize(os.path.join(at, file)) for name in names for at, _, files in os.walk(os.path.join(directory, name)) for file in files)
    fill(cluster, wrk, 1_000_000)
    written, _ = fill(cluster, wrk, 1_000_000)
    time.sleep(15)
    full = disk(["store", "snapshots"])
    connection = http.client.HTTPConnection(*address(leader), timeout=60)
    for number in range(30, 110):
        connection.request("DELETE", f"/v1/kv?prefix=f{number:011}")
        connection.getresponse().read()
    revision = json.loads(http_get(leader + "/status"))["revision"]
    connection.request("POST", "/v1/compact", json.dumps({"revision": revision}))
    if connection.getresponse().status != 200:
        raise SystemExit("the compaction was refused")
    time.sleep(60)
    left = json.loads(http_get(leader + "/v1/kv?prefix=f&count_only=true"))["count"]
    live = left * (16 + len(VALUE))
    return {
        "keys": written, "left_keys": left, "live_mb": live / 1e6, "full_mb": full / 1e6, "after_mb": disk(["store", "snapshots"]) / 1e6,
        "disk_per_live_byte": disk(["store", "snapshots"]) / live, "wal_mb": disk(["wal"]) / 1e6,
    }


def reclaim(cluster, wrk, seconds):
    """A million keys, all deleted, history compacted: what comes back of the memory, and what a put takes meanwhile."""
    pid, leader = cluster.processes[0].pid, cluster.leader()
    empty = status_field(pid, "VmRSS")
    fill(cluster, wrk, 1_000_000)
    time.sleep(5)
    full, disk_full = status_field(pid, "VmRSS"), disk_of_store(cluster)
    before = probed(cluster, lambda: time.sleep(15))
    connection, begun, deleted = http.client.HTTPConnection(*address(leader), timeout=60), time.perf_counter(), 0
    for number in range(300):
        connection.request("DELETE", f"/v1/kv?prefix=f{number:011}")
        deleted += json.loads(connection.getresponse().read())["deleted"]
    delete_s = time.perf_counter() - begun
    revision = json.loads(http_get(leader + "/status"))["revision"]
    cpu = cluster.usage()[0]

    def compact():
        connection.request("POST", "/v1/compact", json.dumps({"revision": revision}))
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise SystemExit(f"the compaction was answered {answer.status}")
        time.sleep(15)

    meanwhile = probed(cluster, compact)
    after = status_field(pid, "VmRSS")
    figures = {
        "deleted": deleted, "delete_s": delete_s, "rss_empty_mb": empty / 1e6, "rss_full_mb": full / 1e6, "rss_after_mb": after / 1e6,
        "disk_full_mb": disk_full / 1e6, "disk_after_mb": disk_of_store(cluster) / 1e6,
        "collect_cpu_s": cluster.usage()[0] - cpu, "left_keys": json.loads(http_get(leader + "/v1/kv?prefix=f&count_only=true"))["count"],
    }
    for when, took in (("before", before), ("meanwhile", meanwhile)):
        figures.update({
            f"puts_{when}": len(took), f"put_p50_ms_{when}": 1e3 * percentile(took, 50), f"put_p99_ms_{when}": 1e3 * percentile(took, 99),
            f"put_max_ms_{when}": 1e3 * max(took),
        })
    return figures


def idle_watchers(cluster, wrk, seconds):
    """10,000 watches of prefixes in which nothing happens."""
    watchers, pid = 10_000, cluster.processes[cluster.leader_index].pid
    open_watch(cluster.leader(), "/v1/watch?prefix=warm/").close()
    time.sleep(1)
    before, begun = status_field(pid, "VmRSS"), time.perf_counter()
    socks = [open_watch(cluster.leader(), f"/v1/watch?prefix=idle/{n}/") for n in range(watchers)]
    opened = time.perf_counter() - begun
    time.sleep(2)
    after = status_field(pid, "VmRSS")
    # Long enough for two progress messages each.
    cpu = cluster.usage()[0]
    time.sleep(20)
    cpu = (cluster.usage()[0] - cpu) / 20
    later = status_field(pid, "VmRSS")
    connection = http.client.HTTPConnection(*address(cluster.leader()))
    begun = time.perf_counter()
    put_once(connection, "/idle/4711/k", VALUE)
    socks[4711].settimeout(10)
    while b"event: change" not in socks[4711].recv(4096):
        pass
    reached = time.perf_counter() - begun
    for sock in socks:
        sock.close()
    return {
        "watchers": watchers, "open_s": opened, "rss_kb_each": (after - before) / watchers / 1e3,
        "rss_kb_each_after_20s": (later - before) / watchers / 1e3, "idle_cpu_percent": cpu * 100, "put_to_event_ms": reached * 1e3,
    }


class Drain(threading.Thread):
    """Reads many streams. Of most the kernel throws the bytes away; a few are looked at for the time that probes carry."""

    def __init__(self, socks, sampled, is_base64=False):
        super().__init__(daemon=True)
        self.begin, self.end = (base64.b64encode(b"probe:"), b'"') if is_base64 else (b"probe:", b":")
        self.is_base64 = is_base64
        self.poll = select.epoll()
        self.socks = {sock.fileno(): sock for sock in socks}
        self.tails = {sock.fileno(): b"" for sock in socks[:sampled]}
        for sock in socks:
            sock.setblocking(False)
            self.poll.register(sock.fileno(), select.EPOLLIN)
        self.latencies, self.received, self.stopping = [], 0, False

    def run(self):
        scratch = bytearray(1 << 20)
        while not self.stopping:
            for fd, _ in self.poll.poll(0.1, 256):
                sock = self.socks[fd]
                try:
                    if fd not in self.tails:
                        self.received += sock.recv_into(scratch, len(scratch), MSG_TRUNC)
                        continue
                    piece = sock.recv(1 << 18)
                except BlockingIOError:
                    continue
                self.received += len(piece)
                self.look(fd, piece)

    def look(self, fd, piece):
        now, text, at = time.perf_counter(), self.tails[fd] + piece, 0
        while True:
            begin = text.find(self.begin, at)
            value = begin + len(self.begin)
            end = text.find(self.end, value)
            if begin < 0 or end < 0:
                break
            sent = base64.b64decode(text[value:end]).rstrip(b":") if self.is_base64 else text[value:end]
            self.latencies.append(now - float(sent))
            at = end
        self.tails[fd] = text[max(at, len(text) - 64):]


class Probes(threading.Thread):
    """A put every 20 ms, whose value says when it was sent."""

    def __init__(self, cluster):
        super().__init__(daemon=True)
        self.cluster, self.took, self.stopping = cluster, [], False
        self.connection = http.client.HTTPConnection(*address(cluster.leader()))

    def run(self):
        while not self.stopping:
            put = self.cluster.put_request("k-probe", f"probe:{time.perf_counter():.6f}:".encode())
            self.took.append(request_once(self.connection, *put))
            time.sleep(0.02)


def probed(cluster, work):
    """Seconds that each put of a probe took while `work` was done."""
    probes = Probes(cluster)
    probes.start()
    work()
    probes.stopping = True
    probes.join()
    return probes.took


# Puts a second that a single connection of this process makes.
ONE_CONNECTION = 1000


def fanout(watchers, rate):
    """Watchers of the prefix into which 64 writers write: as fast as they can, or at a rate (a low one: one of them)."""

    def run(cluster, wrk, seconds):
        script, argument = cluster.put
        result = {"watchers": watchers}
        write = lambda: wrk([cluster.leader()], script, argument, 64, seconds)
        if not rate:
            write()
            result["puts_alone"] = write()["rate"]
        socks = [open_watch(cluster.leader(), "/v1/watch?prefix=k") for _ in range(watchers)]
        drain, probes = Drain(socks, 10), Probes(cluster)
        cpu = cluster.usage()[0]
        drain.start()
        probes.start()
        begun = time.perf_counter()
        if rate > ONE_CONNECTION:
            made = subprocess.run(
                [cluster.options.bin, "bench", "--output", "json", "--endpoints", cluster.leader(), "put", "--connections", "64", "--rate", str(rate), "--duration",
                 f"{seconds}s", "--warm-up", "0s", "--prefix", "k", "--key-size", "16", "--value-size", "256"], check=True, stdout=subprocess.PIPE)
            result["puts"] = json.loads(made.stdout)["per_second"]
        elif rate:
            connection = http.client.HTTPConnection(*address(cluster.leader()))
            for number in range(rate * seconds):
                time.sleep(max(0, begun + number / rate - time.perf_counter()))
                put_once(connection, f"/k{number % 1000:015}", VALUE)
            result["puts"] = rate * seconds / (time.perf_counter() - begun)
        else:
            writing = write()
            result.update(puts=writing["rate"], put_p99_ms=writing["p99_ms"], kept=writing["rate"] / result["puts_alone"])
        probes.stopping = True
        probes.join()
        elapsed = time.perf_counter() - begun
        result["cpu_s_per_s"] = (cluster.usage()[0] - cpu) / elapsed
        result["mb_per_s"] = drain.received / elapsed / 1e6
        deadline = time.time() + 60
        while len(drain.latencies) < 10 * len(probes.took) and time.time() < deadline:
            time.sleep(0.05)
        result["caught_up_s"] = time.perf_counter() - begun - elapsed
        drain.stopping = True
        drain.join()
        result.update(
            probes_seen=len(drain.latencies) / (10 * len(probes.took)), probe_put_p50_ms=1e3 * percentile(probes.took, 50),
            delivery_p50_ms=1e3 * percentile(drain.latencies, 50), delivery_p99_ms=1e3 * percentile(drain.latencies, 99),
            rss_mb=cluster.usage()[1] / 1e6)
        for sock in socks:
            sock.close()
        return result

    return run


def fanout_beside(watchers):
    """Watchers of the prefix into which 64 writers write as fast as they can, and what that is with etcd: puts, and how long one takes to a watcher."""

    def run(cluster, wrk, seconds):
        socks = [cluster.open_watch(connect) for _ in range(watchers)]
        drain, probes = Drain(socks, 10, cluster.watches_in_base64), Probes(cluster)
        cpu = cluster.usage()[0]
        drain.start()
        probes.start()
        result = wrk([cluster.leader()], *cluster.put, 64, seconds)
        result["cpu_ms_per_1000"] = 1e6 * (cluster.usage()[0] - cpu) / max(1.0, result["rate"] * seconds)
        probes.stopping = True
        probes.join()
        ended = time.time()
        expected = 10 * len(probes.took)
        while len(drain.latencies) < expected and time.time() < ended + 120:
            time.sleep(0.05)
        result["caught_up_s"] = time.time() - ended
        drain.stopping = True
        drain.join()
        # Whoever has not come by now took at least so long.
        took = drain.latencies + [120.0] * (expected - len(drain.latencies))
        result.update(p50_ms=1e3 * percentile(took, 50), p99_ms=1e3 * percentile(took, 99), rss_mb=cluster.usage()[1] / 1e6)
        for sock in socks:
            sock.close()
        return result

    return run


def count_revisions(sock, until):
    """Reads a stopped watch to its end: the number of changes, and whether their revisions have gaps."""
    text, changes, last, gaps = b"", 0, None, 0
    sock.settimeout(60)
    while last is None or last < until:
        piece = sock.recv(1 << 20)
        if not piece:
            break
        *lines, text = (text + piece).split(b"\n")
        for line in lines:
            if line.startswith(b'{"type":"change"'):
                revision = int(line[line.index(b'"revision":') + 11:line.index(b",", 17)])
                gaps += last is not None and revision != last + 1
                changes, last = changes + 1, revision
    return changes, gaps, last


def stopped_readers(cluster, wrk, seconds):
    """100 watchers that read nothing while 64 writers write, against the same without them; then one of them reads on."""
    script, argument = cluster.put
    pid = cluster.processes[cluster.leader_index].pid
    grown, socks, begin = {}, [], 0
    # The first time with them fills the memory that all watchers share; after that nothing more may come of them.
    for kind in ("warm", "without", "filling", "with"):
        if kind == "filling":
            socks = [open_watch(cluster.leader(), "/v1/watch?prefix=k", "application/x-ndjson", 4096) for _ in range(100)]
            begin = json.loads(http_get(cluster.leader() + "/status"))["revision"]
        before = status_field(pid, "VmRSS")
        rate = wrk([cluster.leader()], script, argument, 64, seconds)["rate"]
        time.sleep(1)
        # History itself costs memory: what a put costs is compared.
        grown[kind] = (status_field(pid, "VmRSS") - before) / (rate * seconds)
    until = json.loads(http_get(cluster.leader() + "/status"))["revision"]
    begun = time.perf_counter()
    changes, gaps, _ = count_revisions(socks[0], until)
    took = time.perf_counter() - begun
    for sock in socks:
        sock.close()
    return {
        "stopped": 100, "rss_bytes_per_put_without": grown["without"], "rss_bytes_per_put_with": grown["with"], "puts_missed": until - begin,
        "read_after": changes, "gaps": gaps, "changes_per_s": changes / took,
    }


def http_get(url):
    connection = http.client.HTTPConnection(*address(url), timeout=60)
    connection.request("GET", url[url.index("/", 8):])
    return connection.getresponse().read()


def leases(with_keys):
    """100,000 leases: granted, kept alive, idle, and all expired while somebody writes; alone, or each with a key (`?ttl=`)."""
    ttl, wanted = 60, 100_000
    script = "metcd_ttl.lua" if with_keys else "metcd_grant.lua"

    def run(cluster, wrk, seconds):
        leader = cluster.leader()
        begun, granted, cpu = time.perf_counter(), 0, cluster.usage()[0]
        while granted < wanted:
            granted += int(wrk([leader], script, f"{ttl} {granted}", 64, 2)["rate"] * 2)
        grant_s = time.perf_counter() - begun
        grant_cpu = cluster.usage()[0] - cpu
        renewing = wrk([leader], "metcd_keepalive.lua", str(granted), 64, seconds)
        time.sleep(1)
        cpu, asked = cluster.usage()[0], time.perf_counter()
        time.sleep(10)
        idle_cpu = (cluster.usage()[0] - cpu) / (time.perf_counter() - asked)
        connection, took, count = http.client.HTTPConnection(*address(leader)), [], granted
        first_end = last_end = None
        rss = cluster.usage()[1]
        cpu, looked = cluster.usage()[0], 0
        while count > 0:
            if time.perf_counter() > begun + grant_s + ttl * 3:
                raise SystemExit(f"{count} leases do not end")
            took.append(put_once(connection, "/writer", VALUE))
            time.sleep(0.005)
            if time.perf_counter() - looked > 0.5:
                looked, before = time.perf_counter(), count
                count = json.loads(http_get(leader + "/status"))["leases"]
                if count < before and first_end is None:
                    first_end, took = looked, []
                last_end = looked
        return {
            "leases": granted, "grants_per_s": granted / grant_s, "grant_cpu_us": 1e6 * grant_cpu / granted, "keepalives_per_s": renewing["rate"],
            "keepalive_p99_ms": renewing["p99_ms"], "idle_cpu_percent": 100 * idle_cpu, "all_expired_s": last_end - first_end,
            "put_p50_ms_meanwhile": 1e3 * percentile(took, 50), "put_p99_ms_meanwhile": 1e3 * percentile(took, 99),
            "put_max_ms_meanwhile": 1e3 * max(took), "expiry_cpu_s": cluster.usage()[0] - cpu, "rss_mb": rss / 1e6,
        }

    return run


SCENARIOS = {
    "list-million": (1, list_million),
    "reclaim": (1, reclaim),
    "disk-after-compaction": (1, disk_after_compaction),
    "watch-idle": (1, idle_watchers),
    "watch-fanout": (1, fanout(1000, 0)),
    "watch-fanout-500": (1, fanout(1000, 500)),
    "watch-fanout-2500": (1, fanout(1000, 2500)),
    "watch-stopped": (1, stopped_readers),
    "leases": (1, leases(False)),
    "leases-keys": (1, leases(True)),
}


def report(name, results):
    """One figure a line: its median, and its spread if there are several."""
    for key in results[0] if results else ():
        values = [result[key] for result in results]
        spread = f"  ({min(values):.4g}..{max(values):.4g})" if len(values) > 1 else ""
        print(f"{name:18} {key:28} {statistics.median(values):12.5g}{spread}", flush=True)
