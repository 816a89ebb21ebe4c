#!/usr/bin/env python3
"""Train, evaluate or fine-tune sMLPNet and SPACH on ImageNet-1k (or any folder of class folders) on NPU, CUDA or CPU.

Papers: https://arxiv.org/abs/2109.05422 and https://arxiv.org/abs/2108.13002. Recipe: AdamW, cosine schedule with
warm-up, RandAugment, random erasing, mixup and CutMix, repeated augmentation, an average of the weights. Published for
sMLPNet-T: Acc@1 81.9 (microsoft/SPACH); for eight NPUs: 1628.5 images/s, Acc@1 80.90.

    python main.py --data-path /data/imagenet --amp
    python main.py --data-path /data/imagenet --amp --multiprocessing-distributed --device-list 0,1,2,3,4,5,6,7
    python main.py --data-path /data/imagenet --evaluate --resume model_best.pth.tar
    python main.py --predict photos --resume model_best.pth.tar
"""

import copy
import math
import os
import sys

BUNDLE = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [BUNDLE, os.path.dirname(BUNDLE)]  # the first is missing with PYTHONSAFEPATH
import common  # before torch: it finds a torch_npu that would end the process

common.require("timm")

import torch
from torch import nn

import models
from common import arguments, checkpoint, data, device, distributed, errors, logger, weights
from common.arguments import nonnegative_float, positive_float, positive_int, rate, share, whole_number
from common.precision import Precision
from common.transforms import CenterCrop, RandomResizedCrop, import_torchvision
from models import pretrained

transforms = import_torchvision().transforms
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup

NETWORK = "SPACH-SMLP"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NETWORK_OPTIONS = ("image_size", "eval_ema")  # where the command line is silent, a checkpoint says what they are


