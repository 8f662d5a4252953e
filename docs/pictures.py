"""Draw the pictures of concepts.md from SmolLM2-135M: python docs/pictures.py, about a minute."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

import mft
from mft import DataConfig, TrainConfig, load_splits, train_masks
from mft_kernels import kept_threshold, reference

IMAGES = Path(__file__).parent / "images"
KEEP_RATIO = 0.9
LAYER = "model.layers.29.self_attn.q_proj"
TRAIN = TrainConfig(lr=1e-3, steps=24, batch_size=2)


def main() -> None:
    """Draw both pictures."""
    IMAGES.mkdir(exist_ok=True)
    model, tokenizer = mft.load_model("smollm2-135m")
    mft.mask_model(model, mft.MaskConfig.paper(layers_to_transform=29, keep_ratio=KEEP_RATIO))
    layer = dict(model.named_modules())[LAYER]
    draw_mask(layer.weight.detach().float(), layer.scores.detach())
    rows = load_splits(DataConfig(sequence_length=128, max_train_tokens=8192, max_eval_tokens=256), tokenizer).train
    scores, thresholds = [], []

    def note(report=None) -> None:
        scores.append(layer.scores.detach().abs().flatten().clone())
        thresholds.append(kept_threshold(layer.scores.detach(), KEEP_RATIO).item())

    note()
    train_masks(model, rows, TRAIN, on_step=note, way="plain")
    draw_scores(torch.stack(scores), torch.tensor(thresholds))


def draw_mask(weight: torch.Tensor, scores: torch.Tensor) -> None:
    """Draw a corner of the matrix: weight, |scores|, keep, where(keep, weight, 0); below each what its colours mean."""
    keep = reference.keep_mask(scores, kept_threshold(scores, KEEP_RATIO), "magnitude")
    corner = (slice(0, 10), slice(0, 16))
    figure = Figure(figsize=(13, 2.6), layout="constrained")
    bound = weight[corner].abs().max()
    coloured = {"cmap": "RdBu", "vmin": -bound, "vmax": bound}
    pictures = [
        ("weight W, frozen", "blue: above 0, red: below 0", weight, coloured),
        ("|scores|, which learn", "yellow: large, dark: near 0", scores.abs(), {"cmap": "viridis"}),
        (
            "keep = |scores| >= t",
            "grey: 1, keep; white: 0, drop",
            keep.float(),
            {"cmap": "Greys", "vmin": 0, "vmax": 1.4},
        ),
        ("where(keep, W, 0)", "0: dropped; all others are W", torch.where(keep, weight, 0), coloured),
    ]
    for axes, (title, key, matrix, colours) in zip(figure.subplots(1, 4), pictures):
        axes.imshow(matrix[corner], **colours)
        axes.set_title(title, fontsize=12)
        axes.set_xlabel(key, fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([])
        if "where" in title:
            for row, column in (~keep[corner]).nonzero().tolist():
                axes.text(column, row, "0", ha="center", va="center", fontsize=8)
    figure.savefig(IMAGES / "mask.png", dpi=120)


def draw_scores(scores: torch.Tensor, thresholds: torch.Tensor) -> None:
    """Draw |score| of some weights by step, with those that cross the threshold in colour."""
    kept = scores >= thresholds[:, None]
    flipped = (kept[0] != kept[-1]).nonzero().flatten()
    near = ((scores[0] - thresholds[0]).abs() < 0.01) & (kept[0] == kept[-1])
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for index in near.nonzero().flatten()[:24].tolist():
        axes.plot(scores[:, index], color="0.8", linewidth=1)
    for index in flipped[:: max(1, len(flipped) // 10)].tolist():
        axes.plot(scores[:, index], linewidth=1.5)
    axes.plot(thresholds, color="black", linewidth=2, linestyle="--", label="threshold: 10 % lie below")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("|score|")
    share = 100 * len(flipped) / scores.shape[1]
    axes.set_title(f"{LAYER} of SmolLM2-135M, rate {TRAIN.lr:g}: {share:.1f} % of the bits flipped", fontsize=10)
    axes.legend()
    figure.savefig(IMAGES / "scores.png", dpi=120)


if __name__ == "__main__":
    main()
