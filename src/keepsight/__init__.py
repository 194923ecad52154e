"""keepsight: see how much of a picture survives inside a multimodal LLM, and train the model to keep it."""

from typing import TYPE_CHECKING

from keepsight._lazy import lazy

if TYPE_CHECKING:
    from keepsight.diagnosis import Diagnosis, diagnose
    from keepsight.diagnosis.monitor import FidelityCallback
    from keepsight.pre import DeadLossError, Handle, PReConfig, attach, handle_of, param_groups
    from keepsight.training.trainer import PReTrainerMixin

__version__ = "0.1.0"

__getattr__ = lazy(
    __name__,
    {
        "DeadLossError": "keepsight.pre",
        "Handle": "keepsight.pre",
        "PReConfig": "keepsight.pre",
        "PReTrainerMixin": "keepsight.training.trainer",
        "FidelityCallback": "keepsight.diagnosis.monitor",
        "Diagnosis": "keepsight.diagnosis",
        "attach": "keepsight.pre",
        "diagnose": "keepsight.diagnosis",
        "handle_of": "keepsight.pre",
        "param_groups": "keepsight.pre",
    },
)
__all__ = [  # noqa: RUF022 - in the order in which a user meets them
    "diagnose",
    "Diagnosis",
    "attach",
    "PReConfig",
    "Handle",
    "handle_of",
    "param_groups",
    "PReTrainerMixin",
    "FidelityCallback",
    "DeadLossError",
]
