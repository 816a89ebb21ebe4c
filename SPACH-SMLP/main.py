#!/usr/bin/env python3
"""Train, evaluate or fine-tune sMLPNet and SPACH on ImageNet-1k (or any folder of class folders) on NPU, CUDA or CPU.

Papers: https://arxiv.org/abs/2109.05422 and https://arxiv.org/abs/2108.13002. Recipe: AdamW, cosine schedule with
warm-up, RandAugment, random erasing, mixup and CutMix, repeated augmentation, an average of the weights. Published for
sMLPNet-T: Acc@1 81.9 (microsoft/SPACH); for eight NPUs: 1628.5 images/s, Acc@1 80.90.

    python main.py --data-path /data/imagenet --amp
    python main.py --data-path /data/imagenet --amp --multiprocessing-distributed --device-list 0,1,2,3,4,5,6,7
    python main.py --data-path /data/imagenet --evaluate --resume model_best.pth.tar
    python main.py --predict photos --sheet --resume model_best.pth.tar
"""

import copy
import math
import os
import sys

sys.path.insert(1, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common  # noqa: F401  # before torch: it finds a torch_npu that would end the process

BUNDLE = os.path.dirname(os.path.abspath(__file__))

import torch
from torch import nn

import models
from common import (
    arguments,
    checkpoint,
    deploy,
    device,
    errors,
    export,
    input,
    launcher,
    logger,
    predict,
    weights,
)
from common.decode import CenterCrop, RandomResizedCrop
from models import pretrained

transforms = input.import_torchvision_transforms()
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup

NETWORK = "SPACH-SMLP"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NETWORK_OPTIONS = ("image_size", "eval_ema")  # a checkpoint says what they were


def build_parser():
    """Return the parser of all options: the recipe's, then those that the bundles share."""
    parser = arguments.parser(__doc__)
    group = parser.add_argument_group("network and recipe")
    group.add_argument(
        "-a", "--arch", "--model", default="smlpnet_tiny", choices=models.__all__, metavar="NAME", help="%(choices)s"
    )
    group.add_argument("--drop-path", type=float, metavar="RATE", help="default: 0 tiny, 0.2 small, 0.3 base")
    group.add_argument("--image-size", type=int, default=224, metavar="PIXELS", help="val/ is resized to 8/7 of it")
    group.add_argument("--crop-scale", type=float, default=0.08, metavar="MIN", help="smallest crop, share of the area")
    group.add_argument("--flip", type=float, default=0.5, metavar="P", help="probability of a horizontal flip")
    group.add_argument("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="RandAugment; none: without")
    group.add_argument("--reprob", type=float, default=0.25, metavar="P", help="probability of random erasing")
    group.add_argument("--mixup", type=float, default=0.8, metavar="ALPHA", help="0: no mixup")
    group.add_argument("--cutmix", type=float, default=1.0, metavar="ALPHA", help="0: no CutMix")
    group.add_argument("--repeats", type=int, default=3, metavar="N", help="copies of an image in a row of the epoch")
    group.add_argument("--epochs", type=int, default=300, metavar="N", help="cool-down included")
    group.add_argument("-b", "--batch-size", type=int, default=112, metavar="N", help="per card")
    group.add_argument("--lr", "--learning-rate", type=float, default=5e-4, help="for a batch of 512 on all cards")
    group.add_argument("--warmup-epochs", type=int, default=20, metavar="N", help="from 1e-6")
    group.add_argument("--cooldown-epochs", type=int, default=0, metavar="N", help="at the lowest rate, 1e-5")
    group.add_argument("--weight-decay", "--wd", type=float, default=0.05, help="not of biases and norms")
    group.add_argument("--label-smoothing", type=float, default=0.1, help="share of the target that all classes get")
    group.add_argument("--ema-decay", type=float, default=0.99996, help="of the average of the weights; 0: no average")
    group.add_argument("--eval-ema", action="store_true", help="measure the averaged weights")
    group.add_argument("--eval-freq", type=int, default=1, metavar="EPOCHS", help="0: never measure val/")
    group.add_argument("--max-steps", type=int, default=0, metavar="N", help="end the training after N steps")
    group.add_argument("--world_size", type=int, dest="device_num", metavar="N", help="processes of one node")
    npu = {"dest": "device", "action": "store_const", "const": "npu", "default": "auto"}
    group.add_argument("--npu", help="the same as --device npu", **npu)
    input.add_arguments(parser)
    device.add_arguments(parser)
    checkpoint.add_arguments(parser)
    logger.add_arguments(parser)
    deploy.add_arguments(parser)
    return parser


# Copied from MnasNet/main.py:parse_args
def parse_args(argv=None):
    """Return the options of the command line, or of the list `argv`."""
    return arguments.parse(build_parser(), argv)


# Differs from MnasNet: bicubic
def val_crop(args):
    """Return the transform with which the network is measured."""
    return CenterCrop(args.image_size, resize=args.image_size * 8 // 7, interpolation="bicubic")


# Differs from MnasNet: RandAugment, bicubic, repeated augmentation
def build_loaders(args, card, content):
    """Return the loaders of train/ and val/; `None` for the one that the run does not need."""
    if args.synthetic:
        return input.SyntheticLoader(card, args.image_size, args.num_classes or 1000, args), None
    train_loader = val_loader = None
    if not args.evaluate:
        augment = None
        if args.aa != "none":
            grey = tuple(round(255 * mean) for mean in MEAN)
            options = {"translate_const": int(args.image_size * 0.45), "img_mean": grey, "interpolation": 3}
            augment = rand_augment_transform(args.aa, options)
        crop = RandomResizedCrop(args.image_size, "bicubic", (args.crop_scale, 1.0), flip=args.flip, augment=augment)
        images = input.ImageFolder(args.data, "train")
        train_loader = input.Loader(card, images, crop, args, MEAN, STD, training=True, repeats=args.repeats)
    if args.evaluate or args.eval_freq:
        images = input.ImageFolder(args.data, "val", input.classes_of(content, args))
        val_loader = input.Loader(card, images, val_crop(args), args, MEAN, STD, training=False)
    return train_loader, val_loader


# Differs from MnasNet: drop path; the mixing layers are as large as the image
def build_model(args, num_classes, content, card, log):
    """Return the model on the card, with the weights of `--resume` or `--pretrained`."""
    options = {} if args.drop_path is None else {"drop_path_rate": args.drop_path}
    model = getattr(models, args.arch)(num_classes, image_size=args.image_size, **options)
    if content is not None:
        path = args.resume or args.pretrained
        if args.eval_ema and (args.evaluate or deploy.is_asked_for(args)):
            content = {"state_dict": content.get("state_dict_ema")}
        for line in weights.load(model, content, path, pretrained.convert, not args.resume):
            log.line(line)
    return card.prepare(model)


class SoftCrossEntropy(nn.Module):
    """Cross entropy against targets that are a distribution over the classes, [B, C]."""

    def forward(self, logits, targets):
        return -(targets * nn.functional.log_softmax(logits.float(), dim=1)).sum(dim=1).mean()


# Copied from SPNASNet_100/main.py:RandomErasing
class RandomErasing:
    """Replace a random box of some images of a batch by noise, a number per pixel (Zhong et al., 2017; as timm's)."""

    def __init__(self, probability):
        boxes = {"scale": (0.02, 1 / 3), "ratio": (0.3, 1 / 0.3)}
        self._erase = transforms.RandomErasing(probability, value="random", inplace=True, **boxes)

    def __call__(self, images):
        """Return float `images` [B, 3, H, W], normalised, with the boxes erased in place."""
        for image in images if self._erase.p else ():
            self._erase(image)
        return images


class Augment:
    """Random erasing, then mixup or CutMix of a batch (timm's, so the same distributions)."""

    def __init__(self, args, num_classes):
        self._erase = RandomErasing(args.reprob)
        self._num_classes, self._smoothing = num_classes, args.label_smoothing
        self._mix = Mixup(
            args.mixup,
            args.cutmix,
            prob=1.0 if args.mixup or args.cutmix else 0.0,
            switch_prob=0.5,
            label_smoothing=args.label_smoothing,
            num_classes=num_classes,
        )

    def __call__(self, images, targets):
        """Return float images [B, 3, H, W] and targets [B, C] of int64 targets [B]."""
        images = self._erase(images)
        even = len(images) // 2 * 2  # images are mixed in pairs; the odd one of an epoch's last batch stays as it is
        mixed, soft_targets = self._mix(images[:even], targets[:even])
        if even == len(images):
            return mixed, soft_targets
        hard_targets = nn.functional.one_hot(targets[even:], self._num_classes).to(soft_targets)
        rest = (1 - self._smoothing) * hard_targets + self._smoothing / self._num_classes
        return torch.cat([mixed, images[even:]]), torch.cat([soft_targets, rest])


class AveragedWeights:
    """Exponential average of a model's weights and buffers (`model`), kept on the card."""

    def __init__(self, model, decay):
        self.model, self._decay = copy.deepcopy(model).eval(), decay
        # The model's own parameters and buffers, so the pairs stay true, also when mixed precision changes their type.
        averages, values = (m.state_dict(keep_vars=True).values() for m in (self.model, model))
        self._pairs = list(zip(averages, values))

    def update(self):
        """Take the model's last step into the average."""
        with torch.no_grad():
            for average, value in self._pairs:
                if average.is_floating_point():
                    average.lerp_(value.to(average), 1 - self._decay)
                else:
                    average.copy_(value)

    def state_dict(self):
        """Return the averaged weights."""
        return self.model.state_dict()

    def load_state_dict(self, state):
        """Take averaged weights from a checkpoint."""
        self.model.load_state_dict(state)


# Differs from MnasNet: AdamW, and a floor of the learning rate
def build_optimizer(args, card, model):
    """Return the optimizer, and the learning rate as a function of the epochs done (a float)."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]  # biases and norms
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": args.weight_decay}]
    peak = args.lr * args.batch_size * card.ranks.world_size / 512
    optimizer = card.optimizer("AdamW", groups, lr=peak, betas=(0.9, 0.999))
    start, floor, cosine_epochs = 1e-6, 1e-5, max(1, args.epochs - args.cooldown_epochs)

    def schedule(progress):
        if progress < args.warmup_epochs:
            return start + (peak - start) * progress / args.warmup_epochs
        share = min(1.0, progress / cosine_epochs)  # the warm-up covers the beginning of the cosine, as in timm
        return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * share))

    return optimizer, schedule


# Differs from MnasNet: mixup needs soft targets, and the weights are averaged
def train_one_epoch(epoch, model, augment, criterion, optimizer, schedule, precision, average, checkpoints):
    """Train on what is left of `epoch`, a `logger.Epoch`."""
    model.train()
    for images, targets in epoch:
        learning_rate = schedule(epoch.progress)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        images, soft_targets = augment(images, targets)
        with precision.autocast():
            logits = model(images)
            loss = criterion(logits, soft_targets)
        precision.step(loss, optimizer)
        average.update()
        epoch.step(loss, logits, targets, learning_rate)
        checkpoints.after_step(epoch)


# Copied from MnasNet/main.py:evaluate
def evaluate(loader, model, card, log, epoch):
    """Return Acc@1 in percent over every image of `loader`, in float32, the same on all ranks."""
    card.ranks.broadcast_buffers(model)
    model = card.for_evaluation(model)
    counts = torch.zeros(3, dtype=torch.int64, device=card.torch_device)
    with torch.no_grad():
        for images, targets in log.batches(loader):
            counts += logger.count_correct(model(images), targets)
    return log.evaluation(epoch, loader, card.ranks.sum(counts))[0]


# Copied from MnasNet/main.py:use_weights
def use_weights(argv):
    """Do what `--export` or `--predict` asks for."""
    args, content = deploy.read_weights(build_parser(), argv, models.__all__, *NETWORK_OPTIONS)
    card = device.Device(args)
    log = logger.Log(card, args, NETWORK)
    classes = deploy.class_names(args, content)
    model = build_model(args, len(classes), content, card, log).eval()
    if args.export:
        facts = {"arch": args.arch, "classes": classes, "mean": MEAN, "std": STD}
        export.write(args, model, val_crop(args), facts, log)
    else:
        images = predict.find_images(args.predict)
        loader = input.Loader(card, images, val_crop(args), args, MEAN, STD, training=False)
        predict.run(args, loader, model, classes, log)


# Differs from MnasNet: mixup, and the averaged weights
def main(argv=None):
    args = parse_args(argv)
    if deploy.is_asked_for(args):
        return use_weights(argv)
    input.check_arguments(args)
    if launcher.needs_launch(args):
        return launcher.launch(args, sys.argv[1:] if argv is None else argv)
    card = device.Device(args)
    log = logger.Log(card, args, NETWORK)
    content = checkpoint.load(card, args, log, BUNDLE)
    train_loader, val_loader = build_loaders(args, card, content)
    classes = input.class_names(args, train_loader or val_loader)
    model = build_model(args, len(classes), content, card, log)
    optimizer, schedule = build_optimizer(args, card, model)
    average = AveragedWeights(model, args.ema_decay)
    precision = device.Precision(card, args, model, optimizer)
    parts = {"state_dict": model, "optimizer": optimizer, "precision": precision, "state_dict_ema": average}
    facts = {"arch": args.arch, "classes": classes, "args": vars(args)}
    checkpoints = checkpoint.Checkpoints(card, args, log, BUNDLE, parts, facts)
    log.start(args, precision)
    if args.evaluate:
        evaluate(val_loader, model, card, log, 0)
        log.finish()
        return card.ranks.leave()
    if args.resume:
        checkpoints.resume(content, args.resume)
    del content  # it is as large as model and optimizer
    criterion, augment = SoftCrossEntropy(), Augment(args, len(classes))
    parallel_model = card.parallel(model)
    for number in range(checkpoints.epoch, args.epochs):
        epoch = log.train(train_loader, number, checkpoints.samples, args)
        train_one_epoch(epoch, parallel_model, augment, criterion, optimizer, schedule, precision, average, checkpoints)
        acc1 = None
        if val_loader and ((number + 1) % args.eval_freq == 0 or epoch.is_final):
            measured = average.model if args.eval_ema else model
            acc1 = evaluate(val_loader, measured, card, log, number)
        checkpoints.after_epoch(epoch, acc1)
        if epoch.is_final:
            break
    log.finish()
    return card.ranks.leave()


if __name__ == "__main__":
    errors.run_and_exit(main)
