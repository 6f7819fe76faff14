"""The workflows run what is there, with few rights and within a time; forms ask for the doctor."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.yml"))


def jobs(text):
    """Each job's lines; a job's name is indented by two."""
    _, _, rest = text.partition("\njobs:\n")
    return re.split(r"^  (?=[\w-]+:$)", rest, flags=re.MULTILINE)[1:]


def test_there_are_four():
    assert [path.stem for path in WORKFLOWS] == ["ci", "docs", "nightly", "wheels"]
    assert [len(jobs(path.read_text())) for path in WORKFLOWS] == [2, 2, 3, 4]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_rights_and_times(path):
    text = path.read_text()
    assert "\npermissions:\n  contents: read\n" in text
    for job in jobs(text):
        assert "timeout-minutes:" in job, job
        for step in job.split("- uses: ")[1:]:
            action, _, version = step.split()[0].partition("@")
            assert re.fullmatch(r"v\d+(\.\d+)*", version), action
            if action == "actions/checkout":
                assert "persist-credentials: false" in step, job
        if "write" in re.sub(r"#.*", "", job):
            assert "environment:" in job  # where a person approves, or pages are


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_they_run_is_there(path):
    text = path.read_text()
    scripts = re.findall(r"python ((?:tests|examples)/[\w/]+\.py)", text)
    scripts += re.findall(r"run: (\.ci/\w+)", text)
    for names in re.findall(r"for name in ([\w ]+); do", text):
        scripts += [f"tests/benchmarks/{name}.py" for name in names.split()]
    assert [script for script in scripts if not (ROOT / script).is_file()] == []
    watched = re.findall(r"^      - (\S+/\S+|pyproject\.toml)$", text, flags=re.MULTILINE)
    assert [name for name in watched if not (ROOT / name.removesuffix("/**")).exists()] == []


def test_a_bug_comes_with_what_doctor_prints():
    form = (ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text()
    (field,) = [part for part in form.split("- type: ") if "id: doctor" in part]
    assert "python -m bitnet_jax doctor" in field
    assert "required: true" in field
