# Sourced by scripts/test and scripts/demo: what a fresh Debian-like machine needs to build this project.
# Afterwards $PY is the interpreter of .venv and the current directory is the project's.

cd "$(dirname "$0")/.." || exit 1
ROOT=$PWD
VENV=${ZEO_RS_VENV:-$ROOT/.venv}

say() { printf '\n=== %s\n' "$*"; }
die() { printf '%s\n' "$*" >&2; exit 1; }

# A system package is installed only when its command is missing and we may; otherwise say what is missing.
need() { # need COMMAND PACKAGE WHY
    command -v "$1" >/dev/null 2>&1 && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "installing $2 ($3)"
        { apt-get install -y -qq --no-install-recommends "$2" || { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$2"; }; } \
            || die "apt-get could not install $2, which is needed: $3"
    else
        die "missing: $1 ($3). On Debian: sudo apt-get install $2"
    fi
}

# As need, but what only some checks use is not worth ending here.
want() { # want COMMAND PACKAGE WHY
    (need "$@") || say "going on without $1"
}

find_python() {
    for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$candidate"; return; }
    done
    return 1
}

[ -f "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
command -v cargo >/dev/null 2>&1 || die "missing: cargo. Install Rust 1.90 or newer, see https://rustup.rs"
need cc gcc "a C compiler and linker, used by the Rust toolchain and by ring"
# crates with C code look for the headers of the C library, which gcc only recommends
[ "$(uname -s)" != Linux ] || echo '#include <stdlib.h>' | cc -E - >/dev/null 2>&1 || need no-libc-headers libc6-dev "headers of the C library"

if [ "$(uname -m)" = x86_64 ]; then want valgrind valgrind "counts instructions of the hot paths, scripts/instructions"; fi

if [ ! -x "$VENV/bin/python" ] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    find_python >/dev/null || need python3 python3 "Python 3.11 or newer"
    base=$(find_python) || die "missing: Python 3.11 or newer (set PYTHON to its path)"
    say "creating $VENV with $("$base" -V)"
    if ! "$base" -m venv "$VENV"; then
        # Debian ships venv apart from Python
        need "no-venv-module" "python3-venv" "python -m venv"
        "$base" -m venv --clear "$VENV" || die "$base -m venv does not work"
    fi
fi
PY=$VENV/bin/python
export PYO3_PYTHON=$PY PIP_DISABLE_PIP_VERSION_CHECK=1
