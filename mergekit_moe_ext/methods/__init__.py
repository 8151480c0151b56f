"""Every merge method of this package, one file each."""

from mergekit_moe_ext.methods.dare import DARE
from mergekit_moe_ext.methods.fast_ties import FAST_TIES
from mergekit_moe_ext.methods.moe import MOE_METHODS

METHODS = (*MOE_METHODS, FAST_TIES, DARE)
