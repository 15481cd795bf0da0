"""FlashSloth in lmms-eval, the evaluation harness of the paper's authors: `lmms-eval --model flashsloth ...`.

lmms-eval calls `manifest` through the entry point `flashsloth` in the group `lmms_eval.models`; see docs/evaluation.md.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> "ModelManifest":
    """Register the model; lmms-eval calls this when it loads its models."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="flashsloth", chat_class_path="flashsloth.evaluation.model.FlashSlothForEvaluation")
