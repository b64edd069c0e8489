#!/usr/bin/env bash
# Make .airflow ready: Airflow in an environment of its own, the pins of requirements.txt. Quick when nothing has changed;
# may be interrupted and run again. `make airflow` calls it once .venv is there, whose Python it takes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
unset PYTHONPATH PYTHONHOME
readonly VENV=.airflow STAMP=.airflow/.stamp

wanted=$(cksum <infra/airflow/requirements.txt)
[ "$(cat "$STAMP" 2>/dev/null)" != "$wanted" ] || exit 0
start=$SECONDS
rm -rf "$VENV"
.venv/bin/python -m venv "$VENV"
if ! "$VENV/bin/pip" install --disable-pip-version-check -r infra/airflow/requirements.txt >"$VENV/setup.log" 2>&1; then
    tail -n 20 "$VENV/setup.log" >&2
    echo "airflow: pip failed; its message is above, and all of it in $VENV/setup.log" >&2
    exit 1
fi
"$VENV/bin/pip" check
printf '%s\n' "$wanted" >"$STAMP"
echo "airflow: $VENV is ready after $((SECONDS - start)) s"
