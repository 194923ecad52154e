"""What each metric is called, how its numbers are written, and which figures it belongs to."""

from dataclasses import dataclass

from keepsight.results import Measurement


@dataclass(frozen=True)
class Metric:
    """How to show one metric."""

    title: str
    help: str = ""  # one sentence: how to read it
    percent: bool = False  # a share: shown in %, its differences in points
    digits: int = 3


@dataclass(frozen=True)
class Section:
    """A group of figures. `more` are folded away under `more_title`."""

    id: str
    title: str
    short: str  # in the navigation
    lead: str
    metrics: tuple[str, ...]
    more: tuple[str, ...] = ()
    more_title: str = ""
    folded: tuple[str, ...] = ()  # of `metrics`: in the table, but their figures are folded away with `more`


METRICS = {
    "probe_accuracy": Metric("Probe accuracy", percent=True),
    "probe_chance": Metric("Chance", percent=True),
    "probe_drop": Metric(
        "Probe drop", "Share of the accuracy above chance that layer 0 had and this layer has not", percent=True
    ),
    "probe_worst_layer": Metric("Probe drop at the worst layer", percent=True),
    "probe_accuracy_pruned": Metric("Probe accuracy, tokens pruned", percent=True),
    "pruning_loss": Metric("Accuracy lost to pruning", percent=True),
    "cohesion": Metric("Cohesion", "Mean cosine between patches of one object"),
    "coupling": Metric("Coupling", "Mean cosine between an object's patches and all others"),
    "gap": Metric("Gap", "Cohesion − coupling: how far an object's patches stand out"),
    "contrast": Metric("Contrast", "Cohesion ÷ coupling over the data set", digits=2),
    "bleeding": Metric(
        "Bleeding", "Share of a patch's nearest neighbours that lie outside its object, less chance (0 = as by chance)"
    ),
    "participation_ratio": Metric(
        "Participation ratio", "(Σλ)² ÷ Σλ²: how many directions carry the variance", digits=2
    ),
    "entropy_rank": Metric("Entropy rank", "exp of the spectrum's entropy; counts weak directions too", digits=1),
    "components_90": Metric("Components for 90 %", "Principal components for 90 % of the variance", digits=0),
    "components_95": Metric("Components for 95 %", "Principal components for 95 % of the variance", digits=0),
    "components_99": Metric("Components for 99 %", "Principal components for 99 % of the variance", digits=0),
    "feature_correlation": Metric("Feature correlation", "Mean |Pearson r| between channels"),
    "token_homogeneity": Metric("Token homogeneity", "Mean cosine between the tokens of one image"),
    "token_norm": Metric("Token norm", "Norm of a visual token", digits=2),
    "sink_tokens": Metric("Sink tokens", "Tokens with a norm above 10 × the layer's median", digits=2),
    "sink_channels": Metric("Sink channels", "Channels that dominate the norm", digits=2),
    "fidelity": Metric(
        "Fidelity", "R² of the vision encoder's output, predicted linearly from this layer, on other images"
    ),
    "fidelity_cosine": Metric("Fidelity, cosine", "Mean cosine of that prediction with the truth, both centred"),
    "fidelity_input": Metric(
        "Fidelity to layer 0", "R² of h[0], predicted linearly from this layer; a poorer h[0] is easier to predict"
    ),
    "fidelity_input_cosine": Metric("Fidelity to layer 0, cosine", "Mean cosine of that prediction with the truth"),
    "fidelity_target_rank": Metric("Effective rank of what fidelity predicts", digits=1),
    "cka": Metric("CKA with the encoder", "Debiased linear CKA of the images' mean tokens with the encoder's"),
    "neighbour_agreement": Metric(
        "Shared neighbours", "Share of an image's nearest images that are also nearest for the encoder", percent=True
    ),
    "silencing": Metric(
        "Silencing",
        "Visual tokens whose top word is among the layer's few most frequent, on other images",
        percent=True,
    ),
    "lens_entropy": Metric("Lens entropy", "Entropy of the words that a visual token would say, 1 for evenly spread"),
    "answer_accuracy": Metric("Answers", "Questions answered right", percent=True),
    "harness_score": Metric("lmms-eval's own number", "As its task aggregates it, on the task's own scale"),
    "answer_prior": Metric("Text-only prior", "The same questions without the picture", percent=True),
    "answer_f1": Metric("F1 of “yes”", "Yes/no questions: 2 × right yes ÷ (yes said + yes true)", percent=True),
    "answer_yes": Metric("Answered yes", "Share of the yes/no questions", percent=True),
    "pair_accuracy": Metric("Pairs", "Pairs whose questions are all answered right", percent=True),
    "attribution": Metric("r with skill", digits=2),
    "pre_cosine": Metric("PRe cosine", "Between prediction and anchor"),
    "pre_margin": Metric("PRe margin", "Cosine over that with another image's anchor at the same position"),
}

