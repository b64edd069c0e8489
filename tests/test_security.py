"""Nothing that is read can run, reach other files, or speak to a terminal; and no secret is kept or shown."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from rich.console import Console
from rich.table import Table

from infra.audit import bill_of_materials, pinned
from pipeline import report
from pipeline.contracts.config import load_settings
from pipeline.contracts.datasets import MANIFEST, Lineage, commit, open_manifest, write_shard
from pipeline.contracts.errors import DataError, SettingsError, StorageError
from pipeline.contracts.safety import HIDDEN, Redacting, printable, redact, secrets_in
from pipeline.contracts.storage import Storage
from tests.synthetic import shop_settings

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("pipeline", "model", "jobs", "infra")
SECRET, KEY_ID = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "AKIAIOSFODNN7EXAMPLE"

# ------------------------------------------------------------------------------------------------ nothing read can run

NEVER = {
    "pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load", "marshal.loads",
    "shelve.open", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen",
    "eval", "exec", "builtins.eval", "builtins.exec", "torch.jit.load", "torch.hub.load",
}  # fmt: skip


def dangers(source: str) -> Iterator[str]:
    """Calls that run what they read, by line."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = ast.unparse(node.func).partition(".")
        called = names.get(first, first) + dot + rest
        given = {keyword.arg: keyword.value for keyword in node.keywords}

        def says(name: str, value: bool, given: dict[str | None, ast.expr] = given) -> bool:
            found = given.get(name)
            return isinstance(found, ast.Constant) and found.value is value

        if called in NEVER or (called == "torch.load" and not says("weights_only", True)):
            yield f"line {node.lineno}: {called}"
        if called == "numpy.load" and "allow_pickle" in given and not says("allow_pickle", False):
            yield f"line {node.lineno}: numpy.load with pickles"
        if "shell" in given and not says("shell", False):
            yield f"line {node.lineno}: a shell"


def test_nothing_runs_what_it_reads() -> None:
    files = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    assert len(files) > 80
    found = [f"{path.relative_to(ROOT)} {danger}" for path in files for danger in dangers(path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(data)",
        "from pickle import load as get\nget(file)",
        "import torch\ntorch.load(file)",
        "import torch\ntorch.load(file, weights_only=False)",
        "import numpy as np\nnp.load(file, allow_pickle=True)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import os\nos.system(text)",
        "eval(text)",
    ],
)
def test_a_planted_danger_is_found(source: str) -> None:
    assert list(dangers(source))


def test_what_is_safe_is_let_through() -> None:
    safe = (
        "import torch, yaml, numpy as np\ntorch.load(f, weights_only=True)\nyaml.safe_load(t)\nmodel.eval()\nnp.load(f)"
    )
    assert list(dangers(safe)) == []


def test_a_checkpoint_that_would_run_something_is_not_loaded(tmp_path: Path) -> None:
    from model import checkpoint

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    buffer = io.BytesIO()
    torch.save({"lineage": Evil(), "state": 1}, buffer)
    assert checkpoint.decode(bytes(32) + buffer.getvalue(), Lineage("train", {}, {})) is None
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Evil()))
    assert (tmp_path / "ran").exists(), "it would have"


def test_an_array_that_would_run_something_is_not_loaded() -> None:
    from pipeline.ann.building import _from_npy

    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        _from_npy(buffer.getvalue())


# ------------------------------------------------------------------------------------------------ no other files


def changed_manifest(storage: Storage, change: Any) -> None:
    lineage = Lineage("test", {}, {})
    commit(storage, "numbers", [write_shard(storage, "numbers", 0, pa.table({"id": [1]}), lineage)], lineage)
    tree = json.loads(storage.read_bytes(f"numbers/{MANIFEST}"))
    change(tree)
    storage.write_bytes(f"numbers/{MANIFEST}", json.dumps(tree).encode())


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", "", "a/b", "a\\..\\b", ".hidden", "a\x00b", "a\n"])
def test_a_manifest_leads_to_no_file_outside_its_folder(storage: Storage, name: str) -> None:
    changed_manifest(storage, lambda tree: tree["shards"][0].update(name=name))
    with pytest.raises(DataError, match="is not a manifest"):
        open_manifest(storage, "numbers")


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.update(dataset="../other"),
        lambda tree: tree.update(dataset="others"),
        lambda tree: tree["shards"][0].update(sha256="0" * 64),
        lambda tree: tree["shards"][0].update(rows=2),
        lambda tree: tree["shards"][0].update(bytes=-1),
        lambda tree: tree.update(metadata={"dtype": "O"}),
        lambda tree: tree.update(shards={"a": 1}),
    ],
)
def test_a_manifest_that_was_changed_by_hand_is_refused(storage: Storage, change: Any) -> None:
    changed_manifest(storage, change)
    with pytest.raises(DataError, match="is not a manifest"):
        open_manifest(storage, "numbers")


