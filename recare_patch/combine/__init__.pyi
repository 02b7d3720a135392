from .merging import merge as merge
from .merging import unmerge as unmerge
from .regmean import KEPT_WEIGHT as KEPT_WEIGHT
from .regmean import Moments as Moments
from .regmean import measure_moments as measure_moments
from .stacking import plan_stack as plan_stack
from .stacking import save_stack as save_stack
from .stacking import stack as stack
