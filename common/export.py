"""After training: a network as ONNX, checked against onnxruntime, its weights as safetensors, or what images show."""

import csv
import inspect
import io
import json
import os
import warnings

import numpy as np
import torch

from common import data, errors
from common.errors import UserError

OPSET, IR_VERSION = 10, 6  # CANN's ATC reads opsets 9 to 13; from 11 on torch writes how paddings are computed
BATCHES = (1, 7)  # to check with: the batch is not fixed
TOLERANCE = {False: 1e-4, True: 1e-2}  # of float32 and float16, as a share of the largest logit (of 1 if that is less)
BEST, TABLE = 5, "predictions.csv"


def run(args, model, classes, crop, mean, std, card, log):
    """Do what `--export` or `--predict` asks for.

    `classes` are the names of the outputs, `crop` is the `CenterCrop` of the images, `mean` and `std` are their
    channels' (1: white). Raises UserError: no package, no image, no room, or an exported network of other logits.
    """
    model.eval()
    for notice in args.notices:
        log.line(notice)
    if args.predict and not os.path.isdir(args.predict):
        row = _predict(args, model, classes, crop, mean, std, card, log)[0]
        for name, share in zip(row[1::2], row[2::2]):
            log.line("{:6.2f} %  {}".format(100 * float(share), name))
        return
    path = args.export or os.path.join(args.output_dir or "", TABLE)
    if args.predict and args.output_dir:
        try:
            os.makedirs(args.output_dir, exist_ok=True)
        except OSError as error:
            raise UserError("--output-dir {}: {}".format(args.output_dir, error.strerror)) from None
    if args.predict:
        rows, text = _predict(args, model, classes, crop, mean, std, card, log), io.StringIO()
        head = ["image"] + ["{}{}".format(what, i + 1) for i in range(BEST) for what in ("class", "probability")]
        csv.writer(text, lineterminator="\n").writerows([head] + [row + [""] * (len(head) - len(row)) for row in rows])
        content = text.getvalue().encode("utf-8", "surrogateescape")  # a file's name may be any bytes
        line = "{} of {} images are in {}".format(sum(len(row) > 1 for row in rows), len(rows), path)
    else:
        metadata = {"classes": classes, "mean": mean, "std": std, "image_size": crop.size, "resize": crop.resize}
        metadata = {name: json.dumps(value) for name, value in metadata.items()}
        metadata.update(arch=args.arch, interpolation=crop.interpolation)
        convert, packages = (_onnx, "onnx onnxruntime") if path.endswith(".onnx") else (_safetensors, "safetensors")
        try:
            content, verdict = convert(model.cpu(), args.half, crop.size, metadata)
        except ModuleNotFoundError as error:
            name = error.name.partition(".")[0]
            raise UserError("--export: {} is missing: pip install {}".format(name, packages)) from None
        line = "wrote {}, {:.1f} MB: {}".format(path, len(content) / 1e6, verdict)
    errors.write_atomic(path, content)
    log.line(line)


def _safetensors(model, half, _, metadata):
    """Return the bytes of the file, and how many tensors it has."""
    from safetensors.numpy import save  # its form for tensors needs a newer torch

    state = (model.half() if half else model).state_dict()
    state = {name: tensor.contiguous().numpy() for name, tensor in state.items()}
    if not all(np.isfinite(array).all() for array in state.values()):
        raise UserError("no file: weights are not finite numbers, or too large for the float16 of --half")
    return save(state, metadata), "{} tensors".format(len(state))


def _onnx(model, half, image_size, metadata):
    """Return the bytes of the ONNX file (images [N, 3, S, S] to logits [N, C]), and a line on how well it computes."""
    import onnx
    import onnxruntime

    model = model.to(memory_format=torch.contiguous_format)
    images = torch.randn(max(BATCHES), 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.cat([model(images[:count]) for count in BATCHES])
    if half:
        model, images = model.half(), images.half()
    options = {"opset_version": OPSET, "input_names": ["images"], "output_names": ["logits"]}
    options["dynamic_axes"] = {"images": {0: "batch"}, "logits": {0: "batch"}}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        options["dynamo"] = False  # torch's newer exporter begins at opset 18
    traced = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the newer exporter, and of checks of shapes that the trace leaves out
        torch.onnx.export(model, images, traced, **options)
    graph = onnx.load_from_string(traced.getvalue())
    graph.ir_version = IR_VERSION
    onnx.helper.set_model_props(graph, metadata)
    content = graph.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = [session.run(None, {"images": images[:count].numpy()})[0] for count in BATCHES]
    difference = (torch.from_numpy(np.concatenate(found)).float() - expected).abs().max()
    worst = (difference / expected.abs().max().clamp(min=1)).item()
    if not worst <= TOLERANCE[half]:  # nor a NaN
        text = "no file: onnxruntime's logits differ from the model's by {:.2g} of the largest, not {:g} at most"
        raise UserError(text.format(worst, TOLERANCE[half]))
    text = "at batch {} and {} onnxruntime {} differs from the model by {:.1g} of the largest logit"
    return content, text.format(*BATCHES, onnxruntime.__version__, worst)


def _predict(args, model, classes, crop, mean, std, card, log):
    """Return a row of str for each image of `--predict`: its name, the likeliest class, its probability, and so on.

    Of an image that cannot be read there is only the name; UserError where none can be.
    """
    folder, names = os.path.dirname(args.predict), [os.path.basename(args.predict)]
    if os.path.isdir(args.predict):
        folder, names = args.predict, data.image_names(args.predict)
    images = data.Images(folder, names, range(len(names)))  # each is its own target
    loader = data.Loader(card, images, crop, args, mean, std, training=False)
    rows = [[images.name(i)] for i in range(len(images))]
    with torch.no_grad():
        for batch in loader.batches():
            shares, numbers = model(batch.images).float().softmax(dim=1).topk(min(BEST, len(classes)))
            for image, *best in zip(batch.targets.tolist(), numbers.tolist(), shares.tolist()):
                if image >= 0:  # neither padding nor unreadable
                    for number, share in zip(*best):
                        rows[image] += [classes[number], "{:.6f}".format(share)]
    unreadable = loader.share_bad()
    if all(len(row) == 1 for row in rows):
        raise UserError(unreadable[0])
    for text in unreadable:
        log.line("[Warning] " + text)
    return rows
