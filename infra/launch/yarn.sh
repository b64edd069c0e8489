#!/usr/bin/env bash
# A run on a YARN cluster, typed on a host of it: infra/launch/yarn.sh s3://bucket/pinsage.yaml
#
# EMR's and Dataproc's own Spark is 3.5; this one is of `make setup`, version 4, and YARN ships its jars. Code and packages go
# along too, so the workers need Java 17 and a bare Python of this one's minor version: infra/launch/bootstrap.sh sees to
# both. YARN_OPTIONS are more words for spark-submit, EXECUTORS, EXECUTOR_MEMORY and EXECUTOR_CORES default to 4, 8g and 4.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export HADOOP_CONF_DIR=${HADOOP_CONF_DIR:-/etc/hadoop/conf}
[ -f "$HADOOP_CONF_DIR/yarn-site.xml" ] || { echo "yarn.sh: $HADOOP_CONF_DIR has no yarn-site.xml; set HADOOP_CONF_DIR" >&2 && exit 2; }
unset SPARK_HOME SPARK_CONF_DIR # the cluster's own, of another version
python=${PYTHON:-$PWD/.venv/bin/python}
PATH=$(dirname "$python"):$PATH
jars=$("$python" -c 'import pyspark; print(pyspark.__path__[0])')/jars

mkdir -p dist
[ -f dist/jars.zip ] || (cd "$jars" && "$python" -m zipfile -c "$OLDPWD/dist/jars.zip" ./*.jar)
"$python" infra/launch/package.py dist/pinsage.zip --environment dist/environment.tar.gz
export SPARK_SUBMIT="spark-submit --master yarn --deploy-mode client --py-files dist/pinsage.zip
 --archives dist/environment.tar.gz#env --conf spark.yarn.archive=$PWD/dist/jars.zip
 --num-executors ${EXECUTORS:-4} --executor-memory ${EXECUTOR_MEMORY:-8g} --executor-cores ${EXECUTOR_CORES:-4}
 --conf spark.executor.memoryOverheadFactor=1.0
 --conf spark.pyspark.python=./env/bin/python --conf spark.pyspark.driver.python=$python
 ${JAVA_HOME:+--conf spark.executorEnv.JAVA_HOME=$JAVA_HOME --conf spark.yarn.appMasterEnv.JAVA_HOME=$JAVA_HOME} ${YARN_OPTIONS:-}"
SPARK_SUBMIT=${SPARK_SUBMIT//$'\n'/}
exec infra/launch/stages.sh "$@"