SECTIONS = (
    Section(
        "probes",
        "What can still be read",
        "Probes",
        "Accuracy of a linear probe on the mean of an image's visual tokens, on a test split scored once. What "
        "questions never ask about has no reason to stay; what they ask about often gets easier to read on the "
        "way up.",
        ("probe_accuracy",),
        more_title="Further label sets",
    ),
    Section(
        "pruned",
        "What is left when tokens are pruned",
        "Pruning",
        "The same probes on the visual tokens that are kept when the others are dropped on the way, as methods that "
        "make inference cheaper do. At 100 % it is the probe without pruning.",
        ("probe_accuracy_pruned",),
    ),
    Section(
        "fidelity",
        "How much of the encoder's output is left",
        "Fidelity",
        "A linear map, trained on other images, predicts from a layer what the vision encoder had put out. "
        "What lies above the controls is left of this very picture.",
        ("fidelity", "fidelity_input", "cka", "neighbour_agreement"),
        ("fidelity_cosine", "fidelity_input_cosine"),
        "Fidelity to layer 0, shared neighbours, and cosines of the predictions",
        ("fidelity_input", "neighbour_agreement"),
    ),
    Section(
        "structure",
        "Do objects stay apart",
        "Structure",
        "Cosines between patches, split by the masks. When coupling rises faster than cohesion, patches bleed "
        "into one another and the gap closes.",
        ("gap", "bleeding", "cohesion", "coupling", "contrast"),
        more_title="Cohesion, coupling, and their ratio",
        folded=("cohesion", "coupling", "contrast"),
    ),
    Section(
        "spectrum",
        "How many directions are in use",
        "Spectrum",
        "The covariance of the visual tokens, layer by layer. Read it beside the sinks: one token of enormous "
        "norm pulls every one of these numbers.",
        ("participation_ratio", "entropy_rank", "feature_correlation", "token_homogeneity"),
        ("components_90", "components_95", "components_99"),
        "Entropy rank, token homogeneity, and components for 90, 95 and 99 % of the variance",
        ("entropy_rank", "token_homogeneity"),
    ),
    Section(
        "lens",
        "What the tokens would say",
        "Lens",
        "Each layer read as if it were the last. When most visual tokens say one of the same few words, whatever the "
        "picture, they no longer say what they show.",
        ("silencing", "lens_entropy"),
    ),
    Section(
        "sinks",
        "Norms and sinks",
        "Sinks",
        "A few tokens or channels can dominate a layer. Where there are any, compare the figures above with and "
        "without them.",
        ("token_norm", "sink_tokens", "sink_channels"),
    ),
)

# Of attributions, which are of whole trainings and stand apart from the runs of one model.
ATTRIBUTION = Section(
    "attribution",
    "What the model pays for its skill",
    "Attribution",
    "Every point is a checkpoint: the higher, the more questions it answers right; the further right, the more a layer "
    "still tells. Where skill is paid for with sight, a training climbs to the left. r is Pearson's, over the "
    "checkpoints of a training.",
    ("attribution",),
    more_title="Further label sets",
)

# The variant that a figure opens with and that the table and the verdict use, best first.
PREFERRED_VARIANTS = ("", "centred", "covariance", "raw", "correlation")
# Drawn as thin lines under the metric's own, by the names that Plotly has for dashes. A control stands alone, or after
# the variant that it belongs to: "raw, random weights".
CONTROLS = {
    "shuffled labels": "dot",
    "another image, same place": "dot",
    "permuted images": "dot",
    "position only": "dashdot",
    "random weights": "longdash",
}
DASHES = {"dot": "dotted", "dashdot": "dashes and dots", "longdash": "dashes"}  # in words

