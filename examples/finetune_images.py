"""Fine-tunes an image model on labels that have an order, with a prompt head and a linear head, on Lightning.

    python examples/finetune_images.py --demo
    python examples/finetune_images.py --data faces/ --backbone resnet50 --pretrained \\
        --text ViT-B-32 --text-weights laion2b_s34b_b79k --context "the age of the person is"
    python examples/finetune_images.py --data morph.csv --preset morph

Data is a folder with one folder of images for each rank, or a CSV file with the columns `path` (beside the file) and
`label`.  Each head leaves in OUTPUT its checkpoints, `metrics.csv` of every epoch, a picture, and `model.pt`: the
weights of the exported model, which needs no text encoder; `op.load_exported(timm.create_model(…), "model.pt")`.
A run that was killed goes on with the same command and `--resume`.
"""

from __future__ import annotations

import logging
import warnings
from functools import partial
from typing import Any

import lightning
import numpy as np
import timm
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from ordered_data import DataError, check_images, open_image, rank_labels, read_images, split
from PIL import Image, ImageFilter
from runs import at_least, in_one_sentence, keep_parts, load_text_encoder, metrics, new_parser, plot, report, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import MeanAbsoluteError
from torchvision.transforms import v2

import ordinal_prompt as op

MORPH = {  # OrdinalCLIP's settings for the ages of MORPH II (section 4.1)
    "backbone": "vgg16", "pretrained": True, "text": "RN50", "text_weights": "openai", "settings": "paper",
    "context": "age estimation: the age of the person is", "rank_names": [str(age) for age in range(101)],
    "optimizer": "radam", "lr": [1e-4], "prompt_lr_scale": 1.0, "weight_decay": 5e-4, "epochs": 100, "patience": 100,
    "batch_size": 32, "precision": "16-mixed", "resize": 256, "size": 224,
}  # fmt: skip
DEMO = {"backbone": "resnet10t", "context": "the blur of the photo is", "epochs": 15}
PATCH = 48
DEMO_PHOTOS = ("astronaut brick camera cat coffee gravel rocket", "coins immunohistochemistry", "grass page")
DEMO_NAMES = ["none", "barely visible", "slight", "moderate", "strong", "very strong", "extreme"]


def opened(positions: list[int], images: Any, labels: Any, white: float, transform: Any) -> tuple[Tensor, Tensor]:
    """A batch: images, opened and transformed, and their rank indices."""
    found = (images[i] for i in positions)
    found = (image if isinstance(image, Image.Image) else open_image(image, white) for image in found)
    return torch.stack([transform(image) for image in found]), torch.as_tensor(labels[positions])


