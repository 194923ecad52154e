"""A training step with PRe against λ = 0, and a regulariser of the usual make against λ = 0; time and peak memory.

    python benchmarks/train_overhead.py                      # a 135M model on the CPU
    python benchmarks/train_overhead.py --shape 7B           # LLaVA-1.5-7B's shapes under LoRA, on a GPU
    python benchmarks/train_overhead.py --shape 7B --full --layers 16

Random weights, 8 pictures with a question and its answer each, AdamW. 135M: full fine-tuning in float32, 64 visual
tokens a picture. 7B: bf16, 576 visual tokens a picture; --full trains projector and language model, with fewer layers
where memory asks for it. Where there is a GPU, 7B is the default. The usual make, as in VIRAL: all hidden states are
kept (output_hidden_states), and the same head runs over all tokens before the visual ones are picked. λ = 0 is the bare
model, without a head in memory. Bounds for PRe, in time and in peak memory alike: 7B 1.01 in full training and 1.02
under LoRA; 135M 1.05 in time and 1.03 in memory. Beside them the floor: the head's floating-point operations as a share
of the decoder's, and the memory that training the head takes whatever the code.
"""

import argparse
import subprocess
import sys
from typing import Any

import torch
import torch.nn.functional as F
from _models import SHAPES, build, build_on
from _timing import finish, memory_of_process, ratio_of, seconds, verdict

import keepsight
import keepsight.vlm
from keepsight.pre.head import PredictionHead

BATCH, PAIRS = 8, 10
KINDS = ("baseline", "pre", "usual")