# Metrics whose variants tell what was done to the model: none of them stands for the others.
PRUNING = ("probe_accuracy_pruned", "pruning_loss")

# Targets of structure rows that are of some objects only: their first metric's figures are folded away.
PARTS, PARTS_TITLE = "objects: ", "By size and class of the objects"

MOST_DIGITS = 8  # that a difference is written with

ASKED, NEVER_ASKED = "asked", "never asked"
GROUP_TITLES = {NEVER_ASKED: "Never asked about", ASKED: "Asked about", "": ""}


def metric(name: str) -> Metric:
    """How to show `name`; a metric that is not known keeps its own name."""
    return METRICS.get(name) or Metric(name.replace("_", " "))


def control_of(variant: str) -> str | None:
    """The variant that a control belongs to; "" for any; None where it is no control."""
    for control in CONTROLS:
        if variant == control or variant.endswith(f", {control}"):
            return variant.removesuffix(control).removesuffix(", ")
    return None


def dash_of(control: str) -> str:
    """How the line of a control is drawn."""
    return next(dash for name, dash in CONTROLS.items() if control.endswith(name))


def preferred(variants: set[str]) -> str:
    """The variant to show first."""
    ranked = [variant for variant in PREFERRED_VARIANTS if variant in variants]
    return ranked[0] if ranked else min(variants)


def write_number(name: str, value: float | None) -> str:
    """`value` of metric `name` in words: "87.2 %", "0.521", "–" for none."""
    if value is None:
        return "–"
    shown = metric(name)
    text = f"{100 * value:.1f} %" if shown.percent else f"{value:.{shown.digits}f}"
    return _typographic(text)


def write_interval(name: str, low: float | None, high: float | None) -> str:
    """The interval of metric `name`, "[84.1, 90.0]", or nothing."""
    scale, digits = _scale(name)
    return _interval(low, high, scale, digits)


def _interval(low: float | None, high: float | None, scale: int, digits: int) -> str:
    if low is None or high is None:
        return ""
    ends = (_typographic(f"{scale * end:.{digits}f}") for end in (low, high))
    return f"[{', '.join(ends)}]"


def _scale(name: str) -> tuple[int, int]:
    shown = metric(name)
    return (100, 1) if shown.percent else (1, shown.digits)


def write_value(row: Measurement) -> str:
    """A row's number with its interval: "87.2 % [84.1, 90.0]"."""
    return f"{write_number(row.metric, row.value)} {write_interval(row.metric, row.low, row.high)}".rstrip()


def write_difference(name: str, value: float, low: float | None, high: float | None) -> str:
    """A difference of metric `name` with its interval: "+4.1 points [1.0, 7.2]"."""
    return " ".join(filter(None, difference_parts(name, value, low, high)))


def difference_parts(name: str, value: float, low: float | None, high: float | None) -> tuple[str, str]:
    """The same as number and interval, with so many digits that one which leaves zero out is seen to."""
    scale, digits = _scale(name)
    nearest = 0.0 if low is None or high is None or low * high <= 0 else scale * min(abs(low), abs(high))
    while nearest and digits < MOST_DIGITS and not float(f"{nearest:.{digits}f}"):
        digits += 1
    number = _typographic(f"{scale * value:+.{digits}f}") + (" points" if metric(name).percent else "")
    return number, _interval(low, high, scale, digits)


def write_sample(row: Measurement) -> str:
    """The sample behind a row: "n = 400 images, seed 0"."""
    parts = [] if row.n is None else [f"n = {row.n:,} {row.unit}"]
    if row.seed is not None:
        parts.append(f"seed {row.seed}")
    return ", ".join(parts)


def _typographic(text: str) -> str:
    """A real minus sign, and no "-0.0"."""
    if text.startswith(("-0", "+0")) and not any(digit in text for digit in "123456789"):
        text = text[1:]
    return text.replace("-", "−")
