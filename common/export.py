"""After training: a network as ONNX, checked against onnxruntime, its weights as safetensors, or what images show."""

import contextlib
import csv
import errno
import inspect
import io
import json
import os
import re
import tempfile
import warnings

import torch

from common import checkpoint, data
from common.errors import UserError
from common.transforms import import_torchvision

OPSET, IR_VERSION = 11, 6  # CANN's ATC reads opsets 9 to 13 from its version 5 on; 11 has all that the networks need
BATCHES = (1, 7)  # to check with: the batch is not fixed
TOLERANCE = {False: 1e-4, True: 1e-2}  # of float32 and float16, as a share of the largest logit (of 1 if that is less)
BEST, TABLE = 5, "predictions.csv"


def run(args, model, classes, crop, mean, std, card, log):
    """Do what `--export` or `--predict` asks for, once it is sure that the file can be written.

    The model is on the card, `classes` are the names of its outputs, `crop` is the `CenterCrop` of its images, and
    `mean` and `std` are those of their channels, in units of 1 = white.

    Raises:
        UserError: a package is missing, no image can be read, the exported network computes other logits, or the file
            cannot be written.
    """
    model.eval()
    for notice in [*args.notices, *card.notices]:
        log.line(notice)
    if args.predict and not os.path.isdir(args.predict):
        (best,), _ = _predict(args, model, classes, crop, mean, std, card, log)
        for name, share in best:
            log.line("{:6.2f} %  {}".format(100 * share, name))
        return
    path = args.export or os.path.join(args.output_dir or "", TABLE)
    folder = os.path.dirname(os.path.abspath(path))
    with _errors_name(path):
        if args.predict:
            os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            if os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if args.predict:
        best, images = _predict(args, model, classes, crop, mean, std, card, log)
        content, line = _table(images, best), "{} of {} images are in {}".format(sum(map(bool, best)), len(best), path)
    else:
        metadata = {"arch": args.arch, "classes": classes, "mean": mean, "std": std, "image_size": crop.size}
        metadata.update(resize=crop.resize, interpolation=crop.interpolation)
        metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
        convert = _onnx if path.endswith(".onnx") else _safetensors
        model = model.cpu().to(memory_format=torch.contiguous_format)
        content, verdict = convert(model, args.half, crop.size, metadata)
        line = "wrote {}, {:.1f} MB: {}".format(path, len(content) / 1e6, verdict)
    with _errors_name(path):
        checkpoint.write_atomic(path, content)
    log.line(line)


@contextlib.contextmanager
def _errors_name(path):
    try:
        yield
    except OSError as error:
        raise UserError("{} cannot be written: {}".format(path, error.strerror)) from None


def _safetensors(model, half, _, metadata):
    """Return the bytes of the file, and how many tensors it has."""
    try:
        from safetensors.numpy import save  # its form for tensors needs a newer torch
    except ImportError:
        raise UserError("--export: safetensors is missing: pip install safetensors") from None
    state = (model.half() if half else model).state_dict()
    state = {name: tensor.contiguous().numpy() for name, tensor in state.items()}
    return save(state, metadata), "{} tensors".format(len(state))


def _onnx(model, half, image_size, metadata):
    """Return the bytes of the ONNX file (images [N, 3, S, S] to logits [N, C]), and a line on how well it computes."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError("--export: {} is missing: pip install onnx onnxruntime".format(error.name)) from None
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(count, 3, image_size, image_size, generator=generator) for count in BATCHES]
    with torch.no_grad():
        expected = [model(images) for images in batches]
    model = model.half() if half else model
    batches = [images.to(next(model.parameters()).dtype) for images in batches]
    options = {"opset_version": OPSET, "input_names": ["images"], "output_names": ["logits"]}
    options["dynamic_axes"] = {"images": {0: "batch"}, "logits": {0: "batch"}}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        options["dynamo"] = False  # torch's newer exporter begins at opset 18
    traced = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the newer exporter, and of checks of shapes that the trace leaves out
        torch.onnx.export(model, batches[-1], traced, **options)
    graph = onnx.load_from_string(traced.getvalue())
    graph.ir_version = IR_VERSION
    _fold_constants(graph.graph)
    onnx.helper.set_model_props(graph, metadata)
    onnx.checker.check_model(graph)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    differences = []
    for images, logits in zip(batches, expected):
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0]).float()
        differences.append((found - logits).abs().max() / logits.abs().max().clamp(min=1))
    worst = torch.stack(differences).max().item()
    if not worst <= TOLERANCE[half]:  # nor a NaN
        text = (
            "--export: onnxruntime's logits differ from the model's by {:.2g} of the largest, not {:g} at most: no file"
        )
        raise UserError(text.format(worst, TOLERANCE[half]))
    text = "at batch {} and {} onnxruntime {} differs from the model by {:.1g} of the largest logit"
    return graph.SerializeToString(), text.format(*BATCHES, onnxruntime.__version__, worst)


def _fold_constants(graph):
    """Replace what depends on constants alone: torch writes how paddings are computed, ATC wants them as constants."""
    from onnx import helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    values = {}
    for node in graph.node:
        if node.input and len(node.output) == 1 and all(name in values for name in node.input):
            (value,) = ReferenceEvaluator(node).run(None, {name: values[name] for name in node.input})
            node.CopyFrom(helper.make_node("Constant", [], node.output, value=numpy_helper.from_array(value)))
        if node.op_type == "Constant":
            values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    used = {name for node in graph.node for name in node.input}
    for node in [node for node in graph.node if node.op_type == "Constant" and node.output[0] not in used]:
        graph.node.remove(node)


def _predict(args, model, classes, crop, mean, std, card, log):
    """Return, for each image of `--predict`, its likeliest [(class, probability)], and the `data.Images`."""
    images = data.find_images(args.predict)
    loader = data.Loader(card, images, crop, args, mean, std, training=False)
    names, best = _with_words(classes), [[] for _ in range(len(images))]
    with torch.no_grad():
        for batch in loader.batches():
            shares, numbers = model(batch.images).float().softmax(dim=1).topk(min(BEST, len(names)))
            for image, *row in zip(batch.targets.tolist(), numbers.tolist(), shares.tolist()):
                if image >= 0:  # neither padding nor unreadable
                    best[image] = [(names[number], share) for number, share in zip(*row)]
    loader.share_bad()
    if not any(best):
        raise UserError("{} cannot be read: {}".format(*loader.unnamed[0]))
    for bad in loader.unnamed:
        log.line("[Warning] {} cannot be read: {}".format(*bad))
    return best, images


def _table(images, best):
    """Return the bytes of the CSV file; an image that could not be read has empty cells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image"] + ["{}{}".format(what, i + 1) for i in range(BEST) for what in ("class", "probability")])
    for image, row in enumerate(best):
        cells = [cell for name, share in row for cell in (name, "{:.6f}".format(share))]
        writer.writerow([images.name(image)] + cells + [""] * (2 * BEST - len(cells)))
    return text.getvalue().encode("utf-8", "surrogateescape")  # a file's name may be any bytes


def _with_words(classes):
    """Return `classes`, with a word to each where they are the 1000 of ImageNet and torchvision knows the words."""
    if len(classes) != 1000 or not all(re.match(r"n\d{8}$|\d+$", name) for name in classes):
        return classes
    try:
        words = import_torchvision().models.ResNet18_Weights.DEFAULT.meta["categories"]
    except (ImportError, AttributeError):
        return classes
    return ["{} {}".format(name, word) for name, word in zip(classes, words)]
