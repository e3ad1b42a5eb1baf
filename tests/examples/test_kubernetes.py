"""The Kubernetes job: its parts name each other, its command is one that the program takes, and its schemas."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from launch import ROOT, Illada

JOB = ROOT / "examples/kubernetes/job.yaml"


@pytest.fixture
def documents() -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all(JOB.read_text())}


def test_pods_find_the_first_one(documents: dict[str, Any]) -> None:
    """A pod of an Indexed Job is called JOB-INDEX.SUBDOMAIN, where a headless Service of the subdomain's name selects
    it by the label that the Job gives it."""
    service, job = documents["Service"], documents["Job"]
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert f"--rdzv-endpoint={name}-0.{pod['subdomain']}:29500" in pod["containers"][0]["args"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 128
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8


def test_its_command_starts_a_run(documents: dict[str, Any], illada: Illada, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry run of what each pod is told, on 64 to 128 nodes."""
    (container,) = documents["Job"]["spec"]["template"]["spec"]["containers"]
    program, *words = [*container["command"], *container["args"]]
    assert program == "illada"
    monkeypatch.chdir(ROOT)
    outcome = illada(*words, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "fp8" in outcome.out
    (config,) = (Path(word.partition("=")[2]) for word in words if word.startswith("--config="))
    assert (ROOT / config).is_file()


def test_against_the_schemas_of_kubernetes() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for document in yaml.safe_load_all(JOB.read_text()):
        validate.validate(document, "1.31", strict=True)
