#!/usr/bin/env bash
# Make .venv ready: the Python packages of constraints.txt, this project itself, and a check for Java.
#
#   infra/setup.sh                      the first call downloads and installs; later calls find the stamp and return at once
#   PYTHON=python3.12 infra/setup.sh    with a Python of your choice
#   PIP_EXTRA_INDEX_URL=... infra/setup.sh   with an index that has PyTorch's CPU builds: on Linux the usual one brings
#                                       CUDA's libraries along, several gigabytes
#
# May be interrupted and run again, and run twice at the same time. The stamp .venv/.stamp is written last: a .venv without
# one is half made, and is made anew. pip's own settings (index, cache, certificates) are respected.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_USER
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

readonly VENV=.venv STAMP=.venv/.stamp JAVA_STAMP=.venv/.java LOG=.venv/setup.log
readonly JAVA_PACKAGE=openjdk-17-jre-headless

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

on_debian_as_root() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && [ -e /etc/debian_version ]; }
apt_install() { # PACKAGE...: as root on Debian or Ubuntu; silent unless it fails
    local output
    export DEBIAN_FRONTEND=noninteractive
    output=$( (apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@") </dev/null 2>&1) && return
    printf '%s\n' "$output" >&2
    return 1
}

# --- Python -----------------------------------------------------------------------------------------------------------

python_version() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() { # sets python
    local candidate found="" candidates=(python3.11 python3 python3.12 python3.13 python3.10 python)
    if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if new_enough "$candidate"; then
            python=$candidate
            return
        fi
        if command -v "$candidate" >/dev/null; then
            found+="${found:+, }$candidate is $(python_version "$candidate" || echo 'not a working Python')"
        fi
    done
    fail "Python 3.10 or newer is needed; found: ${found:-none of ${candidates[*]}}." \
        "Install one (Debian, Ubuntu: sudo apt-get install -y python3 python3-venv), or name one: make setup PYTHON=/path/to/python3.11"
}

make_venv() { # without ensurepip, `python -m venv` cannot put pip inside
    local package
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        package="python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
        on_debian_as_root || fail "$python cannot make virtual environments: its venv module is a package of its own. Install it:" \
            "  sudo apt-get update && sudo apt-get install -y $package"
        say "installing $package"
        apt_install "$package" || fail "apt-get could not install $package; its message is above."
    fi
    "$python" -m venv "$VENV" || fail "$python -m venv $VENV failed; its message is above."
}

# --- Java -------------------------------------------------------------------------------------------------------------

java_command() { # the one that Spark will use, or nothing
    if [ -n "${JAVA_HOME:-}" ]; then
        printf '%s' "$JAVA_HOME/bin/java"
    else
        command -v java || true
    fi
}
java_major() { # 17 from `openjdk version "17.0.15"`, 8 from `java version "1.8.0_401"`, nothing without a working Java
    "$1" -version 2>&1 | sed -n -E '/ version "/{s/.* version "(1\.)?([0-9]+).*/\2/p;q;}'
}
java_is_fine() {
    local java major
    java=$(java_command)
    [ -n "$java" ] && major=$(java_major "$java") && [ -n "$major" ] && [ "$major" -ge 17 ]
}
found_java() {
    local java major
    java=$(java_command)
    major=$(java_major "${java:-/}")
    if [ -z "$java" ]; then
        echo "no java on PATH, and JAVA_HOME is not set"
    elif [ -z "$major" ]; then
        echo "$java does not run${JAVA_HOME:+ (JAVA_HOME=$JAVA_HOME)}"
    else
        echo "$java is Java $major${JAVA_HOME:+ (JAVA_HOME=$JAVA_HOME)}"
    fi
}

need_java() {
    local home
    if java_is_fine; then return; fi
    for home in /usr/lib/jvm/*; do # there may be a good one that is merely not the chosen one
        if JAVA_HOME=$home java_is_fine; then
            fail "Spark needs Java 17 or newer; found: $(found_java). Choose the one that is installed:" "  export JAVA_HOME='$home'"
        fi
    done
    if on_debian_as_root && [ -z "${JAVA_HOME:-}" ]; then
        say "installing Java ($JAVA_PACKAGE), about 200 MB: usually under a minute"
        apt_install "$JAVA_PACKAGE" || apt_install default-jre-headless || true
        if java_is_fine; then return; fi
        fail "apt-get did not bring a Java 17 or newer; found: $(found_java). Its message is above."
    fi
    if [ -n "${JAVA_HOME:-}" ]; then
        fail "Spark needs Java 17 or newer; found: $(found_java). Use the java on PATH, or set JAVA_HOME to a newer one:" "  unset JAVA_HOME"
    elif command -v apt-get >/dev/null; then
        fail "Spark needs Java 17 or newer; found: $(found_java). Install it:" "  sudo apt-get update && sudo apt-get install -y $JAVA_PACKAGE"
    elif command -v dnf >/dev/null; then
        fail "Spark needs Java 17 or newer; found: $(found_java). Install it:" "  sudo dnf install -y java-17-openjdk-headless"
    elif command -v brew >/dev/null; then
        fail "Spark needs Java 17 or newer; found: $(found_java). Install it:" \
            "  brew install openjdk@17 && export JAVA_HOME=\"\$(brew --prefix openjdk@17)\""
    fi
    fail "Spark needs Java 17 or newer; found: $(found_java). Install a JRE, and set JAVA_HOME to its folder."
}

# --- Packages ---------------------------------------------------------------------------------------------------------

pip_install() { # ARGS: pip into a log, with a sign of life; the log's end if it fails
    local pip status=0 start=$SECONDS shown=-1 last
    "$VENV/bin/python" -m pip install --progress-bar off -c constraints.txt "$@" >>"$LOG" 2>&1 &
    pip=$!
    trap 'kill "$pip" 2>/dev/null || true; wait "$pip" 2>/dev/null || true; exit 130' INT TERM HUP
    while kill -0 "$pip" 2>/dev/null; do
        last=$(grep -E '^ *(Collecting|Downloading|Building|Installing|Using cached)' "$LOG" | tail -n 1 | 
            sed -E 's/^ +//; s/^(Installing) collected packages.*, .*/\1 what was downloaded: about a minute/' | cut -c 1-80 || true)
        if [ -t 1 ]; then
            printf '\r\033[K  %4d s  %s' $((SECONDS - start)) "$last"
        elif [ $(((SECONDS - start) / 15)) -gt "$shown" ]; then
            shown=$(((SECONDS - start) / 15))
            printf '  %4d s  %s\n' $((SECONDS - start)) "$last"
        fi
        sleep 0.5
    done
    wait "$pip" || status=$?
    trap - INT TERM HUP
    if [ -t 1 ]; then printf '\r\033[K'; fi
    if [ "$status" != 0 ]; then
        tail -n 25 "$LOG" >&2
        fail "pip failed (above is the end of $PWD/$LOG). With the cause mended, run the same command again."
    fi
}

# What the stamp holds: change the files or move the clone, and the next call sets up again.
fingerprint() {
    cat pyproject.toml constraints.txt infra/setup.sh | cksum
    pwd
}
wanted_python() { [ -z "${PYTHON:-}" ] || [ "$(python_version "$PYTHON")" = "$(python_version "$VENV/bin/python")" ]; }
up_to_date() { [ -x "$VENV/bin/python" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$(fingerprint)" ] && wanted_python; }

# Finished once, in this place, with the wanted Python, and still running: pip only has to bring the difference.
can_be_updated() {
    [ "$(tail -n 1 "$STAMP" 2>/dev/null)" = "$(pwd)" ] && new_enough "$VENV/bin/python" && wanted_python &&
        "$VENV/bin/python" -m pip --version >/dev/null 2>&1
}

set_up_packages() {
    local start=$SECONDS
    if can_be_updated; then
        say "updating $VENV to the current pyproject.toml and constraints.txt"
        rm -f "$STAMP"
    else
        find_python
        if [ -e "$VENV" ]; then say "$VENV is unfinished or does not fit any more: making it anew"; fi
        rm -rf "$VENV"
        say "making $VENV with $python (Python $(python_version "$python"))"
        make_venv
    fi
    : >"$LOG"
    say "installing the packages of constraints.txt: the first time 2 to 5 minutes (more where PyTorch brings CUDA along)"
    pip_install pip setuptools wheel
    # Without build isolation, the few packages that are built here are built by the pinned setuptools.
    pip_install --no-build-isolation -e '.[dev]'
    "$VENV/bin/python" -m pip check >>"$LOG" || fail "packages disagree: $(tail -n 3 "$LOG")"
    fingerprint >"$STAMP.new"
    mv "$STAMP.new" "$STAMP"
    say "done in $((SECONDS - start)) s; try: $VENV/bin/pinsage --help"
}

main() {
    local java
    java=$(readlink -f "$(java_command)" || true)
    if [ -z "$java" ] || [ "$java" != "$(cat "$JAVA_STAMP" 2>/dev/null)" ]; then need_java; fi
    if ! up_to_date; then
        if command -v flock >/dev/null; then # another set-up in this clone goes first
            exec 9>.venv.lock
            flock -n 9 || { say "another set-up is at work here; waiting for it" && flock 9; }
        fi
        up_to_date || set_up_packages
    fi
    java=$(readlink -f "$(java_command)")
    [ "$java" = "$(cat "$JAVA_STAMP" 2>/dev/null)" ] || printf '%s\n' "$java" >"$JAVA_STAMP"
}

main "$@"
