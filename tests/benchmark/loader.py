"""Batches of random crops from 500x375 JPEG files through two workers: ours, ours packed, torchvision's, timm's."""

import io
import random
import tempfile
import types

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

IMAGES, BATCH, WORKERS, SIZE = 1024, 64, 2, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def ours(folder):
    """Return a function that takes an epoch from the bundles' loader."""
    torch.set_num_threads(1)
    device.keep_freed_memory()
    card = types.SimpleNamespace(type="cpu", torch_device=torch.device("cpu"), ranks=Ranks(), channels_last=True)
    card.upload = torch.Tensor.clone
    args = types.SimpleNamespace(batch_size=BATCH, workers=WORKERS, seed=0, max_bad_images=0.0, notices=[])
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
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        data.write(folder, "train", 8, IMAGES)
        pack.main([folder, folder + "-packed"])
        forms = {"ours": (ours, folder), "ours, packed at 256 pixels": (ours, folder + "-packed")}
        turns = measure.in_turns(dict(forms, torchvision=(torchvisions, folder), timm=(timms, folder)), rounds)
    for unit, clock in (("images per second of processor time", "cpu_seconds"), ("images/s", "seconds")):
        seconds = {name: getattr(turn, clock) for name, turn in turns.items()}
        rows = []
        for name, value in seconds.items():
            ratios = ["{:.2f}".format(seconds[peer] / value) for peer in ("torchvision", "timm")]
            rows.append([name, "{:.0f}".format(IMAGES / value), *ratios])
        print(measure.table(["loader, two workers", unit, "x torchvision", "x timm"], rows) + "\n")
    print("Crops of equal boxes differ from PIL's by {:.3f} of 255 on average.".format(crop_difference(32)))
