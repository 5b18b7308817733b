"""Language-guided heads for labels that have an order.

`OrdinalPromptHead` replaces the linear head of a model, is trained with `OrdinalPromptLoss`, read with `decode`, and
left behind as a plain layer by `export_heads`.
"""

from typing import TYPE_CHECKING, Any

from ordinal_prompt import losses, metrics, plot, protocols, text
from ordinal_prompt.attribute_loss import OrdinalPromptLosses
from ordinal_prompt.attributes import OrdinalPromptHeads
from ordinal_prompt.calibration import Calibration, adapt_prior, calibrate
from ordinal_prompt.conformal import ConformalRanks
from ordinal_prompt.decoding import decode
from ordinal_prompt.export import PrototypeLinear
from ordinal_prompt.fitting import fit_head, regularization
from ordinal_prompt.head import OrdinalPromptHead
from ordinal_prompt.labels import rank_indices, soft_labels
from ordinal_prompt.losses import OrdinalPromptLoss
from ordinal_prompt.metrics import ordinality
from ordinal_prompt.recipes import parameter_groups, recipe
from ordinal_prompt.reload import load_exported
from ordinal_prompt.swap import export_heads, replace_head

if TYPE_CHECKING:
    from ordinal_prompt.classifier import OrdinalPromptClassifier as OrdinalPromptClassifier

__version__ = "0.2.0.dev0"

__all__ = [
    "Calibration",
    "ConformalRanks",
    "OrdinalPromptHead",
    "OrdinalPromptHeads",
    "OrdinalPromptLoss",
    "OrdinalPromptLosses",
    "PrototypeLinear",
    "adapt_prior",
    "calibrate",
    "decode",
    "export_heads",
    "fit_head",
    "load_exported",
    "losses",
    "metrics",
    "ordinality",
    "parameter_groups",
    "plot",
    "protocols",
    "rank_indices",
    "recipe",
    "regularization",
    "replace_head",
    "soft_labels",
    "text",
]


def __dir__() -> list[str]:
    return sorted({*globals(), "OrdinalPromptClassifier"})  # in no `import *`, which may lack scikit-learn


def __getattr__(name: str) -> Any:
    """`OrdinalPromptClassifier` needs scikit-learn, and loads it where it is used."""
    if name != "OrdinalPromptClassifier":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from ordinal_prompt.classifier import OrdinalPromptClassifier
    except ImportError as error:
        raise ImportError(
            "OrdinalPromptClassifier needs scikit-learn; pip install 'ordinal_prompt[sklearn]'."
        ) from error
    return OrdinalPromptClassifier