def build_parser():
    """Return the parser of all options: the recipe's, then those that the bundles share."""
    parser = arguments.build_parser(__doc__, check_options)
    group = parser.add_argument_group("network and recipe")
    add = group.add_argument
    add("-a", "--arch", "--model", default="smlpnet_tiny", choices=models.__all__, metavar="NAME", help="%(choices)s")
    add("--drop-path", type=rate, metavar="RATE", help="default: smlpnet 0, 0.2, 0.3 by size; spach 0, upstream 0.1")
    add("--image-size", type=positive_int, default=224, metavar="PIXELS", help="val/ is resized to 8/7 of it")
    add("--crop-scale", type=share, default=0.08, metavar="MIN", help="smallest crop, share of the area")
    add("--flip", type=share, default=0.5, metavar="P", help="probability of a horizontal flip")
    add("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="RandAugment; none: without")
    add("--reprob", type=share, default=0.25, metavar="P", help="probability of random erasing")
    add("--mixup", type=nonnegative_float, default=0.8, metavar="ALPHA", help="0: no mixup")
    add("--cutmix", type=nonnegative_float, default=1.0, metavar="ALPHA", help="0: no CutMix")
    add("--repeats", type=positive_int, default=3, metavar="N", help="copies of an image in a row of the epoch")
    add("--epochs", type=positive_int, default=300, metavar="N", help="cool-down included")
    add("-b", "--batch-size", type=positive_int, default=112, metavar="N", help="per card")
    add("--lr", "--learning-rate", type=positive_float, default=5e-4, help="for a batch of 512 on all cards")
    add("--warmup-epochs", type=whole_number, default=20, metavar="N", help="from 1e-6")
    add("--cooldown-epochs", type=whole_number, default=0, metavar="N", help="at the lowest rate, 1e-5")
    add("--weight-decay", "--wd", type=nonnegative_float, default=0.05, help="not of biases and norms")
    add("--label-smoothing", type=share, default=0.1, help="share of the target that all classes get")
    add("--ema-decay", type=share, default=0.99996, help="of the average of the weights; 0: no average")
    add("--eval-ema", action="store_true", help="measure the averaged weights")
    add("--eval-freq", type=whole_number, default=1, metavar="EPOCHS", help="0: never measure val/")
    add("--max-steps", type=whole_number, default=0, metavar="N", help="end the training after N steps; 0: do not")
    add("--world_size", type=positive_int, dest="device_num", metavar="N", help="processes of one node")
    npu = {"dest": "device", "action": "store_const", "const": "npu", "default": "auto"}
    add("--npu", help="the same as --device npu", **npu)
    arguments.add_shared(parser)
    return parser


# Differs from PnasNet5Large: patches, and RandAugment
def check_options(args):
    """Raise UserError where the network cannot take images of `--image-size`, or `--aa` is no policy."""
    patch = 16 if "patch16" in args.arch else 32
    if args.image_size % patch:
        text = "--image-size {}: {} takes multiples of {} pixels"
        raise errors.UserError(text.format(args.image_size, args.arch, patch))
    build_augment(args)
    if args.eval_ema and not (args.ema_decay or args.evaluate or args.export or args.predict):
        args.notices.append("--eval-ema: there is no average to measure without --ema-decay, such as 0.99996")


def build_augment(args):
    """Return RandAugment as timm builds it from `--aa`, or None for "none".

    Raises UserError where timm does not know the policy.
    """
    if args.aa == "none":
        return None
    grey = tuple(round(255 * mean) for mean in MEAN)
    options = {"translate_const": int(args.image_size * 0.45), "img_mean": grey, "interpolation": 3}
    try:
        augment = rand_augment_transform(args.aa, options)
    except (AssertionError, ValueError, KeyError):
        text = "--aa {!r} is no policy of timm's RandAugment, such as rand-m9-mstd0.5-inc1; none: without"
        raise errors.UserError(text.format(args.aa)) from None
    for operation in augment.ops:
        if operation.name.startswith("Posterize"):  # at its end it keeps 0 bits, which newer Pillow refuses
            strength = operation.level_fn
            operation.level_fn = lambda level, options, strength=strength: (max(1, *strength(level, options)),)
    return augment


# Copied from SPNASNet_100/main.py:val_crop
def val_crop(args):
    """Return the transform with which the network is measured."""
    return CenterCrop(args.image_size, resize=args.image_size * 8 // 7, interpolation="bicubic")


# Differs from MnasNet: RandAugment, bicubic, repeated augmentation
def build_loaders(args, card, content):
    """Return the loaders of train/ and val/; `None` for the one that the run does not need."""
    if args.synthetic:
        return data.SyntheticLoader(card, args.image_size, args.num_classes or 1000, args), None
    train_loader = val_loader = None
    if not args.evaluate:
        scale, augment = (args.crop_scale, 1.0), build_augment(args)
        crop = RandomResizedCrop(args.image_size, "bicubic", scale, flip=args.flip, augment=augment)
        images = data.ImageFolder(args.data, "train")
        train_loader = data.Loader(card, images, crop, args, MEAN, STD, training=True, repeats=args.repeats)
    if args.evaluate or args.eval_freq:
        images = data.ImageFolder(args.data, "val", weights.classes_of(content, args))
        val_loader = data.Loader(card, images, val_crop(args), args, MEAN, STD, training=False)
    return train_loader, val_loader


# Differs from MnasNet: drop path; the mixing layers are as large as the image; the averaged weights are measured
def build_model(args, num_classes, content, card, log):
    """Return the model on the card, with the weights of `--resume` or `--pretrained`."""
    options = {} if args.drop_path is None else {"drop_path_rate": args.drop_path}
    model = getattr(models, args.arch)(num_classes, image_size=args.image_size, **options)
    if content is not None:
        path = args.resume or args.pretrained
        key = "state_dict_ema" if args.eval_ema and (args.evaluate or args.export or args.predict) else None
        for line in weights.load(model, content, path, pretrained.convert, may_replace_head=not args.resume, key=key):
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
        self._boxes = transforms.RandomErasing(probability, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))

    def __call__(self, images):
        """Return float `images` [B, 3, H, W], normalised, with the boxes erased in place."""
        boxes = self._boxes
        for image in images if boxes.p else ():
            if torch.rand(1) < boxes.p:
                top, left, height, width, _ = boxes.get_params(image, boxes.scale, boxes.ratio, [0.0])
                noise = torch.randn(3, height, width, device=image.device)  # torchvision's comes from the CPU and waits
                image[:, top : top + height, left : left + width] = noise
        return images


# Differs from MnasNet: timm's mixup, which smooths the targets itself
class Augment:
    """Random erasing, then mixup or CutMix of a batch (timm's, so the same distributions)."""

    def __init__(self, args, num_classes):
        self._erase = RandomErasing(args.reprob)
        self._num_classes, self._smoothing = num_classes, args.label_smoothing
        options = {"prob": 1.0 if args.mixup or args.cutmix else 0.0, "switch_prob": 0.5, "num_classes": num_classes}
        self._mix = Mixup(args.mixup, args.cutmix, label_smoothing=args.label_smoothing, **options)

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


# Differs from MnasNet: AdamW, and a floor of the learning rate
def build_optimizer(args, card, model):
    """Return the optimizer, and the learning rate as a function of the epochs done (a float)."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]  # biases and norms
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": args.weight_decay}]
    peak = args.lr * args.batch_size * args.accumulate * card.ranks.world_size / 512
    optimizer = card.optimizer("AdamW", groups, lr=peak, betas=(0.9, 0.999))
    start, floor, cosine_epochs = min(1e-6, peak), min(1e-5, peak), args.epochs - args.cooldown_epochs

    def schedule(progress):
        if progress < args.warmup_epochs:
            return start + (peak - start) * progress / args.warmup_epochs
        # The warm-up covers the beginning of the cosine, as in timm.
        done = min(1.0, progress / cosine_epochs) if cosine_epochs else 1.0
        return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * done))

    return optimizer, schedule


# Differs from MnasNet: mixup needs soft targets, and the weights are averaged
def train_one_epoch(
    loader, number, model, augment, criterion, optimizer, schedule, precision, average, log, checkpoints
):
    """Train on what is left of epoch `number`: from the sample on where `checkpoints` stands."""
    weights.set_training(model)
    for batch in log.steps(loader, number, checkpoints.samples):
        learning_rate = schedule(batch.progress)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        images, soft_targets = augment(batch.images, batch.targets)
        with precision.autocast(model, batch):
            logits = model(images)
            loss = criterion(logits, soft_targets)
        precision.step(loss, optimizer, batch)
        if average and batch.ends_step:
            average.update()
        stop_signal = log.step(loss, logits, batch, learning_rate)
        checkpoints.after_step(batch, stop_signal)


# Copied from MnasNet/main.py:evaluate
def evaluate(loader, model, card, log, epoch):
    """Return Acc@1 in percent over every image of `loader`, in float32, the same on all ranks."""
    card.ranks.average_buffers(model)
    model.eval()
    with torch.no_grad():
        counts = sum(logger.count_classes(model(batch.images), batch.targets) for batch in log.batches(loader))
    return log.evaluation(epoch, loader, counts)[0]


# Differs from MnasNet: mixup, and the averaged weights
def main(argv=None):
    parser = build_parser()
    args = arguments.parse(parser, argv)
    if distributed.should_spawn(args):
        return distributed.spawn(args, argv)
    args, content = checkpoint.load(parser, argv, args, models.__all__, NETWORK_OPTIONS, BUNDLE)
    card = device.Device(args)
    log = logger.Log(card, args, NETWORK)
    if args.export or args.predict:
        from common import export

        classes = weights.class_names(args, content)
        model = build_model(args, len(classes), content, card, log)
        return export.run(args, model, classes, val_crop(args), MEAN, STD, card, log)
    train_loader, val_loader = build_loaders(args, card, content)
    classes = weights.class_names(args, content, train_loader or val_loader)
    model = build_model(args, len(classes), content, card, log)
    weights.train_only(args, model, log)
    optimizer, schedule = build_optimizer(args, card, model)
    average = AveragedWeights(model, args.ema_decay) if args.ema_decay else None
    precision = Precision(card, args, model, optimizer)
    log.start(args, precision)
    card.ranks.catch_signals()
    if args.evaluate:
        evaluate(val_loader, model, card, log, epoch=0)
        return log.finish()
    parts = {"state_dict": model, "optimizer": optimizer, "precision": precision, "log": log}
    if average:
        parts["state_dict_ema"] = average.model
    metadata = {"classes": classes, "order": train_loader.order_facts}
    checkpoints = checkpoint.Checkpoints(card, args, log, args.output_dir or BUNDLE, parts, metadata)
    replica = card.parallel(model)
    checkpoints.resume(content)
    del content  # it is as large as model and optimizer
    criterion, augment = SoftCrossEntropy(), Augment(args, len(classes))
    for number in range(checkpoints.epoch, args.epochs):
        train_one_epoch(
            train_loader, number, replica, augment, criterion, optimizer, schedule, precision, average, log, checkpoints
        )
        acc1 = None
        if val_loader and ((number + 1) % args.eval_freq == 0 or log.is_final):
            checkpoints.before_evaluation()
            acc1 = evaluate(val_loader, average.model if average and args.eval_ema else model, card, log, number)
        checkpoints.after_epoch(acc1)
        if log.is_final:
            break
    return log.finish()


if __name__ == "__main__":
    errors.run_and_exit(main)
