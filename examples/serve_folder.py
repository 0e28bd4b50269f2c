"""Classify the images of a folder with a file of `tools/export.py`. Needs numpy, Pillow and the engine, nothing else.

    python examples/serve_folder.py deit_s.onnx photos                  # ONNX Runtime
    python examples/serve_folder.py deit_s.onnx photos openvino

Prints one line per image: its path, the class, and the tokens left after the last sampling block. If the images lie in
folders named like the classes of the training data, the last line is the accuracy.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def load(path, engine):
    """The file's metadata, and a function: images [1, 3, H, W] -> its outputs."""
    if engine == "openvino":
        import openvino

        model = openvino.Core().read_model(path)
        exact = {"INFERENCE_PRECISION_HINT": "f32"}  # some CPUs default to bfloat16: faster, but other tokens may go
        network = openvino.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"} | exact)
        return model.get_rt_info("framework").value, lambda images: list(network(images).values())
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    return facts, lambda images: session.run(None, {"images": images})


def preprocess(image, facts):
    """An image as [1, 3, H, W]: the short side resized, the centre cropped, normalised; as in the evaluation."""
    side = json.loads(facts["input_size"])[1]
    short = int(side / json.loads(facts["crop_ratio"]))
    image = image.convert("RGB")
    size = [short * length // min(image.size) for length in image.size]
    if size != list(image.size):
        image = image.resize(size, Image.Resampling[facts["interpolation"].upper()])
    left, top = (round((length - side) / 2) for length in image.size)
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
    mean, std = (np.float32(json.loads(facts[key])) for key in ("mean", "std"))
    return ((pixels - mean) / std).transpose(2, 0, 1)[None]


def main(path, folder, engine="onnxruntime"):
    """Print a line for every image below `folder`."""
    for given in (path, folder):
        if not Path(given).exists():
            sys.exit(f"error: there is no {given}.")
    facts, run = load(path, engine)
    names, folders = (json.loads(facts.get(key, "[]")) for key in ("class_names", "class_folders"))
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        sys.exit(f"error: {folder} holds no .jpg, .jpeg or .png.")
    hits = []
    for file in files:
        logits, *counts = run(preprocess(Image.open(file), facts))
        label = int(logits.argmax())
        tokens = f", {counts[0][0, -1]} tokens" if counts else ""
        print(f"{file}: {names[label] if names else f'class {label}'}{tokens}")
        if file.parent.name in folders:
            hits.append(folders[label] == file.parent.name)
    if hits:
        print(f"{sum(hits)} of {len(hits)} right ({100 * sum(hits) / len(hits):.2f} %)")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python examples/serve_folder.py FILE.onnx FOLDER [openvino]")
    main(*sys.argv[1:])
