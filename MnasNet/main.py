#!/usr/bin/env python3
"""Train, evaluate or fine-tune MnasNet on ImageNet-1k (or any folder of class folders) on NPU, CUDA or CPU.

Paper: https://arxiv.org/abs/1807.11626. Recipe: SGD with Nesterov momentum, cosine schedule with warm-up, label
smoothing, 300 epochs. Published for eight NPUs: 14413.78 images/s, Acc@1 72.819.

    python main.py --data /data/imagenet --amp
    python main.py --data /data/imagenet --amp --multiprocessing-distributed --device-list 0,1,2,3,4,5,6,7
    python main.py --data /data/imagenet --evaluate --resume model_best.pth.tar
    python main.py --predict photos --sheet --resume model_best.pth.tar
"""

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

NETWORK = "MnasNet"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NETWORK_OPTIONS = ("image_size",)  # a checkpoint says what they were


def build_parser():
    """Return the parser of all options: the recipe's, then those that the bundles share."""
    parser = arguments.parser(__doc__)
    group = parser.add_argument_group("network and recipe")
    group.add_argument("-a", "--arch", default="mnasnet1_0", choices=models.__all__, metavar="NAME", help="%(choices)s")
    group.add_argument("--image-size", type=int, default=224, metavar="PIXELS", help="val/ is resized to 8/7 of it")
    group.add_argument("--crop-scale", type=float, default=0.08, metavar="MIN", help="smallest crop, share of the area")
    group.add_argument("--flip", type=float, default=0.5, metavar="P", help="probability of a horizontal flip")
    group.add_argument("--epochs", type=int, default=90, metavar="N", help="passes over train/")
    group.add_argument("-b", "--batch-size", type=int, default=256, metavar="N", help="per card")
    group.add_argument("--lr", "--learning-rate", type=float, default=0.1, help="for the batch of all cards")
    group.add_argument("--warmup-epochs", type=int, default=5, metavar="N", help="from a tenth of --lr")
    group.add_argument("--momentum", type=float, default=0.9, help="Nesterov")
    group.add_argument(
        "--wd", "--weight-decay", dest="weight_decay", type=float, default=1e-4, help="of all parameters"
    )
    group.add_argument("--label-smoothing", type=float, default=0.1, help="share of the target that all classes get")
    group.add_argument("--dropout", type=float, default=0.2, help="in the head")
    group.add_argument("--bn-momentum", type=float, default=0.1, help="share of the new batch in the statistics")
    group.add_argument("--eval-freq", type=int, default=1, metavar="EPOCHS", help="0: never measure val/")
    group.add_argument("--max-steps", type=int, default=0, metavar="N", help="end the training after N steps")
    input.add_arguments(parser)
    device.add_arguments(parser)
    checkpoint.add_arguments(parser)
    logger.add_arguments(parser)
    deploy.add_arguments(parser)
    return parser


def parse_args(argv=None):
    """Return the options of the command line, or of the list `argv`."""
    return arguments.parse(build_parser(), argv)


def val_crop(args):
    """Return the transform with which the network is measured."""
    return CenterCrop(args.image_size, resize=args.image_size * 8 // 7)


def build_loaders(args, card, content):
    """Return the loaders of train/ and val/; `None` for the one that the run does not need."""
    if args.synthetic:
        return input.SyntheticLoader(card, args.image_size, args.num_classes or 1000, args), None
    train_loader = val_loader = None
    if not args.evaluate:
        crop = RandomResizedCrop(args.image_size, scale=(args.crop_scale, 1.0), flip=args.flip)
        train_loader = input.Loader(card, input.ImageFolder(args.data, "train"), crop, args, MEAN, STD, training=True)
    if args.evaluate or args.eval_freq:
        images = input.ImageFolder(args.data, "val", input.classes_of(content, args))
        val_loader = input.Loader(card, images, val_crop(args), args, MEAN, STD, training=False)
    return train_loader, val_loader


def build_model(args, num_classes, content, card, log):
    """Return the model on the card, with the weights of `--resume` or `--pretrained`."""
    model = getattr(models, args.arch)(num_classes, dropout=args.dropout, bn_momentum=args.bn_momentum)
    if content is not None:
        path = args.resume or args.pretrained
        for line in weights.load(model, content, path, pretrained.convert, not args.resume):
            log.line(line)
    return card.prepare(model)


class LabelSmoothing(nn.Module):
    """Cross entropy against targets of which a share `smoothing` is spread over all classes (Szegedy et al., 2015)."""

    def __init__(self, smoothing):
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits, targets):
        log_probabilities = nn.functional.log_softmax(logits.float(), dim=1)
        hard = nn.functional.nll_loss(log_probabilities, targets)
        return (1 - self.smoothing) * hard - self.smoothing * log_probabilities.mean()


def build_optimizer(args, card, model):
    """Return the optimizer, and the learning rate as a function of the epochs done (a float)."""
    options = {"momentum": args.momentum, "weight_decay": args.weight_decay, "nesterov": args.momentum > 0}
    optimizer = card.optimizer("SGD", model.parameters(), lr=args.lr, **options)

    def schedule(progress):
        if progress < args.warmup_epochs:
            return args.lr * (0.1 + 0.9 * progress / args.warmup_epochs)
        share = (progress - args.warmup_epochs) / max(1, args.epochs - args.warmup_epochs)
        return args.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    return optimizer, schedule


def train_one_epoch(epoch, model, criterion, optimizer, schedule, precision, checkpoints):
    """Train on what is left of `epoch`, a `logger.Epoch`."""
    model.train()
    for images, targets in epoch:
        learning_rate = schedule(epoch.progress)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        with precision.autocast():
            logits = model(images)
            loss = criterion(logits, targets)
        precision.step(loss, optimizer)
        epoch.step(loss, logits, targets, learning_rate)
        checkpoints.after_step(epoch)


def evaluate(loader, model, card, log, epoch):
    """Return Acc@1 in percent over every image of `loader`, in float32, the same on all ranks."""
    card.ranks.broadcast_buffers(model)
    model = card.for_evaluation(model)
    counts = torch.zeros(3, dtype=torch.int64, device=card.torch_device)
    with torch.no_grad():
        for images, targets in log.batches(loader):
            counts += logger.count_correct(model(images), targets)
    return log.evaluation(epoch, loader, card.ranks.sum(counts))[0]


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
    precision = device.Precision(card, args, model, optimizer)
    parts = {"state_dict": model, "optimizer": optimizer, "precision": precision}
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
    criterion = LabelSmoothing(args.label_smoothing)
    parallel_model = card.parallel(model)
    for number in range(checkpoints.epoch, args.epochs):
        epoch = log.train(train_loader, number, checkpoints.samples, args)
        train_one_epoch(epoch, parallel_model, criterion, optimizer, schedule, precision, checkpoints)
        acc1 = None
        if val_loader and ((number + 1) % args.eval_freq == 0 or epoch.is_final):
            acc1 = evaluate(val_loader, model, card, log, number)
        checkpoints.after_epoch(epoch, acc1)
        if epoch.is_final:
            break
    log.finish()
    return card.ranks.leave()


if __name__ == "__main__":
    errors.run_and_exit(main)
