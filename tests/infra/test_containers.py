"""Container files and launch scripts are what their own tools accept, and name what exists."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.contracts import schemas
from pipeline.contracts.config import load_settings
from tests.runs import ROOT

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
KUBERNETES = ROOT / "infra" / "launch" / "kubernetes"
VERSION = "1.33"
"""The Kubernetes whose schemas the manifests are held to."""
SCRIPTS = sorted(file for pattern in (".ci/run", "infra/**/*.sh", "infra/**/*.sbatch") for file in ROOT.glob(pattern))


def tool(name: str) -> str:
    """A program of this environment, as pip installs it."""
    found = Path(sys.executable).with_name(name)
    if not found.exists():
        pytest.skip(f"{name} is not installed (the extra `dev` brings it): what it checks went unchecked")
    return str(found)


def accepted(*command: str, **more: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, **more)
    assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_pass_shellcheck() -> None:
    assert len(SCRIPTS) >= 9
    accepted(tool("shellcheck"), *map(str, SCRIPTS))


def test_the_dockerfile_passes_hadolint() -> None:
    accepted(tool("hadolint"), "infra/images/Dockerfile")


def test_the_compose_file_fits_its_specification() -> None:
    accepted(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")


def test_compose_names_stages_settings_and_services_that_exist() -> None:
    ran = [word for name in ("prepare", "train", "publish") for word in SERVICES[name]["command"][2:]]
    assert ran == [stage.name for stage in schemas.STAGES]
    assert load_settings(str(ROOT / "infra" / "settings" / "containers.yaml")).task.name == "online-retail"
    for name, service in SERVICES.items():
        assert set(service.get("depends_on", {})) <= set(SERVICES), name
        assert ":" in service["image"], f"{name}: pinned"
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name}: {port} is open to others"
        for other, wanted in service.get("depends_on", {}).items():
            assert wanted["condition"] != "service_healthy" or "healthcheck" in SERVICES[other], (name, other)


def test_the_image_gets_what_the_dockerfile_and_the_services_name() -> None:
    """.dockerignore lets through only what it lists: what is missing there is missing in the image."""
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    named = [
        "pyproject.toml",
        "constraints.txt",
        "LICENSE",
        "NOTICE",
        "README.md",
        "pipeline/spark.py",
        "model/layers.py",
    ]
    named += ["jobs/walks.py", "infra/launch/stages.sh", "infra/launch/store.py", "infra/settings/containers.yaml"]
    named += ["infra/demo/items.parquet", "infra/airflow/requirements.txt", "infra/airflow/dags/pinsage_nightly.py"]
    for name in named:
        assert (ROOT / name).exists(), name
        assert any(name == entry or name.startswith(f"{entry}/") for entry in let_in), f"{name} is not let in"


def manifests(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


def submitted(**environment: str) -> list[dict[str, Any]]:
    """What submit.sh would apply."""
    command = [str(KUBERNETES / "submit.sh"), "--print", "s3://bucket/pinsage.yaml"]
    where = {"PATH": "/usr/bin:/bin", **environment}
    return manifests(subprocess.run(command, env=where, capture_output=True, text=True, check=True).stdout)


def test_kubernetes_accepts_what_is_applied() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="no schemas of Kubernetes: manifests went unchecked")
    applied = [
        *manifests((KUBERNETES / "access.yaml").read_text()), *manifests((KUBERNETES / "executor.yaml").read_text()),
        *submitted(), *submitted(RANKS="4", GPU="cpu", IMAGE="registry:5000/a/b@sha256:0"),
    ]  # fmt: skip
    for document in applied:
        if "apiVersion" in document and document["kind"] != "PyTorchJob":
            validate.validate(document, VERSION, strict=True)
    assert [document["kind"] for document in submitted()] == ["Job", "Service", "Job", "Job"]


def test_no_blank_is_left_and_every_stage_is_run_once() -> None:
    for trainer in ("train.yaml", "pytorchjob.yaml"):
        jobs = submitted(TRAINER=trainer, IMAGE="registry/pinsage:1")
        text = json.dumps(jobs)
        assert "PINSAGE_" not in text
        assert "pinsage-pipeline:0.1.0" not in text, "the image is the one asked for"
        drivers = [job["spec"]["template"]["spec"]["containers"][0]["args"] for job in jobs if job["kind"] == "Job"]
        stages = [word for words in drivers if "infra/launch/stages.sh" in words for word in words[2:]]
        assert stages == [stage.name for stage in schemas.STAGES if stage is not schemas.TRAIN]
        assert text.count("jobs/train.py") == 1


@pytest.mark.parametrize("settings", ["s3://b/a b.yaml", "s3://b/$(x)", "s3://b/a|b"])
def test_settings_that_would_break_a_manifest_are_refused(settings: str) -> None:
    command = [str(KUBERNETES / "submit.sh"), "--print", settings]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2


def test_a_pod_is_nobody_and_can_become_nobody_else() -> None:
    pods = [job["spec"]["template"]["spec"] for job in submitted() if job["kind"] == "Job"]
    pods += [pod["spec"] for pod in manifests((KUBERNETES / "executor.yaml").read_text())]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        assert all(not c["securityContext"]["allowPrivilegeEscalation"] for c in pod["containers"])


def test_the_common_script_runs_each_stage_with_the_cluster_s_words(tmp_path: Path) -> None:
    """And stops at the first that fails. The programs it starts only say here what they were given."""
    for name in ("spark-submit", "torchrun"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "{name} $*"\ncase "$*" in *index*) exit 7;; esac\n')
        program.chmod(0o755)
    where = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "SPARK_SUBMIT": "spark-submit --master yarn", "STAGE_OPTIONS": "--set a=1",
        "TORCHRUN": "torchrun --nnodes 2",
    }  # fmt: skip
    script = str(ROOT / "infra" / "launch" / "stages.sh")
    done = subprocess.run([script, "s.yaml"], env=where, capture_output=True, text=True, check=False)
    assert done.returncode == 7
    expected = [
        f"{'torchrun --nnodes 2' if stage is schemas.TRAIN else 'spark-submit --master yarn'} "
        f"jobs/{stage.name}.py --settings s.yaml --set a=1"
        for stage in schemas.STAGES
    ]
    assert done.stdout.splitlines() == expected[: [s.name for s in schemas.STAGES].index("index") + 1]
    unknown = subprocess.run([script, "s.yaml", "walk"], env=where, capture_output=True, text=True, check=False)
    assert (unknown.returncode, unknown.stdout) == (2, "")
