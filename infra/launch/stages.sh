#!/usr/bin/env bash
# The stages named, in order, each as a job of its own: what every launch script here, and docker-compose.yml, ends in.
#
#   infra/launch/stages.sh s3://bucket/pinsage.yaml ingest graph features walks pairs train inference compact index evaluation
#   infra/launch/stages.sh s3://bucket/pinsage.yaml      all of them
#
# SPARK_SUBMIT is spark-submit with the options of your cluster, TORCHRUN is torchrun with yours; more words for every
# stage (--set dotted.key=value) are in STAGE_OPTIONS. Ends with the first stage that fails; typed again, it goes on there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

settings=${1:?usage: stages.sh SETTINGS [STAGE...]}
shift
[ $# != 0 ] || set -- ingest graph features walks pairs train inference compact index evaluation
read -ra spark <<<"${SPARK_SUBMIT:-spark-submit}"
read -ra torch <<<"${TORCHRUN:-torchrun --standalone --nproc-per-node 1}"
read -ra options <<<"${STAGE_OPTIONS:-}"

for stage in "$@"; do
    [ -f "jobs/$stage.py" ] || { echo "stages.sh: there is no stage $stage (no jobs/$stage.py)" >&2 && exit 2; }
    printf 'stages.sh: %s\n' "$stage" >&2
    start=("${spark[@]}")
    [ "$stage" != train ] || start=("${torch[@]}")
    PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} "${start[@]}" "jobs/$stage.py" --settings "$settings" "${options[@]}"
done
