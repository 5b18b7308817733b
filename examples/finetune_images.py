"""Fine-tunes an image model on labels that have an order, with a prompt head or one of its peers.

    python examples/finetune_images.py --demo
    python examples/finetune_images.py ratings.csv --backbone timm:resnet18 --pretrained \\
        --clip ViT-B-32 --clip-pretrained laion2b_s34b_b79k --head prompt linear
    python examples/finetune_images.py faces/ --preset morph --output outputs/morph
    torchrun --nproc-per-node 2 examples/finetune_images.py ratings.csv --backbone torchvision:resnet18 --head corn

Data is a CSV file with the columns `path` and `label` (and `split`, if it is split already), or a folder whose
sub-folders are the ranks (or `train`, `val` and `test` with such sub-folders).  A run that was killed goes on with the
same command behind its last complete epoch.

Each run leaves in `OUTPUT/HEAD-seedN` the log (`log.jsonl`, `log.csv`), `results.json`, `predictions.csv`, plots, and
`model.pt`, the model for use: `torch.load("model.pt", weights_only=False)` gives a plain module that needs neither the
text encoder nor ordinal_prompt.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import hashlib
import io
import json
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _heads import PROMPT_HEADS, Head, HeadOptions, add_head_arguments, build_head, choose_rank_names, load_text_encoder
from _training import (
    SPLITS,
    Fitted,
    Processes,
    Ranks,
    Row,
    TrainOptions,
    UserError,
    add_training_arguments,
    check_ranks_present,
    clean_errors,
    confusion_matrix,
    evaluation_batches,
    fit,
    needs_network,
    ordinal_metrics,
    ordinality_beside_chance,
    parse_names,
    parse_ranks,
    plot_confusion,
    plot_history,
    plot_similarity,
    predict,
    rank_labels,
    read_table,
    results_table,
    save_atomically,
    seed_everything,
    split_rows,
    started_processes,
    training_batches,
    training_subset,
    write_predictions,
    write_text,
)
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2
from tqdm import tqdm

import ordinal_prompt as op

SCRIPT = "finetune_images"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
EXPORT_TOLERANCE = 1e-3  # of logits that reach 100

# What may differ between a run and its resumption.
FREE_SETTINGS = frozenset(
    [
        "data",
        "val",
        "test",
        "root",
        "output",
        "head",
        "seeds",
        "device",
        "workers",
        "threads",
        "fresh",
        "log_steps",
        "preset",
    ]
)

PRESETS: dict[str, dict[str, Any]] = {
    # OrdinalCLIP on MORPH II.  The paper's projection is the last layer of VGG-16; here it is the head's own.
    "morph": {
        "backbone": "torchvision:vgg16",
        "pretrained": "default",
        "clip": "RN50",
        "clip_pretrained": "openai",
        "ranks": "101",
        "empty_ranks": "allow",
        "context": "age estimation: the age of the person is",
        "interpolation": "linear",
        "num_base_ranks": 3,
        "tokens_per_rank": 1,
        "rank_position": "tail",
        "optimizer": "radam",
        "lr": 1e-4,
        "backbone_lr": 1e-4,
        "weight_decay": 5e-4,
        "epochs": 100,
        "batch_size": 32,
        "warmup": 0.0,
        "patience": 0,
        "amp": "auto",
        "seeds": [1, 27, 42, 128, 114514],
        "resize": 256,
        "squash": True,
        "image_size": 224,
        "flip": True,
    },
    "demo": {
        "backbone": "small",
        "clip": "minilm",
        "threads": 1,  # so small that more threads wait for each other
        "head": ["prompt", "linear"],
        "ranks": "21",
        "resize": 0,
        "image_size": 32,
        "epochs": 12,
        "batch_size": 100,
        "lr": 5e-3,
        "prompt_lr": 1e-3,
        "optimizer": "adamw",
        "warmup": 1.0,
    },
}

# Photographs of the demo; those of training, validation and test are different ones.
DEMO_PHOTOS = {
    "train": ("astronaut", "brick", "camera", "cat", "coffee", "gravel", "hubble_deep_field", "flower.jpg"),
    "val": ("coins", "stereo_motorcycle"),
    "test": ("china.jpg", "grass", "immunohistochemistry"),
}
DEMO_CONTEXT = {"blur": "blur of the photo:", "jpeg": "compression of the photo:"}
DEMO_RANKS = 21
DEMO_CROP = 40


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options; what a preset sets, options override."""
    parser = argparse.ArgumentParser(
        SCRIPT, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("data")
    group.add_argument("data", type=Path, nargs="?", help="CSV file, or folder whose sub-folders are the ranks")
    group.add_argument("--val", type=Path, help="validation data apart, in either form")
    group.add_argument("--test", type=Path, help="test data apart, in either form")
    group.add_argument("--root", type=Path, help="folder that a CSV file's paths start from; default its own")
    group.add_argument("--path-column", default="path", help="default %(default)s")
    group.add_argument("--label-column", default="label", help="default %(default)s")
    group.add_argument(
        "--split-column", default="split", help="used where it exists: train, val or test; default %(default)s"
    )
    group.add_argument("--group-column", help="rows of one group (a person's photos) stay in one split")
    group.add_argument(
        "--ranks",
        help="number of ranks (101), a range (16-77) or a list (1,2,5); default: the sub-folders, "
        "or all integers from the smallest label to the largest",
    )
    group.add_argument(
        "--rank-names",
        help="comma list, or a file with one name a line, from the lowest rank; also sets the order of sub-folders",
    )
    group.add_argument(
        "--empty-ranks",
        choices=["refuse", "allow"],
        default="refuse",
        help="ranks without a training sample; default %(default)s",
    )
    group.add_argument(
        "--unreadable",
        choices=["refuse", "skip"],
        default="refuse",
        help="images that are missing or damaged; default %(default)s",
    )
    group.add_argument(
        "--val-fraction", type=_fraction, default=0.1, help="drawn where no validation is given; default %(default)s"
    )
    group.add_argument(
        "--test-fraction", type=_fraction, default=0.2, help="drawn where no test is given; default %(default)s"
    )
    group.add_argument("--split-seed", type=int, default=0, help="of drawing them; default %(default)s")
    group.add_argument("--shots", type=int, help="few-shot: so many training samples per rank")
    group.add_argument(
        "--shift",
        metavar="RANKS:KEEP",
        help="label shift: the RANKS most frequent ranks keep the share KEEP of their training samples",
    )
    group = parser.add_argument_group("images")
    group.add_argument(
        "--resize", type=int, default=256, help="shorter side before cropping, 0 for as it is; default %(default)s"
    )
    group.add_argument("--squash", action="store_true", help="resize to a square instead")
    group.add_argument("--image-size", type=int, help="side of the crop; default the backbone's, or 224")
    group.add_argument(
        "--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the training images"
    )
    group = parser.add_argument_group("backbone")
    group.add_argument(
        "--backbone",
        default="torchvision:resnet18",
        help="torchvision:NAME, timm:NAME, open_clip:NAME, a NAME that one of them knows, or small (a small "
        "convolutional network, from scratch); default %(default)s",
    )
    group.add_argument(
        "--pretrained",
        nargs="?",
        const="default",
        metavar="TAG",
        help="with pretrained weights: the default ones, a tag, or a file; without, from scratch",
    )
    group.add_argument("--freeze-backbone", action="store_true", help="train the head alone")
    add_head_arguments(parser)
    add_training_arguments(parser)
    group = parser.add_argument_group("what to run")
    group.add_argument("--output", type=Path, default=Path("outputs/finetune_images"), help="default %(default)s")
    group.add_argument("--preset", choices=["morph"], help="options of a published recipe: MORPH II of OrdinalCLIP")
    group.add_argument(
        "--demo",
        action="store_true",
        help="offline, in minutes: rate how blurred crops of real photographs are, prompt beside linear head",
    )
    group.add_argument("--demo-task", choices=["blur", "jpeg"], default="blur", help="default %(default)s")
    group.add_argument(
        "--demo-crops", type=int, default=100, metavar="N", help="training crops per rank; default %(default)s"
    )

    first, _ = parser.parse_known_args(argv)
    for name in filter(None, (first.preset, "demo" if first.demo else None)):
        parser.set_defaults(**PRESETS[name])
    if first.demo:
        parser.set_defaults(context=DEMO_CONTEXT[first.demo_task])
    args = parser.parse_args(argv)
    if args.demo == (args.data is not None):
        parser.error("give either a CSV file or folder, or --demo")
    if args.demo and (args.val or args.test):
        parser.error("--demo brings its own validation and test photographs")
    if args.demo_crops < 1:
        parser.error("--demo-crops must be at least 1")
    return args


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, but got {text}")
    return value


# ------------------------------------------------------------------------------------------------------------- data


def read_images(args: argparse.Namespace) -> tuple[list[Row], Ranks, Tensor]:
    """All rows, with image paths that can be opened from here, the ranks, and each row's rank index."""
    rows, folders = _read_source(args.data, args)
    for path, split in ((args.val, "val"), (args.test, "test")):
        if path is not None:
            more, more_folders = _read_source(path, args)
            if any(row.split == split for row in rows):
                raise UserError(f"--{split} was given, but {args.data} has a {split} part already.")
            rows += [Row(row.content, row.label, split, row.group, row.where) for row in more]
            folders = [*dict.fromkeys([*folders, *more_folders])]
    names = parse_names(args.rank_names) if args.rank_names else None
    ranks = None
    if args.ranks:
        ranks = choose_rank_names(Ranks(parse_ranks(args.ranks)), names)
    elif folders and not all(_is_number(folder) for folder in folders):
        if names and set(names) != set(folders):
            raise UserError(f"--rank-names must be the names of the sub-folders, {', '.join(map(repr, folders))}.")
        ordered = names or tuple(sorted(folders, key=_natural))
        ranks = Ranks(tuple(range(len(ordered))), ordered)
    elif folders:
        ranks = choose_rank_names(Ranks(tuple(sorted({int(folder) for folder in folders}))), names)
    elif names:
        ranks = Ranks(tuple(range(len(names))), names)
    ranks, labels = rank_labels(rows, ranks)
    return rows, ranks, labels


def _read_source(path: Path, args: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Rows of a CSV file or an image folder, and the names of the folder's ranks."""
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{path}: no such file or folder.")
        rows = read_table(path, args.path_column, args.label_column, args.split_column, args.group_column)
        root = args.root or path.parent
        return [Row(str(root / row.content), row.label, row.split, row.group, row.where) for row in rows], []
    inner = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not inner:
        raise UserError(f"{path} has no sub-folders; expected one for each rank.")
    parts: list[tuple[str | None, Path]]
    if all(child.name.lower() in SPLITS for child in inner):
        parts = [(SPLITS[child.name.lower()], child) for child in inner]
    else:
        parts = [(None, path)]
    rows, ranks = [], []
    for split, folder in parts:
        for rank in sorted(
            (child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")),
            key=lambda child: _natural(child.name),
        ):
            images = sorted(
                file for file in rank.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
            )
            if not images and args.empty_ranks == "refuse":
                raise UserError(f"{rank} holds no images; remove it, or pass --empty-ranks allow.")
            ranks.append(rank.name)
            rows += [Row(str(image), rank.name, split, None, str(image)) for image in images]
    if not rows:
        raise UserError(f"{path} holds no images in its sub-folders.")
    return rows, [*dict.fromkeys(ranks)]


def _is_number(name: str) -> bool:
    return re.fullmatch(r"-?\d+", name) is not None


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts `grade 10` behind `grade 9`, and -1 before 0."""
    if _is_number(name):
        return [(0, int(name), "")]
    parts = re.split(r"(\d+)", name.lower())
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def unreadable_images(paths: Sequence[str]) -> dict[int, str]:
    """Index and fault of the images that cannot be decoded to their end."""
    with ThreadPoolExecutor(8) as pool:
        checked = pool.map(_fault, paths)
        faults = list(tqdm(checked, "check images", len(paths), leave=False, disable=None))
    return {i: fault for i, fault in enumerate(faults) if fault is not None}


def _fault(path: str) -> str | None:
    try:
        with Image.open(path) as image:
            image.draft("RGB", (64, 64))  # JPEG decodes to an eighth of its size, but reads all of the file
            image.load()
    except Image.DecompressionBombError as error:
        return str(error)
    except FileNotFoundError:
        return "no such file"
    except (OSError, SyntaxError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def keep_readable(rows: list[Row], labels: Tensor, choice: str, processes: Processes) -> tuple[list[Row], Tensor, int]:
    """The rows whose images can be read, and how many cannot; refused, or skipped and counted."""
    faults = processes.once(lambda: unreadable_images([row.content for row in rows]))
    if not faults:
        return rows, labels, 0
    first = min(faults)
    told = f"{len(faults)} of {len(rows)} images are missing or unreadable, as {rows[first].content} ({faults[first]})"
    if choice == "refuse":
        raise UserError(f"{told}; repair them, or pass --unreadable skip.")
    processes.say(f"skipped: {told}")
    kept = [i for i in range(len(rows)) if i not in faults]
    if not kept:
        raise UserError(f"{told}; nothing is left.")
    return [rows[i] for i in kept], labels[kept], len(faults)


class Images(Dataset[tuple[Tensor, int]]):
    """Images of some rows, and their rank indices."""

    def __init__(
        self, rows: Sequence[Row], labels: Tensor, indices: Tensor, transform: Callable[[Any], Tensor]
    ) -> None:
        self.rows = [rows[i] for i in indices.tolist()]
        self.labels = labels[indices]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.rows[index].content) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        return self.transform(upright), int(self.labels[index])


def transforms(args: argparse.Namespace, backbone: Backbone) -> tuple[v2.Compose, v2.Compose]:
    """Training and evaluation: resize, random or central crop, mirror or not, the backbone's statistics."""
    size = args.image_size or backbone.image_size
    resize = (
        [v2.Resize((args.resize, args.resize) if args.squash else args.resize, antialias=True)] if args.resize else []
    )
    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(backbone.mean, backbone.std)]
    flip = [v2.RandomHorizontalFlip()] if args.flip else []
    train = v2.Compose([*resize, v2.RandomCrop(size, pad_if_needed=True), *flip, *tensor])
    return train, v2.Compose([*resize, v2.CenterCrop(size), *tensor])


# --------------------------------------------------------------------------------------------------------- backbones


@dataclass
class Backbone:
    """Images (B, 3, H, W) to features (B, D), and what its images must look like.

    `clip` is the model that an open_clip backbone is a part of, with its tokenizer.
    """

    module: nn.Module
    image_size: int = 224
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    clip: tuple[nn.Module, Callable[..., Any]] | None = None

    def width(self, image_size: int) -> int:
        """D, found by running it."""
        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                features = self.module(torch.zeros(1, 3, image_size, image_size))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(f"the backbone takes no images of {image_size}²: {str(error).splitlines()[0]}") from error
        self.module.train(training)
        if not isinstance(features, Tensor) or features.dim() != 2:
            raise UserError("the backbone gives no feature vector per image; choose another --backbone.")
        return features.shape[1]


def build_backbone(name: str, pretrained: str | None) -> Backbone:
    """A backbone by name, its classifier removed; see `--backbone`."""
    library, _, model = name.rpartition(":") if not name.startswith("hf-hub:") else ("open_clip", "", name)
    if model == "small" and not library:
        if pretrained:
            raise UserError("--backbone small has no pretrained weights; leave --pretrained away.")
        return Backbone(small_network())
    builders = {"torchvision": _from_torchvision, "timm": _from_timm, "open_clip": _from_open_clip}
    known = {"torchvision": _torchvision_models, "timm": _timm_models, "open_clip": _open_clip_models}
    if library and library not in builders:
        raise UserError(f"--backbone {name}: unknown library {library!r}; known are {', '.join(builders)}.")
    for candidate in [library] if library else known:
        if model in known[candidate]() or model.startswith(("hf-hub:", "hf_hub:")):
            way_out = "pass --pretrained with a file on disk, or leave it away"
            with needs_network(f"the weights of {name}", way_out):
                return builders[candidate](model, pretrained)
    everything = [other for candidate in ([library] if library else known) for other in known[candidate]()]
    near = difflib.get_close_matches(model, everything, n=4)
    hint = f"; did you mean {', '.join(near)}?" if near else "."
    raise UserError(f"--backbone {name}: no such model{hint}")


def _torchvision_models() -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def _timm_models() -> list[str]:
    try:
        import timm
    except ImportError:
        return []
    return [*timm.list_models(), *timm.list_pretrained()]


def _open_clip_models() -> list[str]:
    import open_clip

    return open_clip.list_models()


def _from_torchvision(name: str, pretrained: str | None) -> Backbone:
    import torchvision

    file = _weights_file(pretrained)
    tag = None if file or not pretrained else pretrained.upper() if pretrained == "default" else pretrained
    try:
        model = torchvision.models.get_model(name, weights=tag)
    except (KeyError, ValueError) as error:
        tags = ", ".join(weight.name for weight in torchvision.models.get_model_weights(name))
        raise UserError(f"--pretrained {pretrained}: {name} has {tags or 'no weights'}.") from error
    if file:
        _load_weights(model, file)
    return Backbone(op.replace_head(model, nn.Identity()))


def _from_timm(name: str, pretrained: str | None) -> Backbone:
    import timm

    file = _weights_file(pretrained)
    if pretrained and not file and pretrained != "default":
        name = f"{name.split('.')[0]}.{pretrained}"
    try:
        model = timm.create_model(name, pretrained=bool(pretrained) and not file, num_classes=0)
    except RuntimeError as error:
        if "pretrained" not in str(error).lower() and "unknown model" not in str(error).lower():
            raise
        raise UserError(f"--pretrained: timm has no weights of {name}; see timm.list_pretrained().") from error
    if file:
        _load_weights(model, file)
    config = timm.data.resolve_model_data_config(model)
    return Backbone(model, config["input_size"][-1], config["mean"], config["std"])


def _from_open_clip(name: str, pretrained: str | None) -> Backbone:
    import open_clip

    if pretrained == "default":
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"--pretrained needs a tag for open_clip:{name}; known are {tags}.")
    model, tokenizer = load_text_encoder(name, pretrained)
    visual: Any = model.visual
    size = visual.image_size[0] if isinstance(visual.image_size, (tuple, list)) else visual.image_size
    return Backbone(visual, size, visual.image_mean or IMAGENET[0], visual.image_std or IMAGENET[1], (model, tokenizer))


def _weights_file(pretrained: str | None) -> Path | None:
    return Path(pretrained) if pretrained and Path(pretrained).is_file() else None


def _load_weights(model: nn.Module, file: Path) -> None:
    """Loads a state dict; the classifier may have another shape, or be missing."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        own = model.state_dict()
        fitting = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    except Exception as error:
        raise UserError(
            f"--pretrained {file} is no state dict that torch reads: {str(error).splitlines()[0]}"
        ) from error
    if len(fitting) < 0.9 * len(own):
        raise UserError(
            f"--pretrained {file} fits {len(fitting)} of the model's {len(own)} tensors; it is another model's."
        )
    model.load_state_dict(fitting, strict=False)


def small_network() -> nn.Module:
    """A small convolutional network for small images, without batch statistics; features (B, 64)."""
    layers: list[nn.Module] = []
    width = 3
    for wider in (16, 32, 64):
        layers += [nn.Conv2d(width, wider, 3, padding=1), nn.GroupNorm(8, wider), nn.ReLU(), nn.MaxPool2d(2)]
        width = wider
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(width))


# --------------------------------------------------------------------------------------------------------------- demo


def write_demo(folder: Path, task: str, crops: int) -> Path:
    """Crops of photographs of scikit-image and scikit-learn, blurred or compressed in 21 steps; returns their CSV file.

    Each photograph is halved first, so that what counts as sharp is sharp; crops are drawn where there is detail.
    """
    table = folder / f"{task}-{crops}" / "labels.csv"
    if table.exists():
        return table
    generator = np.random.default_rng(0)
    lines = ["path,label,split"]
    for split, photos in DEMO_PHOTOS.items():
        total = crops if split == "train" else max(1, round(crops * 0.4))
        for number, name in enumerate(photos):
            share = total * (number + 1) // len(photos) - total * number // len(photos)
            photo = _photo(name)
            corners = _detailed_corners(photo, share * DEMO_RANKS, generator)
            for rank in range(DEMO_RANKS):
                worse = _worsened(photo, task, rank)
                for i, (x, y) in enumerate(corners[rank * share : (rank + 1) * share]):
                    crop = worse.crop((x, y, x + DEMO_CROP, y + DEMO_CROP))
                    path = Path(split) / f"{Path(name).stem}-{rank:02}-{i}.png"
                    (table.parent / split).mkdir(parents=True, exist_ok=True)
                    crop.save(table.parent / path)
                    lines.append(f"{path.as_posix()},{rank},{split}")
    write_text("\n".join(lines) + "\n", table)  # last, so that it stands for a complete set
    return table


def _photo(name: str) -> Image.Image:
    """One photograph, in colour, at half its size."""
    try:
        if name.endswith(".jpg"):
            from sklearn.datasets import load_sample_image

            pixels = load_sample_image(name)
        else:
            import skimage.data

            pixels = getattr(skimage.data, name)()
    except ImportError as error:
        raise UserError(f"--demo needs scikit-image and scikit-learn for its photographs: {error}.") from error
    photo = Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels).convert("RGB")
    return photo.resize((photo.width // 2, photo.height // 2), Image.Resampling.LANCZOS)


def _detailed_corners(photo: Image.Image, count: int, generator: np.random.Generator) -> list[tuple[int, int]]:
    """Corners of random crops, of four candidates each the one with the most detail."""
    grey = np.asarray(photo.convert("L"), dtype=np.float64)
    energy = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    corners = []
    for _ in range(count):
        drawn = [
            (int(generator.integers(photo.width - DEMO_CROP)), int(generator.integers(photo.height - DEMO_CROP)))
            for _ in range(4)
        ]
        corners.append(max(drawn, key=lambda at: energy[at[1] : at[1] + DEMO_CROP, at[0] : at[0] + DEMO_CROP].mean()))
    return corners


def _worsened(photo: Image.Image, task: str, rank: int) -> Image.Image:
    """The photograph at a rank: Gaussian blur of 0 to 2.7 pixels, or JPEG quality from 95 down to 5."""
    if task == "blur":
        return photo.filter(ImageFilter.GaussianBlur(0.35 + 0.125 * (rank - 1))) if rank else photo
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=round(95 - 4.5 * rank))
    return Image.open(buffer).convert("RGB")


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass
class Data:
    """Rows, ranks, and the parts of one split."""

    rows: list[Row]
    ranks: Ranks
    labels: Tensor
    parts: dict[str, Tensor]
    skipped: int


def prepare_data(args: argparse.Namespace, processes: Processes) -> Data:
    """Reads, checks and splits the data."""
    rows, ranks, labels = read_images(args)
    rows, labels, skipped = keep_readable(rows, labels, args.unreadable, processes)
    parts = split_rows(rows, labels, args.val_fraction, args.test_fraction, args.split_seed)
    empty = check_ranks_present(ranks, labels[parts["train"]], args.empty_ranks == "allow")
    counts = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
    notes = (f"; {skipped} images skipped" if skipped else "") + (
        f"; {len(empty)} ranks without training samples" if empty else ""
    )
    processes.say(f"{args.data}: {ranks}; {counts}{notes}")
    return Data(rows, ranks, labels, parts, skipped)


def run(args: argparse.Namespace, name: str, seed: int, data: Data, processes: Processes) -> dict[str, Any]:
    """Trains and tests one head with one seed."""
    folder = args.output / f"{name}-seed{seed}"
    if args.fresh and processes.main and folder.exists():
        _remove_run(folder)
    processes.share(None)
    seed_everything(seed)
    backbone = build_backbone(args.backbone, args.pretrained)
    size = args.image_size or backbone.image_size
    head = _build_head(args, name, backbone, size, data.ranks)
    model = nn.Sequential(OrderedDict(backbone=backbone.module, head=head.module)).to(processes.device)
    seed_everything(seed + processes.rank)  # dropout differs between processes

    train_view, test_view = transforms(args, backbone)
    kept = training_subset(data.parts["train"], data.labels, args.shots, args.shift, seed)
    train_set = Images(data.rows, data.labels, kept, train_view)
    val_set = Images(data.rows, data.labels, data.parts["val"], test_view)
    test_set = Images(data.rows, data.labels, data.parts["test"], test_view)
    options = TrainOptions.from_args(args)
    train = training_batches(train_set, options.batch_size, seed, processes, options.workers)
    val = evaluation_batches(val_set, options.batch_size, processes, options.workers) if len(val_set) else None
    test = evaluation_batches(test_set, options.batch_size, processes, options.workers)

    processes.say(f"{folder}: head {name}, seed {seed}, {len(train_set)} training samples")
    settings = _settings(args, name, seed, train_set, val_set)
    if processes.main:
        write_text(json.dumps(settings, indent=2) + "\n", folder / "config.json")
    values = [float(value) for value in data.ranks.values]
    fitted = fit(
        model, head.loss, head.logits, train, val, values, options, processes, folder, settings, args.freeze_backbone
    )
    logits, labels = predict(model, head.logits, test, processes)
    return _report(model, head, fitted, logits, labels, test_set, test, data, folder, settings, processes, test_view)


def _build_head(args: argparse.Namespace, name: str, backbone: Backbone, size: int, ranks: Ranks) -> Head:
    encoder, tokenizer, own = None, None, False
    if name in PROMPT_HEADS:
        bare = args.backbone.removeprefix("open_clip:")
        own = (
            backbone.clip is not None and args.clip in (None, bare) and args.clip_pretrained in (None, args.pretrained)
        )
        if own:
            encoder, tokenizer = backbone.clip or (None, None)
        elif args.clip is not None:
            encoder, tokenizer = load_text_encoder(args.clip, args.clip_pretrained)
    project = args.projection == "yes" or (args.projection == "auto" and not own)
    width = backbone.width(size)
    head = build_head(name, width, ranks, HeadOptions.from_args(args), encoder, tokenizer, project)
    if name in PROMPT_HEADS and head.module.in_features != width:
        raise UserError(
            f"the features are {width} wide, and the text encoder's {head.module.in_features}; pass --projection yes."
        )
    return head


def _remove_run(folder: Path) -> None:
    """Removes what this script writes, and nothing else."""
    for name in (
        "checkpoint.pt",
        "config.json",
        "log.jsonl",
        "log.csv",
        "results.json",
        "predictions.csv",
        "model.pt",
        "model.json",
        "confusion.png",
        "similarity.png",
        "history.png",
    ):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def _settings(args: argparse.Namespace, name: str, seed: int, *sets: Images) -> dict[str, Any]:
    """What must not change between a run and its resumption, in types of JSON."""
    options = {key: value for key, value in vars(args).items() if key not in FREE_SETTINGS}
    samples = repr(
        [
            (Path(row.content).name, int(label))
            for part in sets
            for row, label in zip(part.rows, part.labels, strict=True)
        ]
    )
    digest = hashlib.blake2b(samples.encode(), digest_size=8).hexdigest()
    return {**options, "head": name, "seed": seed, "samples": digest}


def _report(
    model: nn.Module,
    head: Head,
    fitted: Fitted,
    logits: Tensor,
    labels: Tensor,
    test_set: Images,
    test: Any,
    data: Data,
    folder: Path,
    settings: dict[str, Any],
    processes: Processes,
    view: v2.Compose,
) -> dict[str, Any]:
    """Measures, exports, loads the export again and checks it, and writes it all down."""
    values = [float(value) for value in data.ranks.values]
    results: dict[str, Any] = {"head": head.name, "seed": settings["seed"], **ordinal_metrics(logits, labels, values)}
    prototypes = head.prototypes().float().cpu() if head.prototypes else None
    if prototypes is not None:
        results |= ordinality_beside_chance(prototypes)
    results |= {
        "best_epoch": fitted.best_epoch,
        "epochs": len(fitted.history),
        "test_samples": len(labels),
        "skipped_images": data.skipped,
        "seconds": round(sum(record["seconds"] for record in fitted.history), 1),
    }

    if processes.main:
        save_atomically(exported_model(model, head), folder / "model.pt")
    processes.share(None)
    loaded = torch.load(folder / "model.pt", map_location="cpu", weights_only=False).to(processes.device)
    again, _ = predict(loaded, head.logits, test, processes)
    results["export_difference"] = float((again - logits).abs().max())
    if not torch.allclose(again, logits, rtol=1e-4, atol=EXPORT_TOLERANCE):
        raise UserError(
            f"{folder / 'model.pt'} does not give the model's predictions: logits differ by up to "
            f"{results['export_difference']:.2g}."
        )
    if not processes.main:
        return results
    described = {
        "head": head.name,
        "ranks": data.ranks.values,
        "rank_names": data.ranks.names,
        "outputs": _outputs(head.name),
        "transform": [str(step) for step in view.transforms],
    }
    write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", folder / "model.json")
    write_predictions(test_set.rows, logits, labels, values, folder / "predictions.csv")
    plot_confusion(confusion_matrix(labels, logits.argmax(dim=1), len(values)), data.ranks, folder / "confusion.png")
    plot_history(fitted.history, folder / "history.png")
    if prototypes is not None:
        plot_similarity(prototypes, data.ranks, folder / "similarity.png")
    write_text(json.dumps(results, indent=2) + "\n", folder / "results.json")
    return results


def _outputs(name: str) -> str:
    if name == "coral":
        return "logits of P(rank > k), k = 0…K-2"
    if name == "corn":
        return "logits of P(rank > k | rank > k-1), k = 0…K-2"
    return "logits of the ranks"


def exported_model(model: nn.Module, head: Head) -> nn.Module:
    """A copy of the model on the CPU, the head as plain layers; the text encoder is not in it."""
    if head.name in PROMPT_HEADS:
        exported = op.export_heads(model, inplace=False)
    else:
        parts: Any = model
        layers = OrderedDict(backbone=copy.deepcopy(parts.backbone), head=copy.deepcopy(head.export()))
        exported = nn.Sequential(layers)
    return exported.cpu().eval()


def main(argv: Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Runs every head with every seed; returns the test results by head."""
    args = parse_arguments(argv)
    with clean_errors(SCRIPT):
        if args.threads:
            torch.set_num_threads(args.threads)
        with started_processes(args.device) as processes:
            if args.demo:
                photos = args.output / "photos"
                args.data = processes.once(lambda: write_demo(photos, args.demo_task, args.demo_crops))
            data = prepare_data(args, processes)
            results: dict[str, list[dict[str, Any]]] = {}
            for name in dict.fromkeys(args.head):
                for seed in dict.fromkeys(args.seeds):
                    results.setdefault(name, []).append(run(args, name, seed, data, processes))
            table = results_table(results)
            if processes.main:
                write_text(table + "\n", args.output / "results.md")
            processes.say(f"\nTest, {len(data.parts['test'])} samples (MAE in units of the ranks):\n{table}")
            processes.say(f"\nPlots, predictions and exported models are in {args.output}.")
    return results


if __name__ == "__main__":
    main()
