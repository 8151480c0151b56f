"""What lies beside the weights of every model that is written here, in one place.

Our own modelling files where the architecture is ours; no reference to code of anybody else's
unless the user trusts it; and, where the architecture is of transformers, keys for its version 4.
"""

import shutil
from pathlib import Path

from transformers import PretrainedConfig

from mergekit_moe_ext.merging.foreign_code import settle_code
from mergekit_moe_ext.merging.transformers4 import add_old_keys
from mergekit_moe_ext.modeling import modeling_files


def complete_model(
    directory: Path,
    config: PretrainedConfig,
    source: Path,
    source_name: str,
    *,
    is_trusted: bool = False,
) -> None:
    """Brings a written model's directory into order; the card must be there already, if any is to.

    `source` is the directory that its other files came from, and `is_trusted` whether the user lets
    the code in it run.
    """
    architecture = (config.architectures or [""])[0]
    own_files = modeling_files(architecture)
    for file in own_files:
        shutil.copy(file, directory / file.name)
    settle_code(
        directory,
        [file.name for file in own_files],
        source,
        source_name,
        is_trusted=is_trusted,
    )
    if not own_files:  # ours need transformers 5 themselves
        add_old_keys(directory, config)
