#!/usr/bin/env python3
"""Train, evaluate or fine-tune ShuffleNetV2 on ImageNet-1k (or any folder of class folders) on NPU, CUDA or CPU.

Paper: https://arxiv.org/abs/1807.11164. Recipe: SGD without momentum, cosine schedule with warm-up, colour jitter, 240
epochs. Published for eight NPUs: 17329.326 images/s, Acc@1 66.246.

    python main.py --data /data/imagenet --amp
    python main.py --data /data/imagenet --amp --multiprocessing-distributed --device-list 0,1,2,3,4,5,6,7
    python main.py --data /data/imagenet --evaluate --resume model_best.pth.tar
    python main.py --predict photos --resume model_best.pth.tar
"""

import math
import os
import sys

sys.path.insert(1, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common  # noqa: F401  # before torch: it finds a torch_npu that would end the process

BUNDLE = os.path.dirname(os.path.abspath(__file__))

import torch

import models
from common import arguments, checkpoint, data, device, distributed, errors, logger, weights
from common.arguments import nonnegative_float, positive_float, positive_int, share, whole_number
from common.precision import Precision
from common.transforms import CenterCrop, RandomResizedCrop, import_torchvision
from models import pretrained

transforms = import_torchvision().transforms

NETWORK = "ShuffleNetV2"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NETWORK_OPTIONS = ("image_size", "channel_shuffle")  # where the command line is silent, a checkpoint says what they are


def build_parser():
    """Return the parser of all options: the recipe's, then those that the bundles share."""
    parser = arguments.build_parser(__doc__)
    group = parser.add_argument_group("network and recipe")
    add = group.add_argument
    add("-a", "--arch", default="shufflenet_v2_x1_0", choices=models.__all__, metavar="NAME", help="%(choices)s")
    add("--channel-shuffle", default="wock", choices=sorted(models.CHANNEL_SHUFFLE), help="same function")
    add("--image-size", type=positive_int, default=224, metavar="PIXELS", help="val/ is resized to 8/7 of it")
    add("--crop-scale", type=share, default=0.08, metavar="MIN", help="smallest crop, share of the area")
    add("--flip", type=share, default=0.5, metavar="P", help="probability of a horizontal flip")
    add("--color-jitter", type=share, default=0.2, help="of brightness, contrast and saturation")
    add("--epochs", "--epoch", type=positive_int, default=240, metavar="N", help="passes over train/")
    add("-b", "--batch-size", type=positive_int, default=1024, metavar="N", help="per card")
    add("--learning-rate", "--lr", dest="lr", type=positive_float, default=0.5, help="for the batch of all cards")
    add(
        "--warm_up_epochs",
        "--warmup-epochs",
        dest="warmup_epochs",
        type=whole_number,
        default=5,
        metavar="N",
        help="from a tenth of --lr",
    )
    add("--momentum", type=share, default=0.0, help="of the gradients' average")
    add("--wd", "--weight-decay", dest="weight_decay", type=nonnegative_float, default=1e-4, help="of all parameters")
    add("--benchmark", type=int, default=0, choices=[0, 1], help="1: try cuDNN's algorithms (CUDA only)")
    add("--eval-freq", type=whole_number, default=1, metavar="EPOCHS", help="0: never measure val/")
    add("--max-steps", type=whole_number, default=0, metavar="N", help="end the training after N steps; 0: do not")
    arguments.add_shared(parser, opt_level="O2", loss_scale="64")
    return parser


# Copied from MnasNet/main.py:val_crop
def val_crop(args):
    """Return the transform with which the network is measured."""
    return CenterCrop(args.image_size, resize=args.image_size * 8 // 7)


# Differs from MnasNet: colour jitter
def build_loaders(args, card, content):
    """Return the loaders of train/ and val/; `None` for the one that the run does not need."""
    if args.synthetic:
        return data.SyntheticLoader(card, args.image_size, args.num_classes or 1000, args), None
    train_loader = val_loader = None
    if not args.evaluate:
        jitter = transforms.ColorJitter(args.color_jitter, args.color_jitter, args.color_jitter)
        augment = jitter if args.color_jitter else None
        crop = RandomResizedCrop(args.image_size, scale=(args.crop_scale, 1.0), flip=args.flip, augment=augment)
        train_loader = data.Loader(card, data.ImageFolder(args.data, "train"), crop, args, MEAN, STD, training=True)
    if args.evaluate or args.eval_freq:
        images = data.ImageFolder(args.data, "val", weights.classes_of(content, args))
        val_loader = data.Loader(card, images, val_crop(args), args, MEAN, STD, training=False)
    return train_loader, val_loader


# Differs from MnasNet: two forms of the channel shuffle
def build_model(args, num_classes, content, card, log):
    """Return the model on the card, with the weights of `--resume` or `--pretrained`."""
    model = getattr(models.CHANNEL_SHUFFLE[args.channel_shuffle], args.arch)(num_classes)
    if content is not None:
        path = args.resume or args.pretrained
        for line in weights.load(model, content, path, pretrained.convert, may_replace_head=not args.resume):
            log.line(line)
    return card.prepare(model)


# Differs from MnasNet: plain SGD
def build_optimizer(args, card, model):
    """Return the optimizer, and the learning rate as a function of the epochs done (a float)."""
    options = {"momentum": args.momentum, "weight_decay": args.weight_decay}
    optimizer = card.optimizer("SGD", model.parameters(), lr=args.lr, **options)

    def schedule(progress):
        if progress < args.warmup_epochs:
            return args.lr * (0.1 + 0.9 * progress / args.warmup_epochs)
        done = (progress - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
        return args.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return optimizer, schedule


# Copied from MnasNet/main.py:train_one_epoch
def train_one_epoch(loader, number, model, criterion, optimizer, schedule, precision, log, checkpoints):
    """Train on what is left of epoch `number`: from the sample on where `checkpoints` stands."""
    model.train()
    for batch in log.steps(loader, number, checkpoints.samples):
        learning_rate = schedule(batch.progress)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        with precision.autocast():
            logits = model(batch.images)
            loss = criterion(logits, batch.targets)
        precision.step(loss, optimizer, batch.weight)
        stop_signal = log.step(loss, logits, batch, learning_rate)
        checkpoints.after_step(batch, stop_signal)


# Copied from MnasNet/main.py:evaluate
def evaluate(loader, model, card, log, epoch):
    """Return Acc@1 in percent over every image of `loader`, in float32, the same on all ranks."""
    card.ranks.broadcast_buffers(model)
    model.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=card.torch_device)
    with torch.no_grad():
        for batch in log.batches(loader):
            counts += logger.count_correct(model(batch.images), batch.targets)
    return log.evaluation(epoch, loader, card.ranks.sum(counts))[0]


# Differs from MnasNet: cross entropy without smoothing, --benchmark
def main(argv=None):
    parser = build_parser()
    args = arguments.parse(parser, argv)
    if distributed.should_spawn(args):
        return distributed.spawn(args, argv)
    args, content = checkpoint.load(parser, argv, args, models.__all__, NETWORK_OPTIONS, BUNDLE)
    card = device.Device(args)
    card.benchmark(args.benchmark)
    log = logger.Log(card, args, NETWORK)
    if args.export or args.predict:
        from common import export

        classes = weights.class_names(args, content)
        model = build_model(args, len(classes), content, card, log)
        return export.run(args, model, classes, val_crop(args), MEAN, STD, card, log)
    train_loader, val_loader = build_loaders(args, card, content)
    classes = weights.class_names(args, content, train_loader or val_loader)
    model = build_model(args, len(classes), content, card, log)
    optimizer, schedule = build_optimizer(args, card, model)
    precision = Precision(card, args, model, optimizer)
    log.start(args, precision)
    card.ranks.catch_signals()
    if args.evaluate:
        evaluate(val_loader, model, card, log, epoch=0)
        return log.finish()
    parts = {"state_dict": model, "optimizer": optimizer, "precision": precision, "log": log}
    metadata = {"classes": classes, "order": train_loader.order_facts}
    checkpoints = checkpoint.Checkpoints(card, args, log, args.output_dir or BUNDLE, parts, metadata)
    if args.resume:
        checkpoints.resume(content, args.resume)
    del content  # it is as large as model and optimizer
    criterion = torch.nn.CrossEntropyLoss()
    replica = card.parallel(model)
    for number in range(checkpoints.epoch, args.epochs):
        train_one_epoch(train_loader, number, replica, criterion, optimizer, schedule, precision, log, checkpoints)
        acc1 = None
        if val_loader and ((number + 1) % args.eval_freq == 0 or log.is_final):
            checkpoints.before_evaluation()
            acc1 = evaluate(val_loader, model, card, log, number)
        checkpoints.after_epoch(acc1)
        if log.is_final:
            break
    return log.finish()


if __name__ == "__main__":
    errors.run_and_exit(main)
