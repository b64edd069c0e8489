#!/usr/bin/env bash
# A run on a Spark standalone cluster: SPARK_MASTER=spark://HOST:7077 infra/launch/standalone.sh s3://bucket/pinsage.yaml
#
# Code and packages go along (`.venv/bin/python infra/launch/package.py dist/pinsage.zip --environment dist/environment.tar.gz`
# makes them, here if they are missing); workers need Spark, Java and a bare Python of this one's minor version. Training
# runs on this host: TORCHRUN says with what. EXECUTOR_MEMORY and EXECUTOR_CORES default to 4g and 2.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${SPARK_MASTER:?set SPARK_MASTER=spark://HOST:7077}"
python=${PYTHON:-$PWD/.venv/bin/python}
PATH=$(dirname "$python"):$PATH

if [ ! -f dist/environment.tar.gz ] || [ constraints.txt -nt dist/environment.tar.gz ]; then
    "$python" infra/launch/package.py dist/pinsage.zip --environment dist/environment.tar.gz
else
    "$python" infra/launch/package.py dist/pinsage.zip
fi
export SPARK_SUBMIT="spark-submit --master $SPARK_MASTER --py-files dist/pinsage.zip
 --archives dist/environment.tar.gz#env --executor-memory ${EXECUTOR_MEMORY:-4g} --executor-cores ${EXECUTOR_CORES:-2}
 --conf spark.pyspark.python=./env/bin/python --conf spark.pyspark.driver.python=$python"
SPARK_SUBMIT=${SPARK_SUBMIT//$'\n'/}
exec infra/launch/stages.sh "$@"
