"""FlashSloth in lmms-eval, the harness that the paper's authors used: `lmms-eval --model flashsloth ...`.

lmms-eval finds `manifest` by the entry point `flashsloth` of the group `lmms_eval.models`; see docs/evaluation.md.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> "ModelManifest":
    """Tell lmms-eval where the model is; called by lmms-eval while it imports its own models."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="flashsloth", chat_class_path="flashsloth.evaluation.model.FlashSlothForEvaluation")
