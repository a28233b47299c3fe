# Sourced by the scripts here: where the repository is, where cargo builds, which binary is meant.

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)

# Runs of CI keep one target directory between them (RocksDB's C++ takes minutes to compile); elsewhere it is cargo's own choice.
if [ -z "${CARGO_TARGET_DIR:-}" ] && [ -n "${CI:-}${CI_CACHE:-}" ]; then
    export CARGO_TARGET_DIR="${CI_CACHE:-${HOME:-/var/tmp}/.cache}/metcd-target"
fi
target_dir=${CARGO_TARGET_DIR:-$root/target}

say() { printf '%s\n' "$*" >&2; }
die() {
    say "${0##*/}: $*"
    exit 1
}

# Prints the binary: $METCD_BIN, else the newest one built, else one that is built now.
metcd_binary() {
    if [ -n "${METCD_BIN:-}" ]; then
        [ -x "$METCD_BIN" ] || die "METCD_BIN=$METCD_BIN is not a program"
        printf '%s\n' "$METCD_BIN"
        return
    fi
    local release=$target_dir/release/metcd debug=$target_dir/debug/metcd
    if [ ! -x "$release" ] && [ ! -x "$debug" ]; then
        say "no binary yet: building one (some minutes the first time)"
        (cd "$root" && cargo build --release --bin metcd >&2) || die "the build failed"
    fi
    if [ -x "$release" ] && { [ ! -x "$debug" ] || [ "$release" -nt "$debug" ]; }; then
        printf '%s\n' "$release"
    else
        printf '%s\n' "$debug"
    fi
}
