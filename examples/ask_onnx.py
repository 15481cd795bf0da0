"""Answers a question about an image with onnxruntime, using the graphs of `flashsloth onnx`.

flashsloth onnx . runs/onnx
python examples/ask_onnx.py runs/onnx examples/scene.png "Read the sign."
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
from transformers import AutoProcessor


class OnnxFlashSloth:
    """Greedy decoding with the three ONNX graphs.

    Args:
        folder: Output folder of `flashsloth onnx`.
        providers: Execution providers of onnxruntime, in order of preference.
    """

    def __init__(self, folder: str | Path, providers: tuple[str, ...] = ("CPUExecutionProvider",)) -> None:
        self.vision, self.decoder, self.step = (
            onnxruntime.InferenceSession(Path(folder) / f"{name}.onnx", providers=list(providers))
            for name in ("vision", "decoder", "decoder_step")
        )
        settings = json.loads((Path(folder) / "generation_config.json").read_text(encoding="utf-8"))
        self.end_ids = np.atleast_1d(settings["eos_token_id"])
        self.suppressed_ids = settings.get("suppress_tokens") or []

    def generate(self, inputs: Mapping[str, np.ndarray], max_new_tokens: int = 512) -> np.ndarray:
        """Answer prompts by greedy decoding.

        Args:
            inputs: Outputs of the processor as NumPy arrays, with left padding.
            max_new_tokens: Maximum length of an answer, in tokens.

        Returns:
            Token ids of the answers, `(batch, num_new_tokens)`; a finished answer is padded with its last token.
        """
        ids, mask, tiles = self._prepare(inputs)
        patch_features, image_tokens, _ = self.vision.run(None, {"pixel_values": tiles})
        num_cached_tiles = np.zeros(len(ids), dtype=np.int64)
        inputs = (ids, mask, patch_features, image_tokens, num_cached_tiles, *self._empty_cache(len(ids)))
        logits, _, *cache = self._run(self.decoder, *inputs)
        answers = self._choose(logits)
        while answers.shape[1] < max_new_tokens and not np.isin(answers, self.end_ids).any(axis=1).all():
            mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
            logits, *cache = self._run(self.step, answers[:, -1:], mask, *cache)
            has_ended = np.isin(answers[:, -1:], self.end_ids)
            answers = np.concatenate([answers, np.where(has_ended, answers[:, -1:], self._choose(logits))], axis=1)
        return answers

    def _prepare(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, mask and tiles. The graphs need at least one tile: prompts without images get a masked one."""
        ids, mask, tiles = (inputs.get(name) for name in ("input_ids", "attention_mask", "pixel_values"))
        if tiles is not None:
            return ids, mask, tiles
        size, num_tokens = self.vision.get_inputs()[0].shape[1:], self.decoder.get_inputs()[3].shape[1]
        ids, mask = (np.pad(array, ((0, 0), (num_tokens, 0))) for array in (ids, mask))
        return ids, mask, np.zeros((1, *size), dtype=np.float32)

    def _empty_cache(self, batch_size: int) -> list[np.ndarray]:
        shapes = (entry.shape for entry in self.decoder.get_inputs() if entry.name.startswith("past."))
        return [np.zeros((batch_size, heads, 0, head_dim), np.float32) for _, heads, _, head_dim in shapes]

    def _choose(self, logits: np.ndarray) -> np.ndarray:
        logits[:, self.suppressed_ids] = -np.inf
        return logits.argmax(axis=-1, keepdims=True)

    def _run(self, graph: onnxruntime.InferenceSession, *inputs: np.ndarray) -> list[np.ndarray]:
        names = [entry.name for entry in graph.get_inputs()]
        return graph.run(None, dict(zip(names, inputs, strict=True)))


def main() -> None:
    """Answer one question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="output folder of `flashsloth onnx`")
    parser.add_argument("image", help="file or http(s) URL")
    parser.add_argument("question")
    args = parser.parse_args()
    processor = AutoProcessor.from_pretrained(args.folder, trust_remote_code=True)
    content = [{"type": "image", "path": args.image}, {"type": "text", "text": args.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="np",
    )
    answers = OnnxFlashSloth(args.folder).generate(inputs)
    sys.stdout.write(processor.post_process_image_text_to_text(answers)[0] + "\n")


if __name__ == "__main__":
    main()
