from .careset import CareSet as CareSet
from .careset import build_care_set as build_care_set
from .combine import merge as merge
from .combine import stack as stack
from .combine import unmerge as unmerge
from .core import RecarePatchError as RecarePatchError
from .erasure import EraseResult as EraseResult
from .erasure import erase as erase
from .erasure import erase_concept as erase_concept
from .measure import attack as attack
from .measure import evaluate as evaluate
from .models import load_base as load_base
from .patch import Patch as Patch
from .patch import apply_all as apply_all
from .patch import generate as generate
from .recipe import Concept as Concept
from .recipe import Recipe as Recipe
from .recipe import load_recipe as load_recipe
from .share import pull as pull
from .share import push as push
from .share import search as search

__version__: str
