"""Batches of random crops from 500x375 JPEG files, or packs of them: ours, torchvision's, timm's; and packing."""

import io
import random
import shutil
import tempfile
import types
import zlib

import numpy as np
import timm.data
import torch
import torchvision
from PIL import Image
from torchvision import transforms

from common import data as images_of
from common import device, pack
from common.distributed import Ranks
from common.transforms import EncodedImage, RandomResizedCrop
from tests.benchmark import data, measure
from tests.helpers import upload

IMAGES, BATCH, WORKERS, SIZE = 1024, 64, 2, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def ours(folder):
    """Return a function that takes an epoch from the bundles' loader."""
    torch.set_num_threads(1)
    device.keep_freed_memory()
    card = types.SimpleNamespace(type="cpu", torch_device=torch.device("cpu"), ranks=Ranks(), channels_last=True)
    card.upload = upload
    options = {"batch_size": BATCH, "workers": WORKERS, "seed": 0, "max_bad_images": 0.0, "accumulate": 1}
    args = types.SimpleNamespace(notices=[], **options)
    images = images_of.ImageFolder(folder, "train")
    loader = images_of.Loader(card, images, RandomResizedCrop(SIZE), args, MEAN, STD, training=True)
    return lambda: sum(len(batch.targets) for batch in loader.batches())


def torchvisions(folder):
    """Return a function that takes an epoch from the pipeline of pytorch/examples."""
    torch.set_num_threads(1)
    steps = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    images = torchvision.datasets.ImageFolder(folder + "/train", transforms.Compose(steps))
    options = {"shuffle": True, "num_workers": WORKERS, "persistent_workers": True}
    loader = torch.utils.data.DataLoader(images, BATCH, **options)
    return lambda: sum(len(targets) for _, targets in loader)


def timms(folder):
    """Return a function that takes an epoch from timm's loader: uint8 collate, normalised behind the workers."""
    torch.set_num_threads(1)
    loader = timm.data.create_loader(
        timm.data.create_dataset("", folder + "/train"),
        input_size=(3, SIZE, SIZE),
        batch_size=BATCH,
        is_training=True,
        num_workers=WORKERS,
        interpolation="bilinear",
        color_jitter=None,
        mean=MEAN,
        std=STD,
        device=torch.device("cpu"),
        persistent_workers=True,
    )
    return lambda: sum(len(targets) for _, targets in loader)


def crops_alone(folder):
    """Return a function that does what a worker does for an epoch: read, crop, resize and flip into a batch."""
    torch.set_num_threads(1)
    device.keep_freed_memory()
    images, crop = images_of.ImageFolder(folder, "train"), RandomResizedCrop(SIZE)
    batch = torch.empty(BATCH, SIZE, SIZE, 3, dtype=torch.uint8)

    def epoch():
        for index in range(len(images)):
            device.seed_everything(0, 0, index)
            crop(images.image(index), batch[index % BATCH])

    return epoch


def packing(folder):
    """Return a function that makes a pack's pixels of the images, and writes them with their checksums."""
    torch.set_num_threads(1)
    device.keep_freed_memory()
    images = images_of.ImageFolder(folder, "train")
    options = types.SimpleNamespace(format="raw", size=256, interpolation="bilinear")

    def convert():
        with tempfile.TemporaryFile(buffering=0) as file:
            for index in range(len(images)):
                pixels = pack.convert(images, index, options)[0]
                zlib.crc32(pixels)
                file.write(pixels)

    return convert


def pillows_resize(folder):
    """Return a function that decodes and resizes the images by Pillow, and writes nothing."""
    images = images_of.ImageFolder(folder, "train")

    def convert():
        for index in range(len(images)):
            image = Image.open(images.path(index)).convert("RGB")
            height, width = (256 * side // min(image.size) for side in (image.height, image.width))
            image.resize((width, height), Image.BILINEAR)

    return convert


def crop_difference(files):
    """Return the mean absolute difference, of 255, between our crops and PIL's of the same boxes."""
    crop, out, differences = RandomResizedCrop(SIZE, flip=0.0), torch.empty(SIZE, SIZE, 3, dtype=torch.uint8), []
    for number in range(files):
        file = io.BytesIO()
        data.photograph(number).save(file, "JPEG", quality=90)
        image = Image.open(file)
        random.seed(number)
        top, left, height, width = crop.box(image.height, image.width)
        expected = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.BILINEAR)
        random.seed(number)
        crop(EncodedImage(file.getvalue()), out)
        differences.append(np.abs(out.numpy().astype(int) - np.asarray(expected).astype(int)).mean())
    return sum(differences) / files


def run(rounds=4):
    """Print the tables."""
    with tempfile.TemporaryDirectory() as folder:
        data.write(folder, "train", 8, IMAGES)
        for kind in ("raw", "jpeg"):
            pack.main([folder, folder + "-" + kind, "--format", kind])
        sources = {"JPEG folder": folder, "pack of JPEG": folder + "-jpeg", "pack of raw pixels": folder + "-raw"}
        forms = {"ours, " + name: (ours, path) for name, path in sources.items()}
        turns = measure.in_turns(dict(forms, torchvision=(torchvisions, folder), timm=(timms, folder)), rounds)
        alone = measure.in_turns({name: (crops_alone, path) for name, path in sources.items()}, rounds)
        packed = measure.in_turns({"common.pack": (packing, folder), "Pillow": (pillows_resize, folder)}, rounds)
        for path in list(sources.values())[1:]:
            shutil.rmtree(path)
    show("loader, two workers", turns, "cpu_seconds", "torchvision", "timm")
    show("loader, two workers", turns, "seconds", "torchvision", "timm")
    show("a worker's part alone", alone, "cpu_seconds", "JPEG folder")
    show("packing at 256 pixels", packed, "cpu_seconds", "Pillow")
    print("Crops of equal boxes differ from PIL's by {:.3f} of 255 on average.".format(crop_difference(32)))


def show(title, turns, clock, *peers):
    """Print a table of images by `clock`, a field of `measure.Turn`, and of how many times as fast as `peers` it is."""
    unit = "images per second of processor time" if clock == "cpu_seconds" else "images/s"
    seconds = {name: getattr(turn, clock) for name, turn in turns.items()}
    rows = [
        [name, "{:.0f}".format(IMAGES / value), *("{:.2f}".format(seconds[peer] / value) for peer in peers)]
        for name, value in seconds.items()
    ]
    print(measure.table([title, unit, *("x " + peer for peer in peers)], rows) + "\n")
