"""Training: conversations, labels and batches; the mixin for HF Trainer; the two-stage recipe (`recipe.train`)."""

from keepsight.training.collator import Collator
from keepsight.training.conversations import Conversation
from keepsight.training.data import ConversationDataset
from keepsight.training.encode import Encoded, Encoder
from keepsight.training.hub_dataset import HubConversations
from keepsight.training.llava_json import LlavaConversations

__all__ = [
    "Collator",
    "Conversation",
    "ConversationDataset",
    "Encoded",
    "Encoder",
    "HubConversations",
    "LlavaConversations",
]
