"""A training step with PRe against λ = 0, and a regulariser of the usual make against λ = 0; time and peak memory.

    python benchmarks/train_overhead.py

A 135 M model (random weights), 8 pictures of 64 visual tokens with a question and its answer each, full fine-tuning
with AdamW. The usual make, as in VIRAL: all hidden states are kept (output_hidden_states), and the same head runs over
all tokens before the visual ones are picked. Bounds for PRe: 1.05 times in time, 1.03 times in peak memory. Beside them
the floor: the head's floating-point operations as a share of the step's.
"""

import argparse
import subprocess
import sys

import torch
import torch.nn.functional as F
from _models import build
from _timing import finish, memory_of_process, ratio_of, seconds, verdict

import keepsight
import keepsight.vlm
from keepsight.pre.head import PredictionHead

BATCH, ANSWER, PAIRS = 8, 26, 10
KINDS = ("baseline", "pre", "usual")


class Step:
    """One optimizer step of one kind, to be called again and again."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.kind = kind
        self.model, processor = build("135M")
        self.model.train()
        config = self.model.config
        image = torch.full((BATCH, 64), config.image_token_id)
        text = torch.randint(5, len(processor.tokenizer) - 5, (BATCH, ANSWER))
        ids = torch.cat([text[:, :2], image, text[:, 2:]], dim=1)
        self.mask = ids == config.image_token_id
        side = config.vision_config.image_size
        self.batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(BATCH, 3, side, side),
            "labels": ids.masked_fill(self.mask, -100),
        }
        self.width, self.depth = config.text_config.hidden_size, config.text_config.num_hidden_layers
        if kind == "usual":
            self.head = PredictionHead(self.width, self.width, self.width, seed=0)
            parameters = [*self.model.parameters(), *self.head.parameters()]
        else:
            weight = 0.5 if kind == "pre" else 0.0
            self.handle = keepsight.attach(self.model, keepsight.PReConfig(weight=weight))
            parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def __call__(self) -> None:
        if self.kind == "usual":
            out = self.model(**self.batch, output_hidden_states=True)
            prediction = self.head(out.hidden_states[self.depth // 2])[self.mask]
            anchor = out.hidden_states[0][self.mask].detach()
            loss = out.loss - 0.5 * F.cosine_similarity(prediction, anchor, dim=-1).mean()
        else:
            loss = self.model(**self.batch).loss + self.handle.loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def floor(step: Step) -> float:
    """The head's operations as a share of the decoder's: weights times the tokens that they see."""
    decoder = keepsight.vlm.Vlm(step.model).layers
    weights = sum(parameter.numel() for parameter in decoder.parameters())
    return 2 * step.width**2 * int(step.mask.sum()) / (weights * step.mask.numel())


def peak(kind: str) -> float:
    """MiB of a process of its own that takes three steps."""
    command = [sys.executable, __file__, "--memory-of", kind]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-of", choices=KINDS, help="print the peak memory of three steps of this kind and stop")
    arguments = parser.parse_args()
    if arguments.memory_of:
        step = Step(arguments.memory_of)
        for _ in range(3):
            step()
        print(memory_of_process("VmHWM"))
        return
    steps = {kind: Step(kind) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(-1, PAIRS):
        for kind in KINDS[:: 1 if turn % 2 else -1]:
            taken = seconds(steps[kind])
            if turn >= 0:  # the first round warms up
                times[kind].append(taken)
    print(f"a step at λ = 0 takes {sum(times['baseline']) / PAIRS:.2f} s; the head's share of operations", end=" ")
    print(f"{floor(steps['baseline']):.2%}")
    print(f"the usual make: {ratio_of(times['usual'], times['baseline'])} in time")
    in_time = verdict("PRe, time", ratio_of(times["pre"], times["baseline"]), at_most=1.05)
    del steps
    peaks = {kind: peak(kind) for kind in KINDS}
    print(", ".join(f"{kind} {value:.0f} MiB" for kind, value in peaks.items()))
    print(f"the usual make: {peaks['usual'] / peaks['baseline']:.3f}x in peak memory")
    ratio = peaks["pre"] / peaks["baseline"]
    print(f"PRe, peak memory: {ratio:.3f}x, at most 1.03x: {'holds' if ratio <= 1.03 else 'MISSED'}")
    finish(in_time, ratio <= 1.03)


if __name__ == "__main__":
    main()
