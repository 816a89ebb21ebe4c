"""Write a trained network as ONNX, checked against onnxruntime, or its weights as safetensors."""

import inspect
import io
import json
import os
import warnings

import torch

from common.deploy import save
from common.errors import UserError

OPSET, IR_VERSION = 11, 6  # CANN's ATC reads opsets 9 to 13 from its version 5 on; 11 has all that the networks need
BATCHES = (1, 7)  # to check with: the batch is not fixed
TOLERANCE = {False: 1e-4, True: 1e-2}  # of float32 and float16, as a share of the largest logit (of 1 if that is less)


def write(args, model, crop, facts, log):
    """Write `model` to the file `args.export`, whole and checked, or not at all.

    A name in .onnx: images float [N, 3, S, S], normalised, to logits [N, C], N free. In .safetensors: the state dict.

    Args:
        args: `export`, and `half` for weights, images and logits in float16.
        model: the model, in evaluation mode; it is moved to the CPU, and changed to float16 with `half`.
        crop: the `decode.CenterCrop` of its images.
        facts: dict of plain values that the file carries beside those of `crop`: "classes", "mean", ...
        log: the `common.logger.Log`.

    Raises:
        UserError: a package is missing, onnxruntime computes other logits, or the file cannot be written.
    """
    model = model.cpu().to(memory_format=torch.contiguous_format)
    facts = dict(facts, image_size=crop.size, resize=crop.resize, interpolation=crop.interpolation)
    facts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    if args.export.endswith(".onnx"):
        data, verdict = _onnx(model, args.half, crop.size, facts)
    else:
        data, verdict = _safetensors(model.half() if args.half else model, facts)
    save(args.export, data)
    log.line("wrote {}, {:.1f} MB: {}".format(args.export, len(data) / 1e6, verdict))


def _safetensors(model, facts):
    try:
        from safetensors.numpy import save  # its form for tensors needs a newer torch
    except ImportError:
        raise UserError("--export: safetensors is missing: pip install safetensors") from None
    state = {name: tensor.contiguous().numpy() for name, tensor in model.state_dict().items()}
    return save(state, facts), "{} tensors".format(len(state))


def _onnx(model, half, image_size, facts):
    """Return the bytes of the ONNX file, and a line that says how well it computes."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        needed = os.path.join(os.path.dirname(os.path.abspath(__file__)), "export_requirements.txt")
        raise UserError("--export: {} is missing: pip install -r {}".format(error.name, needed)) from None
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(count, 3, image_size, image_size, generator=generator) for count in BATCHES]
    with torch.no_grad():
        expected = [model(images) for images in batches]
    model = model.half() if half else model
    batches = [images.to(next(model.parameters()).dtype) for images in batches]
    graph = onnx.load_from_string(_trace(model, batches[-1]))
    graph.ir_version = IR_VERSION
    _fold_constants(graph.graph)
    onnx.helper.set_model_props(graph, facts)
    onnx.checker.check_model(graph)
    data = graph.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    worst = 0.0
    for images, logits in zip(batches, expected):
        difference = torch.from_numpy(session.run(None, {"images": images.numpy()})[0]).float() - logits
        worst = max(worst, (difference.abs().max() / logits.abs().max().clamp(min=1)).item())
    if not worst <= TOLERANCE[half]:  # nor a NaN
        text = (
            "--export: onnxruntime's logits differ from the model's by {:.2g} of the largest, more than {:g}: no file"
        )
        raise UserError(text.format(worst, TOLERANCE[half]))
    text = "at batch {} and {} onnxruntime {} differs from the model by {:.1g} of the largest logit"
    return data, text.format(*BATCHES, onnxruntime.__version__, worst)


def _trace(model, images):
    """Return the bytes of the ONNX file that torch writes; `images` are an example."""
    options = {"dynamic_axes": {"images": {0: "batch"}, "logits": {0: "batch"}}}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        options["dynamo"] = False  # torch's newer exporter begins at opset 18
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the newer exporter, and of checks of shapes that the trace leaves out
        torch.onnx.export(
            model, images, data, opset_version=OPSET, input_names=["images"], output_names=["logits"], **options
        )
    return data.getvalue()


def _fold_constants(graph):
    """Replace what depends on constants alone: torch writes how paddings are computed, ATC wants them as constants."""
    from onnx import helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    values, nodes = {}, []
    for node in graph.node:
        if node.input and all(name in values for name in node.input) and len(node.output) == 1:
            (value,) = ReferenceEvaluator(node).run(None, {name: values[name] for name in node.input})
            node = helper.make_node("Constant", [], node.output, value=numpy_helper.from_array(value))
        if node.op_type == "Constant":
            values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        nodes.append(node)
    used = {name for node in nodes for name in node.input}.union(output.name for output in graph.output)
    del graph.node[:]
    graph.node.extend(node for node in nodes if used.intersection(node.output))
