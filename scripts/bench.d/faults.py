"""Loads while something is wrong: a follower dead, slow or catching up, the leader killed or stopped."""

import http.client
import signal
import statistics
import threading
import time
import urllib.parse

KILLS = 10  # scripts/bench --kills
WRITERS = 64


def follower_of(cluster):
    return (cluster.leader_index + 1) % cluster.nodes


def with_dead_follower(scenario):
    """One follower was killed before."""

    def run(cluster, seconds):
        quiet = scenario(cluster, seconds)
        cluster.kill(follower_of(cluster))
        return beside(quiet, scenario(cluster, seconds))

    return run


def beside(quiet, faulty):
    """What the fault leaves of the rate that the same cluster had just before it."""
    return {**faulty, "of_quiet": faulty["rate"] / quiet["rate"]}


def with_slow_follower(scenario):
    """One follower stands still nine tenths of the time."""

    def run(cluster, seconds):
        quiet = scenario(cluster, seconds)
        process, over = cluster.processes[follower_of(cluster)], threading.Event()

        def stutter():
            while not over.wait(0.01):
                process.send_signal(signal.SIGSTOP)
                over.wait(0.09)
                process.send_signal(signal.SIGCONT)

        thread = threading.Thread(target=stutter)
        thread.start()
        try:
            return beside(quiet, scenario(cluster, seconds))
        finally:
            over.set()
            thread.join()

    return run


def with_returning_follower(scenario):
    """One follower comes back with an empty past while the load runs: it was down for more entries than the log keeps."""

    def run(cluster, seconds):
        behind = follower_of(cluster)
        cluster.kill(behind)
        quiet = scenario(cluster, 4 * seconds)
        cluster.start(behind)
        return beside(quiet, scenario(cluster, seconds))

    return run


def catch_up(fill, scenario):
    """A follower that missed a million keys returns; how long until it has applied what the leader had, and what that costs it and others."""

    def run(cluster, seconds):
        behind = follower_of(cluster)
        cluster.kill(behind)
        fill(cluster, 1_000_000)
        quiet = scenario(cluster, seconds)
        target, begun, result = cluster.applied(cluster.leader_index), time.time(), {}
        cluster.start(behind)

        def wait():
            while time.time() - begun < 300:
                try:
                    if cluster.applied(behind) >= target:
                        result["catch_up_s"] = time.time() - begun
                        return
                except OSError:  # not up yet; the deadline speaks
                    pass
                time.sleep(0.05)

        waiting = threading.Thread(target=wait)
        waiting.start()
        result.update(beside(quiet, scenario(cluster, 4 * seconds)))
        waiting.join()
        if "catch_up_s" not in result:
            raise SystemExit(f"{cluster.name}: the follower did not catch up within 300 s")
        result["peak_mb"] = cluster.peak_rss(behind) / 1e6
        return result

    return run


class Writers:
    """Connections that put one value after another and note when each was answered. A connection that breaks is opened again."""

    def __init__(self, cluster, urls):
        self.cluster, self.over, self.errors = cluster, threading.Event(), []
        self.answered = [[time.monotonic()] for _ in range(WRITERS)]
        self.threads = [threading.Thread(target=self.write, args=(index, urls[index % len(urls)])) for index in range(WRITERS)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for thread in self.threads:
            thread.join()

    def write(self, index, url):
        parts = urllib.parse.urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
        count = 0
        while not self.over.is_set():
            count += 1
            try:
                connection.request(*self.cluster.put_request(f"w{index:03}-{count:010}"))
                answer = connection.getresponse()
                answer.read()
                if answer.status >= 300:
                    self.errors.append(answer.status)
                else:
                    self.answered[index].append(time.monotonic())
            except (OSError, http.client.HTTPException) as error:
                self.errors.append(str(error))
                connection.close()

    def longest_gap(self, begin, end):
        """The longest pause of any connection that reaches into this time."""
        longest = 0
        for times in self.answered:
            near = [at for at in times if begin - 5 <= at <= end]
            pauses = [after - before for before, after in zip(near, near[1:]) if after >= begin]
            longest = max([longest, *pauses])
        return longest


def interrupted(cluster, how):
    """Writers on the followers while the leader goes, again and again; it comes back each time."""
    gaps, errors, answered, begun = [], 0, 0, time.time()
    for _ in range(KILLS):
        leader = cluster.leader_index
        others = [index for index in range(cluster.nodes) if index != leader]
        with Writers(cluster, [cluster.url(index) for index in others]) as writers:
            time.sleep(1)
            at = time.monotonic()
            cluster.kill(leader, how)
            time.sleep(5)
            gaps.append(writers.longest_gap(at, time.monotonic()))
        errors += len(writers.errors)
        answered += sum(map(len, writers.answered))
        cluster.start(leader)
        await_all(cluster, others[0])
    return {
        "rate": answered / (time.time() - begun), "p50_ms": 0, "p99_ms": 0, "cpu_ms_per_1000": 0, "rss_mb": cluster.usage()[1] / 1e6,
        "errors": errors, "gap_median_s": statistics.median(gaps), "gap_max_s": max(gaps),
    }


def await_all(cluster, ask):
    """Every member is back and a leader is known."""
    deadline = time.time() + 30
    while True:
        try:
            for index in range(cluster.nodes):
                cluster.find_leader(index)
            cluster.leader_index = cluster.find_leader(ask)
            return
        except Exception as error:  # not back yet; the deadline speaks
            if time.time() > deadline:
                raise SystemExit(f"{cluster.name} did not come back within 30 s: {error}") from error
            time.sleep(0.1)


def failover(cluster, _seconds):
    """kill -9 of the leader."""
    return interrupted(cluster, signal.SIGKILL)


def graceful_stop(cluster, _seconds):
    """SIGTERM to the leader."""
    return interrupted(cluster, signal.SIGTERM)
