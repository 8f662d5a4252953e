"""The private names that the recipe (python/mft) uses. They may change with any version.

Each line says what the recipe needs the name for. tests/test_imports.py checks that the recipe imports no other private
name, and that it uses all of these.
"""
# ruff: noqa: I001  (the order is by purpose)

# What runs here
from .backends.cpu import path_taken as path_taken  # `mft env` shows the instruction set and why
from .backends.processor import this_processor as this_processor  # results name the machine that made them
from .backends.table import asked_for as asked_for  # `mft env` shows what MFT_KERNELS asks for
from .backends.table import registered as registered  # codes are decoded by the cpu backend if it is there

# `mft env --measure`
from .eager import eager_grad_scores as eager_grad_scores  # our kernels against plain PyTorch: d_scores,
from .eager import eager_grad_x as eager_grad_x  # d_x,
from .eager import eager_linear as eager_linear  # and the forward
from .testing import Inputs as Inputs  # the operands that are timed: their class,
from .testing import random_inputs as random_inputs  # and what makes them
from .timing import Samples as Samples  # milliseconds by competitor
from .timing import median_ratio as median_ratio  # round by round, so that noise hits both alike
from .timing import time_within as time_within  # as many rounds as a time limit allows

# Which layers fit, and what replaces them
from .layers.attention import projections as projections  # the linears of an nn.MultiheadAttention
from .layers.attention import why_not_split as why_not_split  # an attention that cannot be masked, with the reason
from .layers.maskable import has_slow_path as has_slow_path  # a parent that leaves its fast path for a masked child
from .layers.maskable import why_lost as why_lost  # a changed forward that a replacement would lose
from .layers.maskable import why_no_mask as why_no_mask  # a linear that cannot be masked, with the reason
from .layers.maskable import why_no_scores as why_no_scores  # a weight that cannot have scores, with the reason
from .layers.maskable import why_not_there as why_not_there  # a parent that reads the weight itself
from .layers.shells import filled as filled  # converting and merging put parameters into copies of modules,
from .layers.shells import linear_on as linear_on  # make an nn.Linear without a copy of its weight,
from .layers.shells import copy_without as copy_without  # and take parameters out

# Masks and their scores
from .mask.masking import CurrentMask as CurrentMask  # a mask with its threshold and signs
from .mask.masking import current_mask as current_mask  # PEFT's and quantised layers select as MaskedLinear does
from .mask.scores import Scores as Scores  # a budget remembers its threshold until scores change:
from .mask.scores import State as State  # the class of what it compares,
from .mask.scores import state as state  # their state then,
from .mask.scores import still as still  # and whether they are in it now
from .mask.scores import watch as watch  # makes plain parameters tell when they are written
from .mask.shared_threshold import AddUp as AddUp  # a budget over processes adds up counts
from .mask.shared_threshold import one_process as one_process  # or leaves them as they are
from .mask.shared_threshold import part_thresholds as part_thresholds  # thresholds of matrices that processes share
from .mask.shared_threshold import shared_threshold as shared_threshold  # one threshold for all layers of a budget
from .ops.checks import NonFiniteScores as NonFiniteScores  # engines name the layer; a study ends the unit
from .ops.checks import check_alpha as check_alpha  # the strength of a merge, checked before the work begins
from .ops.checks import check_pattern as check_pattern  # the pattern of masks, checked before a layer is replaced
from .reference.fixed_point import code_at_least as code_at_least  # a budget's threshold as an int16 code
from .reference.fixed_point import selectable as selectable  # int16 scores, read as the kernels read them

# Weights and products
from .backends.cpu import try_linear as try_linear  # what layers with a mask in place generate by
from .codes import FORMATS as FORMATS  # the quantised formats by name,
from .codes import INT8_LARGEST as INT8_LARGEST  # int8's largest code,
from .codes import NESTED_BLOCK as NESTED_BLOCK  # scales that share one scale in Nf4Dq,
from .codes import Codes as Codes  # and the classes of the formats, for which the recipe has encoders:
from .codes import Int4 as Int4
from .codes import Int8 as Int8
from .codes import Nf4 as Nf4
from .codes import Nf4Dq as Nf4Dq
from .mask.held import Weight as Weight  # what a held layer may have in place of a weight
from .mask.masked_in_place import MaskedInPlace as MaskedInPlace  # `memory: in_place`
from .ops.grouped import GROUPED_PACKED as GROUPED_PACKED  # quantised experts: the product,
from .ops.grouped import GROUPED_PACKED_BACKWARD as GROUPED_PACKED_BACKWARD  # and its gradients
from .ops.linear import MASKED_LINEAR_PACKED_BACKWARD as MASKED_LINEAR_PACKED_BACKWARD  # gradients by decoded weights
from .ops.many import MOST_MASKS as MOST_MASKS  # how many tasks one call serves
from .ops.quantized import QuantizedMatrix as QuantizedMatrix  # base class of weights as codes
from .ops.route import is_seen_by_others as is_seen_by_others  # a trace must not keep a remembered mask
from .ops.route import unchanged as unchanged  # what a forward saved, or an error that says what changed

# Host memory, and matrices that are spread over processes
from .page_locked import empty_locked as empty_locked  # page-locked memory for layers that are offloaded,
from .page_locked import page_locked as page_locked  # or a copy in such memory
from .shards import first_row as first_row  # where this process's rows begin in a spread matrix,
from .shards import is_spread as is_spread  # whether a matrix is spread,
from .shards import rows_here as rows_here  # its rows here,
from .shards import spread_like as spread_like  # and a matrix spread in the same way
