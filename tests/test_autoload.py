"""How our hosts find us, in real processes: every order of imports, and every way it can go
wrong. What they then do is in `test_stock_tools.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

from _mergekit_moe_ext_autoload import KNOWN
from _mergekit_moe_ext_common.versions import TESTED
from tests.conftest import BIN, document, read_tensors, same_files, start

ROOT = Path(__file__).parents[1]
LIVE = """
import sys, mergekit.merge, mergekit.merge_methods
from mergekit.merge import run_merge
assert run_merge is mergekit.merge.run_merge and hasattr(run_merge, "__wrapped__"), run_merge
assert mergekit.merge_methods.get("moe_ties").spec.name == "moe_ties"
assert mergekit.merge.MergePlanner.__module__ == "mergekit_moe_ext.merging.planner"
assert type(mergekit.merge) is type(sys)
"""
IMPORTED_FIRST = [
    "from mergekit.merge import run_merge as first; from mergekit.merge import run_merge; assert "
    "first is run_merge",
    "import mergekit.merge",
    "import mergekit.merge as m; m.run_merge",
    "import torch",
    "import transformers, peft",
    "import mergekit_moe_ext",
    "import mergekit_moe_ext.merging.method",
    "import mergekit.merge_methods",
    "import mergekit.merge_methods.sce",
    "import mergekit.scripts.run_yaml",
]


def python(code, **environment):
    return start("python", "-c", code, env={**os.environ, **environment})


@pytest.mark.parametrize("first", IMPORTED_FIRST)
def test_every_order_of_imports(first):
    result = python(first + LIVE)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr


@pytest.mark.parametrize(
    "first", ["import mergekit_moe_ext", "import mergekit.merge, mergekit_moe_ext"]
)
def test_without_autoload_importing_the_package_is_enough(first):
    result = python(first + LIVE, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert result.returncode == 0, result.stderr


def test_only_importing_torch_loads_nothing_of_ours_but_the_hook():
    code = (
        "import sys, torch; print(sorted(m for m in sys.modules if 'mergekit' in m or "
        "m.startswith('peft')))"
    )
    assert python(code).stdout.strip() == "['_mergekit_moe_ext_autoload']"
    assert python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0").stdout.strip() == "[]"


def test_a_stubbed_mergekit_does_not_break_torch():
    stub = (
        "import sys, types; sys.modules['mergekit.merge'] = types.SimpleNamespace()\nimport torch"
    )
    assert python(stub).returncode == 0


def test_the_hook_imports_only_the_standard_library():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import _mergekit_moe_ext_autoload as a; "
        "a.activate()"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(ROOT)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture
def configured(here):
    (here / "linear.yml").write_text(yaml.safe_dump(document("linear", parameters={"weight": 1.0})))
    (here / "ties.yml").write_text(
        yaml.safe_dump(document("moe_ties", parameters={"density": 0.8}))
    )
    return here


def test_stock_methods_write_the_same_files_as_without_us(configured):
    for out, autoload in (("with", "1"), ("without", "0")):
        (configured / out).mkdir()
        environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
        result = start("mergekit-yaml", "linear.yml", f"{out}/merged", env=environment)
        assert result.returncode == 0, result.stderr
    assert same_files(configured / "with" / "merged", configured / "without" / "merged")
    # mergekit's card lists the models in the order of a set
    cards = [
        Path(out, "merged", "README.md").read_text().splitlines() for out in ("with", "without")
    ]
    assert sorted(cards[0]) == sorted(cards[1])


def test_the_ways_to_run_a_merge_agree(configured):
    off = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    bound_before = (
        "from mergekit.merge import run_merge; import mergekit_moe_ext, yaml\n"
        "from mergekit.config import MergeConfiguration; from mergekit.options import "
        "MergeOptions\n"
        "config = MergeConfiguration.model_validate(yaml.safe_load(open('ties.yml')))\n"
        "run_merge(config, 'bound', MergeOptions())"
    )
    stock = start("mergekit-yaml", "ties.yml", "stock")
    ours = start("mergekit-moe-ext", "yaml", "ties.yml", "ours", env=off)
    bound = start("python", "-c", bound_before, env=off)
    refused = start("mergekit-yaml", "ties.yml", "refused", env=off)
    assert stock.returncode == ours.returncode == bound.returncode == 0, (
        stock.stderr + ours.stderr + bound.stderr
    )
    assert same_files(configured / "stock", configured / "ours")
    assert "run_merge was imported before mergekit_moe_ext" in bound.stderr
    expected, got = read_tensors(configured / "stock"), read_tensors(configured / "bound")
    assert expected.keys() == got.keys() and all(
        tensor.equal(got[name]) for name, tensor in expected.items()
    )
    assert refused.returncode != 0 and "Unimplemented merge method moe_ties" in refused.stderr


# As PEFT and transformers would be if they were newer than we know.
NEWER = """
import importlib.metadata
installed = importlib.metadata.version
importlib.metadata.version = lambda name: {newer!r}.get(name) or installed(name)
import torch, peft, transformers
"""


def test_an_unknown_peft_is_left_alone_and_told_only_who_asks_for_our_type():
    code = NEWER.format(newer={"peft": "0.22.0"})
    idle = python(code + "assert 'LORA' in peft.PEFT_TYPE_TO_CONFIG_MAPPING")
    assert idle.returncode == 0 and "Warning" not in idle.stderr, idle.stderr
    asked = (
        "assert 'ROUTED_LORA' not in peft.PEFT_TYPE_TO_CONFIG_MAPPING\n"
        "assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING.get('ROUTED_LORA') is None\n"
        "assert 'peft_routing' not in sys.modules\n"
        "try: peft.get_peft_config({'peft_type': 'ROUTED_LORA'})\n"
        "except KeyError as error: assert 'it knows >=0.21.2,<0.22' in str(error.__cause__)\n"
        "else: raise AssertionError\n"
    )
    result = python(code + "import sys\n" + asked)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("RuntimeWarning") == 1, result.stderr
    assert "`import peft_routing` has it tried nonetheless" in result.stderr
    tried = "import peft_routing\nassert 'ROUTED_LORA' in peft.PEFT_TYPE_TO_CONFIG_MAPPING"
    result = python(code + tried)
    assert result.returncode == 0 and "RuntimeWarning" not in result.stderr, result.stderr


def test_an_unknown_transformers_is_left_alone():
    asked = "assert 'wemoe_llama' not in transformers.CONFIG_MAPPING"
    result = python(NEWER.format(newer={"transformers": "6.0.0"}) + asked)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("RuntimeWarning") == 1 and "it knows >=5.21,<6" in result.stderr


def test_the_autoload_knows_the_versions_that_were_tested():
    for host, (first, end) in KNOWN.items():
        oldest, newest = map(Version, TESTED[host])
        assert Version(first) == oldest and newest < Version(end)


# The tests below install into an environment of their own, which borrows everything but this
# package.


WHEEL: list[str] = []
EDITABLE = ["-e"]


@pytest.fixture(scope="module", params=[WHEEL, EDITABLE], ids=["wheel", "editable"])
def fresh(request, tmp_path_factory):
    import sysconfig
    import venv

    home = tmp_path_factory.mktemp("fresh")
    source = home / "source"
    files = start("git", "-C", ROOT, "ls-files", "-co", "--exclude-standard").stdout.split()
    for name in files:
        if name.startswith(
            ("mergekit_moe_ext/", "peft_routing/", "_mergekit", "pyproject", "README", "LICENSE")
        ):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    venv.create(home / "env", with_pip=False)
    python = home / "env" / "bin" / "python"
    site = Path(
        start(
            python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        ).stdout.strip()
    )
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-build-isolation",
    ]
    installed = start(*pip, "-q", *request.param, source, env={**os.environ, "PIP_NO_INDEX": "1"})
    assert installed.returncode == 0, installed.stderr
    return python, site, source


def in_fresh(python, code, cwd=None):
    return start(python, "-W", "default::RuntimeWarning", "-c", code, cwd=cwd or python.parent)


def test_a_fresh_install_is_found(fresh, configured):
    python, _site, _source = fresh
    found = in_fresh(python, LIVE + "\nimport mergekit_moe_ext; print(mergekit_moe_ext.__file__)")
    assert found.returncode == 0, found.stderr
    assert str(ROOT) not in found.stdout
    merged = start(python, BIN / "mergekit-yaml", "ties.yml", "out", cwd=configured)
    assert merged.returncode == 0, merged.stderr
    assert (configured / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("fresh", [WHEEL], ids=["wheel"], indirect=True)
def test_an_unknown_mergekit_turns_us_off_with_one_warning(fresh):
    python, site, _source = fresh
    unknown = site / "mergekit-0.2.0.dist-info"
    unknown.mkdir()
    (unknown / "METADATA").write_text("Metadata-Version: 2.1\nName: mergekit\nVersion: 0.2.0\n")
    try:
        result = in_fresh(
            python, "import mergekit.merge as m; assert not hasattr(m.run_merge, '__wrapped__')"
        )
        doctor = start(python.parent / "mergekit-moe-ext", "doctor", cwd=site)
    finally:
        (unknown / "METADATA").unlink()
        unknown.rmdir()
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("RuntimeWarning") == 1 and "it knows >=0.1.5,<0.2" in result.stderr
    assert doctor.returncode == 1 and "FAIL  this mergekit" in doctor.stdout


@pytest.mark.parametrize("fresh", [WHEEL], ids=["wheel"], indirect=True)
def test_a_broken_install_leaves_torch_and_mergekit_alone(fresh):
    python, site, source = fresh
    package = next(
        p for p in (site / "mergekit_moe_ext", source / "mergekit_moe_ext") if p.exists()
    )
    init = package / "__init__.py"
    whole = init.read_text()
    init.write_text("this is not Python")
    try:
        result = in_fresh(
            python,
            "import torch, mergekit.merge as m, mergekit.merge_methods as mm\n"
            "assert not hasattr(m.run_merge, '__wrapped__')\n"
            "assert mm.get('linear')",
        )
    finally:
        init.write_text(whole)
    assert result.returncode == 0, result.stderr
    assert (
        result.stderr.count("RuntimeWarning") == 1 and "mergekit-moe-ext stays off" in result.stderr
    )
