"""What a package index, a citation and the workflow say of this package."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from build.util import project_wheel_metadata

import mergekit_moe_ext

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def metadata():
    """The wheel's metadata, made by the build backend."""
    return project_wheel_metadata(ROOT, isolated=False)


def test_the_version_stands_in_one_place(metadata):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert metadata["Version"] == mergekit_moe_ext.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == mergekit_moe_ext.__version__


def test_the_changelog_has_the_version_and_its_day_below_what_is_unreleased():
    text = (ROOT / "CHANGELOG.md").read_text()
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = f"[{citation['version']}] - {citation['date-released']}"
    assert sections[:2] == ["[Unreleased]", released]


def test_an_index_shows_the_readme_without_a_dead_link(metadata):
    """The repository's README has links to files; its copy on an index has none."""
    readme = (ROOT / "README.md").read_text()
    files = [target for _, target in LINK.findall(readme) if not target.startswith(("http", "#"))]
    assert len(files) > 20
    for target in files:
        assert (ROOT / target.partition("#")[0]).exists(), target
    shown = metadata.get_payload() or metadata["Description"]
    remote = [target for _, target in LINK.findall(shown) if not target.startswith("#")]
    assert remote and all(target.startswith("https://") for target in remote)
    assert "(`docs/caem.md`)" in shown


def test_the_workflow_runs_the_pythons_that_are_claimed(metadata):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    tried = workflow["jobs"]["checks"]["strategy"]["matrix"]["python"]
    claims = []
    for classifier in metadata.get_all("Classifier"):
        version = re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", classifier)
        if version:
            claims.append(version[1])
    assert claims == tried
    assert metadata["Requires-Python"] == f">={tried[0]}"


def test_the_citation_names_every_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    papers = citation["references"]
    assert len(papers) == 5
    for paper in papers:
        assert paper["url"].startswith("https://"), paper["title"]
        # A submission has no year yet.
        assert "year" in paper or paper["status"] == "submitted", paper["title"]
