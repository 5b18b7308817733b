"""Language-guided heads for labels that have an order.

`OrdinalPromptHead` replaces the linear head of a model, is trained with `OrdinalPromptLoss`, read with `decode`, and
left behind as a plain layer by `export_heads`.
"""

from ordinal_prompt import losses, protocols, text
from ordinal_prompt.decoding import decode
from ordinal_prompt.export import PrototypeLinear
from ordinal_prompt.head import OrdinalPromptHead
from ordinal_prompt.labels import rank_indices, soft_labels
from ordinal_prompt.losses import OrdinalPromptLoss
from ordinal_prompt.metrics import ordinality
from ordinal_prompt.recipes import parameter_groups, recipe
from ordinal_prompt.reload import load_exported
from ordinal_prompt.swap import export_heads, replace_head

__version__ = "0.1.0"

__all__ = [
    "OrdinalPromptHead",
    "OrdinalPromptLoss",
    "PrototypeLinear",
    "decode",
    "export_heads",
    "load_exported",
    "losses",
    "ordinality",
    "parameter_groups",
    "protocols",
    "rank_indices",
    "recipe",
    "replace_head",
    "soft_labels",
    "text",
]
