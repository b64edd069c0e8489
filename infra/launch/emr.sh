#!/usr/bin/env bash
# A run on Amazon EMR: a cluster is made, does the run as one step, and ends.
#
#   BUCKET=s3://bucket/pinsage infra/launch/emr.sh s3://bucket/pinsage.yaml
#
# `aws` (version 2) finds its own credentials; the roles are EMR's default ones, and the hosts' role must read and write the
# bucket. WORKERS (4) of TYPE (m6i.4xlarge), SUBNET, RELEASE (emr-7.9.0) and AWS_OPTIONS say what is bought. Training runs
# on the primary host, PRIMARY_TYPE; name one with GPUs and set TORCHRUN accordingly.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
settings=${1:?usage: emr.sh SETTINGS [STAGE...]}
: "${BUCKET:?set BUCKET=s3://BUCKET/FOLDER for the code and the logs}"
shift
primary=${PRIMARY_TYPE:-m6i.4xlarge}
[ -z "${SUBNET:-}" ] || AWS_OPTIONS="--ec2-attributes SubnetId=$SUBNET ${AWS_OPTIONS:-}"
read -ra more <<<"${AWS_OPTIONS:-}"

mkdir -p dist
git archive --format tar.gz -o dist/source.tar.gz HEAD
aws s3 cp dist/source.tar.gz "$BUCKET/source.tar.gz"
aws s3 cp infra/launch/bootstrap.sh "$BUCKET/bootstrap.sh"

java=/usr/lib/jvm/java-17-amazon-corretto
command="JAVA_HOME=$java TORCHRUN='${TORCHRUN:-torchrun --standalone --nproc-per-node 1}' EXECUTORS=${EXECUTORS:-${WORKERS:-4}}"
command+=" /opt/pinsage/infra/launch/yarn.sh $settings $*"
step=$(python3 -c 'import json, sys; print(json.dumps([{
    "Name": "pinsage", "Type": "CUSTOM_JAR", "Jar": "command-runner.jar", "ActionOnFailure": "TERMINATE_CLUSTER",
    "Args": ["bash", "-c", sys.argv[1]]}]))' "$command")
aws emr create-cluster --name pinsage --release-label "${RELEASE:-emr-7.9.0}" --applications Name=Hadoop \
    --use-default-roles --log-uri "$BUCKET/logs/" --auto-terminate \
    --instance-groups "InstanceGroupType=MASTER,InstanceCount=1,InstanceType=$primary" \
    "InstanceGroupType=CORE,InstanceCount=${WORKERS:-4},InstanceType=${TYPE:-m6i.4xlarge}" \
    --bootstrap-actions "Path=$BUCKET/bootstrap.sh,Args=[$BUCKET]" --steps "$step" "${more[@]}"