class Step:
    """One optimizer step of one kind, to be called again and again.

    Args:
        lora: adapters on the decoder's attention learn, and the head; else projector and language model (135M: all).
        layers: of the decoder, instead of the shape's.
    """

    def __init__(
        self, kind: str, shape: str = "135M", device: str = "cpu", *, lora: bool = False, layers: int | None = None
    ) -> None:
        torch.manual_seed(0)
        self.kind = kind
        large = shape.startswith("7B")
        self.model: Any = build_on(shape, device, layers=layers) if large else build(shape)[0].to(device)
        self.model.train()
        config = self.model.config
        self.width, self.depth = config.text_config.hidden_size, config.text_config.num_hidden_layers
        self.batch = self._batch(config, device, answer=64 if large else 26)
        self.mask = self.batch["input_ids"] == config.image_token_id
        if large:
            self.model.model.vision_tower.requires_grad_(False)
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora:
            from peft import LoraConfig, get_peft_model

            attention = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"
            self.model = get_peft_model(self.model, LoraConfig(r=128, lora_alpha=256, target_modules=attention))
            self.model.enable_input_require_grads()
        parameters = []
        if kind == "usual":
            self.head = PredictionHead(self.width, self.width, self.width, seed=0).to(device)
            parameters = list(self.head.parameters())
        elif kind == "pre":
            self.handle = keepsight.attach(self.model, keepsight.PReConfig(weight=0.5))
        parameters += [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def _batch(self, config: Any, device: str, answer: int) -> dict[str, torch.Tensor]:
        side = config.vision_config.image_size
        tokens = (side // config.vision_config.patch_size) ** 2
        image = torch.full((BATCH, tokens), config.image_token_id)
        text = torch.randint(5, config.text_config.vocab_size - 5, (BATCH, answer))
        ids = torch.cat([text[:, :2], image, text[:, 2:]], dim=1).to(device)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(BATCH, 3, side, side, dtype=self.model.dtype).to(device),
            "labels": ids.masked_fill(ids == config.image_token_id, -100),
        }

    def __call__(self) -> None:
        if self.kind == "usual":
            out = self.model(**self.batch, output_hidden_states=True)
            prediction = self.head(out.hidden_states[self.depth // 2])[self.mask]
            anchor = out.hidden_states[0][self.mask].detach()
            loss = out.loss - 0.5 * F.cosine_similarity(prediction, anchor.float(), dim=-1).mean()
        else:
            loss = self.model(**self.batch).loss
            if self.kind == "pre":
                loss = loss + self.handle.loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def floor(step: Step) -> float:
    """The head's operations as a share of the decoder's: weights times the tokens that they see."""
    decoder = keepsight.vlm.Vlm(step.model).layers
    weights = sum(parameter.numel() for parameter in decoder.parameters())
    return 2 * step.width**2 * int(step.mask.sum()) / (weights * step.mask.numel())


def head_memory(step: Step) -> float:
    """MiB of the head's weights, their gradient and AdamW's two moments, all in float32."""
    return 4 * 4 * (2 * step.width**2 + 2 * step.width) / 2**20


def bounds(shape: str, *, lora: bool) -> tuple[float, float]:
    """At most so many times λ = 0: time and peak memory."""
    if not shape.startswith("7B"):
        return 1.05, 1.03
    return (1.02, 1.02) if lora else (1.01, 1.01)


def peak(kind: str, *options: str) -> float:
    """MiB of a process of its own that takes three steps: on the GPU where it has one, else of the process."""
    command = [sys.executable, __file__, "--memory-of", kind, *options]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--shape", choices=SHAPES, default="7B" if gpu else "135M")
    parser.add_argument("--full", action="store_true", help="7B: train projector and language model, not adapters")
    parser.add_argument("--layers", type=int, help="7B: so many decoder layers instead of 32")
    parser.add_argument("--memory-of", choices=KINDS, help="print the peak memory of three steps of this kind and stop")
    arguments = parser.parse_args()
    device = "cuda" if gpu else "cpu"
    lora = arguments.shape.startswith("7B") and not arguments.full
    made: dict[str, Any] = {"shape": arguments.shape, "device": device, "lora": lora, "layers": arguments.layers}
    if arguments.memory_of:
        step = Step(arguments.memory_of, **made)
        for _ in range(3):
            step()
        print(torch.cuda.max_memory_allocated() / 2**20 if gpu else memory_of_process("VmHWM"))
        return
    # Memory first, while nothing else is on the device.
    options = ["--shape", arguments.shape, *(["--full"] if arguments.full else [])]
    options += ["--layers", str(arguments.layers)] if arguments.layers else []
    peaks = {kind: peak(kind, *options) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    if arguments.shape.startswith("7B"):  # one model at a time is in memory: pairs are steps of the same number
        for kind in KINDS:
            step = Step(kind, **made)
            share, own = floor(step), head_memory(step)
            times[kind] = [seconds(step) for _ in range(PAIRS + 2)][2:]
            del step
            if gpu:
                torch.cuda.empty_cache()
    else:
        steps = {kind: Step(kind, **made) for kind in KINDS}
        share, own = floor(steps["baseline"]), head_memory(steps["baseline"])
        for turn in range(-1, PAIRS):
            for kind in KINDS[:: 1 if turn % 2 else -1]:
                taken = seconds(steps[kind])
                if turn >= 0:  # the first round warms up
                    times[kind].append(taken)
    at_most, at_most_memory = bounds(arguments.shape, lora=lora)
    print(f"a step at λ = 0 takes {sum(times['baseline']) / PAIRS:.2f} s; the head's share of operations {share:.2%}")
    print(f"the usual make: {ratio_of(times['usual'], times['baseline'])} in time")
    in_time = verdict("PRe, time", ratio_of(times["pre"], times["baseline"]), at_most=at_most)
    print(", ".join(f"{kind} {value:.0f} MiB" for kind, value in peaks.items()), f"; the head {own:.0f} MiB", sep="")
    print(f"the usual make: {peaks['usual'] / peaks['baseline']:.3f}x in peak memory")
    ratio = peaks["pre"] / peaks["baseline"]
    in_memory = ratio <= at_most_memory
    print(f"PRe, peak memory: {ratio:.3f}x, at most {at_most_memory}x: {'holds' if in_memory else 'MISSED'}")
    finish(in_time, in_memory)


if __name__ == "__main__":
    main()
