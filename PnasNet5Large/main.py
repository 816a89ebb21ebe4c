#!/usr/bin/env python3
"""Train, evaluate or fine-tune PNASNet-5-Large on ImageNet-1k (or any folder of class folders) on NPU, CUDA or CPU.

Paper: https://arxiv.org/abs/1712.00559. Recipe: SGD with momentum, learning rate times 0.97 per epoch, auxiliary head,
90 epochs. Published for eight NPUs: 353 images/s, Acc@1 79.625. `--zero-pad` is the original network (82.9 % with its
TensorFlow weights); without it, Ascend's variant.

    python main.py --data /data/imagenet --amp
    python main.py --data /data/imagenet --amp --multiprocessing-distributed --device-list 0,1,2,3,4,5,6,7
    python main.py --data /data/imagenet --evaluate --resume model_best.pth.tar
    python main.py --predict photos --resume model_best.pth.tar
"""

import math
import os
import sys

BUNDLE = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [BUNDLE, os.path.dirname(BUNDLE)]  # the first is missing with PYTHONSAFEPATH
import common  # noqa: F401  # before torch: it finds a torch_npu that would end the process

# isort: split
import torch
from torch import nn

import models
from common import arguments, checkpoint, data, device, distributed, errors, logger, weights
from common.arguments import nonnegative_float, positive_float, positive_int, rate, share, whole_number
from common.precision import Precision
from common.transforms import CenterCrop, RandomResizedCrop
from models import pretrained

NETWORK = "PnasNet5Large"
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
NETWORK_OPTIONS = ("image_size", "zero_pad")  # where the command line is silent, a checkpoint says what they are


def build_parser():
    """Return the parser of all options: the recipe's, then those that the bundles share."""
    parser = arguments.build_parser(__doc__, check_options)
    group = parser.add_argument_group("network and recipe")
    add = group.add_argument
    add("-a", "--arch", default="pnasnet5large", choices=models.__all__, metavar="NAME", help="%(choices)s")
    add("--zero-pad", action="store_true", help="the original padding, for the official weights")
    add("--aux-weight", type=nonnegative_float, default=0.4, help="of the auxiliary loss; 0: no auxiliary head")
    add("--drop-path", type=rate, default=0.0, help="in the last cell, growing with depth")
    add("--dropout", type=share, default=0.5, help="in the head")
    add("--image-size", type=positive_int, default=331, metavar="PIXELS", help="val/ is resized to 8/7 of it")
    add("--crop-scale", type=share, default=0.08, metavar="MIN", help="smallest crop, share of the area")
    add("--flip", type=share, default=0.5, metavar="P", help="probability of a horizontal flip")
    add("--epochs", type=positive_int, default=90, metavar="N", help="passes over train/")
    add("-b", "--batch-size", type=positive_int, default=32, metavar="N", help="per card")
    add("--lr", "--learning-rate", type=positive_float, default=0.4, help="for the batch of all cards")
    add("--lr-decay", type=positive_float, default=0.97, help="factor of --lr after each epoch")
    add("--schedule", default="decay", choices=["decay", "cosine"], help="cosine: --lr falls to 0, without --lr-decay")
    add("--momentum", type=share, default=0.9, help="of the gradients' average")
    add("--wd", "--weight-decay", dest="weight_decay", type=nonnegative_float, default=4e-5, help="of all parameters")
    add("--class-weights", choices=["balanced"], help="in the loss; balanced: every class counts as much as any other")
    add("--eval-freq", type=whole_number, default=1, metavar="EPOCHS", help="0: never measure val/")
    add("--max-steps", type=whole_number, default=0, metavar="N", help="end the training after N steps; 0: do not")
    done = {"--wd-all": (None, "all parameters decay"), "--use_aux": (None, "--aux-weight X is its weight, 0: without")}
    arguments.add_shared(parser, opt_level="O2", originals=done)
    return parser


def check_options(args):
    """Raise UserError where the network cannot take images of `--image-size`."""
    size = args.image_size
    if _has_aux(args) and size < 323:
        raise errors.UserError(
            "the auxiliary head cannot see --image-size {}: give 323 or more, or --aux-weight 0".format(size)
        )
    if args.zero_pad and (size - 11) % 16 >= 8:  # see models.pnasnet5large
        raise errors.UserError(
            "--zero-pad needs an even map in cell_4, which --image-size {} does not give: try {}".format(
                size, size + 16 - (size - 11) % 16
            )
        )


