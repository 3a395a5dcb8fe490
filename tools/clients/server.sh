# Sourced by the scripts beside it: what they share to run `aotron serve` with tiny-chat and Python clients against it.
#
# Before it is sourced, `here` is this folder. It sets `root`; `AOTRON`, the program (default target/release/aotron); `kept`,
# where virtual environments and the engine are kept (CLIENTS_DIR, default target/clients); and `ENGINE`, which it builds.
# The server, if one runs, is stopped when the script ends.
root=$(cd "$here/../.." && pwd)
export AOTRON=${AOTRON:-$root/target/release/aotron}
kept=${CLIENTS_DIR:-$root/target/clients}
[ -x "$AOTRON" ] || { echo "$AOTRON is not there: run cargo build --release first" >&2; exit 2; }
mkdir -p "$kept"
kept=$(cd "$kept" && pwd)
export ENGINE=$kept/tiny-chat
export PYTHONDONTWRITEBYTECODE=1 NO_COLOR=1

# Builds a checkpoint for this machine's CPU: build CHECKPOINT PACKAGE [OPTION…]. Shows what the program says if it fails.
build() {
    local said
    said=$("$AOTRON" build "$1" --recipe cpu --force -o "$2" "${@:3}" 2>&1) || { echo "$said" >&2; exit 1; }
}
build "$root/tests/data/tiny-chat" "$ENGINE"

server=
stop() {
    if [ -n "$server" ]; then
        kill "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
        server=
    fi
}
trap stop EXIT

# Starts a server on a free port, with more options as arguments; sets `url`.
start() {
    local log=$kept/server.log
    : >"$log"
    "$AOTRON" serve "$ENGINE" --port 0 --log-format off "$@" >"$log" 2>&1 &
    server=$!
    url=
    for _ in $(seq 600); do
        url=$(sed -n 's/.*listening on \(http[^ ]*\).*/\1/p' "$log" | head -n 1)
        if [ -n "$url" ] && grep -q 'is ready' "$log"; then
            return
        fi
        kill -0 "$server" 2>/dev/null || break
        sleep 0.1
    done
    echo "the server did not start:" >&2
    cat "$log" >&2
    exit 1
}

# Makes the virtual environment of a requirements file; sets `python`. Exits with 3 if it cannot be installed.
environment() {
    local folder=$kept/$1 requirements=$here/requirements-$1.txt
    python=$folder/bin/python
    if ! cmp -s "$requirements" "$folder/requirements.txt"; then
        python3 -m venv --clear "$folder"
        # The files name everything, so that what a package asks for beside it (such as GPU libraries) is left out.
        if ! "$folder/bin/pip" install -q --disable-pip-version-check --no-deps -r "$requirements"; then
            echo "$1 cannot be installed here" >&2
            exit 3
        fi
        cp "$requirements" "$folder/requirements.txt"
    fi
}
