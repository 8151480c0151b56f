"""Every merge method of this package, one file each."""

from mergekit_moe_ext.caem.method import CAEM
from mergekit_moe_ext.growing.method import MOE, REMOVE_EXPERTS
from mergekit_moe_ext.sequence.hetero_moe import HETERO_MOE
from mergekit_moe_ext.sequence.seq_moe import SEQ_MOE
from mergekit_moe_ext.tensor.dare import DARE
from mergekit_moe_ext.tensor.fast_ties import FAST_TIES
from mergekit_moe_ext.upcycling.method import MOE_METHODS
from mergekit_moe_ext.upcycling.moe_lora import MOE_LORA
from mergekit_moe_ext.wemoe.method import WEMOE_METHODS

METHODS = (
    MOE,
    *MOE_METHODS,
    MOE_LORA,
    REMOVE_EXPERTS,
    CAEM,
    SEQ_MOE,
    HETERO_MOE,
    *WEMOE_METHODS,
    FAST_TIES,
    DARE,
)
