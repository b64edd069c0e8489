"""The night as an Airflow 3 DAG: begin, every stage as its own job, finish, and how the gate decided.

    begin -> ingest -> graph -> walks -> ... -> evaluation -> finish -> outcome -> published | refused

`pinsage nightly begin` says where the settings of the night's run are; every stage is a spark-submit or a torchrun
with them, and ends at once where nothing is due. `finish` also runs after a stage that failed for good, so that the
night ends with a reason and without its lock. A refusal by the gate is an outcome, not an error: `finish` is green,
`refused` is red and says why; the release that readers see stays as it was.

Nothing of the pipeline is imported: Airflow has an environment of its own, and the commands of the other one are
started as processes. What they need are Airflow Variables (or AIRFLOW_VAR_PINSAGE_SETTINGS and so on, variables of the
environment):

    pinsage_settings      the settings file, any fsspec URL; the one that must be there
    pinsage_path          folders of `pinsage`, `spark-submit` and `torchrun`, put before PATH
    pinsage_home          the folder with jobs/: default, the repository that this file is in
    pinsage_spark_submit  `spark-submit` with the options of your cluster
    pinsage_torchrun      `torchrun` with yours; default, one process on this host

Credentials are not among them: the commands find their own, as the object store's SDK does. The gate starts Spark by
itself, where `resources.spark.master` says. When the file is parsed, PINSAGE_SCHEDULE, PINSAGE_DEADLINE_HOURS and
PINSAGE_PARALLEL are read from the environment of the DAG processor.

    airflow dags trigger pinsage_nightly --logical-date 2011-03-05T03:00:00Z                    one night of the past
    airflow backfill create --dag-id pinsage_nightly --from-date 2011-03-05 --to-date 2011-03-10 --max-active-runs 1

The second runs the nights of 5 to 9 March, one after the other. It needs PostgreSQL or MySQL as Airflow's database:
with SQLite, only while no scheduler runs.
"""

from __future__ import annotations

import os
from datetime import datetime, timedelta, timezone
from pathlib import Path

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, DeadlineAlert, DeadlineReference, Param, SyncCallback, TriggerRule, task
from airflow.sdk.exceptions import AirflowFailException

STAGES: dict[str, tuple[float, tuple[str, ...]]] = {
    "ingest": (2, ()),
    "graph": (2, ("ingest",)),
    "features": (2, ("ingest",)),
    "walks": (6, ("graph",)),
    "pairs": (8, ("graph",)),
    "train": (24, ("features", "walks", "pairs")),
    "inference": (8, ("train",)),
    "compact": (2, ("inference",)),
    "index": (4, ("inference",)),
    "evaluation": (2, ("index",)),
}
"""Hours until a stage is stopped, and the stages whose datasets it reads; a test holds it to the pipeline's table."""

HOME = Path(__file__).resolve().parents[3]
ENVIRONMENT = {
    "SETTINGS": "{{ params.settings or var.value.get('pinsage_settings', '') }}",
    "NIGHT": "{{ params.night or (dag_run.logical_date or dag_run.run_after) | ds }}",
    "PINSAGE_PATH": "{{ var.value.get('pinsage_path', '') }}",
    "PINSAGE_HOME": f"{{{{ var.value.get('pinsage_home', '{HOME}') }}}}",
    "SPARK_SUBMIT": "{{ var.value.get('pinsage_spark_submit', 'spark-submit') }}",
    "TORCHRUN": "{{ var.value.get('pinsage_torchrun', 'torchrun --standalone --nproc-per-node 1') }}",
}
"""Values reach the shell as variables, never as text of the command: what the trigger form is given stays a word."""

PREAMBLE = """\
set -euo pipefail
: "${SETTINGS:?set the Airflow Variable pinsage_settings, or the parameter settings}"
export PATH="${PINSAGE_PATH:+$PINSAGE_PATH:}$PATH" PYTHONPATH="$PINSAGE_HOME${PYTHONPATH:+:$PYTHONPATH}"
"""
BEGIN = 'pinsage nightly begin --settings "$SETTINGS" --night "$NIGHT"'
SPARK = '$SPARK_SUBMIT "$PINSAGE_HOME/jobs/$STAGE.py" --settings "$RUN_SETTINGS"'
TRAIN = '$TORCHRUN "$PINSAGE_HOME/jobs/train.py" --settings "$RUN_SETTINGS"'
FINISH = """\
said=$(mktemp); trap 'rm -f "$said"' EXIT
code=0; pinsage nightly finish --settings "$SETTINGS" --night "$NIGHT" 2>&1 | tee "$said" || code=$?
case $code in 0) word=published;; 3) word=refused;; *) exit "$code";; esac
printf '%s %s\\n' "$word" "$(sed -e '/│/d' -e '/─/d' -e '/━/d' "$said" | tail -n 12 | tr -s '\\n' ' ')"
"""


def command(
    name: str, script: str, hours: float, more: dict[str, str] | None = None, **options: object
) -> BashOperator:
    """A task that runs the script; its last line of output is what other tasks can ask for."""
    return BashOperator(
        task_id=name,
        bash_command=PREAMBLE + script,
        env={**ENVIRONMENT, **(more or {})},
        append_env=True,
        execution_timeout=timedelta(hours=hours),
        skip_on_exit_code=None,
        **options,
    )


with DAG(
    dag_id="pinsage_nightly",
    description="Yesterday's release and today's data: a better release, or a reason why not",
    doc_md=__doc__,
    schedule=os.environ.get("PINSAGE_SCHEDULE", "0 3 * * *"),
    start_date=datetime(2000, 1, 1, tzinfo=timezone.utc),
    catchup=False,
    max_active_runs=1,
    max_active_tasks=int(os.environ.get("PINSAGE_PARALLEL", "2")),
    dagrun_timeout=timedelta(hours=48),
    deadline=DeadlineAlert(
        name="late",
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=timedelta(hours=float(os.environ.get("PINSAGE_DEADLINE_HOURS", "8"))),
        callback=SyncCallback("pinsage_late.tell"),
    ),
    default_args={
        "retries": 3,
        "retry_delay": timedelta(minutes=2),
        "retry_exponential_backoff": 2.0,
        "max_retry_delay": timedelta(minutes=30),
    },
    params={
        "night": Param(
            None, type=["null", "string"], format="date", description="The night; default, the run's logical date."
        ),
        "settings": Param(
            None, type=["null", "string"], description="A settings file instead of the Variable pinsage_settings."
        ),
    },
    tags=["pinsage"],
) as dag:
    begin = command("begin", BEGIN, 1)
    run_settings = {"RUN_SETTINGS": "{{ ti.xcom_pull(task_ids='begin') }}"}
    stages = {
        name: command(name, TRAIN if name == "train" else SPARK, hours, {**run_settings, "STAGE": name})
        for name, (hours, _) in STAGES.items()
    }
    finish = command("finish", FINISH, 2, trigger_rule=TriggerRule.ALL_DONE_MIN_ONE_SUCCESS)
    for name, (_, after) in STAGES.items():
        stages[name] << ([stages[other] for other in after] or [begin])
    [begin, *stages.values()] >> finish

    @task.branch(retries=0)
    def outcome(said: str) -> str:
        """Which of the two ends it is: the word that finish's line begins with."""
        return said.split(" ", 1)[0]

    @task(retries=0)
    def published(said: str) -> str:
        """Readers see the night's release."""
        return said

    @task(retries=0)
    def refused(said: str) -> None:
        """The gate found a reason against it; readers see the release before."""
        raise AirflowFailException(f"the release was not published: {said}")

    said = finish.output
    outcome(said) >> [published(said), refused(said)]
