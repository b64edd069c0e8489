#!/usr/bin/env bash
# On every host of an EMR or Dataproc cluster when it starts: Python 3.11 and Java 17; on the first one also the project.
# EMR calls it as a bootstrap action, Dataproc as an initialization action; BUCKET/source.tar.gz is what emr.sh and
# dataproc.sh put there. BUCKET is the first word or, on Dataproc, the metadata value pinsage-bucket.
set -euo pipefail
if command -v dnf >/dev/null; then # EMR 7: Amazon Linux 2023
    sudo dnf install -y python3.11 java-17-amazon-corretto-headless make tar gzip
    bucket=${1:?usage: bootstrap.sh s3://BUCKET/FOLDER}
    is_first=$(grep -q '"isMaster": *true' /mnt/var/lib/info/instance.json && echo yes || echo no)
    fetch() { aws s3 cp "$1" "$2"; }
else # Dataproc: Debian
    bucket=${1:-$(/usr/share/google/get_metadata_value attributes/pinsage-bucket)}
    is_first=$([ "$(/usr/share/google/get_metadata_value attributes/dataproc-role)" = Master ] && echo yes || echo no)
    sudo apt-get update -qq && sudo apt-get install -y -qq python3.11 python3.11-venv openjdk-17-jre-headless make
    fetch() { gcloud storage cp "$1" "$2"; }
fi
[ "$is_first" = yes ] || exit 0

sudo mkdir -p /opt/pinsage
sudo chown "$(id -u):$(id -g)" /opt/pinsage
fetch "$bucket/source.tar.gz" /tmp/pinsage-source.tar.gz
tar -xzf /tmp/pinsage-source.tar.gz -C /opt/pinsage
cd /opt/pinsage
make setup PYTHON=python3.11
.venv/bin/pip install -c constraints.txt -e '.[s3,gcs]'
