"""Patches on the Hub: sending them, fetching them, finding them."""

from recare_patch.sharing.contents import RECORD_NAME, SharedFile
from recare_patch.sharing.hub import PREFIX, Address
from recare_patch.sharing.indexing import index_text, row_of_folder, row_of_found
from recare_patch.sharing.pulling import Pulled, fetched, pull
from recare_patch.sharing.pushing import Pushed, push
from recare_patch.sharing.searching import Found, search

__all__ = [
    "PREFIX",
    "RECORD_NAME",
    "Address",
    "Found",
    "Pulled",
    "Pushed",
    "SharedFile",
    "fetched",
    "index_text",
    "pull",
    "push",
    "row_of_folder",
    "row_of_found",
    "search",
]
