"""What is said of the hosts' versions, and that the doctor's self-test notices a host that treats
caches oddly.
"""

import os
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from _mergekit_moe_ext_common import selftest, versions
from _mergekit_moe_ext_common.versions import TESTED, verdict
from mergekit_moe_ext.selftest import sequence_mixture, weight_ensembling_model
from peft_routing.selftest import routed_adapter
from tests.conftest import start

ROOT = Path(__file__).parents[1]
MODELS = {
    "a sequence mixture": sequence_mixture,
    "an ensemble": weight_ensembling_model,
    "an adapter": routed_adapter,
}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "missing"),
        ("5.20.9", "older than tested"),
        ("5.21.0", "tested"),
        ("5.24.0", "tested"),
        ("5.24.0+cu130", "tested"),
        ("5.24.1", "newer than tested"),
        ("5.25.0.dev0", "newer than tested"),
        ("6.0.0", "newer than tested"),
    ],
)
def test_verdict(found, said, monkeypatch):
    monkeypatch.setitem(TESTED, "transformers", ("5.21.0", "5.24.0"))
    assert verdict("transformers", found) == said


@pytest.mark.parametrize(
    ("transformers", "torch", "status"),
    [
        ("5.23.0", "2.10.0", 0),
        ("5.25.0", "2.10.0", versions.NEWER),
        ("5.25.0", "3.0.0", versions.NEWER),
        ("5.25.0", "2.0.0", 1),
        (None, "2.10.0", 1),
    ],
)
def test_exit_status(transformers, torch, status, monkeypatch):
    """What the checks of every change tell an unclaimed version by."""
    monkeypatch.setattr(
        versions, "installed", lambda: {"transformers": transformers, "torch": torch}
    )
    monkeypatch.setitem(TESTED, "transformers", ("5.21.0", "5.24.0"))
    monkeypatch.setitem(TESTED, "torch", ("2.7.0", "2.14.1"))
    try:
        versions.main()
    except SystemExit as end:
        assert end.code == status
    else:
        assert status == 0


def pinned(file):
    lines = (ROOT / file).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {each.name: str(each.specifier).removeprefix("==") for each in requirements}


def test_only_the_methods_around_loading_want_a_newer_peft():
    """That loading itself works is in tests/peft_routing/test_saving.py."""
    said = versions.remark_on_native_adapters({"transformers": "5.24.0", "peft": "0.21.2"})
    assert "loads adapters itself" in said and "`set_adapter`, want peft 0.22.0" in said
    for transformers, peft in (("5.23.0", "0.21.2"), ("5.24.0", "0.22.0"), (None, "0.21.2")):
        assert not versions.remark_on_native_adapters({"transformers": transformers, "peft": peft})


def test_what_is_claimed_is_what_is_tested():
    """pyproject.toml, both constraint files, the table in the docs and the file beside the weights
    say the same.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    claims = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}
    table = (ROOT / "docs" / "versions.md").read_text()
    newest, oldest = pinned("constraints.txt"), pinned("constraints-oldest.txt")
    oldest["torch"] = re.search(
        r"^OLDEST_TORCH \?= torch==(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )[1]
    for host, (first, last) in TESTED.items():
        lower = [part.version for part in claims[host] if part.operator == ">="]
        assert lower == [first], host
        assert oldest[host] == first, host
        assert Version(first) <= Version(newest[host]) <= Version(last), host
        assert re.search(rf"\| {host} \| {re.escape(first)} \| {re.escape(last)} \|", table), host
    from mergekit_moe_ext.modeling.host_cache import TRIED

    assert " to ".join(TESTED["transformers"]) == TRIED


def test_a_newer_host_gives_one_warning_and_no_more():
    """In a process where the newest of transformers that was tested is an old one."""
    code = (
        "import _mergekit_moe_ext_common.versions as v; v.TESTED['transformers'] = ('4.0.0', "
        "'4.1.0'); import mergekit_moe_ext, peft_routing"
    )
    said = start("python", "-W", "always", "-c", code).stderr
    assert said.count("was not tested with transformers") == 1
    assert "(tested up to 4.1.0)" in said and "mergekit-moe-ext doctor" in said
    result = start("python", "-W", "error::UserWarning", "-c", code)
    assert result.returncode == 0, result.stderr
    quiet = start(
        "python",
        "-W",
        "always",
        "-c",
        "import mergekit_moe_ext, peft_routing",
        env=dict(os.environ),
    )
    assert "was not tested with" not in quiet.stderr or versions.installed() != pinned(
        "constraints.txt"
    )


@pytest.mark.hosts
@pytest.mark.parametrize("name", MODELS)
def test_the_selftest_passes(name):
    assert selftest.difference(MODELS[name]()) < selftest.TOLERANCE


@pytest.mark.parametrize("name", ["an ensemble", "an adapter"])
def test_the_selftest_notices_a_choice_that_is_made_anew(name, monkeypatch):
    """With the guard of the seam off, so that nothing but the numbers can tell."""
    import mergekit_moe_ext.modeling.wemoe_calls as ensembles
    import peft_routing.calls as adapters

    for module in (ensembles, adapters):
        monkeypatch.setattr(module, "cache_in", lambda values: None)
        monkeypatch.setattr(module, "begin_sequences", lambda model: None)
    assert selftest.difference(MODELS[name]()) > 10 * selftest.TOLERANCE


def test_the_doctor_says_what_is_installed_and_tries_it():
    result = start("mergekit-moe-ext", "doctor")
    assert result.returncode == 0, result.stdout
    for host, found in versions.installed().items():
        assert re.search(
            rf"^{host} +{re.escape(found)} +{verdict(host, found)} ",
            result.stdout,
            flags=re.MULTILINE,
        )
    assert result.stdout.count("generates with a cache as without one") == 3


def test_the_doctor_fails_where_generation_is_wrong(tmp_path):
    """A sitecustomize that has transformers lose the cache after every step."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if any('selftest' in word for word in sys.orig_argv):\n"
        "    from transformers import GenerationMixin\n"
        "    stock = GenerationMixin._update_model_kwargs_for_generation\n"
        "    def losing(self, *args, **kwargs):\n"
        "        kept = stock(self, *args, **kwargs)\n"
        "        return {k: v for k, v in kept.items() if k not in ('cache', 'past_key_values')}\n"
        "    GenerationMixin._update_model_kwargs_for_generation = losing\n"
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = start("mergekit-moe-ext", "doctor", env={**os.environ, "PYTHONPATH": paths})
    assert result.returncode == 1
    assert result.stdout.count("FAIL") == 3 and "did not come back" in result.stdout
    assert "pip install 'transformers==" in result.stdout
