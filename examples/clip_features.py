"""Cached CLIP features and a prompt head: ten lines of training, on pictures of your own.

    python examples/clip_features.py --data faces/ --clip ViT-B-32 --weights laion2b_s34b_b79k --context "a face aged"
    python examples/clip_features.py --data ratings.csv --rank-names poor fair good --weights checkpoint.pt

Data is a folder with one folder of images for each rank, or a CSV file with the columns `path` (beside the file) and
`label`.  Features are computed once and kept beside OUTPUT's exported head; without `--weights` they are random.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from ordered_data import check_images, open_image, rank_labels, read_images, split
from runs import at_least, in_one_sentence, load_text_encoder, metrics, plot, report, weights
from torch import Tensor
from tqdm import tqdm

import ordinal_prompt as op


@torch.no_grad()
def image_features(model: Any, transform: Any, paths: list[str], white: float, cache: Path) -> Tensor:
    """Unit-norm features (N, D), computed once."""
    if not cache.exists():
        batches = [paths[start : start + 64] for start in range(0, len(paths), 64)]
        images = (torch.stack([transform(open_image(path, white)) for path in batch]) for batch in tqdm(batches))
        rows = [model.encode_image(batch, normalize=True) for batch in images]
        torch.save(torch.cat(rows), part := cache.with_suffix(".part"))
        part.replace(cache)  # atomically: a run that is stopped leaves no half file
    features: Tensor = torch.load(cache)
    return features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, type=Path, help="a folder with a folder for each rank, or a CSV file")
    parser.add_argument("--rank-names", nargs="+", help="the labels, lowest first; label=name: another name in prompts")
    parser.add_argument("--clip", default="ViT-B-32", help="an open_clip model; default %(default)s")
    parser.add_argument("--weights", help="a pretrained tag of open_clip, or a file")
    parser.add_argument("--context", default="a photo of {} quality", help="default %(default)s")
    parser.add_argument("--shots", type=at_least(1), help="training images per rank")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--output", type=Path, default=Path("outputs/clip"))
    options = parser.parse_args()
    paths, labels = read_images(options.data)
    readable, fingerprints, white = check_images(paths, options.skip_unreadable)
    paths = [paths[i] for i in readable]
    names, values, indices = rank_labels([labels[i] for i in readable], options.rank_names)
    training, _, test = split(indices, paths, keys=fingerprints, shots=options.shots)

    torch.manual_seed(0)  # random weights are the same each time, as cached features of theirs are
    model, tokenizer = load_text_encoder(options.clip, options.weights)
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    options.output.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(repr((options.clip, options.weights, fingerprints)).encode()).hexdigest()[:16]
    features = image_features(model.eval(), transform, paths, white, options.output / f"features-{key}.pt")
    ranks = torch.from_numpy(indices)

    head = op.OrdinalPromptHead(
        model, names, tokenizer=tokenizer, rank_values=values, context=options.context,
        **op.recipe(names, prompts="frozen"),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(op.parameter_groups(head, lr=1e-3))
    for _ in range(100):
        loss = head.loss()(head(features[training]), ranks[training])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        logits = head.eval()(features[test])
    report(options.output, {"prompt": metrics(logits, ranks[test], head.rank_values.tolist())})
    plot(options.output / "prompt.png", logits, ranks[test], weights(head), names, "prompt head")
    exported = head.export()
    torch.testing.assert_close(exported(features[test]), logits, rtol=1e-3, atol=1e-3)
    torch.save(exported, options.output / "head.pt")
    print(f"exported: {options.output / 'head.pt'}, which torch.load(…, weights_only=False) gives back")


if __name__ == "__main__":
    in_one_sentence(main)
