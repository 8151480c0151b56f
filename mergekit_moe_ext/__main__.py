"""`python -m mergekit_moe_ext`, and `accelerate launch -m mergekit_moe_ext`: the `mergekit-moe-ext`
command.
"""

from mergekit_moe_ext.cli import main

main(prog_name="mergekit-moe-ext")
