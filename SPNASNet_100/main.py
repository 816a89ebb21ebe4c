#!/usr/bin/env python3
"""Train, evaluate or fine-tune SPNASNet-100 on ImageNet-1k (or any folder of class folders) on NPU, CUDA or CPU.

Paper: https://arxiv.org/abs/1904.02877. Recipe: SGD with momentum, cosine schedule with warm-up, label smoothing,
colour jitter, random erasing. Published for eight NPUs: 3860.241 images/s; the Acc@1 published with it, 82.665, cannot
be the validation accuracy: the best published one is the paper's, 74.96.

    python main.py --data /data/imagenet --amp
    python main.py --data /data/imagenet --amp --multiprocessing-distributed --device-list 0,1,2,3,4,5,6,7
    python main.py --data /data/imagenet --evaluate --resume model_best.pth.tar
    python main.py --predict photos --resume model_best.pth.tar
"""

import copy
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
from common.arguments import nonnegative_float, positive_float, positive_int, share, whole_number
from common.precision import Precision
from common.transforms import CenterCrop, RandomResizedCrop, import_torchvision
from models import pretrained

transforms = import_torchvision().transforms

NETWORK = "SPNASNet_100"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NETWORK_OPTIONS = ("image_size", "eval_ema")  # where the command line is silent, a checkpoint says what they are


def build_parser():
    """Return the parser of all options: the recipe's, then those that the bundles share."""
    parser = arguments.build_parser(__doc__, check_options)
    group = parser.add_argument_group("network and recipe")
    add = group.add_argument
    add(
        "-a",
        "--arch",
        default="spnasnet_100",
        type=str.lower,
        choices=models.__all__,
        metavar="NAME",
        help="%(choices)s",
    )
    add("--image-size", type=positive_int, default=224, metavar="PIXELS", help="val/ is resized to 8/7 of it")
    add("--crop-scale", type=share, default=0.08, metavar="MIN", help="smallest crop, share of the area")
    add("--flip", type=share, default=0.5, metavar="P", help="probability of a horizontal flip")
    add("--color-jitter", type=share, default=0.4, help="of brightness, contrast and saturation")
    add("--reprob", type=share, default=0.5, metavar="P", help="probability of random erasing")
    add("--epochs", "--epoch", type=positive_int, default=150, metavar="N", help="passes over train/")
    add("-b", "--batch-size", type=positive_int, default=256, metavar="N", help="per card")
    add("--lr", "--learning-rate", type=positive_float, default=0.01, help="for the batch of all cards")
    add("--schedule", default="cosine", choices=["cosine", "linear"], help="how --lr falls to 0 after the warm-up")
    add("--warmup-epochs", type=nonnegative_float, default=5, metavar="N", help="before --lr is reached")
    add("--warmup-method", default="linear", choices=["linear", "constant"], help="constant: --warmup-start to its end")
    add("--warmup-start", type=share, default=0.1, help="share of --lr at the beginning")
    add("--optimizer", default="sgd", choices=["nesterov", "sgd", "rmsprop"], help="all with --momentum")
    add("--momentum", type=share, default=0.9, help="of the gradients' average")
    add("--weight_decay", "--weight-decay", "--wd", type=nonnegative_float, default=1e-4, help="of all parameters")
    add("--norm-weight-decay", type=nonnegative_float, help="of BatchNorm's parameters (default: --weight-decay)")
    add("--label-smoothing", type=share, default=0.1, help="share of the target that all classes get")
    add("--dropout", type=share, default=0.0, help="in the head")
    add("--ema-decay", type=share, default=0.0, help="of the average of the weights; 0: no average")
    add("--eval-ema", action="store_true", help="measure the averaged weights")
    add("--class-weights", choices=["balanced"], help="in the loss; balanced: every class counts as much as any other")
    add("--eval-freq", type=whole_number, default=1, metavar="EPOCHS", help="0: never measure val/")
    add("--max-steps", type=whole_number, default=0, metavar="N", help="end the training after N steps; 0: do not")
    remode = {"--remode": ("pixel", "what is erased gets random pixels")}
    arguments.add_shared(parser, opt_level="O2", originals=remode)
    return parser


# Differs from MnasNet: images are not mixed
def check_options(args):
    """Raise UserError where options contradict each other."""
    if args.optimizer == "rmsprop" and args.fused_optimizer == "on":
        raise errors.UserError("--fused-optimizer on: RMSprop has one form")
    if args.eval_ema and not (args.ema_decay or args.evaluate or args.export or args.predict):
        args.notices.append("--eval-ema: there is no average to measure without --ema-decay, such as 0.9999")


