"""Training: conversations, labels and batches; the mixin for HF Trainer; the two-stage recipe (`recipe.train`)."""

from typing import TYPE_CHECKING

from keepsight._lazy import lazy

if TYPE_CHECKING:
    from keepsight.training.collator import Collator
    from keepsight.training.conversations import Conversation
    from keepsight.training.data import ConversationDataset
    from keepsight.training.encode import Encoded, Encoder
    from keepsight.training.hub_dataset import HubConversations
    from keepsight.training.llava_json import LlavaConversations

__getattr__ = lazy(
    __name__,
    {
        "Collator": "keepsight.training.collator",
        "Conversation": "keepsight.training.conversations",
        "ConversationDataset": "keepsight.training.data",
        "Encoded": "keepsight.training.encode",
        "Encoder": "keepsight.training.encode",
        "HubConversations": "keepsight.training.hub_dataset",
        "LlavaConversations": "keepsight.training.llava_json",
    },
)
__all__ = [
    "Collator",
    "Conversation",
    "ConversationDataset",
    "Encoded",
    "Encoder",
    "HubConversations",
    "LlavaConversations",
]
