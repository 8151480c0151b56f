"""Merge methods for mergekit that build and merge mixtures of experts.

Importing this package makes the methods known to mergekit (they are already where torch's autoload is
on, which is the default): `mergekit.merge.run_merge` then takes them. It also makes the architectures of
`modeling/` known to transformers, so that its Auto classes load them without `trust_remote_code`.

>>> import mergekit_moe_ext
>>> from mergekit.merge import run_merge
"""

from _mergekit_moe_ext_autoload import activate
from _mergekit_moe_ext_common.versions import warn_of_newer_hosts
from mergekit_moe_ext import modeling  # noqa: F401  (registers the architectures)

__version__ = "0.1.0"
__all__ = ["__version__"]

warn_of_newer_hosts()
activate()
# Before any module of ours: they import it, and it makes us known while it loads, which takes all of them.
import mergekit.merge_methods  # noqa: E402, F401
