"""Fine-tunes an image model on labels that have an order, with a prompt head or one of its peers.

    python examples/finetune_images.py --demo
    python examples/finetune_images.py ratings.csv --backbone timm:resnet18 --pretrained \\
        --clip ViT-B-32 --clip-pretrained laion2b_s34b_b79k --head prompt linear
    python examples/finetune_images.py faces/ --preset morph --output outputs/morph
    torchrun --nproc-per-node 2 examples/finetune_images.py ratings.csv --backbone torchvision:resnet18 --head corn

Data is a CSV file with the columns `path` and `label` (and `split`, if it is split already), or a folder whose
sub-folders are the ranks (or `train`, `val` and `test` with such sub-folders).  A run that was killed goes on with the
same command behind its last complete epoch.

Each run leaves in `OUTPUT/HEAD-seedN` the log (`log.jsonl`, `log.csv`, and `tensorboard/` where TensorBoard is
installed), `results.json`, `predictions.csv`, plots, and `model.pt`, the model for use: `torch.load("model.pt",
weights_only=False)` gives a plain module that needs neither the text encoder nor ordinal_prompt.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import io
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _errors import UserError, clean_errors, needs_network, skip_unreachable_hub
from _files import save_atomically, write_text
from _finetuning import (
    Data,
    add_data_arguments,
    as_part,
    check_export,
    describe_export,
    new_parser,
    run_all,
    split_data,
    start_run,
    train_and_test,
    write_report,
)
from _heads import PROMPT_HEADS, Head, HeadOptions, add_head_arguments, build_head, load_text_encoder
from _options import add_choice, count, whole
from _processes import Processes, started_processes
from _ranks import SPLIT_NAMES, Ranks, Row, is_integer, parse_names, parse_ranks, rank_labels, read_table
from _training import add_training_arguments, predict
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2
from tqdm import tqdm

import ordinal_prompt as op

SCRIPT = "finetune_images"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
EXPORT_TOLERANCE = (1e-4, 1e-3)  # relative and absolute, of logits that reach 100

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
    parser = new_parser(SCRIPT, __doc__)
    group = parser.add_argument_group("what to run")
    group.add_argument(
        "--demo",
        action="store_true",
        help="offline, in minutes: rate how blurred crops of real photographs are, prompt beside linear head",
    )
    add_choice(group, "--demo-task", ["blur", "jpeg"], "what makes the crops worse")
    group.add_argument(
        "--demo-crops", type=count, default=100, metavar="N", help="training crops per rank; default %(default)s"
    )
    group.add_argument("--preset", choices=["morph"], help="options of a published recipe: MORPH II of OrdinalCLIP")
    group.add_argument(
        "--output", type=Path, metavar="FOLDER", default=Path("outputs/finetune_images"), help="default %(default)s"
    )
    group = add_data_arguments(
        parser,
        "path",
        "CSV file, or folder whose sub-folders are the ranks",
        "a person's photos",
        "the sub-folders, or all integers from the smallest label to the largest",
    )
    group.add_argument(
        "--root", type=Path, metavar="FOLDER", help="where a CSV file's paths start; default its own folder"
    )
    add_choice(group, "--unreadable", ["refuse", "skip"], "what to do about images that are missing or damaged")
    group = parser.add_argument_group("images")
    group.add_argument(
        "--resize",
        type=whole,
        metavar="PIXELS",
        default=256,
        help="make the shorter side so long before cropping, 0 to leave it; default %(default)s",
    )
    group.add_argument("--squash", action="store_true", help="make both sides so long")
    group.add_argument(
        "--image-size", type=count, metavar="PIXELS", help="side of the crop; default the backbone's, or 224"
    )
    group.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mirror half of the training images",
    )
    group = parser.add_argument_group("backbone")
    group.add_argument(
        "--backbone",
        metavar="NAME",
        default="torchvision:resnet18",
        help="torchvision:NAME, timm:NAME, open_clip:NAME, a NAME that one of them knows, or small (a small "
        "convolutional network, from scratch); default %(default)s",
    )
    group.add_argument(
        "--pretrained",
        nargs="?",
        const="default",
        metavar="TAG",
        help="start from weights: the library's choice, those of a tag, or a file; none, and the default: from scratch",
    )
    group.add_argument("--freeze-backbone", action="store_true", help="train the head alone")
    add_head_arguments(parser)
    add_training_arguments(parser)

    first, _ = parser.parse_known_args(argv)
    for name in filter(None, (first.preset, "demo" if first.demo else None)):
        parser.set_defaults(**PRESETS[name])
    if first.demo:
        parser.set_defaults(context=DEMO_CONTEXT[first.demo_task])
    args = parser.parse_args(argv)
    if args.pretrained == "none":
        args.pretrained = None
    if args.demo == (args.data is not None):
        parser.error("give either a CSV file or folder, or --demo")
    if args.demo and (args.val or args.test):
        parser.error("--demo brings its own validation and test photographs")
    return args


# ------------------------------------------------------------------------------------------------------------- data


def read_images(args: argparse.Namespace) -> tuple[list[Row], Ranks, Tensor]:
    """All rows, with image paths that can be opened from here, the ranks, and each row's rank index."""
    rows, folders = _read_source(args.data, args)
    for part in ("val", "test"):
        if path := getattr(args, part):
            more, more_folders = _read_source(path, args)
            rows += as_part(more, part, rows)
            folders = [*dict.fromkeys([*folders, *more_folders])]
    names = parse_names(args.rank_names) if args.rank_names else None
    ranks = None
    if args.ranks:
        ranks = Ranks(parse_ranks(args.ranks)).named(names)
    elif folders and not all(_is_number(folder) for folder in folders):
        if names and set(names) != set(folders):
            raise UserError(f"--rank-names must be the names of the sub-folders, {', '.join(map(repr, folders))}.")
        ordered = names or tuple(sorted(folders, key=_natural))
        ranks = Ranks(tuple(range(len(ordered))), ordered)
    elif folders:
        ranks = Ranks(tuple(sorted({int(folder) for folder in folders}))).named(names)
    elif names and not all(is_integer(row.label) for row in rows):
        ranks = Ranks(tuple(range(len(names))), names)
    ranks, labels = rank_labels(rows, ranks)
    return rows, ranks.named(names or ranks.names), labels


