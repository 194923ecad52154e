"""Which parameters a stage trains, by the three parts that every image-text model has."""

from collections.abc import Iterable, Sequence

from torch import nn

from keepsight.pre.handle import HEAD
from keepsight.training.lora import is_adapter
from keepsight.vlm.features import encoder_of
from keepsight.vlm.view import Vlm

# Families that keep the projector inside the encoder name it so.
_PROJECTOR_IN_ENCODER = ("merger", "deepstack_merger_list")


def parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The model's parameters as `encoder`, `projector` and `language_model`; PRe's head is in none of them.

    The language model is the decoder, its embeddings and the output layer; the projector is whatever is neither the
    language model nor the encoder, and a patch merger inside the encoder (Qwen).
    """
    vlm = Vlm(model)
    base = vlm.base
    language = {id(p) for p in vlm.decoder.parameters()}
    output = base.get_output_embeddings()
    if output is not None:
        language |= {id(p) for p in output.parameters()}
    encoder = encoder_of(vlm)
    inside = {
        id(p) for name, child in encoder.named_children() if name in _PROJECTOR_IN_ENCODER for p in child.parameters()
    }
    seen = {id(p) for p in encoder.parameters()} - inside
    found: dict[str, list[nn.Parameter]] = {"projector": [], "language_model": [], "encoder": []}
    for name, parameter in base.named_parameters():
        if HEAD in name.split("."):
            continue
        part = "language_model" if id(parameter) in language else "encoder" if id(parameter) in seen else "projector"
        found[part].append(parameter)
    return found


def train_only(model: nn.Module, chosen: Sequence[str]) -> int:
    """Let the chosen parts learn and freeze the others, PRe's head aside; returns the number of values that learn.

    Of a language model with LoRA only the adapters learn.

    Raises:
        ValueError: for an unknown part, or one that this model does not have.
    """
    found = parts(model)
    for part in chosen:
        if not found.get(part):
            present = [name for name, parameters in found.items() if parameters]
            raise ValueError(f"{type(model).__name__} has no parameters in part {part!r}; it has {present}.")
    count = 0
    adapters = [p for name, p in model.named_parameters() if is_adapter(name)]
    if adapters:
        _set(found["language_model"], False)
        found["language_model"] = adapters
    for part, parameters in found.items():
        _set(parameters, part in chosen)
        count += sum(p.numel() for p in parameters) if part in chosen else 0
    return count


def _set(parameters: Iterable[nn.Parameter], learns: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(learns)
