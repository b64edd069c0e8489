#!/usr/bin/env bash
# A run on Google Dataproc: a cluster is made, does the run from its first host, and is deleted, whatever came of it.
#
#   BUCKET=gs://bucket/pinsage REGION=europe-west1 ZONE=europe-west1-b infra/launch/dataproc.sh gs://bucket/pinsage.yaml
#
# `gcloud` finds its own credentials; the cluster's service account must read and write the bucket. WORKERS (4) of TYPE
# (n2-standard-16) and GCLOUD_OPTIONS say what is bought. Training runs on the first host, PRIMARY_TYPE. A cluster that is
# idle for an hour deletes itself, should this shell be lost.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
settings=${1:?usage: dataproc.sh SETTINGS [STAGE...]}
: "${BUCKET:?set BUCKET=gs://BUCKET/FOLDER}" "${REGION:?set REGION}" "${ZONE:?set ZONE}"
shift
name=pinsage-$(date -u +%Y%m%d-%H%M%S)
read -ra more <<<"${GCLOUD_OPTIONS:-}"

mkdir -p dist
git archive --format tar.gz -o dist/source.tar.gz HEAD
gcloud storage cp dist/source.tar.gz infra/launch/bootstrap.sh "$BUCKET/"
trap 'gcloud dataproc clusters delete "$name" --region "$REGION" --quiet' EXIT
gcloud dataproc clusters create "$name" --region "$REGION" --zone "$ZONE" --image-version 2.3-debian12 \
    --num-workers "${WORKERS:-4}" --worker-machine-type "${TYPE:-n2-standard-16}" \
    --master-machine-type "${PRIMARY_TYPE:-n2-standard-16}" --max-idle 1h --metadata "pinsage-bucket=$BUCKET" \
    --initialization-actions "$BUCKET/bootstrap.sh" --initialization-action-timeout 30m "${more[@]}"
java=/usr/lib/jvm/java-17-openjdk-amd64
command="JAVA_HOME=$java TORCHRUN='${TORCHRUN:-torchrun --standalone --nproc-per-node 1}' EXECUTORS=${EXECUTORS:-${WORKERS:-4}}"
command+=" /opt/pinsage/infra/launch/yarn.sh $settings $*"
gcloud compute ssh "$name-m" --zone "$ZONE" --command "$command"