def _read_source(path: Path, args: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Rows of a CSV file or an image folder, and the names of the folder's ranks."""
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{path}: no such file or folder.")
        rows = read_table(path, args.path_column, args.label_column, args.split_column, args.group_column)
        root = args.root or path.parent
        return [replace(row, content=str(root / row.content)) for row in rows], []
    inner = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not inner:
        raise UserError(f"{path} has no sub-folders; expected one for each rank.")
    parts: list[tuple[str | None, Path]]
    if all(child.name.lower() in SPLIT_NAMES for child in inner):
        parts = [(SPLIT_NAMES[child.name.lower()], child) for child in inner]
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
            raise UserError("--backbone small has no pretrained weights; pass --pretrained none.")
        return Backbone(small_network())
    builders = {"torchvision": _from_torchvision, "timm": _from_timm, "open_clip": _from_open_clip}
    known = {"torchvision": _torchvision_models, "timm": _timm_models, "open_clip": _open_clip_models}
    if library and library not in builders:
        raise UserError(f"--backbone {name}: unknown library {library!r}; known are {', '.join(builders)}.")
    for candidate in [library] if library else known:
        if model in known[candidate]() or model.startswith(("hf-hub:", "hf_hub:")):
            way_out = "pass --pretrained with a file on disk, or with none"
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
    if pretrained and not file:
        skip_unreachable_hub()
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


def prepare_data(args: argparse.Namespace, processes: Processes) -> Data:
    """Reads, checks and splits the data."""
    rows, ranks, labels = read_images(args)
    rows, labels, skipped = keep_readable(rows, labels, args.unreadable, processes)
    return split_data(args, rows, ranks, labels, processes, skipped)


def run(args: argparse.Namespace, name: str, seed: int, data: Data, processes: Processes) -> dict[str, Any]:
    """Trains, tests and exports one head with one seed."""
    folder = start_run(args, name, seed, processes)
    backbone = build_backbone(args.backbone, args.pretrained)
    head = _build_head(args, name, backbone, data.ranks)
    train_view, test_view = transforms(args, backbone)

    def samples(part: str, indices: Tensor) -> Images:
        return Images(data.rows, data.labels, indices, train_view if part == "train" else test_view)

    def key(row: Row) -> str:
        return Path(row.content).name

    trained = train_and_test(args, backbone.module, head, samples, data, seed, folder, processes, key=key)
    path = folder / "model.pt"
    if processes.main:
        save_atomically(exported_model(trained.model, head), path)
        describe_export(head, data.ranks, folder, transform=[str(step) for step in test_view.transforms])
    processes.share(None)
    loaded = torch.load(path, map_location="cpu", weights_only=False).to(processes.device)
    again, _ = predict(loaded, head.logits, trained.test, processes)
    difference = check_export(again, trained.logits, EXPORT_TOLERANCE, path)

    def report() -> dict[str, Any]:
        more = {"skipped_images": data.skipped, "export_difference": difference}
        return write_report(head, seed, trained, data, folder, **more)

    return processes.once(report)  # type: ignore[no-any-return]


def _build_head(args: argparse.Namespace, name: str, backbone: Backbone, ranks: Ranks) -> Head:
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
    width = backbone.width(args.image_size or backbone.image_size)
    return build_head(name, width, ranks, HeadOptions.from_args(args), encoder, tokenizer, same_space=own)


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
    with clean_errors(SCRIPT), started_processes(args.device, args.threads) as processes:
        if args.demo:
            photos = args.output / "photos"
            args.data = processes.once(lambda: write_demo(photos, args.demo_task, args.demo_crops))
        return run_all(args, prepare_data(args, processes), run, processes)


if __name__ == "__main__":
    main()