def _has_aux(args):
    """Return whether the run needs the auxiliary head: it trains, with a weight for it."""
    return args.aux_weight > 0 and not (args.evaluate or args.export or args.predict)


# Differs from MnasNet: one size of images
def val_crop(args):
    """Return the transform with which the network is measured."""
    return CenterCrop(args.image_size, resize=args.image_size * 8 // 7)


# Differs from MnasNet: crops and mirror images alone
def build_loaders(args, card, content):
    """Return the loaders of train/ and val/; `None` for the one that the run does not need."""
    if args.synthetic:
        return data.SyntheticLoader(card, args.image_size, args.num_classes or 1000, args), None
    train_loader = val_loader = None
    if not args.evaluate:
        crop = RandomResizedCrop(args.image_size, scale=(args.crop_scale, 1.0), flip=args.flip)
        train_loader = data.Loader(card, data.ImageFolder(args.data, "train"), crop, args, MEAN, STD, training=True)
    if args.evaluate or args.eval_freq:
        images = data.ImageFolder(args.data, "val", weights.classes_of(content, args))
        val_loader = data.Loader(card, images, val_crop(args), args, MEAN, STD, training=False)
    return train_loader, val_loader


# Differs from MnasNet: padding, auxiliary head and drop path
def build_model(args, num_classes, content, card, log):
    """Return the model on the card, with the weights of `--resume` or `--pretrained`."""
    model = getattr(models, args.arch)(num_classes, _has_aux(args), args.zero_pad, args.drop_path, args.dropout)
    if content is not None:
        path = args.resume or args.pretrained
        for line in weights.load(model, content, path, pretrained.convert, may_replace_head=not args.resume):
            log.line(line)
    return card.prepare(model)


class AuxiliaryLoss(nn.Module):
    """Cross entropy of the logits, plus `weight` times that of the auxiliary head's, where the model gives them."""

    def __init__(self, weight, class_weights):
        super().__init__()
        self.weight, self.class_weights = weight, class_weights

    def forward(self, outputs, targets):
        if not isinstance(outputs, tuple):
            return nn.functional.nll_loss(weights.log_probabilities(outputs, targets, self.class_weights), targets)
        logits, aux_logits = outputs
        return self.forward(logits, targets) + self.weight * self.forward(aux_logits, targets)


# Differs from MnasNet: exponential decay too, no warm-up
def build_optimizer(args, card, model):
    """Return the optimizer, and the learning rate as a function of the epochs done (a float)."""
    options = {"momentum": args.momentum, "weight_decay": args.weight_decay}
    optimizer = card.optimizer("SGD", model.parameters(), lr=args.lr, **options)

    def schedule(progress):
        if args.schedule == "cosine":
            return args.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress / args.epochs)))
        return args.lr * args.lr_decay ** math.floor(progress)

    return optimizer, schedule


# Differs from MnasNet: the pair (logits, auxiliary logits)
def train_one_epoch(loader, number, model, criterion, optimizer, schedule, precision, log, checkpoints):
    """Train on what is left of epoch `number`: from the sample on where `checkpoints` stands."""
    weights.set_training(model)
    for batch in log.steps(loader, number, checkpoints.samples):
        learning_rate = schedule(batch.progress)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        with precision.autocast(model, batch):
            outputs = model(batch.images)
            loss = criterion(outputs, batch.targets)
        precision.step(loss, optimizer, batch)
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
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


# Differs from MnasNet: auxiliary loss, checkpoints beside the log
def main(argv=None):
    parser = build_parser()
    args = arguments.parse(parser, argv)
    if distributed.should_spawn(args):
        return distributed.spawn(args, argv)
    args, content = checkpoint.load(parser, argv, args, models.__all__, NETWORK_OPTIONS, args.log_dir or BUNDLE)
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
    precision = Precision(card, args, model, optimizer)
    log.start(args, precision)
    card.ranks.catch_signals()
    if args.evaluate:
        evaluate(val_loader, model, card, log, epoch=0)
        return log.finish()
    parts = {"state_dict": model, "optimizer": optimizer, "precision": precision, "log": log}
    metadata = {"classes": classes, "order": train_loader.order_facts}
    checkpoints = checkpoint.Checkpoints(card, args, log, args.output_dir or args.log_dir or BUNDLE, parts, metadata)
    replica = card.parallel(model)
    checkpoints.resume(content)
    del content  # it is as large as model and optimizer
    criterion = AuxiliaryLoss(args.aux_weight, weights.class_weights(args, train_loader, len(classes), card))
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
