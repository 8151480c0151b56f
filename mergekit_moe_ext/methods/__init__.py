"""Every merge method of this package, one file each."""

from mergekit_moe_ext.methods.caem import CAEM
from mergekit_moe_ext.methods.dare import DARE
from mergekit_moe_ext.methods.fast_ties import FAST_TIES
from mergekit_moe_ext.methods.hetero_moe import HETERO_MOE
from mergekit_moe_ext.methods.moe import MOE_METHODS
from mergekit_moe_ext.methods.seq_moe import SEQ_MOE
from mergekit_moe_ext.methods.wemoe import WEMOE_METHODS

METHODS = (*MOE_METHODS, CAEM, SEQ_MOE, HETERO_MOE, *WEMOE_METHODS, FAST_TIES, DARE)
