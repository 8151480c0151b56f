"""A library: a directory that names many LoRA adapters of one base model, and keeps what was
computed of each. Adapters are referenced, never copied.

`catalogue` is its list, `adding` fills it, `sketches` is the index by which updates are compared
(Trade-offs 2.1), `likeness` finds duplicates and clusters, `retraining` writes what is to be
trained for each cluster, `selection` chooses few adapters, and `requests` names one per text, by
`centroids` first.
"""

from peft_routing.library.adding import add, remove
from peft_routing.library.catalogue import Entry, Library
from peft_routing.library.clusters import Clusters
from peft_routing.library.likeness import Duplicate, cluster_library, dedupe
from peft_routing.library.requests import Request, route
from peft_routing.library.retraining import retraining_command
from peft_routing.library.selection import Chosen, select

__all__ = [
    "Chosen",
    "Clusters",
    "Duplicate",
    "Entry",
    "Library",
    "Request",
    "add",
    "cluster_library",
    "dedupe",
    "remove",
    "retraining_command",
    "route",
    "select",
]
