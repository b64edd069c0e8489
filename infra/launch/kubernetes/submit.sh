#!/usr/bin/env bash
# A run on Kubernetes: what is read by training, training, and what is made from its model, as one job after the other.
#
#   IMAGE=registry/pinsage-pipeline:0.1.0 infra/launch/kubernetes/submit.sh s3://bucket/pinsage.yaml
#
# kubectl's current context is the cluster. EXECUTORS (4), CORES (4) and MEMORY (8g, as much again for Python) say what Spark
# takes, RANKS (1) how many training pods, GPU what a pod asks for (nvidia.com/gpu; cpu: train without), TRAINER which
# manifest. A Secret pinsage-store, if there is one, becomes the pods' environment: credentials for the object store where
# the cloud gives the service account none. Typed again, it goes on where it was; --print shows the manifests only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
show=""
if [ "${1:-}" = --print ]; then
    show=1
    shift
fi
settings=${1:?usage: submit.sh [--print] SETTINGS}
image=${IMAGE:-pinsage-pipeline:0.1.0}
ranks=${RANKS:-1}
for value in "$settings" "$image" "$ranks"; do # they become YAML
    [[ $value =~ ^[A-Za-z0-9._:/@%+=-]+$ ]] || { echo "submit.sh: $value has characters that no manifest can take" >&2 && exit 2; }
done

fill() { # FILE [NAME STAGE...]: the manifest with its blanks filled in
    local file=$1 name=${2:-} stages
    shift $(($# < 2 ? $# : 2))
    stages=$(printf ', %s' "$@")
    sed -e "s|PINSAGE_NAME|$name|" -e "s|, PINSAGE_STAGES|$stages|" -e "s|PINSAGE_SETTINGS|$settings|" \
        -e "s|PINSAGE_IMAGE|$image|" -e "s|PINSAGE_RANKS|$ranks|" -e "s|PINSAGE_GPU|${GPU:-nvidia.com/gpu}|" \
        -e "s|PINSAGE_MEMORY|${MEMORY:-8g}|" -e "s|PINSAGE_CORES|${CORES:-4}|" -e "s|PINSAGE_EXECUTORS|${EXECUTORS:-4}|" "$file"
}

run() { # KIND NAME: apply what comes in, made anew, and wait for its end
    if [ -n "$show" ]; then
        printf -- '---\n'
        cat
        return
    fi
    local state
    kubectl delete "$1" "$2" --namespace pinsage --ignore-not-found
    kubectl apply -f -
    until state=$(kubectl get "$1" "$2" --namespace pinsage -o 'jsonpath={.status.conditions[?(@.status=="True")].type}') &&
        [[ $state =~ Complete|Succeeded|Failed ]]; do
        sleep 10
    done
    [[ ! $state =~ Failed ]] || { echo "submit.sh: $2 failed: kubectl logs --namespace pinsage -l job-name=$2" >&2 && exit 1; }
}

[ -n "$show" ] || kubectl apply -k .
trainer=${TRAINER:-train.yaml}
kind=job
[ "$trainer" = train.yaml ] || kind=pytorchjob
fill driver.yaml pinsage-prepare ingest graph features walks pairs | run job pinsage-prepare
fill "$trainer" | run "$kind" pinsage-train
fill driver.yaml pinsage-publish inference compact index evaluation | run job pinsage-publish