# Differs from MnasNet: bicubic
def val_crop(args):
    """Return the transform with which the network is measured."""
    return CenterCrop(args.image_size, resize=args.image_size * 8 // 7, interpolation="bicubic")


# Differs from MnasNet: colour jitter, and both interpolations
def build_loaders(args, card, content):
    """Return the loaders of train/ and val/; `None` for the one that the run does not need."""
    if args.synthetic:
        return data.SyntheticLoader(card, args.image_size, args.num_classes or 1000, args), None
    train_loader = val_loader = None
    if not args.evaluate:
        jitter = transforms.ColorJitter(args.color_jitter, args.color_jitter, args.color_jitter)
        augment = jitter if args.color_jitter else None
        crop = RandomResizedCrop(args.image_size, "random", (args.crop_scale, 1.0), flip=args.flip, augment=augment)
        train_loader = data.Loader(card, data.ImageFolder(args.data, "train"), crop, args, MEAN, STD, training=True)
    if args.evaluate or args.eval_freq:
        images = data.ImageFolder(args.data, "val", weights.classes_of(content, args))
        val_loader = data.Loader(card, images, val_crop(args), args, MEAN, STD, training=False)
    return train_loader, val_loader


# Differs from MnasNet: the network has no other BatchNorm momentum
def build_model(args, num_classes, content, card, log):
    """Return the model on the card, with the weights of `--resume` or `--pretrained`."""
    model = getattr(models, args.arch)(num_classes, dropout=args.dropout)
    if content is not None:
        path = args.resume or args.pretrained
        key = "state_dict_ema" if args.eval_ema and (args.evaluate or args.export or args.predict) else None
        for line in weights.load(model, content, path, pretrained.convert, may_replace_head=not args.resume, key=key):
            log.line(line)
    return card.prepare(model)


# Differs from MnasNet: images are not mixed
class LabelSmoothing(nn.Module):
    """Cross entropy against targets of which a share `smoothing` is spread over all classes (Szegedy et al., 2015)."""

    def __init__(self, smoothing, class_weights):
        super().__init__()
        self.smoothing, self.class_weights = smoothing, class_weights

    def forward(self, logits, targets):
        log_probabilities = weights.log_probabilities(logits, targets, self.class_weights)
        hard = nn.functional.nll_loss(log_probabilities, targets)
        return (1 - self.smoothing) * hard - self.smoothing * log_probabilities.mean()


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


# Copied from SPACH-SMLP/main.py:AveragedWeights
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


# Copied from MnasNet/main.py:RMSprop
class RMSprop(torch.optim.Optimizer):
    """RMSprop as TensorFlow and MindSpore define it; torch's own takes other steps with the same options.

    Here `eps` stands under the root, the average of the squares begins at 1, and the momentum holds the learning rate.
    """

    def __init__(self, params, lr, momentum, weight_decay, alpha=0.9, eps=1e-3):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "alpha": alpha, "eps": eps}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        """Take a step along the gradients."""
        for group in self.param_groups:
            for weight in [weight for weight in group["params"] if weight.grad is not None]:
                gradient, state = weight.grad.add(weight, alpha=group["weight_decay"]), self.state[weight]
                if not state:
                    state.update(square_avg=torch.ones_like(weight), momentum_buffer=torch.zeros_like(weight))
                square, update = state["square_avg"], state["momentum_buffer"]
                square.mul_(group["alpha"]).addcmul_(gradient, gradient, value=1 - group["alpha"])
                update.mul_(group["momentum"]).addcdiv_(gradient, (square + group["eps"]).sqrt_(), value=group["lr"])
                weight.sub_(update)


# Copied from MnasNet/main.py:build_optimizer
def build_optimizer(args, card, model):
    """Return the optimizer, and the learning rate as a function of the epochs done (a float)."""
    params, options = list(model.parameters()), {"momentum": args.momentum, "weight_decay": args.weight_decay}
    if args.norm_weight_decay is not None:
        norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
        others = [p for p in params if id(p) not in set(map(id, norms))]
        params = [{"params": others}, {"params": norms, "weight_decay": args.norm_weight_decay}]
    if args.optimizer == "rmsprop":
        optimizer = RMSprop(params, args.lr, **options)
    else:
        options["nesterov"] = args.optimizer == "nesterov" and args.momentum > 0
        optimizer = card.optimizer("SGD", params, lr=args.lr, **options)
    return optimizer, lambda progress: rate_at(args, progress)


# Copied from MnasNet/main.py:rate_at
def rate_at(args, progress):
    """Return the learning rate after `progress` epochs (a float): the warm-up, then a cosine or a line down to 0."""
    if progress < args.warmup_epochs:
        part = progress if args.warmup_method == "linear" else 0.0
        return args.lr * (args.warmup_start + (1 - args.warmup_start) * part / args.warmup_epochs)
    done = min(1.0, (progress - args.warmup_epochs) / (args.epochs - args.warmup_epochs))
    return args.lr * (1 - done if args.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


# Differs from MnasNet: random erasing
def train_one_epoch(loader, number, model, erase, criterion, optimizer, schedule, precision, average, log, checkpoints):
    """Train on what is left of epoch `number`: from the sample on where `checkpoints` stands."""
    weights.set_training(model)
    for batch in log.steps(loader, number, checkpoints.samples):
        learning_rate = schedule(batch.progress)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        with precision.autocast(model, batch):
            logits = model(erase(batch.images))
            loss = criterion(logits, batch.targets)
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


# Differs from MnasNet: random erasing
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
    name = "rmsprop" if args.optimizer == "rmsprop" else "optimizer"  # neither takes the other's state
    parts = {"state_dict": model, name: optimizer, "precision": precision, "log": log}
    if average:
        parts["state_dict_ema"] = average.model
    metadata = {"classes": classes, "order": train_loader.order_facts}
    checkpoints = checkpoint.Checkpoints(card, args, log, args.output_dir or BUNDLE, parts, metadata)
    replica = card.parallel(model)
    checkpoints.resume(content)
    del content  # it is as large as model and optimizer
    criterion = LabelSmoothing(args.label_smoothing, weights.class_weights(args, train_loader, len(classes), card))
    erase = RandomErasing(args.reprob)
    for number in range(checkpoints.epoch, args.epochs):
        train_one_epoch(
            train_loader, number, replica, erase, criterion, optimizer, schedule, precision, average, log, checkpoints
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
