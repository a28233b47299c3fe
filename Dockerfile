# syntax=docker/dockerfile:1
# A member in a container:
#
#   docker build -t metcd .
#   docker run -d --name metcd -p 127.0.0.1:3379:3379 -v metcd-data:/data metcd
#
# That is a single node. packaging/docker.toml says what a member of a cluster needs besides.
# `--build-arg FEATURES=rocksdb` builds with RocksDB, which takes some ten minutes more.

FROM rust:1-slim-bookworm AS build
ARG FEATURES=""
RUN apt-get update \
    && case "$FEATURES" in *rocksdb*) more="clang libclang-dev" ;; *) more="" ;; esac \
    && apt-get install -y --no-install-recommends build-essential $more \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN cargo build --release --locked --features "$FEATURES" --bin metcd \
    && strip target/release/metcd

FROM debian:bookworm-slim
LABEL org.opencontainers.image.title="metcd" \
      org.opencontainers.image.description="A replicated key-value server with etcd's guarantees, spoken to with plain HTTP" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --system --gid 3379 metcd \
    && useradd --system --uid 3379 --gid 3379 --home-dir /data --shell /usr/sbin/nologin metcd \
    && install -d -o metcd -g metcd -m 0750 /data
COPY --from=build /src/target/release/metcd /usr/bin/metcd
COPY packaging/docker.toml /etc/metcd/metcd.toml
COPY LICENSE /usr/share/doc/metcd/copyright
# By number, so that an orchestrator can see that it is not root.
USER 3379:3379
WORKDIR /data
VOLUME /data
EXPOSE 3379 3380
# That the process runs, and no more: whoever restarts what is unhealthy must not restart every member of a cluster that lost its quorum.
# The image has no curl, but a shell that can open a socket.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/3379 && printf 'GET /livez HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n' >&3 && read -r _ status _ <&3 && [ \"$status\" = 200 ]"]
# SIGTERM hands leadership over; it takes at most 10 s.
STOPSIGNAL SIGTERM
ENTRYPOINT ["metcd"]
CMD ["serve", "--config", "/etc/metcd/metcd.toml"]
