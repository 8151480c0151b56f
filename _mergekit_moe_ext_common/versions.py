"""The versions of the hosts that this release was tested with, and one warning where a newer one
is installed.

`docs/versions.md` says what was run on them. The lower ends are those of `pyproject.toml`, the
upper ends the newest that the compact suite (`make newest`) has passed on.
"""

import contextlib
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

# Oldest and newest of each.
TESTED = {
    "transformers": ("5.21.0", "5.24.0"),
    "peft": ("0.21.2", "0.21.2"),
    "mergekit": ("0.1.5", "0.1.5"),
    "torch": ("2.7.0", "2.15.0"),
    "accelerate": ("1.15.0", "1.15.0"),
    "datasets": ("4.0.0", "5.2.0"),
}
# From this transformers on its own methods for adapters want this PEFT, which is not on the package
# index yet. `model.load_adapter` does without.
_NATIVE_ADAPTERS_SINCE = "5.24.0"
_NATIVE_ADAPTERS_WANT = "0.22.0"
_has_warned = False
# The exit status of this module where a host is newer than the table says, and none is older.
NEWER = 3


def installed() -> dict[str, str | None]:
    """The version of each host that is installed here, by its name; None where it is missing."""
    versions: dict[str, str | None] = {}
    for host in TESTED:
        try:
            versions[host] = version(host)
        except PackageNotFoundError:
            versions[host] = None
    return versions


def verdict(host: str, release: str | None) -> str:
    """A verdict on a host's release: "tested", "newer than tested", "older than tested" or
    "missing" (None).
    """
    if release is None:
        return "missing"
    # Builds for one device or another ("2.13.0+cpu") are of the same release.
    public = Version(Version(release).public)
    oldest, newest = TESTED[host]
    if public < Version(oldest):
        return "older than tested"
    if public > Version(newest):
        return "newer than tested"
    return "tested"


def remark_on_native_adapters(versions: dict[str, str | None]) -> str:
    """A sentence on adapters that transformers loads itself, with these versions; "" if all of its
    methods work.
    """
    transformers = versions["transformers"]
    peft = versions["peft"]
    if transformers is None or peft is None:
        return ""
    is_refused = Version(transformers) >= Version(_NATIVE_ADAPTERS_SINCE)
    if is_refused and Version(peft) < Version(_NATIVE_ADAPTERS_WANT):
        return (
            f"transformers {transformers} loads adapters itself (`model.load_adapter`), and its "
            f"methods for them, such as `set_adapter`, want peft {_NATIVE_ADAPTERS_WANT} or newer, "
            f"where this is {peft}: for those load by PEFT, "
            "`PeftModel.from_pretrained(base, directory)`"
        )
    return ""


def warn_of_newer_hosts() -> None:
    """One warning in a process, which names every host that is newer than those tested; nothing is
    refused.
    """
    global _has_warned
    if _has_warned:
        return
    _has_warned = True
    newer = []
    for host, release in installed().items():
        if verdict(host, release) == "newer than tested":
            newer.append(f"{host} {release} (tested up to {TESTED[host][1]})")
    if not newer:
        return
    with contextlib.suppress(Warning):  # where warnings are errors
        warnings.warn(
            f"mergekit-moe-ext was not tested with {', '.join(newer)}. `mergekit-moe-ext doctor` "
            "tries what is installed here",
            UserWarning,
            stacklevel=3,
        )


def main() -> None:
    """`python -m _mergekit_moe_ext_common.versions` exits with 0 where every host was tested, with
    NEWER where some are newer and the others were tested, and with 1 where one is older or missing.
    """
    verdicts = []
    for host, release in installed().items():
        host_verdict = verdict(host, release)
        if host_verdict == "tested":
            continue
        verdicts.append(host_verdict)
        print(f"{host} {release or '-'}: {host_verdict} ({' to '.join(TESTED[host])})")
    if not verdicts:
        return
    is_only_newer = set(verdicts) == {"newer than tested"}
    sys.exit(NEWER if is_only_newer else 1)


if __name__ == "__main__":
    main()