class Finetuning(lightning.LightningModule):
    """A model, a loss and an optimizer; `val_mae` is the error of the expectation, in the units of the values."""

    def __init__(self, model: Any, head: nn.Module, values: list[float], lr: float, options: Any) -> None:
        super().__init__()
        self.model, self.head, self.lr, self.options = model, head, lr, options
        self.loss = head.loss() if isinstance(head, op.OrdinalPromptHead) else nn.CrossEntropyLoss()
        self.values: Tensor
        self.register_buffer("values", torch.tensor(values), persistent=False)
        self.val_mae = MeanAbsoluteError()

    def on_train_epoch_start(self) -> None:
        if self.options.frozen:
            self.model.eval()  # the statistics of its batch norms stay as they are
            self.head.train()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss: Tensor = self.loss(self.model(batch[0]).float(), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.val_mae(op.decode(self.model(batch[0]), values=self.values), self.values[batch[1]])
        self.log("val_mae", self.val_mae, prog_bar=True)

    def configure_optimizers(self) -> Any:
        if isinstance(self.head, op.OrdinalPromptHead):
            groups = op.parameter_groups(self.model, self.lr, self.options.prompt_lr_scale)
        else:
            groups = [{"params": [p for p in self.model.parameters() if p.requires_grad], "lr": self.lr}]
        decay = self.options.weight_decay
        optimizer: Any = torch.optim.AdamW(groups, weight_decay=decay)
        if self.options.optimizer == "radam":
            optimizer = torch.optim.RAdam(groups, weight_decay=decay, decoupled_weight_decay=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.options.epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def demo_data() -> tuple[list[Any], list[str], list[float], list[np.ndarray[Any, Any]]]:
    """Patches of real photographs, blurred more and more; the parts show different photographs."""
    from skimage import data

    images: list[Any] = []
    labels: list[int] = []
    parts = []
    random = np.random.default_rng(0)
    for photos, number in zip(DEMO_PHOTOS, (14, 20, 20), strict=True):
        start = len(images)
        for photo in photos.split():
            pixels = Image.fromarray(getattr(data, photo)()).convert("RGB")
            for rank in range(len(DEMO_NAMES)):
                blurred = pixels.filter(ImageFilter.GaussianBlur(rank / 2))
                for _ in range(number):
                    x, y = (int(random.integers(side - PATCH)) for side in pixels.size)
                    images.append(blurred.crop((x, y, x + PATCH, y + PATCH)))
                    labels.append(rank)
        parts.append(np.arange(start, len(images)))
    return images, DEMO_NAMES, [*map(float, range(len(DEMO_NAMES)))], [np.array(labels), *parts]


def read_data(options: Any) -> tuple[list[Any], list[str], list[float], list[np.ndarray[Any, Any]], float]:
    """Images (or their paths), rank names and values, [all labels, training, validation, test positions], and white."""
    if options.demo:
        return *demo_data(), 1.0
    paths, labels = read_images(options.data, options.path_column, options.label_column)
    readable, fingerprints, white = check_images(paths, options.skip_unreadable)
    paths, labels = [paths[i] for i in readable], [labels[i] for i in readable]
    names, values, indices = rank_labels(labels, options.rank_names)
    parts = split(indices, paths, keys=fingerprints, seed=options.seed, shots=options.shots, shift=options.shift)
    return paths, names, values or [*map(float, range(len(names)))], [indices, *parts], white


def loaders(options: Any, model: Any, trainer: lightning.Trainer, data: Any) -> list[DataLoader[Any]]:
    """Training, validation and test batches; `--batch-size` counts the images of all processes together."""
    images, _, _, (labels, *parts), white = data
    parts = [part.tolist() for part in parts]
    config: Any = timm.data.resolve_model_data_config(model)  # type: ignore[attr-defined,no-untyped-call]
    size = options.size or config["input_size"][-1]
    resize = v2.Resize((options.resize or size,) * 2)
    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]
    varied = v2.Compose([resize, v2.RandomCrop(size), v2.RandomHorizontalFlip(), *last])
    plain = v2.Compose([resize, v2.CenterCrop(size), *last])
    of_all = {"num_replicas": trainer.world_size, "rank": trainer.global_rank, "seed": options.seed}
    found = []
    for number, part in enumerate(parts):
        training = number == 0
        sampler: Any = DistributedSampler(part, shuffle=training, **of_all) if number < 2 else None
        transform = varied if training and not options.no_augment else plain
        collate = partial(opened, images=images, labels=labels, white=white, transform=transform)
        own = max(1, options.batch_size // trainer.world_size)
        found.append(DataLoader(part, own, sampler=sampler, num_workers=options.workers, collate_fn=collate))
    return found


def run(kind: str, lr: float, options: Any, data: Any) -> tuple[float, Any]:
    """Trains one head at one learning rate; gives the validation error, and what is needed to test it."""
    lightning.seed_everything(options.seed, verbose=False)
    names, values = data[1:3]
    model: Any = timm.create_model(options.backbone, pretrained=options.pretrained, num_classes=len(names))
    head: Any = model.get_classifier()
    if kind == "prompt":
        encoder, tokenizer = load_text_encoder(options.text, options.text_weights)
        ranks: Any = len(names) if names == [f"{value:g}" for value in values] else names
        settings = {} if options.settings == "paper" else op.recipe(ranks, prompts=options.settings)
        head = op.OrdinalPromptHead(
            encoder, ranks, tokenizer=tokenizer, rank_values=values, context=options.context,
            in_features=head.in_features, **settings,
        )  # fmt: skip
        op.replace_head(model, head)
    if options.frozen:
        of_head = {*head.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter in of_head)
    folder = options.output / f"{kind}-lr{lr:g}"
    best: Any = ModelCheckpoint(folder, monitor="val_mae", filename="best")
    latest = ModelCheckpoint(folder, filename="last", enable_version_counter=False)  # of each epoch, for --resume
    trainer = lightning.Trainer(
        max_epochs=options.epochs, accelerator=options.accelerator, devices=options.devices,
        precision=options.precision, strategy="ddp" if options.devices > 1 else "auto", use_distributed_sampler=False,
        callbacks=[best, latest, EarlyStopping("val_mae", patience=options.patience)], logger=CSVLogger(folder, "", ""),
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    module = Finetuning(model, head, values, lr, options)
    train, validation, test = loaders(options, model, trainer, data)
    last = folder / "last.ckpt"
    trainer.fit(module, train, validation, ckpt_path=last if options.resume and last.exists() else None)
    module.load_state_dict(torch.load(best.best_model_path, weights_only=False)["state_dict"])
    return float(best.best_model_score), (module.eval().cpu(), test, trainer)


@torch.no_grad()
def predict(model: nn.Module, loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    logits, labels = zip(*[(model(images), labels) for images, labels in loader], strict=True)
    return torch.cat(logits).float(), torch.cat(labels)


def main() -> None:
    options = parse()
    data = read_data(options)
    images, names, values, (_, *parts), _ = data
    keep_parts(options, *([images[i] for i in part] for part in parts if not options.demo))
    print(f"{len(images)} images in {len(names)} ranks; training, validation, test: {[*map(len, parts)]}")
    results = {}
    for kind in ("linear", "prompt") if options.head == "both" else (options.head,):
        runs = {lr: run(kind, lr, options, data) for lr in options.lr}
        lr = min(runs, key=lambda rate: runs[rate][0])  # chosen on the validation images
        module, test, trainer = runs[lr][1]
        if not trainer.is_global_zero:
            continue
        logits, labels = predict(module.model, test)
        results[kind] = metrics(logits, labels, values) | {"lr": lr}
        plot(options.output / f"{kind}.png", logits, labels, weights(module.head), names, f"{kind} head")
        if kind == "prompt":
            op.export_heads(module.model)
        torch.save(module.model.state_dict(), options.output / f"{kind}-model.pt")
        loaded = op.load_exported(timm.create_model(options.backbone), options.output / f"{kind}-model.pt")
        torch.testing.assert_close(predict(loaded, test)[0], logits, rtol=1e-3, atol=1e-2)
    if results:
        report(options.output, results)
        print(f"pictures and exported models: {options.output}")


def parse() -> Any:
    parser = new_parser((__doc__ or "").split("\n")[0], "outputs/images")
    add = parser.add_argument
    add("--data", help="a folder with one folder for each rank, or a CSV file")
    add("--preset", choices=["morph"], help="the paper's settings for ages")
    add("--path-column", default="path")
    add("--skip-unreadable", action="store_true", help="leave out images that cannot be read")
    add("--backbone", default="resnet18", help="a timm model")
    add("--pretrained", action="store_true", help="with its weights")
    add("--text", default="minilm", help="text encoder: minilm, or an open_clip model")
    add("--text-weights", help="its pretrained tag, or a file")
    add("--prompt-lr-scale", type=float, default=1.0)
    add("--weight-decay", type=float, default=1e-2)
    add("--batch-size", type=at_least(1), default=64, help="of all processes together")
    add("--resize", type=at_least(1), help="side that images are brought to before the crop")
    add("--size", type=at_least(1), help="side of the crop")
    add("--no-augment", action="store_true")
    add("--precision", default="32-true", help="Lightning's, as bf16-mixed")
    add("--accelerator", default="auto")
    add("--devices", type=int, default=1)
    add("--workers", type=int, default=0)
    given, _ = parser.parse_known_args()
    parser.set_defaults(**({**DEMO, "size": PATCH} if given.demo else MORPH if given.preset else {}))
    options = parser.parse_args()
    if not options.demo and not options.data:
        raise DataError("No data: pass --data FOLDER_OR_CSV, or --demo.")
    if ":" not in options.backbone and not timm.is_model(options.backbone):  # with a colon, a repository or a folder
        raise DataError(f"timm has no model {options.backbone!r}; timm.list_models() has their names.")
    return options


if __name__ == "__main__":
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*is not empty.*|.*LeafSpec.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    in_one_sentence(main)