# ------------------------------------------------------------------------------------------------ no secrets


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("resources.run", f"s3://{KEY_ID}:{SECRET}@bucket/run"),
        ("resources.run", "sftp://user:pass@host/run"),
        ("task.data.previous", "https://host/run?X-Amz-Signature=abc123"),
        ("task.data.previous", "abfs://c@a.dfs.core.windows.net/run?sig=abc"),
        ("task.data.interactions.paths", f"s3://bucket/{KEY_ID}/x.parquet"),
        ("resources.spark.conf", f"{{spark.hadoop.fs.s3a.secret.key: {SECRET}}}"),
        ("resources.spark.conf", f"{{spark.driver.extraJavaOptions: -Daws.secretAccessKey={SECRET}}}"),
        ("resources.aws_secret_access_key", SECRET),
        ("resources.aws_session_token", SECRET),
    ],
)
def test_settings_with_a_secret_are_refused_and_do_not_show_it(tmp_path: Path, setting: str, value: str) -> None:
    file = tmp_path / "pinsage.yaml"
    file.write_text(yaml.safe_dump(shop_settings(tmp_path, tmp_path / "run")))
    assert load_settings(str(file))
    with pytest.raises(SettingsError, match=f"{setting}.* holds a key or a secret.*environment") as caught:
        load_settings(str(file), [f"{setting}={value}"])
    for secret in (SECRET, KEY_ID, "pass@", "abc123"):
        assert secret not in str(caught.value)


def test_settings_that_say_where_a_secret_is_are_let_through() -> None:
    conf = {
        "spark.hadoop.fs.s3a.aws.credentials.provider": "com.amazonaws.auth.DefaultAWSCredentialsProviderChain",
        "spark.kubernetes.driver.secretKeyRef.AWS_SECRET_ACCESS_KEY": "store:secret",
        "spark.kubernetes.executor.secrets.store": "/mnt/secrets",
        "spark.kubernetes.authenticate.submission.oauthTokenFile": "/var/run/token",
    }
    tree = {"resources": {"run": "hdfs://host:9000/a@b", "spark": {"conf": conf}}, "user": "token", "key": "sku"}
    assert list(secrets_in(tree)) == []


def test_an_address_with_a_secret_is_not_opened_and_not_shown() -> None:
    with pytest.raises(StorageError, match="holds a key or a secret") as caught:
        Storage(f"s3://{KEY_ID}:{SECRET}@bucket/run")
    assert SECRET not in str(caught.value)
    assert KEY_ID not in str(caught.value)


def test_errors_and_log_lines_show_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "from-the-environment")
    said = f"PUT s3://me:{SECRET}@b?token=abcdef by {KEY_ID}, secret_key={SECRET}, from-the-environment"
    for text in (redact(said), str(DataError(said))):
        assert not any(secret in text for secret in (SECRET, KEY_ID, "abcdef", "from-the-environment"))
        assert text.count(HIDDEN) == 5
    record = logging.LogRecord("a", logging.INFO, "f", 1, "put %s\x1b[2J", (said,), None)
    assert Redacting().filter(record)
    assert SECRET not in record.getMessage()
    assert "\x1b" not in record.getMessage()
    assert redact("check the address and the credentials; token 7 of 9, key g3-02: unknown") == (
        "check the address and the credentials; token 7 of 9, key g3-02: unknown"
    )


def test_spark_hides_secrets_in_its_pages_and_logs(spark: Any) -> None:
    pattern = spark.getConf().get("spark.redaction.regex")
    matches = spark._jvm.java.util.regex.Pattern.compile(pattern)
    for name in ("spark.hadoop.fs.s3a.secret.key", "AWS_SESSION_TOKEN", "fs.azure.account.key", "spark.my.password"):
        assert matches.matcher(name).find(), name
    assert not matches.matcher("spark.driver.memory").find()


# ------------------------------------------------------------------------------------------------ terminals

LOUD = "\x1b]0;owned\x07\x1b[2Jred\r\b\u202egpj\x9b31m"


def test_a_key_does_not_speak_to_the_terminal() -> None:
    table = Table("key")
    table.add_row(report.plain(f"{LOUD}[bold]x[/]"))
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=False, width=100)
    console.print(table)
    console.print(str(DataError(f"item {LOUD} is unknown")), markup=False)
    assert not set(stream.getvalue()) & set("\x1b\x07\r\b\u202e\x9b")
    assert "[bold]x[/]" in stream.getvalue()
    assert printable("two\nlines\tand é 日本") == "two\nlines\tand é 日本"


# ------------------------------------------------------------------------------------------------ what is installed


def test_the_bill_of_materials_names_every_pin_once() -> None:
    pins = list(pinned((ROOT / "constraints.txt").read_text()))
    listed = json.loads(bill_of_materials(pins))
    assert listed["bomFormat"] == "CycloneDX"
    assert sorted(part["purl"] for part in listed["components"]) == sorted(f"pkg:pypi/{n}@{v}" for n, v in pins)
    assert len({name for name, _ in pins}) == len(pins) > 100
